"""ONNX Runtime on the CPU: runs the ONNX file as it is, one thread after the other unless told otherwise."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import statistics
import sys
import sysconfig
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
)

from edgeprune.errors import DeviceError, MissingDependency, ModelError, NoRoom, UnsupportedModel
from edgeprune.runtimes._base import NodeTime, Runtime, Session
from edgeprune.serialization import scratch_folder

if TYPE_CHECKING:
    import numpy as np

_RAISED = (
    "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelRequiresCompilation", "NoModel",
    "NoSuchFile", "NotFound", "NotImplemented", "RuntimeException",
)  # fmt: skip
_IMAGES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8",
}  # fmt: skip
_PROVIDER = "CPUExecutionProvider"
_SUFFIX = "_kernel_time"
# The profiler was seen to add 1.6 to 1.9 us to each node; more than this is noise of the machine.
_MOST_PROFILER_S = 5e-6
# What `channels` writes into a folder that it keeps and removes, whatever becomes of us.
_KEPT = ".keeper"
# A disk with less room than this is full: bytes.
_FULL = 2**20
_ROOM = "free some space on the disk of its temporary folder (TMPDIR there says which), then start again"


@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider: all graph optimizations, sequential, spinning as it does by default."""

    accepts: ClassVar[Tuple[str, ...]] = ("fp32", "fp16", "int8")

    def version(self) -> str:
        """As Runtime.version."""
        return f"onnxruntime {_library().__version__}"

    def make(self, onnx: Path, out: Path, precision: str) -> None:
        """Copy the file, after a look that ONNX Runtime takes it; the precision is in the file already."""
        new_session(onnx, threads=1)
        if onnx.resolve() != out.resolve():
            shutil.copyfile(onnx, out)

    def open(self, built: Path, threads: int) -> Session:
        """As Runtime.open."""
        return _wrap(new_session(built, threads=threads), built)

    def profile(
        self, built: Path, threads: int, runs: int, shape: Optional[Tuple[int, int, int]]
    ) -> List[NodeTime]:
        """As Runtime.profile."""
        warmup = max(1, runs // 10)
        with _scratch(built) as folder:
            inner = new_session(built, threads=threads, profile_to=str(folder / "profile"))
            profiled, plain = _wrap(inner, built), _wrap(new_session(built, threads=threads), built)
            x = plain.image(shape)
            seconds = []
            for _ in range(warmup + runs):
                profiled.infer(x)
                start = time.perf_counter()
                plain.infer(x)
                seconds.append(time.perf_counter() - start)
            events = profile_events(Path(inner.end_profiling()))
        return _without_profiler(_node_times(events, warmup), statistics.median(seconds[warmup:]))


@dataclass(frozen=True)
class _OrtSession(Session):
    inner: Any
    input_name: str
    output_name: str
    dtype: str
    input_shape: Tuple[Optional[int], ...]

    def infer(self, x: np.ndarray) -> np.ndarray:
        if self.dtype != "float32":
            x = (x * 255 if self.dtype == "uint8" else x).astype(self.dtype)
        try:
            return self.inner.run([self.output_name], {self.input_name: x})[0]
        except _errors() as error:
            raise ModelError(f"ONNX Runtime failed on {x.dtype} {x.shape}: {error}") from error

    def ready(self, x: np.ndarray) -> Callable[[], Optional[int]]:
        def run() -> None:
            self.infer(x)

        return run


def _library() -> Any:
    # From 1.29 on, its Linux packages tell the maker about each model (file name, hashes, operators) unless this is
    # set before the import. Models here are their owner's business, and its threads would be in the timings.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        message = f"ONNX Runtime can't be imported by {sys.executable}: {error}"
        raise MissingDependency(message, _install()) from error
    return onnxruntime


def _install() -> str:
    """The line that installs it for this Python: pip, or an environment where the system forbids pip (PEP 668)."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix != sys.base_prefix or not marker.is_file():
        return "pip install onnxruntime"
    python, home = shlex.quote(sys.executable), shlex.quote(str(Path(os.path.expanduser("~"), "edge")))
    return (
        f"there: {python} -m venv {home} && {home}/bin/pip install onnxruntime; "
        f"then: --device 'URL?python={home}/bin/python'"
    )


@contextmanager
def _scratch(built: Path) -> Iterator[Path]:
    kept = built.parent if (built.parent / _KEPT).is_file() else None
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(kept))
        except OSError as error:
            raise DeviceError(
                f"no folder can be made for the profile of the layers: {error}", _ROOM
            ) from error
        yield folder


def profile_events(profile: Path) -> List[Dict[str, Any]]:
    """What ONNX Runtime wrote of a run; it does not say when it could not write all of it."""
    try:
        return json.loads(profile.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        free = shutil.disk_usage(profile.parent).free
        size = profile.stat().st_size if profile.is_file() else 0
        limited = 0 < resource.getrlimit(resource.RLIMIT_FSIZE)[0] <= size
        full = (
            "the disk is full" if free < _FULL else "a file may not be larger (ulimit -f)" if limited else ""
        )
        why = full or f"it is not whole: {error}"
        raise (NoRoom if full else DeviceError)(
            f"ONNX Runtime's profile of the layers can't be read: {why}; {size} bytes were written to "
            f"{profile.parent}, {free} bytes are free there",
            _ROOM,
        ) from error


def _errors() -> Tuple[Type[Exception], ...]:
    """What ONNX Runtime raises: classes without a common base, not all of them in each version."""
    state = vars(import_module("onnxruntime.capi.onnxruntime_pybind11_state"))
    # A message of its own that holds a name of the file may be no UTF-8, which is a ValueError.
    return (RuntimeError, ValueError, *(state[name] for name in _RAISED if name in state))


def new_session(path: Path, *, threads: int, profile_to: str = "") -> Any:
    """A session of ONNX Runtime on the CPU, for a file."""
    ort = _library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what it would log, in colors, is in what it raises
    if profile_to:
        options.enable_profiling = True
        options.profile_file_prefix = profile_to
    try:
        return ort.InferenceSession(str(path), options, providers=[_PROVIDER])
    except _errors() as error:
        hint = "export it again with a lower opset, or update onnxruntime" if "opset" in str(error) else ""
        raise ModelError(f"ONNX Runtime {ort.__version__} can't open {path}: {error}", hint) from error


def _wrap(inner: Any, path: Path) -> _OrtSession:
    inputs, outputs = inner.get_inputs(), inner.get_outputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _IMAGES:
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs) or "none"
        raise UnsupportedModel(
            f"{path} has the inputs {found}; accepted: one float or uint8 tensor (N, C, H, W)"
        )
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in inputs[0].shape)
    return _OrtSession(inner, inputs[0].name, outputs[0].name, _IMAGES[inputs[0].type], shape)


def _node_times(events: Sequence[Dict[str, Any]], warmup: int) -> List[NodeTime]:
    found: Dict[str, List[Dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_SUFFIX):
            # Nodes without a name of their own (reorders) share one; their place in the graph tells them apart.
            key = f"{event['name'][: -len(_SUFFIX)]}\n{event['args'].get('node_index', '')}"
            found.setdefault(key, []).append(event)
    times = []
    for key, all_runs in found.items():
        kept = all_runs[warmup:] or all_runs
        args = kept[-1]["args"]
        times.append(
            NodeTime(
                name=key.split("\n")[0],
                op=str(args.get("op_name", "")),
                seconds=_middle_mean([float(e["dur"]) for e in kept]) * 1e-6,
                macs=_macs(args),
                bytes=sum(int(args.get(k, 0)) for k in ("parameter_size", "activation_size", "output_size")),
            )
        )
    return times


def _middle_mean(values: List[float]) -> float:
    """Mean of the middle half: as robust as a median, and finer than the whole microseconds of the profile."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.mean(ordered[cut : len(ordered) - cut])


def _without_profiler(nodes: List[NodeTime], seconds: float) -> List[NodeTime]:
    excess = (sum(n.seconds for n in nodes) - seconds) / max(1, len(nodes))
    cost = min(max(0.0, excess), _MOST_PROFILER_S)
    return [replace(n, seconds=max(0.0, n.seconds - cost)) for n in nodes]


def _macs(args: Dict[str, Any]) -> int:
    op = str(args.get("op_name", ""))
    inputs = [next(iter(t.values())) for t in args.get("input_type_shape", []) if t]
    outputs = [next(iter(t.values())) for t in args.get("output_type_shape", []) if t]
    if not outputs:
        return 0
    made = 1
    for size in outputs[0]:
        made *= size
    kernels = [s for s in inputs[1:] if len(s) == 4]
    if "Conv" in op and kernels:
        return made * kernels[0][1] * kernels[0][2] * kernels[0][3]
    if ("Gemm" in op or "MatMul" in op) and inputs and inputs[0]:
        return made * inputs[0][-1]
    return 0
