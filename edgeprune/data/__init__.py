"""Data sets, splits, calibration images, synthesized images."""

# fmt: off
from edgeprune.data.collection import Data, Split, calibration_digest, calibration_images, calibration_indices
from edgeprune.data.collection import calibration_set, divide, in_memory, open_data, spread
from edgeprune.data.images import Chosen, VERSION
from edgeprune.data.sources import BROKEN_NPZ
from edgeprune.data.splits import stratified
from edgeprune.data.synthesis import SYNTHESIS_VERSION, read, run, write
