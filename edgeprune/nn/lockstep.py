"""Two networks of the same calls, run side by side over the same images, one call at a time.

What a compressed network's layers get and what the dense ones' layers answered is then at hand together, and a layer
can be changed before anything behind it is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.nn.readers import tensors_of
from edgeprune.nn.surgery import FORWARD_ERRORS
from edgeprune.nn.tracing import Call, Program, Ref, Weight

_VIEWS = ("view", "_unsafe_view", "reshape")
_FILLED = ("expand", "new_zeros", "new_ones", "new_full")


class Side:
    """One of the two networks, and the values that are still needed, in chunks of images."""

    def __init__(self, network: nn.Module, program: Program, chunks: Sequence[Tensor]) -> None:
        """Start with the input. chunks: normalized images (n, C, H, W)."""
        self.network, self.program = network, program
        self.state = {**tensors_of(network), **program.constants}
        self.values: dict[str, list[Any]] = {program.input: list(chunks)}
        self._images = [len(chunk) for chunk in chunks]

    def run(self, call: Call) -> None:
        """Run a call on every chunk, with the weights as they are now."""
        with torch.no_grad():
            self.values[call.name] = [self._one(call, i) for i in range(len(self._images))]

    def _one(self, call: Call, chunk: int) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, Ref):
                return self.values[value.name][chunk]
            if isinstance(value, Weight):
                return self.state[value.name].detach()
            return tuple(fill(v) for v in value) if isinstance(value, tuple) else value  # type: ignore[union-attr]

        args = tuple(fill(a) for a in call.args)
        return call.run(self._sized(call, args, self._images[chunk]))

    def _sized(self, call: Call, args: tuple[Any, ...], images: int) -> tuple[Any, ...]:
        """Sizes for so many images where those for one were traced; those of a weight are the same for all."""
        if images == 1 or call.op not in (*_VIEWS, *_FILLED) or not args[1]:
            return args
        first = args[1][0]
        grown = first > 0 and args[0].numel() == images * math.prod(call.shape)
        many = grown if call.op in _VIEWS else first == 1
        return (args[0], (images * first, *args[1][1:]), *args[2:]) if many else args


def check_batches(network: nn.Module, program: Program, images: Tensor) -> bool:
    """Whether a program that was traced for one image gives for several what the network gives.

    Args:
        images: normalized (n, C, H, W), at least two.
    """
    try:
        side = Side(network, program, [images])
        for call in program.calls:
            side.run(call)
        with torch.no_grad():
            expected = network(images)
    except FORWARD_ERRORS:
        return False
    found = side.values[program.output][0]
    return (
        isinstance(expected, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    )


def check_same_calls(dense: Program, small: Program) -> None:
    """The calls must be the same ones, so that they can be matched by their place.

    Raises:
        UnsupportedModel: names the first call that differs.
    """
    if len(dense.calls) != len(small.calls):
        raise UnsupportedModel(
            f"the dense network makes {len(dense.calls)} operator calls and the compressed one {len(small.calls)}"
        )
    for first, second in zip(dense.calls, small.calls, strict=True):
        if (first.op, first.weights) != (second.op, second.weights):
            raise UnsupportedModel(
                f"the dense network calls {first.op} at {first.layer!r} where the compressed one calls {second.op}"
            )


def walk(dense: Side, small: Side, visit: Callable[[Call, Call, bool], None]) -> None:
    """Run both networks call by call; before the compressed one runs a call, `visit` may change its weights.

    Args:
        visit: (the dense call, which has been run; the compressed one's call; whether what that reads differs).
    """
    last = _last_uses(small.program)
    pairs = list(zip(dense.program.calls, small.program.calls, strict=True))
    partner = {b.name: a.name for a, b in pairs} | {small.program.input: dense.program.input}
    changed: set[str] = set()
    for index, (first, second) in enumerate(pairs):
        dense.run(first)
        moved = any(name in changed for name in second.reads)
        visit(first, second, moved)
        if moved or any(_differ(dense.state, small.state, n) for n in second.weights):
            small.run(second)
            changed.add(second.name)
        else:
            small.values[second.name] = dense.values[first.name]
        for name in [n for n, at in last.items() if at == index and n != small.program.output]:
            del small.values[name], dense.values[partner[name]]


def _last_uses(program: Program) -> Mapping[str, int]:
    last: dict[str, int] = {}
    for index, call in enumerate(program.calls):
        last[call.name] = index
        for name in call.reads:
            last[name] = index
    return last


def _differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str) -> bool:
    a, b = first[name], second[name]
    return a is not b and (a.shape != b.shape or not torch.equal(a, b))
