"""What a network comes to in another precision, in bytes and in time, without looking for the best way there."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from edgeprune.nn.activations import observe
from edgeprune.nn.onnx_half import half
from edgeprune.nn.onnx_prepare import prepare
from edgeprune.nn.onnx_quantize import quantized
from edgeprune.nn.ranges import ranges
from edgeprune.stages.quantize_guard import guarded

# What the file that ships says of itself besides: scheme, calibrator, the hash of its parent.
ABOUT = 512


def size_of(exported: Path, precision: str, scheme: str) -> int:
    """The bytes that a float file comes to as "int8" or "fp16", every layer that can be in that precision.

    The values of the scales are not those that ship; their number and their bytes are.

    Raises:
        UnsupportedModel: ONNX Runtime can't run it, or nothing in it can be quantized.
    """
    return rough(exported, precision, scheme).ByteSize() + ABOUT


def rough(exported: Path, precision: str, scheme: str) -> onnx.ModelProto:
    """A float file in another precision, with scales of one grey image: it takes the time and the bytes of what ships.

    Raises:
        UnsupportedModel: as `size_of`.
    """
    model = prepare(onnx.load(str(exported)))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    image = torch.full((1, *(int(d.dim_value) for d in dims[1:])), 0.5)
    seen = observe(model, image)
    if precision == "fp16":
        return half(model, seen)[0]
    bounds = ranges(seen, "minmax", symmetric=scheme == "s8")
    return guarded(quantized(model, bounds, scheme))
