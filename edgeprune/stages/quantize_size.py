"""How many bytes a network takes in another precision, without looking for the best way there."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from edgeprune.nn.activations import observe
from edgeprune.nn.onnx_half import half
from edgeprune.nn.onnx_prepare import prepare
from edgeprune.nn.onnx_quantize import quantized
from edgeprune.nn.ranges import ranges

# What the file that ships says of itself besides: scheme, calibrator, the hash of its parent.
ABOUT = 512


def size_of(exported: Path, precision: str, scheme: str) -> int:
    """The bytes that a float file comes to as "int8" or "fp16", every layer that can be in that precision.

    The values of the scales are not those that ship; their number and their bytes are.

    Raises:
        UnsupportedModel: ONNX Runtime can't run it, or nothing in it can be quantized.
    """
    model = prepare(onnx.load(str(exported)))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    image = torch.full((1, *(int(d.dim_value) for d in dims[1:])), 0.5)
    seen = observe(model, image)
    if precision == "fp16":
        return half(model, seen)[0].ByteSize() + ABOUT
    bounds = ranges(seen, "minmax", symmetric=scheme == "s8")
    return quantized(model, bounds, scheme).ByteSize() + ABOUT
