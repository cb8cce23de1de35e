"""A GPU that is not there: a `tensorrt` module whose engines ONNX Runtime runs, and CUDA's calls on host memory.

Every run of an engine takes 250 us by the clock of its events. What is made and used is counted, so that tests can
tell which way something went.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgeprune.agent import program
from edgeprune.devices._base import Device
from edgeprune.devices.fake import Fake
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import EdgepruneError
from edgeprune.runtimes.engine.cuda import SIGNATURES, Cuda

RUN_MS = 0.25
DTYPES = {"FLOAT": np.float32, "HALF": np.float16}
NOT_SUPPORTED = "NonZero"


@dataclass
class Gpu:
    """The state of the GPU: what lies in its memory, what a stream records, and its clock."""

    name: str = "Orin"
    capability: tuple[int, int] = (8, 7)
    integrated: bool = True
    multiprocessors: int = 8
    free: int = 6 * 2**30
    total: int = 8 * 2**30
    captures: bool = True
    clock_ms: float = 0.0
    memory: dict[int, Any] = field(default_factory=dict)
    recording: list[Callable[[], None]] | None = None
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    events: dict[int, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    handles: int = 1000

    def cuda(self) -> Cuda:
        return Cuda({name: self._function(name) for name in SIGNATURES})

    def submit(self, work: Callable[[], None]) -> None:
        """What an engine puts into a stream: recorded while a graph is captured, done at once otherwise."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return getattr(self, f"_{name}")(*arguments)

        return call

    def _cudaMalloc(self, pointer: Any, size: int) -> int:
        if size > self.free:
            return 2
        block = ctypes.create_string_buffer(size)
        address = ctypes.addressof(block)
        self.memory[address], self.free = block, self.free - size
        pointer._obj.value = address
        return 0

    def _cudaFree(self, address: int) -> int:
        return 0 if self.memory.pop(address, None) else 1

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> int:
        if (to if kind == 1 else source) not in self.memory:
            return 1
        ctypes.memmove(to, source, size)
        return 0

    def _cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.free, self.total
        return 0

    def _made(self, pointer: Any) -> int:
        pointer._obj.value = self.handle()
        return 0

    _cudaStreamCreate = _cudaEventCreate = _made

    def _fine(self, *arguments: Any) -> int:
        return 0

    _cudaStreamDestroy = _cudaStreamSynchronize = _cudaGraphDestroy = _cudaGraphExecDestroy = _fine
    _cudaEventDestroy = _cudaEventSynchronize = _cudaGetLastError = _fine

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        self.recording = []
        return 0

    def _cudaStreamEndCapture(self, stream: int, graph: Any) -> int:
        recorded, self.recording = self.recording, None
        if not self.captures:
            return 900
        graph._obj.value = self.handle()
        self.graphs[graph._obj.value] = recorded or []
        return 0

    def _cudaGraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> int:
        executable._obj.value = self.handle()
        self.graphs[executable._obj.value] = self.graphs[graph]
        return 0

    def _cudaGraphLaunch(self, executable: int, stream: int) -> int:
        for work in self.graphs[executable]:
            work()
        return 0

    def _cudaEventRecord(self, event: int, stream: int) -> int:
        self.events[event] = self.clock_ms
        return 0

    def _cudaEventElapsedTime(self, milliseconds: Any, start: int, end: int) -> int:
        milliseconds._obj.value = self.events[end] - self.events[start]
        return 0

    def _cudaDeviceGetAttribute(self, value: Any, which: int, device: int) -> int:
        value._obj.value = {
            75: self.capability[0], 76: self.capability[1], 18: int(self.integrated), 16: self.multiprocessors,
        }[which]  # fmt: skip
        return 0

    def _cudaGetDeviceProperties(self, properties: int, device: int) -> int:
        ctypes.memmove(properties, self.name.encode() + b"\0", len(self.name) + 1)
        return 0

    def _cudaRuntimeGetVersion(self, number: Any) -> int:
        number._obj.value = 12060
        return 0

    def _cudaGetErrorString(self, code: int) -> bytes:
        return {1: b"invalid argument", 2: b"out of memory"}.get(code, b"some other error")


class Flag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Flag11(IntEnum):
    STRONGLY_TYPED = 1


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


Names = {
    "MemoryPoolType": ["WORKSPACE"],
    "ProfilingVerbosity": ["DETAILED"],
    "BuilderFlag": ["SPARSE_WEIGHTS"],
    "TensorIOMode": ["INPUT", "OUTPUT"],
    "LayerInformationFormat": ["JSON"],
    "DataType": ["FLOAT", "HALF", "INT32"],
    "LayerType": ["CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "SHUFFLE"],
}
ENUMS: dict[str, Any] = {name: Enum(name, members) for name, members in Names.items()}  # type: ignore[misc]


class Base:
    """Both base classes that are subclassed; the bindings want their own __init__ called."""

    ready = False

    def __init__(self) -> None:
        self.ready = True


class ILogger(Base):
    Severity = Severity


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]


