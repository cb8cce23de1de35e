"""What files cost on a device, and how right they are: time, memory, energy, size, accuracy."""

# fmt: off
from edgeprune.measure.alone import check_bundle
from edgeprune.measure.answers import RUNTIME, accuracy, predict
from edgeprune.measure.counts import densities, nonzero_weights
from edgeprune.measure.engines import Place, built_engines, choose, precision_of
from edgeprune.measure.evaluate import balanced, classes, guessing, normalized, noted, of_network, reported
from edgeprune.measure.onnx_outputs import Judged, OnnxFile, check, look
from edgeprune.measure.latency import Latency, RESULT_VERSION, latency_ratio
from edgeprune.measure.layer_times import per_layer
from edgeprune.measure.place import held, on_target
from edgeprune.measure.roofline import estimate, validated
from edgeprune.measure.stage import MeasureRequest, Measured, NOT_THERE, artifact, run
from edgeprune.measure.trials import Trials
from edgeprune.measure.unlabelled import Pictures, measure_unlabelled
