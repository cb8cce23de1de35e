"""torch to ONNX, proven; what rebuilds the network."""

# fmt: off
from edgeprune.export.stage import RESULT_VERSION, check_reload, run, save_modules
from edgeprune.export.tensorrt_support import check_for_tensorrt
from edgeprune.export.torch_to_onnx import Exported, candidates, check_size
