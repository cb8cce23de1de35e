"""Which nn.Module an operator of an exported graph was: convolution, linear, normalization, dropout, PReLU.

Only operators that own parameters, or behave differently in training, become modules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

TensorOf = Callable[[Any], Tensor | None]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORM = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_CHANNEL_DROPOUT = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


@dataclass(frozen=True)
class Layer:
    """The module that an operator was.

    config: the class's name and its constructor's arguments; equal configs are one layer called twice.
    source: the input. tensors: attribute -> the node of the tensor. several: the operator has several outputs, of which
    only the first is used.
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
    arguments = {}
    for i, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        arguments[argument.name] = (
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
        )
    return reader(_Operator(node, "native" in target._schema.name, arguments, tensor_of))


@dataclass(frozen=True)
class _Operator:
    """A call of an operator, its arguments by the schema's names.

    several: it has several outputs, such as the batch's statistics.
    """

    node: fx.Node
    several: bool
    arguments: Mapping[str, Any]
    tensor_of: TensorOf

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def owned(self, *nodes: Any) -> list[Tensor]:
        """The network's tensors at these nodes, absent ones left out; none when one of them is computed."""
        found = [self.tensor_of(node) for node in nodes if node is not None]
        return [] if any(tensor is None for tensor in found) else found  # type: ignore[return-value]

    def layer(self, kind: type, config: Mapping[str, Any], *tensors: str) -> Layer | None:
        """The layer, with attributes that are called as the arguments."""
        return self.layer_on(
            self["input"] or self["self"], kind, config, {name: self[name] for name in tensors}
        )

    def layer_on(
        self, source: Any, kind: type, config: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> Layer | None:
        if not isinstance(source, fx.Node) or (self.several and not _only_first(self.node)):
            return None
        nodes = {name: value for name, value in tensors.items() if isinstance(value, fx.Node)}
        return Layer((kind.__name__, tuple(sorted(config.items()))), source, nodes, self.several)


def _convolution(call: _Operator) -> Layer | None:
    owned = call.owned(call["weight"], call["bias"])
    if not owned or owned[0].ndim < 3:
        return None
    weight, axes, groups = owned[0], owned[0].ndim - 2, int(call["groups"])
    named = call["transposed"]
    transposed = bool("output_padding" in call.arguments if named is None else named)
    channels = (weight.shape[0], weight.shape[1] * groups)
    padding, extra = call["padding"], _per_axis(call["output_padding"] or [0], axes)
    config: dict[str, Any] = {
        "in_channels": channels[not transposed],
        "out_channels": channels[transposed],
        "kernel_size": tuple(weight.shape[2:]),
        "stride": _per_axis(call["stride"], axes),
        "padding": padding if isinstance(padding, str) else _per_axis(padding, axes),
        "dilation": _per_axis(call["dilation"], axes),
        "groups": groups,
        "bias": call["bias"] is not None,
    }
    if transposed:
        config["output_padding"] = extra
    elif any(extra):
        return None
    return call.layer((_TRANSPOSED if transposed else _CONV)[axes], config, "weight", "bias")


def _linear(call: _Operator) -> Layer | None:
    return _dense(call, call["input"], call["weight"], call["bias"])


def _addmm(call: _Operator) -> Layer | None:
    """bias + x @ weight.T, as decomposed programs write a linear layer; mm without the bias."""
    weight = _transposed(call["mat2"])
    if weight is None or any(call[factor] not in (None, 1) for factor in ("beta", "alpha")):
        return None
    if "mat1" in call.arguments:
        return _dense(call, call["mat1"], weight, call["self"])
    return _dense(call, call["self"], weight, None)


def _dense(call: _Operator, source: Any, weight: Any, bias: Any) -> Layer | None:
    owned = call.owned(weight, bias)
    if not owned or owned[0].ndim != 2:
        return None
    outputs, inputs = owned[0].shape
    config = {"in_features": inputs, "out_features": outputs, "bias": bias is not None}
    return call.layer_on(source, nn.Linear, config, {"weight": weight, "bias": bias})


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


def _norm_of(kinds: Mapping[int, type]) -> Callable[[_Operator], Layer | None]:
    """Reads a batch-norm or an instance-norm; kinds: number of axes -> class."""

    def read(call: _Operator) -> Layer | None:
        names = ("weight", "bias", "running_mean", "running_var")
        owned = call.owned(*(call[name] for name in names))
        kind = kinds.get(_rank(call["input"]))
        if not owned or kind is None or (call["weight"] is None) != (call["bias"] is None):
            return None
        config = {
            "num_features": owned[0].shape[0],
            "eps": call["eps"],
            # A cumulative average (momentum None) is exported as 0.
            "momentum": call["momentum"] or None,
            "affine": call["weight"] is not None,
            "track_running_stats": call["running_mean"] is not None,
        }
        return call.layer(kind, config, *names)

    return read


def _layer_norm(call: _Operator) -> Layer | None:
    shape = tuple(call["normalized_shape"])
    if call["weight"] is None or not call.owned(call["weight"], call["bias"]):
        return None
    if not all(isinstance(n, int) for n in shape):
        return None
    config = {"normalized_shape": shape, "eps": call["eps"]}
    if "bias" not in call.arguments:
        return call.layer(nn.RMSNorm, config, "weight")
    return call.layer(nn.LayerNorm, {**config, "bias": call["bias"] is not None}, "weight", "bias")


def _group_norm(call: _Operator) -> Layer | None:
    owned = call.owned(call["weight"], call["bias"])
    if len(owned) != 2:
        return None
    groups = call["group"] if call.several else call["num_groups"]
    config = {"num_groups": groups, "num_channels": owned[0].shape[0], "eps": call["eps"]}
    return call.layer(nn.GroupNorm, config, "weight", "bias")


def _prelu(call: _Operator) -> Layer | None:
    owned = call.owned(call["weight"])
    if not owned or owned[0].ndim != 1:
        return None
    return call.layer(nn.PReLU, {"num_parameters": owned[0].shape[0]}, "weight")


def _dropout(kind: type, *, inplace: bool = False) -> Callable[[_Operator], Layer | None]:
    def read(call: _Operator) -> Layer | None:
        rank = _rank(call["input"] or call["self"])
        module = _CHANNEL_DROPOUT.get(rank) if kind is nn.Dropout2d else kind
        return call.layer(module, {"p": call["p"], "inplace": inplace}) if module is not None else None

    return read


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) * axes if len(value) == 1 else tuple(value)


def _rank(value: Any) -> int:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return known.ndim if isinstance(known, Tensor) else 0


def _only_first(node: fx.Node) -> bool:
    """Whether the operator's other outputs are at most outputs of the program: statistics."""
    getitems = [
        u for u in node.users if u.op == "call_function" and getattr(u.target, "__name__", "") == "getitem"
    ]
    return len(getitems) == len(node.users) and all(
        u.args[1] == 0 or all(v.op == "output" for v in u.users) for u in getitems
    )


_batch_norm, _instance_norm = _norm_of(_BATCH_NORM), _norm_of(_INSTANCE_NORM)
_READERS: Mapping[str, Callable[[_Operator], Layer | None]] = {
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
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "native_group_norm": _group_norm,
    "prelu": _prelu,
    "dropout": _dropout(nn.Dropout),
    "dropout_": _dropout(nn.Dropout, inplace=True),
    "native_dropout": _dropout(nn.Dropout),
    "feature_dropout": _dropout(nn.Dropout2d),
    "feature_dropout_": _dropout(nn.Dropout2d, inplace=True),
    "alpha_dropout": _dropout(nn.AlphaDropout),
    "feature_alpha_dropout": _dropout(nn.FeatureAlphaDropout),
}
