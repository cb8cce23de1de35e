"""What a machine says of itself: processor, memory, sensors, power."""

# fmt: off
from edgeprune.host.machine import CPU_KINDS, FACTS, Machine, parse, this
from edgeprune.host.power import LEAST_SAMPLES, Meter, ROOT, available, integral, metered, sampled
from edgeprune.host.sensors import board, state
