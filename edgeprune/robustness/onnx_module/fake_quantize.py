"""QuantizeLinear and DequantizeLinear in torch: forward as in the file, gradients straight through the rounding.

The straight-through estimator of Bengio et al. 2013, arXiv:1308.3432: rounding has the gradient 0 almost everywhere,
so an attack takes it for the identity. Where a value is cut off at the end of its range the gradient is 0, as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from edgeprune.errors import UnsupportedModel

# What is noted at a node: inputs that no image changes, place -> their numbers as Python has them. To read them out of
# tensors would wait for a GPU, and torch.export can't.
KNOWN = "twin.known"

Inputs = Sequence[Tensor | None]


@dataclass(frozen=True)
class Node:
    """One node. options: its attributes. opset: the version of the operator set. outputs: how many it has."""

    op: str
    name: str
    options: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def get(self, option: str, default: Any) -> Any:
        """An attribute, or what the operator's document says where it is left out."""
        return self.options.get(option, default)


Operator = Callable[[Node, Inputs], Tensor | tuple[Tensor, ...]]


def refuse(node: Node, why: str) -> UnsupportedModel:
    """That a node can't be computed in torch."""
    return UnsupportedModel(f"{node.op} {node.name!r} of the file has no form in torch: {why}")


def at(x: Inputs, place: int) -> Tensor | None:
    """An optional input."""
    return x[place] if place < len(x) else None


def need(x: Inputs, place: int) -> Tensor:
    """An input that the operator's document says is there."""
    found = at(x, place)
    if found is None:
        raise ValueError(f"input {place} is missing")
    return found


def ints(node: Node, x: Inputs, place: int, option: str) -> list[int] | None:
    """Whole numbers that are an input in newer operator sets and an attribute in older ones; None: left out."""
    found = read(node, x, place)
    if found is not None:
        return [int(n) for n in found]
    return None if option not in node.options else [int(n) for n in node.options[option]]


def read(node: Node, x: Inputs, place: int) -> list[Any] | None:
    """An input's numbers, one after the other, as Python has them; None: left out."""
    known = node.get(KNOWN, {})
    found = at(x, place)
    return known[place] if place in known else None if found is None else found.reshape(-1).tolist()


def number(node: Node, x: Inputs, place: int) -> Any:
    """An input that is one number, as Python has it; None: left out."""
    found = read(node, x, place)
    if found is not None and len(found) != 1:
        raise ValueError(f"input {place} is {len(found)} numbers, accepted is one")
    return None if found is None else found[0]


LIMITS: Mapping[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
}
# What is noted at a QuantizeLinear node: the limits of its type, whether what follows is a DequantizeLinear
# with the same numbers, so that both are one, and whether values are cut off but not rounded.
LOW, HIGH, BACK, SMOOTH = "twin.low", "twin.high", "twin.back", "twin.smooth"


def limited(node: Node, kind: int) -> Node:
    """A QuantizeLinear node that knows the limits of its type."""
    if kind not in LIMITS:
        raise refuse(node, f"it makes {TensorProto.DataType.Name(kind)}")
    low, high = LIMITS[kind]
    return replace(node, options={**node.options, LOW: low, HIGH: high})


class _StraightThrough(torch.autograd.Function):
    """Steps of a scale: rounded half to even and cut off; `back` gives multiples of the scale instead."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, back: bool
    ) -> Tensor:
        """Low and high are numbers of steps, numbers or tensors like `scale`."""
        steps = x.div(scale).round_()
        kept = torch.clamp(steps, low, high)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(steps == kept, scale)
            ctx.back = back
        return kept.mul_(scale) if back else kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient where nothing was cut off."""
        inside, scale = ctx.saved_tensors
        found = gradients[0] * inside
        return found if ctx.back else found / scale, None, None, None, None


def _along(numbers: Tensor, node: Node, x: Tensor) -> Tensor:
    """Scales or zero points so that they broadcast: one for all, one for each entry of an axis, or for blocks of it."""
    if numbers.numel() == 1:
        return numbers.reshape(())
    axis = node.get("axis", 1) % x.ndim
    block = node.get("block_size", 0)
    if block:
        return numbers.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return numbers.reshape(-1, *[1] * (x.ndim - 1 - axis))


def _quantize(node: Node, x: Inputs) -> Tensor:
    whole, zero = need(x, 0), at(x, 2)
    scale = _along(need(x, 1), node, whole)
    low, high = node.options[LOW], node.options[HIGH]
    if zero is not None:
        # The zero point is a whole number: to cut off before it is added comes to the same.
        shift = _along(zero, node, whole)
        shift = float((read(node, x, 2) or [0])[0]) if shift.ndim == 0 else shift.to(whole)
        low, high = low - shift, high - shift
    back = bool(node.get(BACK, False))
    if node.get(SMOOTH, False):
        step = float((read(node, x, 1) or [1])[0]) if scale.ndim == 0 else scale
        found = torch.clamp(whole, low * step, high * step)
        found = found if back else found / scale
    else:
        found: Tensor = _StraightThrough.apply(whole, scale, low, high, back)  # pyright: ignore[reportAssignmentType]
    return found if back or zero is None else found + _along(zero, node, whole).to(whole)


def _dequantize(node: Node, x: Inputs) -> Tensor:
    whole, zero = need(x, 0), at(x, 2)
    # int32 minus its zero point is exact in whole numbers and, of biases, not in floats.
    shifted = whole if zero is None else whole - _along(zero, node, whole).to(whole)
    return shifted.to(need(x, 1).dtype) * _along(need(x, 1), node, whole)


QUANTIZERS: Mapping[str, Operator] = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}
