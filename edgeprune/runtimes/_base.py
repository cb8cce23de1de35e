"""How an ONNX file is built and run on a device: the contract of a runtime and of a session."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, ClassVar, List, Optional, Tuple

from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.quantities import check_choice

if TYPE_CHECKING:
    import numpy as np

# Images in one run of a model with a free batch dimension: enough to keep one core busy, little memory.
FREE_BATCH = 32


@dataclass(frozen=True)
class NodeTime:
    """One node that the runtime really ran, after its own fusing.

    name: of the node, or of the last value that a fused node makes. seconds: typical over runs.
    macs: multiply-accumulates of convolutions and matrix products as they ran, with the zeros that the runtime
    pads channels with; 0 for the rest.
    bytes: weights, inputs and outputs, each once; 0 when the runtime does not say.
    """

    name: str
    op: str
    seconds: float
    macs: int = 0
    bytes: int = 0


class Session(ABC):
    """A model that is open: call it with float32 (N, C, H, W), any N, to get float32 logits (N, K).

    `input_shape` is (N, C, H, W) with None for a free dimension.
    """

    input_shape: Tuple[Optional[int], ...]

    @abstractmethod
    def infer(self, x: np.ndarray) -> np.ndarray:
        """One run on a batch of exactly the model's size, from the host's memory and back into it, without checks."""

    @abstractmethod
    def ready(self, x: np.ndarray) -> Callable[[], Optional[int]]:
        """What gets timed: one run on such a batch, with all that is done only once done before.

        Returns:
            A function that gives its own time in ns by the runtime's clock, or None to be timed from outside.
        """

    def __call__(self, x: np.ndarray) -> np.ndarray:
        import numpy as np

        self._check(x)
        step = self.input_shape[0] or FREE_BATCH
        chunks = [x[i : i + step] for i in range(0, len(x), step)] or [x]
        parts = []
        for chunk in chunks:
            full = np.ascontiguousarray(chunk)
            # A free batch still needs one image, so that an empty x gives (0, K).
            missing = (self.input_shape[0] or max(1, len(chunk))) - len(chunk)
            if missing:
                full = np.concatenate([full, np.zeros((missing, *x.shape[1:]), np.float32)])
            logits = np.asarray(self.infer(full), dtype=np.float32)
            if logits.ndim != 2 or len(logits) != len(full):
                raise UnsupportedModel(
                    f"the output for {len(full)} images has the shape {logits.shape}; accepted: (N, K)"
                )
            parts.append(logits[: len(chunk)])
        return np.concatenate(parts)

    def image(self, shape: Optional[Tuple[int, int, int]] = None) -> np.ndarray:
        """A batch of mixed pixels in [0, 1), float32, the same at each call, of one image where the batch is free.

        Raises:
            UsageError: the file leaves C, H or W free and `shape` does not say them.
        """
        import numpy as np

        batch, *rest = self.input_shape
        known = [r or s for r, s in zip(rest, shape or (0, 0, 0))]
        if 0 in known:
            raise UsageError(
                f"the model's input is {self.input_shape} with free dimensions", "give the input as CxHxW"
            )
        size = (batch or 1, *known)
        # Multiples of the golden ratio modulo 1. Not numpy.random: its import would count as the model's memory.
        count = math.prod(size)
        return np.mod(np.arange(count, dtype=np.float32) * np.float32(0.618034), np.float32(1.0)).reshape(
            size
        )

    def _check(self, x: np.ndarray) -> None:
        wanted = self.input_shape
        fits = x.ndim == len(wanted) and all(w is None or w == g for w, g in zip(wanted[1:], x.shape[1:]))
        if not fits or x.dtype.name != "float32":
            shape = ", ".join(str(w or "any") for w in ("N", *wanted[1:]))
            raise UsageError(f"the input must be float32 ({shape}), got {x.dtype} {x.shape}")


class Runtime(ABC):
    """Builds an ONNX file for a machine and opens it there. A member is a frozen dataclass of options.

    accepts: the precisions of files. on_gpu: it runs on a GPU, whose clock and memory are then looked at.
    clock: what times a run: "wall" or a clock of the runtime's own.
    """

    accepts: ClassVar[Tuple[str, ...]]
    on_gpu: ClassVar[bool] = False
    clock: ClassVar[str] = "wall"

    @abstractmethod
    def version(self) -> str:
        """Load the runtime's library and give its name and version, as in "onnxruntime 1.31.1".

        Raises:
            MissingDependency: it is not installed; says the pip line.
        """

    @abstractmethod
    def make(self, onnx: Path, out: Path, precision: str) -> None:
        """Write at `out` what `open` needs."""

    @abstractmethod
    def open(self, built: Path, threads: int) -> Session:
        """Open what `build` wrote, to run on so many threads.

        Raises:
            ModelError: it refuses the file, or what was built is of another machine or file; says why.
        """

    @abstractmethod
    def profile(
        self, built: Path, threads: int, runs: int, shape: Optional[Tuple[int, int, int]]
    ) -> List[NodeTime]:
        """Time each node over so many runs of one batch, after as many as a tenth of them to warm up."""

    def build(self, onnx: Path, out: Path, precision: str) -> Path:
        """Make `out` from an ONNX file, on the machine that will run it, and give `out` back.

        Raises:
            UsageError: no such file, or a precision that this runtime does not know.
        """
        check_choice("precision", precision, self.accepts)
        if not onnx.is_file():
            raise UsageError(f"no file {str(onnx)!r}")
        self.make(onnx, out, precision)
        return out
