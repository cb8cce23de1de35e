"""TensorRT's own objects: its log, its profiler, what an engine of it fits, what a network holds, and how it starts.

Light: runs on the device. TensorRT is handed in, never imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

from edgeprune import agent_cuda, agent_sensors
from edgeprune.errors import DeviceError

_LOG_LINES = 8


def logger(trt: Any, lines: List[str]) -> Any:
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


def profiler(trt: Any, times: Dict[str, List[float]]) -> Any:
    """A profiler that notes what each layer took, in ms, name -> one number for each run."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    return Profiler()


def machine(trt: Any, cuda: agent_cuda.Cuda) -> Dict[str, Any]:
    """What an engine fits: the "tensorrt" here, "gpu", "compute_capability", "multiprocessors", and "board" or ""."""
    return {
        "tensorrt": trt.__version__, "gpu": cuda.name(), "compute_capability": cuda.capability(),
        "multiprocessors": cuda.multiprocessors(), "board": agent_sensors.board(),
    }  # fmt: skip


def multiplying(trt: Any, network: Any) -> int:
    """How many layers of a network that was read are convolutions or matrix products."""
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return sum(layer.type in kinds for layer in layers)


def use_timings(config: Any, cache: Path) -> None:
    """Let a build use what was timed before, and note what it times itself.

    Args:
        cache: need not be there. What another GPU or version timed is not taken, nor what can't be read.
    """
    known = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def last(log: List[str]) -> str:
    """What TensorRT said in the end, on one line."""
    return " | ".join(line.strip() for line in log[-3:]) or "it gave no reason"


def started(make: Callable[[], Any], log: List[str]) -> Any:
    """A builder or a runtime.

    Raises:
        DeviceError: there is no usable GPU. The bindings raise TypeError then, since the library makes none.
    """
    try:
        return make()
    except TypeError as error:
        raise DeviceError(
            f"TensorRT can't start: {last(log)} ({error})", "nvidia-smi says whether there is a GPU"
        ) from error
