"""TensorRT on an NVIDIA GPU: an engine is built from the ONNX file, on the machine that runs it.

One code path for TensorRT 10.3 to 11: strongly typed networks, so that every precision is the file's. Nothing is
imported but TensorRT's own package; CUDA is called by ctypes.
"""

from __future__ import annotations

import importlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Dict, List, Optional, Tuple

from edgeprune import host, serialization
from edgeprune.errors import DeviceError, MissingDependency, ModelError, UnsupportedModel
from edgeprune.runtimes._base import NodeTime, Runtime, Session
from edgeprune.runtimes.engine import cuda as cuda_module
from edgeprune.runtimes.engine import files
from edgeprune.runtimes.engine.cuda import Cuda

if TYPE_CHECKING:
    import numpy as np

    from edgeprune.records import Artifact, Target

_LOG_LINES = 8


def make_logger(trt: Any, lines: List[str]) -> Any:
    """A logger that keeps TensorRT's errors and warnings, the last few of them."""
    loud = {trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR, trt.ILogger.Severity.WARNING}

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in loud:
                lines.append(msg)
                del lines[:-_LOG_LINES]

    return Log()


def make_profiler(trt: Any, times: Dict[str, List[float]]) -> Any:
    """A profiler that notes what each layer took, in ms, name -> one number for each run."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    return Profiler()


def machine(trt: Any, cuda: Cuda) -> Dict[str, Any]:
    """What an engine fits: the "tensorrt" here, "gpu", "compute_capability", "multiprocessors", and "board" or ""."""
    return {
        "tensorrt": trt.__version__, "gpu": cuda.name(), "compute_capability": cuda.capability(),
        "multiprocessors": cuda.multiprocessors(), "board": host.board(),
    }  # fmt: skip


def multiplying(trt: Any, network: Any) -> int:
    """How many layers of a network that was read are convolutions or matrix products."""
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return sum(layer.type in kinds for layer in layers)


def use_timings(config: Any, cache: Path) -> None:
    """Let a build use what was timed before, and note what it times itself."""
    known = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def last(log: List[str]) -> str:
    """What TensorRT said in the end, on one line."""
    return " | ".join(line.strip() for line in log[-3:]) or "it gave no reason"


def started(make: Callable[[], Any], log: List[str]) -> Any:
    """A builder or a runtime."""
    try:
        return make()
    except TypeError as error:
        raise DeviceError(
            f"TensorRT can't start: {last(log)} ({error})", "nvidia-smi says whether there is a GPU"
        ) from error


_WORKSPACE_SHARE = 4
_LEAST_WORKSPACE = 64 * 2**20
# What trtexec builds with when it is not told.
_LEVEL = 3
# The first whose strongly typed networks have all that is used here: that of JetPack 6.
OLDEST = (10, 3)
# Of all engines in a folder: what was timed for one helps the next.
CACHE = "timing.cache"


@dataclass(frozen=True)
class TensorRT(Runtime):
    """NVIDIA TensorRT. An engine fits the machine and the version that built it, so it is built there.

    workspace_mib: memory that building may take; 0 is a quarter of the GPU's. sparse: kernels for 2:4 weights may be
    used.
    """

    workspace_mib: int = 0
    sparse: bool = False
    accepts: ClassVar[Tuple[str, ...]] = ("fp32", "fp16", "int8")
    on_gpu: ClassVar[bool] = True
    clock: ClassVar[str] = "cuda events"

    def version(self) -> str:
        """As Runtime.version."""
        return f"tensorrt {_library().__version__}"

    def make(self, onnx: Path, out: Path, precision: str) -> None:
        """As Runtime.make: the engine, what is known of it beside it, and the timing cache.

        `precision` "" is whatever the file has.
        """
        trt, cuda, start = _new_enough(), cuda_module.load(), time.perf_counter()
        log: List[str] = []
        logger = make_logger(trt, log)
        builder = started(lambda: trt.Builder(logger), log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, network, logger, onnx)
        config = builder.create_builder_config()
        workspace = self.workspace_mib * 2**20 or max(cuda.memory() // _WORKSPACE_SHARE, _LEAST_WORKSPACE)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = _LEVEL
        if self.sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        _one_image(builder, network, config, onnx)
        cache = out.with_name(CACHE)
        use_timings(config, cache)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise ModelError(f"TensorRT {trt.__version__} can't build an engine of {onnx.name}: {last(log)}")
        data = bytes(serialized)
        runtime = started(lambda: trt.Runtime(logger), log)
        found = files.layers(_information(trt, _deserialized(trt, runtime, data, log)))
        files.judge(found, precision, onnx.name, multiplying(trt, network))
        facts = {
            **machine(trt, cuda), "onnx": serialization.sha256(onnx), "onnx_name": onnx.name,
            "precision": precision, "layers": files.counted(found), "workspace_bytes": workspace,
            "sparse": self.sparse, "cuda": cuda.version(), "build_s": round(time.perf_counter() - start, 3),
        }  # fmt: skip
        files.write(out, data, facts)
        learned = config.get_timing_cache()
        with serialization.replace_file(cache) as file:
            file.write(bytes(learned.serialize()))

    def open(self, built: Path, threads: int) -> Session:
        """As Runtime.open; an ONNX file is first built into an engine beside it, unless a fresh one is there."""
        engine, _ = self._open(built)
        return engine

    def profile(
        self, built: Path, threads: int, runs: int, shape: Optional[Tuple[int, int, int]]
    ) -> List[NodeTime]:
        """As Runtime.profile: TensorRT's own profiler, which times each layer of the engine on the GPU."""
        session, found = self._open(built)
        times: Dict[str, List[float]] = {}
        profiler = make_profiler(_library(), times)
        context = session.context
        context.profiler = profiler
        x, warmup = session.image(shape), max(1, runs // 10)
        for _ in range(warmup + runs):
            session.infer(x)
        known = {layer.name: layer for layer in found}
        return [
            NodeTime(
                name, known[name].kind if name in known else "",
                statistics.median(took[warmup:] or took) * 1e-3, known[name].macs if name in known else 0,
            )
            for name, took in times.items()
        ]  # fmt: skip

    @staticmethod
    def engine_script(
        target: Target, artifact: Artifact, *, dynamic_batch: bool, sparse: bool = False
    ) -> str:
        """As engine_script.engine_script."""
        text: str = importlib.import_module("edgeprune.runtimes.engine.build_script").engine_script(
            target, artifact, dynamic_batch=dynamic_batch, sparse=sparse
        )
        return text

    def _open(self, built: Path) -> Tuple[_EngineSession, List[files.Layer]]:
        trt, cuda = _new_enough(), cuda_module.load()
        log: List[str] = []
        logger = make_logger(trt, log)
        if built.suffix == ".onnx":
            onnx, built = built, built.with_name(built.name + ".engine")
            try:
                files.fresh(built, machine(trt, cuda), onnx)
            except ModelError:
                self.make(onnx, built, "")
        files.fresh(built, machine(trt, cuda))
        runtime = started(lambda: trt.Runtime(logger), log)
        engine = _deserialized(trt, runtime, built.read_bytes(), log)
        found = files.layers(_information(trt, engine))
        # The engine calls the logger as long as it lives.
        return _session(trt, cuda, engine, built, (logger, runtime)), found


@dataclass(frozen=True)
class _Buffer:
    """One input or output: its name, its memory on the GPU, and the numpy type and shape of what goes there."""

    name: str
    address: int
    dtype: str
    shape: Tuple[int, ...]


@dataclass(frozen=True)
class _EngineSession(Session):
    engine: Any
    context: Any
    cuda: Cuda
    stream: int
    source: _Buffer
    answer: _Buffer
    input_shape: Tuple[Optional[int], ...]
    kept: Tuple[Any, ...]

    def infer(self, x: np.ndarray) -> np.ndarray:
        import numpy as np

        here = np.ascontiguousarray(x, dtype=self.source.dtype)
        there = np.empty(self.answer.shape, self.answer.dtype)
        self.cuda.to_device(self.source.address, here.ctypes.data, here.nbytes, self.stream)
        self._enqueue()
        self.cuda.to_host(there.ctypes.data, self.answer.address, there.nbytes, self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return there

    def ready(self, x: np.ndarray) -> Callable[[], Optional[int]]:
        """What `trtexec --noDataTransfers --useCudaGraph --useSpinWait` times: the GPU's work between two events.

        The batch lies on the GPU before; a network that CUDA can't capture as a graph is enqueued each time.
        """
        cuda, stream = self.cuda, self.stream
        self.infer(x)  # also makes TensorRT do what it only does at the first run, before the capture
        graph = cuda.captured(self._enqueue, stream)
        # Made without cudaEventBlockingSync: waiting for it spins.
        start, end = cuda.made("cudaEventCreate"), cuda.made("cudaEventCreate")

        def run() -> int:
            cuda.call("cudaEventRecord", start, stream)
            if graph:
                cuda.call("cudaGraphLaunch", graph, stream)
            else:
                self._enqueue()
            cuda.call("cudaEventRecord", end, stream)
            cuda.call("cudaEventSynchronize", end)
            return cuda.elapsed_ns(start, end)

        return run

    def _enqueue(self) -> None:
        context = self.context
        if not context.execute_async_v3(self.stream):
            raise ModelError("TensorRT failed to run the engine", "its log, on stderr, says why")


def _session(trt: Any, cuda: Cuda, engine: Any, path: Path, kept: Tuple[Any, ...]) -> _EngineSession:
    context = engine.create_execution_context()
    if context is None:
        raise ModelError(f"TensorRT can't make a context for {path.name}", "is there memory left on the GPU?")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    outputs = [n for n in names if n not in inputs]
    if len(inputs) != 1 or len(outputs) != 1 or len(engine.get_tensor_shape(inputs[0])) != 4:
        found = ", ".join(f"{n} {tuple(engine.get_tensor_shape(n))}" for n in names)
        raise UnsupportedModel(
            f"{path.name} has {found}; accepted: one input (N, C, H, W) and one output (N, K)"
        )
    # An open batch was built for one image; the profile of the engine says so.
    shape = tuple(int(n) if n > 0 else 1 for n in engine.get_tensor_shape(inputs[0]))
    context.set_input_shape(inputs[0], shape)
    source = _buffer(trt, cuda, engine, inputs[0], shape)
    answer = _buffer(
        trt, cuda, engine, outputs[0], tuple(int(n) for n in context.get_tensor_shape(outputs[0]))
    )
    for buffer in (source, answer):
        context.set_tensor_address(buffer.name, buffer.address)
    return _EngineSession(engine, context, cuda, cuda.made("cudaStreamCreate"), source, answer, shape, kept)


def _buffer(trt: Any, cuda: Cuda, engine: Any, name: str, shape: Tuple[int, ...]) -> _Buffer:
    kinds = {trt.DataType.FLOAT: ("float32", 4), trt.DataType.HALF: ("float16", 2)}
    kind = engine.get_tensor_dtype(name)
    if kind not in kinds:
        raise UnsupportedModel(f"the tensor {name!r} of the engine is {kind}; accepted: FLOAT, HALF")
    dtype, size = kinds[kind]
    for n in shape:
        size *= n
    return _Buffer(name, cuda.made("cudaMalloc", max(size, 1)), dtype, shape)


def _parse(trt: Any, network: Any, logger: Any, onnx: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    said = [f"{error.node_operator()} {error.node_name()!r}: {error.desc()}" for error in errors]
    message = (
        f"TensorRT {trt.__version__} can't read {onnx.name}: {'; '.join(said[:3]) or 'no reason was given'}"
    )
    raise UnsupportedModel(message, "export it with the opset of the target, or leave that operator out")


def _one_image(builder: Any, network: Any, config: Any, onnx: Path) -> None:
    open_ones = []
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(int(n) for n in tensor.shape)
        if -1 in shape[1:]:
            raise UnsupportedModel(
                f"the input {tensor.name!r} of {onnx.name} is {shape}; only the batch may be open"
            )
        if shape[0] == -1:
            open_ones.append((tensor.name, (1, *shape[1:])))
    if open_ones:
        profile = builder.create_optimization_profile()
        for name, shape in open_ones:
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)


def _deserialized(trt: Any, runtime: Any, data: bytes, log: List[str]) -> Any:
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ModelError(f"TensorRT {trt.__version__} can't load the engine: {last(log)}", "build it again")
    return engine


def _information(trt: Any, engine: Any) -> str:
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _library() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingDependency(
            f"TensorRT's Python package can't be imported: {error}",
            "on a Jetson it comes with the system's Python: sudo apt install python3-libnvinfer",
        ) from error


def _new_enough() -> Any:
    trt = _library()
    if tuple(int(n) for n in trt.__version__.split(".")[:2]) < OLDEST:
        raise MissingDependency(
            f"TensorRT {trt.__version__} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed",
            "update JetPack to 6.1, or run build_engine.sh there, which takes TensorRT 8.2 and newer",
        )
    return trt
