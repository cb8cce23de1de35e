"""How an ONNX file is built and run: one file each."""

# fmt: off
from edgeprune.runtimes._base import FREE_BATCH, NodeTime, Runtime, Session
from edgeprune.runtimes.engine.build_script import workspace_mib
from edgeprune.runtimes.engine.cuda import Cuda, load
from edgeprune.runtimes.engine.files import UNTOLD, beside
from edgeprune.runtimes.onnxruntime import OnnxRuntime
from edgeprune.runtimes.tensorrt import CACHE, OLDEST
