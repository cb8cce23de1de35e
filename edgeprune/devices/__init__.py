"""How a machine is reached: one file each."""

# fmt: off
from edgeprune.devices._base import Answer, Device, ShellDevice, device_from_url, redacted
from edgeprune.devices.transport.shell import SLOWEST
from edgeprune.devices.transport.stream import InteractiveCommand, START_S
