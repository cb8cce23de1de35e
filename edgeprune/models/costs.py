"""What a network costs, counted: parameters and multiply-accumulates, per layer and as a function of kept channels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.models.surgery import checked_logits
from edgeprune.models.torch_export import temporary_hooks
from edgeprune.records import Group, InputSpec

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


def _twice(*sizes: int) -> int:
    return 2 * prod(sizes)


_ATEN = torch.ops.aten
# Products that torch's counter does not know: a matrix or a vector with a vector, and nn.Bilinear.
_PRODUCTS: dict[Any, Callable[..., int]] = {
    _ATEN.mv: lambda a, b, *_, **__: _twice(*a),
    _ATEN.addmv: lambda _, a, b, *__, **___: _twice(*a),
    _ATEN.dot: lambda a, b, *_, **__: _twice(*a),
    _ATEN._trilinear: lambda a, b, *_, **__: _twice(*a[:-1], *b),
}

_NOT_COUNTED = frozenset({"_cdist_forward", "_embedding_bag", "_pdist_forward"})


@dataclass(frozen=True)
class LayerCost:
    """One layer: its parameters (zeros included) and its multiply-accumulates for one image."""

    name: str
    op: str
    channels: int
    params: int
    macs: int
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class CostModel:
    """Costs as a function of how many channels each group keeps; exact where all channels of a group are alike.

    sizes: tensor -> shape. positions: weight -> multiply-accumulates per entry. shares: tensor -> axis ->
    ((group, entries per channel), ...). channels: group -> C. constant_macs: what no layer's weight explains
    (attention products). constant_params: parameters that no cut touches. uncounted: operators that multiply, and by
    how much is not known.
    """

    sizes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, float]
    shares: Mapping[str, Mapping[int, tuple[tuple[str, float], ...]]]
    channels: Mapping[str, int]
    constant_macs: float
    constant_params: int
    parameters: frozenset[str]
    uncounted: tuple[str, ...] = ()

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Parameters and multiply-accumulates (one image) when each group keeps so many channels."""
        macs, params = self.constant_macs, float(self.constant_params)
        for name, shape in self.sizes.items():
            entries = 1.0
            for axis, size in enumerate(shape):
                gone = sum(
                    (self.channels[g] - kept.get(g, self.channels[g])) * per
                    for g, per in self.shares[name].get(axis, ())
                )
                entries *= size - gone
            macs += self.positions.get(name, 0.0) * entries
            params += entries if name in self.parameters else 0.0
        return {"macs": macs, "params": params}


def normalized_example(spec: InputSpec, seed: int, batch: int = 1) -> Tensor:
    """Random input of the bare network: float32 (batch, C, H, W), normalized by the spec's mean and std."""
    generator = torch.Generator().manual_seed(seed)
    x = spec.low + (spec.high - spec.low) * torch.rand((batch, *spec.shape), generator=generator)
    return normalize(x, spec)


def normalize(x: Tensor, spec: InputSpec) -> Tensor:
    """Pixels (N, C, H, W) by the spec's mean and std, where it has them."""
    if not spec.mean:
        return x
    return (x - torch.tensor(spec.mean).view(-1, 1, 1)) / torch.tensor(spec.std).view(-1, 1, 1)


def layer_costs(network: nn.Module, example: Tensor) -> tuple[LayerCost, ...]:
    """One row for every convolution and linear layer that the input reaches, in the order of definition."""
    entries: dict[nn.Module, int] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counted = inputs[0] if isinstance(module, _TRANSPOSED) else output
        entries[module] = entries.get(module, 0) + counted.numel() // example.shape[0]

    layers = [m for m in network.modules() if isinstance(m, LAYERS)]
    with temporary_hooks(m.register_forward_hook(remember) for m in layers):
        checked_logits(network, example)
    return tuple(_row(name, m, entries[m]) for name, m in network.named_modules() if m in entries)


def total_macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image: convolutions, and all products, with weights or without.

    Attention and recurrent layers are taken apart into the products that they are made of, whatever kernel runs them
    otherwise. Elementwise products, sums and transforms (FFT) are none.
    """
    with counting() as counter:
        checked_logits(network, example)
    return counter.get_total_flops() // 2 // example.shape[0]


def uncounted(network: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Operators that the network runs and whose multiply-accumulates are not known: of other packages, and a few."""
    with _Seen() as seen, counting():
        checked_logits(network, example)
    return tuple(sorted(seen.names))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims") or func._opname in _NOT_COUNTED:
            self.names.add(f"{func.namespace}::{func._opname}")
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts twice the multiply-accumulates of what runs inside; no fused kernel hides any of them."""
    # torch.backends.mkldnn.flags would do, but warns of GPUs that are not there.
    fused = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=_PRODUCTS) as counter,
        ):
            yield counter
    finally:
        torch._C._set_mkldnn_enabled(fused[0])
        torch.backends.mha.set_fastpath_enabled(fused[1])


def total_params(network: nn.Module) -> int:
    """Non-zero parameters; a parameter that two layers share counts once."""
    return sum(int(torch.count_nonzero(p)) for p in network.parameters())


def cost_model(network: nn.Module, groups: Sequence[Group], example: Tensor) -> CostModel:
    """The costs of a network as a function of the channels that each group keeps."""
    rows = layer_costs(network, example)
    positions = {f"{r.name}.weight": r.macs / network.get_parameter(f"{r.name}.weight").numel() for r in rows}
    shares: dict[str, dict[int, list[tuple[str, float]]]] = {}
    for group in groups:
        for member in group.members:
            per = sum(len(p) for p in member.positions) / group.channels
            shares.setdefault(member.tensor, {}).setdefault(member.axis, []).append((group.name, per))
    named = dict(network.named_parameters())
    everything = dict(network.named_parameters(remove_duplicate=False))
    sizes = {n: tuple(everything[n].shape) for n in {*shares, *positions} if n in everything}
    touched = sum(named[n].numel() for n in sizes if n in named)
    explained = sum(r.macs for r in rows)
    return CostModel(
        sizes=sizes,
        positions=positions,
        shares={n: {a: tuple(v) for a, v in shares.get(n, {}).items()} for n in sizes},
        channels={g.name: g.channels for g in groups},
        constant_macs=float(max(0, total_macs(network, example) - explained)),
        constant_params=sum(p.numel() for p in named.values()) - touched,
        parameters=frozenset(n for n in sizes if n in named),
        uncounted=uncounted(network, example),
    )


def _row(name: str, module: Any, entries: int) -> LayerCost:
    """entries: of the output; of the input where that is multiplied (transposed convolutions)."""
    weight: Tensor = module.weight
    params = sum(p.numel() for p in module.parameters(recurse=False))
    op = type(module).__name__
    if isinstance(module, nn.Linear):
        return LayerCost(name, op, module.out_features, params, entries * module.in_features, ())
    return LayerCost(
        name, op, module.out_channels, params, entries * weight[0].numel(), tuple(module.kernel_size)
    )
