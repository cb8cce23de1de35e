"""Whether every scale and zero point of a Q/DQ graph is sound, and fits the scheme that the file is in."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from edgeprune.errors import ParityError
from edgeprune.nn.onnx_proof_layers import PRODUCTS
from edgeprune.nn.onnx_steps import Step, maker_of, quantized_constant, step_of
from edgeprune.nn.onnx_view import View, operand, title

# An int32 bias is added to sums of steps as it is: a kernel never looks at the scale that the file gives it.
BIAS_TOLERANCE = 1e-3
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_DAMAGED = "the file is damaged, or was not made by edgeprune: quantize it again"


def check_steps(view: View) -> tuple[str, int]:
    """Look at every QuantizeLinear and DequantizeLinear of an int8 file.

    Returns:
        The scheme, "u8" or "s8" ("" when no activation is quantized), and how many scale entries there are.

    Raises:
        ParityError: a scale is computed, not finite or not above 0; a zero point is not 0 where the scheme wants that
            (weights, biases, signed activations); activations are quantized in two ways; a Q/DQ pair has two steps; an
            int32 bias has another scale than its input's times its weight's, or stands beside signed activations.
    """
    steps = [
        (node, _step(view, node), _is_constant(view, node))
        for node in view.graph.node
        if node.op_type in _QDQ and node.domain in ("", "ai.onnx")
    ]
    kinds: dict[str, str] = {}
    for node, step, constant in steps:
        _check_scale(node, step)
        if not constant:
            kinds.setdefault(step.zero.dtype.name, title(node))
    scheme = _scheme(kinds)
    for node, step, constant in steps:
        _check_stored(node, step, constant=constant)
        if constant or scheme == "s8":
            _check_zero(node, step, "a constant" if constant else "a signed activation")
        _check_pair(view, node, step)
    for node in view.graph.node:
        if node.op_type in PRODUCTS and operand(node, 2):
            _check_bias(view, node, scheme)
    return scheme, sum(step.scale.size for _, step, _ in steps)


def _step(view: View, node: NodeProto) -> Step:
    step = step_of(view, node)
    if step is None:
        raise ParityError(
            f"the scale or the zero point of {title(node)} is computed, not a constant of the file", _DAMAGED
        )
    return step


def _is_constant(view: View, node: NodeProto) -> bool:
    if node.op_type == "QuantizeLinear":
        return view.constant(node.input[0]) is not None
    return quantized_constant(view, node) is not None


def _check_scale(node: NodeProto, step: Step) -> None:
    good = np.isfinite(step.scale) & (step.scale > 0)
    if not good.all():
        place = int(np.argmin(good.ravel()))
        entry = f" for channel {place}" if step.scale.size > 1 else ""
        raise ParityError(
            f"the scale of {title(node)} ({node.input[1]}) is {step.scale.ravel()[place]!s}{entry}; "
            "accepted: finite and above 0",
            _DAMAGED,
        )


def _check_zero(node: NodeProto, step: Step, what: str) -> None:
    if step.zero.any():
        value = step.zero.ravel()[np.argmax(step.zero.ravel() != 0)]
        raise ParityError(f"the zero point of {title(node)} is {value!s}; {what} must have 0", _DAMAGED)


def _scheme(kinds: dict[str, str]) -> str:
    """The scheme from the types of activations; kinds: type -> the first node that has it."""
    known = {"uint8": "u8", "int8": "s8"}
    for kind, node in kinds.items():
        if kind not in known:
            raise ParityError(f"{node} quantizes an activation to {kind}; accepted: uint8 or int8", _DAMAGED)
    if len(kinds) > 1:
        raise ParityError(
            f"activations are quantized in two ways: {kinds['uint8']} to uint8, {kinds['int8']} to int8",
            _DAMAGED,
        )
    return next((known[kind] for kind in kinds), "")


def _check_pair(view: View, node: NodeProto, step: Step) -> None:
    rounding = maker_of(view, node.input[0], "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
    if rounding is None:
        return
    before = _step(view, rounding)
    # At the input a normalization may be part of the rounding, with a step and a zero for each channel of the pixels.
    if rounding.input[0] in view.inputs:
        return
    alike = np.array_equal(before.scale, step.scale) and np.array_equal(before.zero, step.zero)
    if not alike or (step.scale.size > 1 and before.axis != step.axis):
        raise ParityError(
            f"{title(rounding)} and {title(node)} are a pair with two steps: scale {_brief(before)} and {_brief(step)}",
            _DAMAGED,
        )


def _check_stored(node: NodeProto, step: Step, *, constant: bool) -> None:
    """Weights are int8 and biases int32; anything else is no scheme of ours."""
    if constant and step.zero.dtype.name not in ("int8", "int32"):
        raise ParityError(
            f"{title(node)} has a constant of {step.zero.dtype}; accepted: int8, and int32 for a bias"
        )


def _check_bias(view: View, node: NodeProto, scheme: str) -> None:
    maker = maker_of(view, node.input[2], "DequantizeLinear")
    if maker is None:
        return
    if scheme == "s8":
        raise ParityError(
            f"the bias of {title(node)} is quantized; beside signed activations it must be float32",
            "TensorRT takes no other: quantize the file again with scheme s8",
        )
    data, weight = (maker_of(view, name, "DequantizeLinear") for name in node.input[:2])
    if data is None or weight is None:
        return
    wanted = (_step(view, data).scale * _step(view, weight).scale).ravel().astype(np.float64)
    given = _step(view, maker).scale.ravel().astype(np.float64)
    far = np.abs(given - wanted) > BIAS_TOLERANCE * wanted
    if far.any():
        place = int(np.argmax(far))
        raise ParityError(
            f"the bias of {title(node)} has scale {np.broadcast_to(given, far.shape)[place]:.6g} for channel {place}; "
            f"that of its input times that of its weight is {np.broadcast_to(wanted, far.shape)[place]:.6g}",
            _DAMAGED,
        )


def _brief(step: Step) -> str:
    shown = f"{step.scale.ravel()[0]:.6g}" if step.scale.size == 1 else f"of {step.scale.size} channels"
    return f"{shown}, zero point {step.zero.ravel()[0]!s}"
