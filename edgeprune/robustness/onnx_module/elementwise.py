"""ONNX operators in torch that compute value by value or over axes: activations, arithmetic, reductions."""

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.robustness.onnx_module.fake_quantize import Inputs, Node, Operator, ints, need, number, refuse


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda node, x: function(need(x, 0))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, x: function(need(x, 0), need(x, 1))


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, x: reduce(function, [t for t in x if t is not None])


def _divide(a: Tensor, b: Tensor) -> Tensor:
    whole = not a.is_floating_point() and not b.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def _clip(node: Node, x: Inputs) -> Tensor:
    low, high = (
        limit if (limit := number(node, x, place)) is not None else node.get(option, None)
        for place, option in ((1, "min"), (2, "max"))
    )
    found = need(x, 0)
    # One after the other: where the limits cross, the upper one holds, as in the operator's document.
    for clamp, limit in ((torch.clamp_min, low), (torch.clamp_max, high)):
        if limit is not None:
            found = clamp(found, float(limit) if found.is_floating_point() else int(limit))
    return found


def _swish(node: Node, x: Inputs) -> Tensor:
    whole, alpha = need(x, 0), node.get("alpha", 1.0)
    return functional.silu(whole) if alpha == 1.0 else whole * torch.sigmoid(alpha * whole)


def _softmax(node: Node, x: Inputs) -> Tensor:
    function = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax}.get(node.op, _hardmax)
    whole = need(x, 0)
    if node.opset >= 13:
        return function(whole, node.get("axis", -1))
    # Before opset 13 all axes from this one on are one.
    axis = node.get("axis", 1) % whole.ndim
    return function(whole.flatten(axis), -1).reshape(whole.shape)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def _reduced(function: Callable[..., Tensor]) -> Operator:
    def operator(node: Node, x: Inputs) -> Tensor:
        whole = need(x, 0)
        axes = ints(node, x, 1, "axes")
        if not axes:
            if node.get("noop_with_empty_axes", 0):
                return whole
            axes = list(range(whole.ndim))
        return function(whole, axes, keepdim=bool(node.get("keepdims", 1)))

    return operator


def _product(x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _arg_max(node: Node, x: Inputs) -> Tensor:
    if node.get("select_last_index", 0):
        raise refuse(node, "select_last_index")
    return need(x, 0).argmax(node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))


def _einsum(node: Node, x: Inputs) -> Tensor:
    return torch.einsum(node.options["equation"].decode(), *[t for t in x if t is not None])


def _modulo(node: Node, x: Inputs) -> Tensor:
    return (torch.fmod if node.get("fmod", 0) else torch.remainder)(need(x, 0), need(x, 1))


ACTIVATIONS: Mapping[str, Operator] = {
    "Relu": _unary(functional.relu),
    "LeakyRelu": lambda n, x: functional.leaky_relu(need(x, 0), n.get("alpha", 0.01)),
    "PRelu": lambda n, x: torch.where(need(x, 0) < 0, need(x, 0) * need(x, 1), need(x, 0)),
    "Elu": lambda n, x: functional.elu(need(x, 0), n.get("alpha", 1.0)),
    "Celu": lambda n, x: functional.celu(need(x, 0), n.get("alpha", 1.0)),
    "Selu": _unary(functional.selu),
    "Clip": _clip,
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": lambda n, x: (n.get("alpha", 0.2) * need(x, 0) + n.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _unary(functional.hardswish),
    "Swish": _swish,
    "Tanh": _unary(torch.tanh),
    "Gelu": lambda n, x: functional.gelu(need(x, 0), approximate=n.get("approximate", b"none").decode()),
    "Mish": _unary(functional.mish),
    "Softplus": _unary(lambda x: functional.softplus(x, threshold=1e9)),
    "Softsign": _unary(functional.softsign),
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _softmax,
}
ARITHMETIC: Mapping[str, Operator] = {
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(_divide),
    "Pow": _binary(torch.pow),
    "Mod": _modulo,
    "Min": _folded(torch.minimum),
    "Max": _folded(torch.maximum),
    "Sum": _folded(torch.add),
    "Equal": _binary(torch.eq),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Not": _unary(torch.logical_not),
    "Where": lambda _, x: torch.where(need(x, 0), need(x, 1), need(x, 2)),
    "Einsum": _einsum,
    **{
        name: _unary(function)
        for name, function in {
            "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
            "Floor": torch.floor, "Log": torch.log, "Neg": torch.neg, "Reciprocal": torch.reciprocal,
            "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Sqrt": torch.sqrt,
        }.items()
    },
}  # fmt: skip

REDUCTIONS: Mapping[str, Operator] = {
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced(_product),
    "ReduceL1": _reduced(lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim)),
    "ReduceL2": _reduced(lambda x, axes, keepdim: torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)),
    "ReduceSumSquare": _reduced(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim)),
    "ArgMax": _arg_max,
}

OPERATORS: Mapping[str, Operator] = {**ACTIVATIONS, **ARITHMETIC, **REDUCTIONS}
