"""Which nn.Module an operator of an exported graph was: convolution, linear, normalization, dropout, PReLU.

Only operators that own parameters, or behave differently in training, become modules; the rest needs none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

TensorOf = Callable[[Any], torch.Tensor | None]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORM = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_CHANNEL_DROPOUT = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


@dataclass(frozen=True)
class Layer:
    """A layer that an operator stands for.

    config: the module class's name and its constructor's arguments; equal configs are one layer called twice.
    source: the node that the layer eats. tensors: attribute -> the node of the tensor. several: the operator gave more
    than one value, of which only the first is used.
    """

    config: tuple[str, tuple[tuple[str, Any], ...]]
    source: fx.Node
    tensors: Mapping[str, fx.Node]
    several: bool = False

    def make(self) -> nn.Module:
        """The module, without memory for its tensors."""
        name, arguments = self.config
        with torch.device("meta"):
            return getattr(nn, name)(**dict(arguments))


def layer_of(node: fx.Node, tensor_of: TensorOf) -> Layer | None:
    """The layer that a call_function node was, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    reader = _READERS.get(target._schema.name.removeprefix("aten::"))
    if reader is None:
        return None
    call = {}
    for i, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        call[argument.name] = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
    return reader(call, tensor_of, node)


def _layer(
    kind: type,
    source: Any,
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *,
    several: bool = False,
) -> Layer | None:
    if not isinstance(source, fx.Node):
        return None
    owned = {name: value for name, value in tensors.items() if isinstance(value, fx.Node)}
    return Layer((kind.__name__, tuple(sorted(arguments.items()))), source, owned, several)


def _convolution(call: Mapping[str, Any], tensor_of: TensorOf, _: fx.Node) -> Layer | None:
    weight, bias = tensor_of(call["weight"]), call.get("bias")
    if weight is None or (bias is not None and tensor_of(bias) is None) or weight.ndim < 3:
        return None
    axes, groups = weight.ndim - 2, int(call["groups"])
    transposed = bool(call.get("transposed", "output_padding" in call))
    channels = (
        (weight.shape[0], weight.shape[1] * groups)
        if transposed
        else (weight.shape[1] * groups, weight.shape[0])
    )
    arguments: dict[str, Any] = {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "kernel_size": tuple(weight.shape[2:]),
        "stride": _per_axis(call["stride"], axes),
        "padding": call["padding"] if isinstance(call["padding"], str) else _per_axis(call["padding"], axes),
        "dilation": _per_axis(call["dilation"], axes),
        "groups": groups,
        "bias": bias is not None,
    }
    if transposed:
        arguments["output_padding"] = _per_axis(call["output_padding"], axes)
    elif any(_per_axis(call.get("output_padding") or [0], axes)):
        return None
    return _layer(
        (_TRANSPOSED if transposed else _CONV)[axes],
        call["input"],
        arguments,
        {"weight": call["weight"], "bias": bias},
    )


def _linear(call: Mapping[str, Any], tensor_of: TensorOf, _: fx.Node) -> Layer | None:
    return _dense(call["input"], call["weight"], call["bias"], tensor_of)


def _addmm(call: Mapping[str, Any], tensor_of: TensorOf, _: fx.Node) -> Layer | None:
    weight = _transposed(call["mat2"])
    if weight is None or (call.get("beta", 1), call.get("alpha", 1)) != (1, 1):
        return None
    return _dense(call.get("mat1", call["self"]), weight, call["self"] if "mat1" in call else None, tensor_of)


def _dense(source: Any, weight: Any, bias: Any, tensor_of: TensorOf) -> Layer | None:
    matrix = tensor_of(weight)
    if matrix is None or matrix.ndim != 2 or (bias is not None and tensor_of(bias) is None):
        return None
    arguments = {"in_features": matrix.shape[1], "out_features": matrix.shape[0], "bias": bias is not None}
    return _layer(nn.Linear, source, arguments, {"weight": weight, "bias": bias})


def _transposed(value: Any) -> fx.Node | None:
    if not isinstance(value, fx.Node) or not isinstance(value.target, torch._ops.OpOverload):
        return None
    name, axes = value.target._schema.name, list(value.args[1:])
    swapped = name == "aten::t" or (name, axes) in (
        ("aten::permute", [[1, 0]]),
        ("aten::transpose", [0, 1]),
        ("aten::transpose", [1, 0]),
    )
    return value.args[0] if swapped and isinstance(value.args[0], fx.Node) else None


