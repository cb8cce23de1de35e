"""Two networks of the same calls, run together over the same images, one call at a time.

So the inputs of a compressed layer and the outputs of the dense one are available together, and the layer can be
changed before anything downstream is run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.models import FORWARD_ERRORS, Call, Program, Ref, Weight, affine, tensors
from edgeprune.repair.least_squares import CutOff

# A batch-norm that hardly scales an output can't pass a correction on.
FAINT = 1e-3
# Constant below 0. What they do to large values is left out of account.
_RECTIFIERS = frozenset(("relu", "relu6"))


@dataclass(frozen=True)
class Downstream:
    """norm: the batch-norm call that alone reads the layer. total: the sum that alone reads that.

    axis: the channel dimension of the layer's output. shortcut: the name of the other value in the sum.
    rectified: whether only an activation that is 0 below 0 reads the result.
    """

    axis: int
    norm: Call | None
    total: Call | None
    shortcut: str
    rectified: bool


def downstream_of(program: Program, call: Call) -> Downstream:
    """What follows a layer's call, as far as nothing else reads the values between."""
    end, norm, total, shortcut = call, None, None, ""
    axis = len(call.shape) - 1 if call.op == "linear" else 1
    follower = _only_user(program, end)
    normalizes = follower is not None and follower.op == "batch_norm" and axis == 1
    if follower and normalizes and follower.arg("running_mean") is not None and not follower.arg("training"):
        end, norm = follower, follower
        follower = _only_user(program, end)
    plain = follower is not None and follower.op == "add" and len(follower.reads) == 2
    if follower is not None and plain and follower.arg("alpha") == 1 and follower.shape == call.shape:
        total, shortcut = follower, follower.reads[1 - follower.reads.index(end.name)]
        follower = _only_user(program, total)
    return Downstream(axis, norm, total, shortcut, follower is not None and follower.op in _RECTIFIERS)


def norm_scale(norm: Call | None, state: Mapping[str, Tensor], outputs: int) -> tuple[Tensor, Tensor]:
    """A batch-norm's scale of each output (1 without one), and where it is next to 0: (O,) each."""
    if norm is None:
        return torch.ones(outputs), torch.zeros(outputs, dtype=torch.bool)
    given = (norm.arg(name) for name in ("running_mean", "running_var", "weight"))
    mean, variance, weight = (None if w is None else state[w.name].detach().double() for w in given)
    assert mean is not None, "its statistics are fixed"
    assert variance is not None, "its statistics are fixed"
    scale, _ = affine(mean, variance, weight, None, norm.arg("eps"))
    faint = scale.abs() <= FAINT * scale.abs().max()
    return torch.where(faint, 1.0, scale).float(), faint


def residual_target(found: Downstream, state: Mapping[str, Tensor], dense: Tensor, small: Tensor) -> Tensor:
    """What the layer's output should gain so that the sum is the dense one."""
    scale, faint = norm_scale(found.norm, state, small.shape[found.axis])
    gain = torch.where(faint, 0.0, 1 / scale)
    return (dense - small) * _along(gain, small.ndim, found.axis)


def active_mask(
    found: Downstream, state: Mapping[str, Tensor], level: Tensor, shortcut: Tensor | None, ndim: int
) -> CutOff | None:
    """Which outputs of the layer the activation after it clips; None when there is none.

    Args:
        state: of the cut network. level: (O,), what the batch-norm subtracts. shortcut: the other value of the sum in
        the cut network, (N, O, ...). ndim: of the layer's output.

    Returns:
        `at` has the shape of the layer's output, or 1 in the place of N and the positions.
    """
    if not found.rectified or (found.total is not None and shortcut is None):
        return None
    scale, faint = norm_scale(found.norm, state, len(level))
    shift = found.norm.arg("bias") if found.norm is not None else None
    bias = state[shift.name].detach() if shift is not None else torch.zeros(len(level))
    at = _along(level.float() - bias / scale, ndim, found.axis)
    if shortcut is not None:
        at = at - shortcut / _along(scale, ndim, found.axis)
    return CutOff(at, torch.where(faint, 0.0, scale.sign()))


def _along(values: Tensor, ndim: int, axis: int) -> Tensor:
    return values.view(*(-1 if i == axis else 1 for i in range(ndim)))


def _only_user(program: Program, call: Call) -> Call | None:
    users = program.users(call.name)
    return users[0] if len(users) == 1 and call.name != program.output else None


_VIEWS = ("view", "_unsafe_view", "reshape")
_FILLED = ("expand", "new_zeros", "new_ones", "new_full")


class Execution:
    """One of the two networks, and the values that are still needed, in chunks of images."""

    def __init__(self, network: nn.Module, program: Program, chunks: Sequence[Tensor]) -> None:
        self.network, self.program = network, program
        self.state = {**tensors(network), **program.constants}
        self.values: dict[str, list[Any]] = {program.input: list(chunks)}
        self._images = [len(chunk) for chunk in chunks]

    def run(self, call: Call) -> None:
        """Run a call on every chunk, with the current weights."""
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
        """Scale the batch size in arguments that were traced for one image."""
        if images == 1 or call.op not in (*_VIEWS, *_FILLED) or not args[1]:
            return args
        first = args[1][0]
        grown = first > 0 and args[0].numel() == images * math.prod(call.shape)
        many = grown if call.op in _VIEWS else first == 1
        return (args[0], (images * first, *args[1][1:]), *args[2:]) if many else args


def check_batches(network: nn.Module, program: Program, images: Tensor) -> bool:
    """Whether a program that was traced for one image gives the network's output for several."""
    try:
        side = Execution(network, program, [images])
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
    """Refuse networks whose calls can't be matched by their place."""
    if len(dense.calls) != len(small.calls):
        raise UnsupportedModel(
            f"the dense network makes {len(dense.calls)} operator calls and the compressed one {len(small.calls)}"
        )
    for first, second in zip(dense.calls, small.calls, strict=True):
        if (first.op, first.weights) != (second.op, second.weights):
            raise UnsupportedModel(
                f"the dense network calls {first.op} at {first.layer!r} where the compressed one calls {second.op}"
            )


def run_pairwise(dense: Execution, small: Execution, visit: Callable[[Call, Call, bool], None]) -> None:
    """Run both networks call by call; `visit` may change the compressed one's weights before it runs a call."""
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
