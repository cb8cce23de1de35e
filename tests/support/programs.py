"""Running a traced program call by call, on many inputs, with something added to the output of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.bounds.interval import Interval
from edgeprune.bounds.propagation import Bounds
from edgeprune.models.tracing import Program, Ref, Weight


def run(
    program: Program, state: Mapping[str, Tensor], x: Tensor, added: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every call's output, one input after the other: (N, ...), N in the place of the batch of one."""
    with torch.no_grad():
        runs = [_once(program, state, x[i : i + 1], i, added or {}) for i in range(len(x))]
    return {
        name: torch.cat(found) if program.shape_of(name)[:1] == (1,) else torch.stack(found)
        for name in runs[0]
        if isinstance(runs[0][name], Tensor)
        for found in [[one[name] for one in runs]]
    }


def _once(
    program: Program, state: Mapping[str, Tensor], x: Tensor, i: int, added: Mapping[str, Tensor]
) -> dict[str, Any]:
    values: dict[str, Any] = {program.input: x + (added[program.input][i] if program.input in added else 0)}

    def fill(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(fill(a) for a in arg)
        if isinstance(arg, Ref):
            return values[arg.name]
        if isinstance(arg, Weight):
            return cast(state[arg.name] if arg.name in state else program.constants[arg.name])
        return arg

    def cast(value: Any) -> Any:
        return value.to(x.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    for call in program.calls:
        out = cast(call.run(fill(call.args)))
        values[call.name] = out + added[call.name][i] if call.name in added else out
    return values


def inputs(box: Interval, count: int, seed: int = 0) -> Tensor:
    """Points of a box (1, ...): uniform ones, corners, the two ends; float64."""
    generator = torch.Generator().manual_seed(seed)
    lo, hi = box.lo.double(), box.hi.double()
    share = torch.rand((count, *lo.shape[1:]), generator=generator, dtype=torch.float64)
    share = torch.cat([share, share.round().flip(0)])
    return torch.cat([torch.maximum(torch.minimum(lo + (hi - lo) * share, hi), lo), lo, hi])


def box_of(
    shape: tuple[int, ...], low: float = -1.0, high: float = 1.0, dtype: torch.dtype = torch.float64
) -> Interval:
    """The same limits for every entry of an input (1, ...)."""
    return Interval(torch.full((1, *shape), low, dtype=dtype), torch.full((1, *shape), high, dtype=dtype))


def outside(bounds: Bounds, values: Mapping[str, Tensor]) -> list[str]:
    """The calls that have a value outside of its interval."""
    return [name for name, interval in bounds.intervals.items() if not contains(interval, values[name])]


def contains(interval: Interval, values: Tensor) -> bool:
    """Whether every value lies inside; broadcasts."""
    return bool(((values >= interval.lo) & (values <= interval.hi)).all())


def within(change: Tensor, bound: Interval, scale: Tensor) -> bool:
    """Whether observed changes lie in their bound, but for the rounding of the float64 runs they are differences of."""
    room = 1e-11 * (1 + scale.abs().amax())
    return bool(((change >= bound.lo - room) & (change <= bound.hi + room)).all())


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random scales, shifts and statistics in every norm, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)):
                for name, tensor in (
                    *module.named_parameters(recurse=False),
                    *module.named_buffers(recurse=False),
                ):
                    if tensor.is_floating_point():
                        low = -0.5 if name in ("bias", "running_mean") else 0.5
                        tensor.uniform_(low, low + 1, generator=generator)
    return network.eval()
