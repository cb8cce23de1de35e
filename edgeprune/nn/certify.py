"""A sound bound of how much pruning can change the logits, for every image that the network may get.

The small network is run on the dense one's traced program: what was cut comes back as zeros, which gives the same
outputs. So both have the same calls, and the difference of the two is followed from call to call. The units that are
gone do no harm: where they were read, the weights are zeros now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.nn.bounds import Interval, activation_bounds
from edgeprune.nn.bounds_interval import Value
from edgeprune.nn.bounds_walk import Weights, changes_of, outward
from edgeprune.nn.tracing import Program, trace
from edgeprune.records import Bundle, InputSpec

Removed = Mapping[str, Sequence[tuple[int, Sequence[int]]]]


def input_box(spec: InputSpec) -> Interval:
    """All inputs that the bare network may get, normalized: float64 (1, C, H, W)."""
    channels = spec.shape[0]
    mean = torch.tensor(spec.mean or (0.0,) * channels, dtype=torch.float64)
    std = torch.tensor(spec.std or (1.0,) * channels, dtype=torch.float64)
    ends = [((end - mean) / std).reshape(1, -1, 1, 1).expand(1, *spec.shape) for end in (spec.low, spec.high)]
    return Interval(torch.minimum(*ends), torch.maximum(*ends))


def full_size(
    small_state: Mapping[str, Tensor], tensors: Removed, dense_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The small network's tensors in the dense one's shapes, zeros (a running variance: ones) where some were cut.

    For several cuts, from the last to the first: the result of each is the small state of the one before.

    Args:
        small_state: state dict after the cut. tensors: `Plan.tensors` of the cut.
        dense_state: gives what the small one lacks.

    Raises:
        ModelError: the cut does not belong to these tensors.
    """
    full = dict(dense_state)
    for name, small in small_state.items():
        out = small.detach()
        for axis, positions in tensors.get(name, ()):
            out = _spread(name, out, axis, positions)
        full[name] = out
    return full


def logit_change(
    program: Program,
    dense_state: Mapping[str, Tensor],
    twin_state: Mapping[str, Tensor],
    box: Interval,
    *,
    collapsed: bool,
) -> Interval:
    """A bound of twin(x) - dense(x) for every x in the box.

    Args:
        program: traced from the dense network. dense_state, twin_state: two state dicts of its shapes.
        box: (1, C, H, W), as `input_box`. collapsed: as for `activation_bounds`, cheaper and looser.

    Returns:
        (1, K), in the dtype of the box.

    Raises:
        ModelError: a tensor of the twin has another shape than the dense one.
        Unbounded: an operator has no bound; says which.
    """
    for name, tensor in twin_state.items():
        if name in dense_state and tensor.shape != dense_state[name].shape:
            raise ModelError(
                f"{name} has shape {tuple(tensor.shape)}, the dense network's has {tuple(dense_state[name].shape)}",
                "put the removed positions back with full_size",
            )
    states = (dense_state, twin_state)
    bounds = [activation_bounds(program, s, box, collapsed=collapsed) for s in states]
    weights = [Weights(program, s, box.lo.dtype) for s in states]
    found = changes_of(program, (weights[0], weights[1]), (bounds[0], bounds[1]), {})
    return outward(Value(found.full(), found.shape))


def bundle_change(dense: Bundle, small: Bundle, *, collapsed: bool) -> Interval:
    """A bound of small(x) - dense(x) for every image x that the dense network may get; see `logit_change`.

    Args:
        small: made from `dense` by cuts, which are the plans that it has beyond those of `dense`.

    Returns:
        float64 (1, K).

    Raises:
        UnsupportedModel, ModelError, Unbounded: the network can't be traced, the plans don't fit, no bound.
    """
    program = trace(dense.module, torch.zeros(1, *dense.input.shape))
    dense_state, state = dense.module.state_dict(), dict(small.module.state_dict())
    for plan in reversed(small.plans[len(dense.plans) :]):
        state = full_size(state, plan.tensors, dense_state)
    return logit_change(program, dense_state, state, input_box(dense.input), collapsed=collapsed)


def margin_change(change: Interval) -> Tensor:
    """How much the difference of two logits can change at most: max over i != j of hi_i - lo_j; (B,).

    Where the margin of an answer is more than this, its class stays (methods' R; the sound version of "uniform").
    With one logit there is no other class, and it is 0.
    """
    classes = change.lo.shape[1]
    if classes < 2:
        return change.lo.new_zeros(change.lo.shape[0])
    # The largest hi and the smallest lo, of two different classes: among the two best of each.
    highs, high_at = change.hi.topk(2, dim=1)
    lows, low_at = (-change.lo).topk(2, dim=1)
    sums = highs.unsqueeze(2) + lows.unsqueeze(1)
    same = high_at.unsqueeze(2) == low_at.unsqueeze(1)
    return sums.masked_fill(same, -torch.inf).flatten(1).amax(1)


def _spread(name: str, tensor: Tensor, axis: int, positions: Sequence[int]) -> Tensor:
    """The tensor with the removed positions along an axis back in."""
    if not positions:
        return tensor
    size = (tensor.shape[axis] if axis < tensor.ndim else -len(positions)) + len(positions)
    gone = set(positions)
    kept = [i for i in range(size) if i not in gone]
    if axis >= tensor.ndim or len(kept) != tensor.shape[axis]:
        raise ModelError(
            f"{name} has shape {tuple(tensor.shape)}, which the plan does not fit (axis {axis})",
            "use the plan that the network was cut with",
        )
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    fill = 1.0 if name.rpartition(".")[2] == "running_var" else 0.0
    return tensor.new_full(shape, fill).index_copy_(axis, torch.tensor(kept, device=tensor.device), tensor)
