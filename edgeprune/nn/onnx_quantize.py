"""A float ONNX model as an 8-bit one with explicit QuantizeLinear and DequantizeLinear nodes, in one of two schemes.

u8  unsigned activations with a zero point, int8 weights per output channel, int32 biases: what ONNX Runtime's CPU
    kernels compute with. Q/DQ pairs stand on everything between 8-bit nodes, so that all of it fuses.
s8  signed activations and int8 weights per output channel, zero point 0 throughout, float biases: what TensorRT 10
    and 11 ask for. Q/DQ pairs stand on what weighted nodes and pools read, and on the other branch of a sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnx import ModelProto

from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.nn import onnx_quantize_plan as plans
from edgeprune.nn.onnx_quantize_apart import sums_apart
from edgeprune.nn.onnx_quantize_write import write
from edgeprune.nn.ranges import Range
from edgeprune.quantities import suggest

SCHEMES = ("u8", "s8")
# The first with scales for each channel.
_OLDEST_OPSET = 13


def quantizable(model: ModelProto) -> tuple[str, ...]:
    """The names of the nodes whose weights can be int8, in order: Conv, Gemm and MatMul with constant weights."""
    return plans.quantizable(model)


def quantized(
    model: ModelProto, ranges: Mapping[str, Range], scheme: str, *, skip: Collection[str] = ()
) -> ModelProto:
    """A prepared model as a Q/DQ model that computes on 8 bits.

    Args:
        model: float, as `onnx_prepare.prepare` gives it.
        ranges: value name -> (low, high), as `ranges.ranges` gives them; those that 8-bit nodes read and make.
        scheme: "u8" or "s8".
        skip: names of nodes that stay float.

    Returns:
        The model; nodes keep their names, and weights and biases theirs. Other values are renamed shortly. What
        computes in float, because of `skip` or because there is no 8-bit form, is as it was.

    Raises:
        UsageError: there is no such scheme, or no node of a name in `skip`.
        UnsupportedModel: no node can be int8, the opset is below 13, a weight is not finite, or a range is missing.
    """
    _check(model, scheme, skip)
    if scheme == "u8":
        made = write(model, plans.unsigned(model, ranges, skip), ranges, symmetric=False)
        sums_apart(made, model)
        return made
    return write(model, plans.signed(model, skip), ranges, symmetric=True)


def _check(model: ModelProto, scheme: str, skip: Collection[str]) -> None:
    if scheme not in SCHEMES:
        raise UsageError(
            f"quantize.scheme {scheme!r} is not one of {', '.join(SCHEMES)}", suggest(scheme, SCHEMES)
        )
    names = {node.name for node in model.graph.node}
    for name in skip:
        if name not in names:
            raise UsageError(f"quantize.skip names {name!r}, which is no node", suggest(name, sorted(names)))
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        raise UnsupportedModel(
            f"int8 with scales for each channel needs opset {_OLDEST_OPSET}, the model has {opset}",
            f"--set export.opset={_OLDEST_OPSET}, or more",
        )
    if not set(plans.quantizable(model)) - set(skip):
        raise UnsupportedModel(
            "no node can be int8: that takes a Conv, Gemm or MatMul with constant weights that is not skipped"
        )