def _batch_norm(call: Mapping[str, Any], tensor_of: TensorOf, node: fx.Node) -> Layer | None:
    tensors = {name: call.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
    owned = [tensor_of(v) for v in tensors.values() if v is not None]
    rank = _rank(call["input"])
    if (
        not owned
        or any(t is None for t in owned)
        or rank not in _BATCH_NORM
        or (tensors["weight"] is None) != (tensors["bias"] is None)
    ):
        return None
    several = not call.keys() >= {"cudnn_enabled"}
    if several and not _only_first(node):
        return None
    arguments = {
        "num_features": owned[0].shape[0] if owned[0] is not None else 0,
        "eps": call["eps"],
        # A cumulative average (momentum None) is exported as 0.
        "momentum": call["momentum"] or None,
        "affine": tensors["weight"] is not None,
        "track_running_stats": tensors["running_mean"] is not None,
    }
    return _layer(_BATCH_NORM[rank], call["input"], arguments, tensors, several=several)


def _instance_norm(call: Mapping[str, Any], tensor_of: TensorOf, _: fx.Node) -> Layer | None:
    tensors = {name: call.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
    owned = [tensor_of(v) for v in tensors.values() if v is not None]
    rank = _rank(call["input"])
    if not owned or any(t is None for t in owned) or rank not in _INSTANCE_NORM or owned[0] is None:
        return None
    arguments = {
        "num_features": owned[0].shape[0],
        "eps": call["eps"],
        "momentum": call["momentum"],
        "affine": tensors["weight"] is not None,
        "track_running_stats": tensors["running_mean"] is not None,
    }
    return _layer(_INSTANCE_NORM[rank], call["input"], arguments, tensors)


def _layer_norm(call: Mapping[str, Any], tensor_of: TensorOf, node: fx.Node) -> Layer | None:
    several = "cudnn_enable" not in call
    weight, bias = call["weight"], call["bias"]
    shape = tuple(call["normalized_shape"])
    unowned = tensor_of(weight) is None or (bias is not None and tensor_of(bias) is None)
    if unowned or not all(isinstance(n, int) for n in shape) or (several and not _only_first(node)):
        return None
    arguments = {"normalized_shape": shape, "eps": call["eps"], "bias": bias is not None}
    return _layer(nn.LayerNorm, call["input"], arguments, {"weight": weight, "bias": bias}, several=several)


def _rms_norm(call: Mapping[str, Any], tensor_of: TensorOf, _: fx.Node) -> Layer | None:
    shape = tuple(call["normalized_shape"])
    if tensor_of(call["weight"]) is None or not all(isinstance(n, int) for n in shape):
        return None
    return _layer(
        nn.RMSNorm, call["input"], {"normalized_shape": shape, "eps": call["eps"]}, {"weight": call["weight"]}
    )


def _group_norm(call: Mapping[str, Any], tensor_of: TensorOf, node: fx.Node) -> Layer | None:
    several = "cudnn_enabled" not in call
    weight, bias = tensor_of(call["weight"]), tensor_of(call["bias"])
    if weight is None or bias is None or (several and not _only_first(node)):
        return None
    groups = call["group"] if several else call["num_groups"]
    arguments = {"num_groups": groups, "num_channels": weight.shape[0], "eps": call["eps"]}
    return _layer(
        nn.GroupNorm,
        call["input"],
        arguments,
        {"weight": call["weight"], "bias": call["bias"]},
        several=several,
    )


def _prelu(call: Mapping[str, Any], tensor_of: TensorOf, _: fx.Node) -> Layer | None:
    weight = tensor_of(call["weight"])
    if weight is None or weight.ndim != 1:
        return None
    return _layer(nn.PReLU, call["self"], {"num_parameters": weight.shape[0]}, {"weight": call["weight"]})


def _dropout(kind: type, *, inplace: bool = False, several: bool = False) -> Callable[..., Layer | None]:
    def read(call: Mapping[str, Any], _: TensorOf, node: fx.Node) -> Layer | None:
        source = call.get("input", call.get("self"))
        cls = _CHANNEL_DROPOUT.get(_rank(source)) if kind is nn.Dropout2d else kind
        if cls is None or (several and not _only_first(node)):
            return None
        return _layer(cls, source, {"p": call["p"], "inplace": inplace}, {}, several=several)

    return read


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) * axes if len(value) == 1 else tuple(value)


def _rank(value: Any) -> int:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return known.ndim if isinstance(known, torch.Tensor) else 0


def _only_first(node: fx.Node) -> bool:
    getitems = [
        u for u in node.users if u.op == "call_function" and getattr(u.target, "__name__", "") == "getitem"
    ]
    return len(getitems) == len(node.users) and all(
        u.args[1] == 0 or all(v.op == "output" for v in u.users) for u in getitems
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any], TensorOf, fx.Node], Layer | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "linear": _linear,
    "addmm": _addmm,
    "mm": _addmm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit_functional": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "native_group_norm": _group_norm,
    "prelu": _prelu,
    "dropout": _dropout(nn.Dropout),
    "dropout_": _dropout(nn.Dropout, inplace=True),
    "native_dropout": _dropout(nn.Dropout, several=True),
    "feature_dropout": _dropout(nn.Dropout2d),
    "feature_dropout_": _dropout(nn.Dropout2d, inplace=True),
    "alpha_dropout": _dropout(nn.AlphaDropout),
    "feature_alpha_dropout": _dropout(nn.FeatureAlphaDropout),
}
