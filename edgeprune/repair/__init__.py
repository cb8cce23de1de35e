"""Layers solved anew after a cut, without training."""

# fmt: off
from edgeprune.repair.backward_elimination import Order, Reader, eliminate
from edgeprune.repair.consumers import Consumer, bias_of, consumers_of, output_scale
from edgeprune.repair.input_moments import affordable, moments_of_inputs, positions, reads_patches
from edgeprune.repair.sensitivity import Renormalized, SensitivityProbe, WORK, effort, losses
from edgeprune.repair.stage import RESULT_VERSION, run, source_of