@dataclass
class NetworkLayer:
    type: Any


@dataclass
class Network:
    flags: int
    data: bytes = b""
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    @property
    def num_layers(self) -> int:
        return len(onnx.load_from_string(self.data).graph.node)

    def get_layer(self, index: int) -> NetworkLayer:
        kinds = {"Conv": "CONVOLUTION", "Gemm": "MATRIX_MULTIPLY"}
        op = onnx.load_from_string(self.data).graph.node[index].op_type
        return NetworkLayer(ENUMS["LayerType"][kinds.get(op, "SHUFFLE")])


@dataclass
class Failure:
    node: Any

    def node_operator(self) -> str:
        return self.node.op_type

    def node_name(self) -> str:
        return self.node.name

    def desc(self) -> str:
        return "no importer registered for op"


class Parser:
    def __init__(self, network: Network, logger: Any) -> None:
        assert logger.ready
        self.network, self.failures = network, []

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        self.failures = [Failure(n) for n in model.graph.node if n.op_type == NOT_SUPPORTED]
        self.network.data = model.SerializeToString()
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
            self.network.inputs.append(Tensor(value.name, shape))
        return not self.failures

    @property
    def num_errors(self) -> int:
        return len(self.failures)

    def get_error(self, index: int) -> Failure:
        return self.failures[index]


class Cache(bytes):
    def serialize(self) -> bytes:
        return bytes(self) + b"+"


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        assert least == best == most
        self.shapes[name] = best


