"""An ONNX file as a victim: its session answers, and one with a free batch answers many images at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from edgeprune.attacks import Logits
from edgeprune.errors import UsageError
from edgeprune.nn.onnx_batch import freed
from edgeprune.runtimes import Session
from edgeprune.runtimes.onnxruntime import OnnxRuntime

# How far the copy may be from the file, relative to the largest logit; rounding in another order gives 1e-6.
TOLERANCE = 1e-4
_TRIED = 3
# Of many images each thread answers so many at a time by itself: threads that share one question wait for each other
# behind every operator, and what more images leave behind does not stay in the processor's caches.
ROWS = 24
# Fewer are not worth a thread.
LEAST = 2


def open_file(path: Path, folder: Path, threads: int) -> tuple[Logits, Logits | None]:
    """The answers of an ONNX file, and those of a session for many images, where one can be had.

    Where the file's batch is fixed, a copy is opened whose batch is free. It is used only if it answers images as the
    file does. Searching on it is several times as fast.

    Args:
        path: an ONNX file with one image input and logits. folder: where the copy may be written.
        threads: that ONNX Runtime may use.

    Raises:
        UsageError: no such file. MissingDependency, ModelError: ONNX Runtime is not there or refuses the file.
    """
    if not path.is_file():
        raise UsageError(f"no file {str(path)!r}", "give an .onnx file or a finished run directory")
    session = OnnxRuntime().open(path, threads)
    if session.input_shape[0] is None:
        return _answers(session), _opened(path, session, threads) if threads > 1 else None
    copy = _freed(path, folder / "free-batch.onnx")
    if copy is None:
        return _answers(session), None
    try:
        return _answers(session), _opened(copy, session, threads)
    finally:
        copy.unlink()


def _answers(session: Session) -> Logits:
    def answers(x: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
        return torch.from_numpy(session(pixels))

    return answers


def _opened(path: Path, session: Session, threads: int) -> Logits | None:
    """The answers on several threads, or None where it fails or answers otherwise. ONNX Runtime prints nothing."""
    import onnxruntime

    from edgeprune.nn.parity import ORT_ERRORS

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        many = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        answers = _shared_out(many, threads)
        return answers if _same(session, answers) else None
    except ORT_ERRORS:
        return None


def _shared_out(many: Any, threads: int) -> Logits:
    """The parts of a batch on several threads at the same time, each some images after the others."""
    name, pool = many.get_inputs()[0].name, ThreadPoolExecutor(threads)

    def some(pixels: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(many.run(None, {name: pixels})[0], dtype=np.float32)

    def answers(x: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
        lanes = min(threads, len(pixels) // LEAST)
        if lanes < 2:
            return torch.from_numpy(some(pixels))
        rounds = -(-len(pixels) // (lanes * ROWS))
        parts = np.array_split(pixels, lanes * rounds)
        return torch.from_numpy(np.concatenate(list(pool.map(some, parts))))

    return answers


def _freed(path: Path, out: Path) -> Path | None:
    """A copy whose batch is free, also where reshapes say its size; or None where it can't be written."""
    try:
        model = onnx.load(str(path))
    except (OSError, DecodeError, ValueError):
        return None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(freed(model), str(out))
    except (OSError, ValueError):
        return None
    return out


def _same(session: Session, answers: Logits) -> bool:
    """Whether both answer images alike, in a batch of another size."""
    one = session.image()
    batch = np.concatenate([np.mod(one + np.float32(0.37 * i), np.float32(1.0)) for i in range(_TRIED)])
    old, new = session(batch), answers(torch.from_numpy(batch)).numpy()
    if old.shape != new.shape or not np.isfinite(old).all():
        return False
    scale = float(np.abs(old).max()) or 1.0
    return float(np.abs(old - new).max()) <= TOLERANCE * scale
