"""evaluate: the clean accuracy of an ONNX file, or of a network in torch, on held-out images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from edgeprune import intervals
from edgeprune.errors import MissingDependency, ModelError, ParityError, UsageError
from edgeprune.nn import train
from edgeprune.nn.bundle import deployed
from edgeprune.nn.data import Split, spread
from edgeprune.nn.images import Chosen
from edgeprune.records import Bundle, InputSpec, Reading
from edgeprune.runtimes.onnxruntime import OnnxRuntime


def balanced(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` images, the same share of each class, the same ones for the same seed.

    Raises:
        UsageError: the limit is not at least 1.
    """
    if limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    chosen = spread(split.labels, limit, seed).sort().values
    return Split(split.name, split.labels[chosen], Chosen(split.pixels, chosen))


def of_network(bundle: Bundle, split: Split, name: str) -> Reading:
    """The accuracy of a network in torch, with its exact binomial 95 % interval."""
    right, total = train.accuracy(deployed(bundle), split)
    interval = intervals.binomial(right, total)
    where = f"local torch {torch.__version__}"
    return Reading(
        "clean_accuracy", right / total, "fraction", total, interval, where, name, {"part": split.name}
    )


def input_of(path: Path) -> InputSpec:
    """What an ONNX classifier eats and how many classes it answers, from its one input and its first output.

    Where the file leaves the number of classes open, it is asked about one image.

    Raises:
        UsageError: not an ONNX file, or not one image in and logits out; or the number of classes is open, and ONNX
            Runtime can't be asked.
        ParityError: a scale of its quantization is not finite or not above 0; names the node.
    """
    hint = (
        "give an .onnx file or a finished run directory; `edgeprune compress` and `why` take PyTorch models"
    )
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError, ValueError) as error:
        raise UsageError(f"{path} is not a readable ONNX file: {error}", hint) from error
    if not graph.node:
        raise UsageError(f"{path} is not a readable ONNX file: there is no graph in it", hint)
    _check_scales(path, graph)
    constants = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inputs, *graph.output)]
    if (
        len(inputs) != 1
        or len(shapes) < 2
        or len(shapes[0]) != 4
        or len(shapes[1]) not in (0, 2)
        or not all(shapes[0][1:])
    ):
        raise UsageError(f"{path} must take (N, C, H, W) and answer (N, classes), found {shapes}")
    channels, height, width = shapes[0][1:]
    known = shapes[1][1] if shapes[1] else 0
    return InputSpec((channels, height, width), known or _answered(path, shapes[0]))


def _answered(path: Path, shape: list[int]) -> int:
    """How many logits a file answers an image with. shape: (N, C, H, W) of its input, N 0 where it is free."""
    rows = shape[0] or 1
    try:
        answer = OnnxRuntime().open(path, 1).infer(np.full((rows, *shape[1:]), 0.5, np.float32))
    except (MissingDependency, ModelError) as error:
        raise UsageError(
            f"{path} does not say how many classes it answers, and can't be asked: {error.message}",
            "write the number into the shape of its output: (N, classes)",
        ) from error
    if answer.ndim != 2 or answer.shape[0] != rows or answer.shape[1] < 1:
        raise UsageError(
            f"{path} must answer (N, classes), it answers {rows} of its images with {answer.shape}",
            "end it with the logits of every image",
        )
    return int(answer.shape[1])


def _check_scales(path: Path, graph: onnx.GraphProto) -> None:
    """A scale of 0, NaN or infinity answers something, and nothing of what the network was."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        scale = (
            constants.get(node.input[1]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        )
        if scale is None or scale.data_location == onnx.TensorProto.EXTERNAL:
            continue
        values = numpy_helper.to_array(scale)
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            raise ParityError(
                f"{path}: the scale of {node.op_type} {node.name!r} is {wrong.flat[0]}; accepted: finite and above 0",
                "the file was damaged: make it again with edgeprune compress",
            )