class Config:
    def __init__(self) -> None:
        self.pools: dict[Any, int] = {}
        self.flags: list[Any] = []
        self.profiles: list[Profile] = []
        self.profiling_verbosity: Any = None
        self.builder_optimization_level = 0
        self.cache: Any = None

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool] = size

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return 0

    def create_timing_cache(self, data: bytes) -> Cache | None:
        return None if data.startswith(b"broken") else Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.startswith(b"of another GPU"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache


class Inspector:
    def __init__(self, text: str) -> None:
        self.text = text

    def get_engine_information(self, kind: Any) -> str:
        assert kind.name == "JSON"
        return self.text


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.shapes, self.profiler = engine, {}, {}, None

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        return tuple(batch if n < 0 else n for n in self.engine.tensors[name][1])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.broken:
            return False
        self.engine.gpu.submit(self._run)
        return True

    def _run(self) -> None:
        gpu, engine = self.engine.gpu, self.engine
        for name in engine.tensors:
            assert self.addresses[name] in gpu.memory, "the address is not on the GPU"
        source, answer = list(engine.tensors)
        shape, dtype = self.shapes[source], engine.tensors[source][2]
        x = np.frombuffer(gpu.memory[self.addresses[source]], dtype, count=int(np.prod(shape))).reshape(shape)
        y = engine.runner.run([answer], {source: x})[0] + engine.offset
        data = np.ascontiguousarray(y, engine.tensors[answer][2])
        ctypes.memmove(self.addresses[answer], data.ctypes.data, data.nbytes)
        gpu.clock_ms += RUN_MS
        if self.profiler is not None:
            assert self.profiler.ready
            for layer in engine.layers:
                self.profiler.report_layer_time(layer["Name"], RUN_MS / len(engine.layers))


class Engine:
    """An engine as it was serialized: the ONNX file, and what the inspector is to say."""

    def __init__(self, data: bytes, gpu: Gpu, broken: bool) -> None:
        head, _, model = data.partition(b"\n")
        told = json.loads(head)
        self.gpu, self.broken, self.layers, self.offset = gpu, broken, told["Layers"], told["offset"]
        self.information = json.dumps({k: v for k, v in told.items() if k != "offset"})
        self.runner = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.tensors: dict[str, tuple[str, tuple[int, ...], Any]] = {}
        for mode, rows in (("INPUT", self.runner.get_inputs()), ("OUTPUT", self.runner.get_outputs())):
            for row in rows:
                shape = tuple(n if isinstance(n, int) else -1 for n in row.shape)
                self.tensors[row.name] = (mode, shape, np.float16 if "float16" in row.type else np.float32)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return ENUMS["TensorIOMode"][self.tensors[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return ENUMS["DataType"]["HALF" if self.tensors[name][2] is np.float16 else "FLOAT"]

    def create_execution_context(self) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self.information)


def information(
    model: onnx.ModelProto, version: str, *, silent: bool = False, told: int = 10**6
) -> dict[str, Any]:
    """What the inspector of that version says of a model: the layers that multiply, and one reformatting.

    silent: everything runs in float32 whatever the file says. told: so many layers that multiply are told; the others
    lie in one closed part.
    """
    quantized = any(n.op_type == "QuantizeLinear" for n in model.graph.node)
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    kind = "FP32" if silent else "Int8" if quantized else "FP16" if half else "FP32"
    new = int(version.split(".", maxsplit=1)[0]) >= 11

    def tensor(name: str, dims: list[int]) -> dict[str, Any]:
        told = (
            {
                "Format": "Row major linear",
                "Datatype": {"Int8": "Int8", "FP16": "Half", "FP32": "Float"}[kind],
            }
            if new
            else {"Format/Datatype": f"Row major linear {kind} format"}
        )
        return {"Name": name, "Location": "Device", "Dimensions": dims, **told}

    rows = [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0",
            "LayerType": "Reformat",
            "Inputs": [],
            "Outputs": [],
        }
    ]
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            rows.append({
                "Name": f"{node.name} + relu" if node.op_type == "Conv" else node.name,
                "LayerType": "CaskConvolution" if node.op_type == "Conv" else "CaskGemmMatrixMultiply",
                "Inputs": [tensor("in", [1, 3, 8, 8])], "Outputs": [tensor("out", [1, 16, 8, 8])],
                "Weights": {"Type": {"Int8": "Int8", "FP16": "Half", "FP32": "Float"}[kind], "Count": 432},
            })  # fmt: skip
    if len(rows) > 1 + told:
        del rows[1 + told :]
        rows.append({"Name": "__myl_Conv_myl0_0", "LayerType": "kgen", "Inputs": [], "Outputs": []})
    return {"Layers": rows, "I/O Tensors" if new else "Bindings": ["input", "logits"]}


def module(
    version: str,
    gpu: Gpu,
    *,
    silent: bool = False,
    refuses: bool = False,
    broken: bool = False,
    offset: float = 0.0,
    told: int = 10**6,
) -> Any:
    """A `tensorrt` module of a version.

    silent: engines run in float32 whatever was asked for. refuses: nothing can be built. broken: no engine runs.
    offset: added to every answer. told: as of `information`.
    """
    trt: Any = ModuleType("tensorrt")
    trt.__version__, trt.configs, trt.networks, trt.loggers = version, [], [], []
    trt.ILogger, trt.IProfiler, trt.OnnxParser = ILogger, type("IProfiler", (Base,), {}), Parser
    trt.NetworkDefinitionCreationFlag = Flag11 if version.startswith("11") else Flag
    for name, members in ENUMS.items():
        setattr(trt, name, members)

    trt.Builder = _builder(trt, version, {"silent": silent, "offset": offset, "told": told}, refuses=refuses)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert logger.ready

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            return Engine(data, gpu, broken) if data.startswith(b"{") else None

    trt.Runtime = Runtime
    return trt


def _builder(trt: Any, version: str, how: dict[str, Any], *, refuses: bool) -> type:
    class Builder:
        def __init__(self, logger: Any) -> None:
            assert logger.ready
            self.logger = logger
            trt.loggers.append(logger)

        def create_network(self, flags: int) -> Network:
            trt.networks.append(Network(flags))
            return trt.networks[-1]

        def create_builder_config(self) -> Config:
            trt.configs.append(Config())
            return trt.configs[-1]

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            if refuses:
                self.logger.log(Severity.INFO, "looking for tactics")
                self.logger.log(Severity.ERROR, "Could not find any implementation for node conv")
                return None
            if any(-1 in t.shape for t in network.inputs) and not config.profiles:
                self.logger.log(Severity.ERROR, "Network has dynamic inputs, but no optimization profile")
                return None
            model = onnx.load_from_string(network.data)
            said = information(model, version, silent=how["silent"], told=how["told"])
            return json.dumps({**said, "offset": how["offset"]}).encode() + b"\n" + network.data

    return Builder


@dataclass(frozen=True)
class Board(Device):
    """A device whose agent runs in this process, with whatever `tensorrt` is installed in it."""

    asked: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "ssh://board"

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        if list(argv)[-1] != "the-agent":
            return Fake().run(argv, stdin, timeout_s)
        request = json.loads(stdin)
        self.asked.append(f"{request['op']} {request['runtime']}")
        try:
            return Answer(0, json.dumps(program.handle(request)), "")
        except EdgepruneError as error:
            said = {"error": error.message, "kind": type(error).__name__, "hint": error.hint}
            return Answer(error.exit_code, json.dumps(said), "")

    def put(self, here: Path, there: str) -> None:
        Fake().put(here, there)

    def get(self, there: str, here: Path) -> None:
        Fake().get(there, here)

    def agent(self) -> list[str]:
        return ["the-agent"]


def write_half(path: Path) -> Path:
    """One convolution with half-precision weights, float32 at both ends."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((10, 3, 8, 8)).astype(np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], "in", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "w"], ["conv"], "conv"),
        helper.make_node("Cast", ["conv"], ["full"], "out", to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["full"], ["logits"], "flat"),
    ]
    graph = helper.make_graph(
        nodes, "half", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, path)
    return path
