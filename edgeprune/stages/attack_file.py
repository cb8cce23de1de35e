"""An ONNX file as a victim: its session answers, and a copy with a free batch answers many images at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor

from edgeprune.attacks import Logits
from edgeprune.errors import UsageError
from edgeprune.runtimes import Session
from edgeprune.runtimes.onnxruntime import OnnxRuntime

# How far the copy may be from the file, relative to the largest logit; rounding in another order gives 1e-6.
TOLERANCE = 1e-4
_TRIED = 3


def open_file(path: Path, folder: Path, threads: int) -> tuple[Logits, Logits | None]:
    """The answers of an ONNX file, and, where its batch is fixed and can be freed, those of a copy for many images.

    The copy is used only if it answers images as the file does. Searching on it is several times as fast.

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
        return _answers(session), None
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


def _opened(copy: Path, session: Session, threads: int) -> Logits | None:
    """The answers of a copy, or None where it fails or answers otherwise. ONNX Runtime prints nothing about that."""
    import onnxruntime

    from edgeprune.nn.parity import ORT_ERRORS

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        many = onnxruntime.InferenceSession(str(copy), options, providers=["CPUExecutionProvider"])
        name = many.get_inputs()[0].name

        def answers(x: Tensor) -> Tensor:
            pixels = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
            return torch.from_numpy(np.asarray(many.run(None, {name: pixels})[0], dtype=np.float32))

        return answers if _same(session, answers) else None
    except ORT_ERRORS:
        return None


def _freed(path: Path, out: Path) -> Path | None:
    """A copy whose batch is free, also where reshapes say its size; or None where it can't be written."""
    try:
        model = onnx.load(str(path))
    except (OSError, DecodeError, ValueError):
        return None
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    size = inputs[0].type.tensor_type.shape.dim[0].dim_value
    for value in (*inputs, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims):
            dims[0].dim_param = "batch"
    del graph.value_info[:]
    for node in graph.node:
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if shape is None:
            continue
        wanted = numpy_helper.to_array(shape).copy()
        if len(wanted) and wanted[0] == size:
            # In a Reshape -1 is the size that is left over, which one place may have, and 0 the size that the input
            # has there, unless allowzero says that it is no size.
            wanted[0] = 0 if -1 in wanted else -1
            if not wanted[0]:
                kept = [a for a in node.attribute if a.name != "allowzero"]
                del node.attribute[:]
                node.attribute.extend(kept)
            name = f"{shape.name}.free_batch"
            if name not in constants:
                constants[name] = numpy_helper.from_array(wanted, name)
                graph.initializer.append(constants[name])
            node.input[1] = name
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(out))
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
