"""CUDA's runtime library by ctypes: memory, copies, streams, events and graphs, without a package to install."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any, Callable, Mapping

from edgeprune.errors import DeviceError, MissingDependency

NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS = 75, 76, 18, 16  # cudaDeviceAttr
# Only calls of this thread may disturb a capture: TensorRT's own threads may do as they like.
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal
# The structure grows from version to version; in all of them it starts with the name, 256 bytes.
_PROPERTIES, _NAME = 16384, 256
_POINTER = ctypes.POINTER
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaMalloc": (_POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaMemGetInfo": (_POINTER(c_size_t), _POINTER(c_size_t)),
    "cudaStreamCreate": (_POINTER(c_void_p),),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, _POINTER(c_void_p)),
    "cudaGraphInstantiateWithFlags": (_POINTER(c_void_p), c_void_p, c_ulonglong),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaEventCreate": (_POINTER(c_void_p),),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventElapsedTime": (_POINTER(c_float), c_void_p, c_void_p),
    "cudaDeviceGetAttribute": (_POINTER(c_int), c_int, c_int),
    "cudaGetDeviceProperties": (c_void_p, c_int),
    "cudaRuntimeGetVersion": (_POINTER(c_int),),
    "cudaGetLastError": (),
    "cudaGetErrorString": (c_int,),
}


@dataclass(frozen=True)
class Cuda:
    """The library's functions by name, and calls that raise where one reports an error. Pointers are whole numbers."""

    functions: Mapping[str, Callable[..., Any]]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns an error code.

        Raises:
            DeviceError: the code is not 0; says CUDA's own words for it.
        """
        code = self.functions[name](*arguments)
        if code:
            words = (self.functions["cudaGetErrorString"](code) or b"").decode(errors="replace")
            raise DeviceError(f"{name} failed with CUDA error {code}: {words or 'unknown'}", _hint(code))

    def made(self, name: str, *arguments: Any) -> int:
        """The handle that a function makes; it is the function's first argument."""
        handle = c_void_p()
        self.call(name, byref(handle), *arguments)
        return int(handle.value or 0)

    def to_device(self, there: int, here: int, size: int, stream: int) -> None:
        """Copy so many bytes from the host's memory to the GPU's, in the order of the stream."""
        self.call("cudaMemcpyAsync", there, here, size, _TO_DEVICE, stream)

    def to_host(self, here: int, there: int, size: int, stream: int) -> None:
        """Copy so many bytes from the GPU's memory to the host's, in the order of the stream."""
        self.call("cudaMemcpyAsync", here, there, size, _TO_HOST, stream)

    def captured(self, work: Callable[[], None], stream: int) -> int:
        """What `work` puts into the stream as one graph that can be launched; 0 where CUDA can't capture it."""
        graph = c_void_p()
        try:
            self.call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
            try:
                work()
            finally:
                self.call("cudaStreamEndCapture", stream, byref(graph))
            return self.made("cudaGraphInstantiateWithFlags", graph.value, 0)
        except DeviceError:
            # A capture that failed leaves its error behind, which the next call would report.
            self.functions["cudaGetLastError"]()
            return 0
        finally:
            if graph.value:
                self.call("cudaGraphDestroy", graph.value)

    def elapsed_ns(self, start: int, end: int) -> int:
        """Time between two events that have happened; the clock ticks in about 0.5 us."""
        milliseconds = c_float()
        self.call("cudaEventElapsedTime", byref(milliseconds), start, end)
        return max(1, round(milliseconds.value * 1e6))

    def in_use(self) -> int:
        """Bytes of the GPU's memory that anybody uses."""
        free, total = c_size_t(), c_size_t()
        self.call("cudaMemGetInfo", byref(free), byref(total))
        return total.value - free.value

    def memory(self) -> int:
        """Bytes of the GPU's memory; of a Jetson, of the whole machine's."""
        free, total = c_size_t(), c_size_t()
        self.call("cudaMemGetInfo", byref(free), byref(total))
        return total.value

    def integrated(self) -> bool:
        """Whether the GPU shares the machine's memory, as on a Jetson."""
        return self._attribute(_INTEGRATED) != 0

    def capability(self) -> str:
        """Compute capability, as in "8.7"."""
        return f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    def multiprocessors(self) -> int:
        """How many streaming multiprocessors the GPU has; it tells boards of one name apart, as those with an Orin."""
        return self._attribute(_MULTIPROCESSORS)

    def name(self) -> str:
        """What the GPU is called, as in "Orin"."""
        properties = ctypes.create_string_buffer(_PROPERTIES)
        self.call("cudaGetDeviceProperties", ctypes.addressof(properties), 0)
        return properties.raw[:_NAME].split(b"\0")[0].decode(errors="replace")

    def version(self) -> str:
        """The library's version, as in "12.6"."""
        number = c_int()
        self.call("cudaRuntimeGetVersion", byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def _attribute(self, which: int) -> int:
        value = c_int()
        self.call("cudaDeviceGetAttribute", byref(value), which, 0)
        return value.value


def load(names: tuple[str, ...] = NAMES) -> Cuda:
    """CUDA's runtime library with the types of its functions."""
    why = ""
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            why = why or str(error)
            continue
        return Cuda({function: _typed(library, function, types) for function, types in SIGNATURES.items()})
    raise MissingDependency(
        f"CUDA's runtime library can't be loaded ({why})",
        "on a Jetson: sudo apt install nvidia-jetpack; elsewhere the CUDA toolkit, its lib64 in LD_LIBRARY_PATH",
    )


def _typed(library: Any, name: str, types: tuple[Any, ...]) -> Callable[..., Any]:
    # Each look-up by index makes a new function, without the types of the one before.
    function: Any = library[name]
    function.argtypes = types
    function.restype = c_char_p if name == "cudaGetErrorString" else c_int
    return function


def _hint(code: int) -> str:
    if code in (35, 100, 999):  # insufficient driver, no device, unknown
        return "is there an NVIDIA GPU with its driver here? in a container: docker run --runtime nvidia"
    return "close what else uses the GPU's memory" if code == 2 else ""  # cudaErrorMemoryAllocation
