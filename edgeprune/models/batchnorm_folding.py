"""A network whose batch-norms are part of the convolutions before them: the same outputs, gradients in less time.

In evaluation mode a batch-norm scales and shifts each channel by constants, which the weights and the bias of the
layer before it can take over (Jacob et al. 2018, section 3.2), if nothing else reads what that layer makes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgeprune.errors import ModelError, not_short
from edgeprune.models.inference import logits, modes
from edgeprune.models.torch_export import FORWARD_ERRORS, temporary_hooks

# Their exact classes: a subclass may compute its weight, and so does a parametrization, which makes a subclass.
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Between outputs, relative to the largest logit. Rounding in another order gives 1e-6.
TOLERANCE = 1e-4


def folded(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy for evaluation, batch-norms folded where that is sound; the module itself where none can be.

    A batch-norm is folded when the network, run on the example, gives it the output of a convolution or a linear
    layer that is called once and whose output and weight nothing else reads. The copy is used only if its outputs
    for the example and its negative are the same. Its kernels lie in memory as the example does.
    """
    if not any(type(layer) in _NORMS for layer in module.modules()):
        return module
    try:
        copy = deepcopy(module).eval().requires_grad_(False)
        pairs = _pairs(copy, example)
        for weighted, norm in pairs:
            _absorb(weighted, norm)
        _replace(copy, {norm for _, norm in pairs})
        _lay_out(copy, example)
        alike = bool(pairs) and all(_alike(module, copy, x) for x in (example, 1 - example))
    except (ModelError, *FORWARD_ERRORS):
        not_short()
        # A network that can't be copied or run on the example; it says so itself when it is used.
        return module
    return copy if alike else module


def affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What a batch-norm in evaluation mode multiplies each channel by, and what it adds: (C,) each."""
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


@dataclass
class _Watch(TorchDispatchMode):
    """Counts how often operators read each tensor, by its id. Tensors stay alive, so that ids stay theirs."""

    reads: Counter[int] = field(default_factory=Counter)
    alive: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.reads.update(id(tensor) for tensor in given)
        output = func(*args, **kwargs)
        self.alive += [given, output]
        return output


@dataclass(frozen=True, eq=False)
class _Call:
    layer: nn.Module
    given: Tensor
    made: Tensor


def _pairs(network: nn.Module, example: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    candidates = [layer for layer in network.modules() if type(layer) in (*_WEIGHTED, *_NORMS)]
    owners = Counter(id(tensor) for layer in network.modules() for tensor in layer.parameters(recurse=False))
    bare = [layer for layer in candidates if not (layer._forward_hooks or layer._forward_pre_hooks)]
    calls: list[_Call] = []
    watch = _Watch()
    with _recording(bare, calls), torch.no_grad(), watch:
        logits(network, example)
    times = Counter(call.layer for call in calls)
    makers = {id(call.made): call for call in calls if type(call.layer) in _WEIGHTED}
    found: list[tuple[nn.Module, nn.Module]] = []
    for call in calls:
        maker = makers.get(id(call.given))
        if maker is None or type(call.layer) not in _NORMS or not _constant(call.layer, maker):
            continue
        weight: Any = maker.layer.weight
        once = times[maker.layer] == times[call.layer] == watch.reads[id(maker.made)] == 1
        if once and watch.reads[id(weight)] == owners[id(weight)] == 1:
            found.append((maker.layer, call.layer))
    return found


def _constant(norm: Any, maker: _Call) -> bool:
    # Of (N, L, C), which a linear layer makes, batch-norm scales the entries of L.
    along = maker.made.ndim == 2 or type(maker.layer) is not nn.Linear
    return norm.running_mean is not None and norm.running_var is not None and along


@contextmanager
def _recording(layers: Sequence[nn.Module], calls: list[_Call]) -> Iterator[None]:
    def record(layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(made, Tensor):
            calls.append(_Call(layer, given[0], made))

    with temporary_hooks(layer.register_forward_hook(record) for layer in layers):
        yield


def _absorb(weighted: Any, norm: Any) -> None:

    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    weight, bias = fuse_conv_bn_weights(
        exact(weighted.weight),  # type: ignore[arg-type]
        exact(weighted.bias),
        exact(norm.running_mean),  # type: ignore[arg-type]
        exact(norm.running_var),  # type: ignore[arg-type]
        norm.eps,
        exact(norm.weight),
        exact(norm.bias),
    )
    dtype = weighted.weight.dtype
    weighted.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    weighted.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _replace(network: nn.Module, norms: set[nn.Module]) -> None:
    for layer in list(network.modules()):
        for name, child in list(layer._modules.items()):
            if child in norms:
                setattr(layer, name, nn.Identity())


def _lay_out(network: nn.Module, example: Tensor) -> None:
    if not example.is_contiguous(memory_format=torch.channels_last) or example.is_contiguous():
        return
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _alike(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with modes(None, one), torch.no_grad():
        old, new = logits(one, x), logits(other, x)
    scale = float(old.abs().max()) or 1.0
    return old.shape == new.shape and float((old - new).abs().max()) <= TOLERANCE * scale
