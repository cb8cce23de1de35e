"""cut: remove the chosen channels, and verify that the output equals that of the masked network."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

from torch import Tensor, nn

from edgeprune import models
from edgeprune.errors import ModelError
from edgeprune.models import total_macs, total_params
from edgeprune.records import Bundle, Group, Masks, Plan

CUT_VERSION = 2


def run_cut(
    bundle: Bundle,
    groups: Sequence[Group],
    masks: Masks,
    left_out: Mapping[str, str],
    example: Tensor,
    *,
    edited: Mapping[str, Tensor] | None = None,
) -> tuple[Plan, Bundle]:
    """Cut a copy of the network.

    Args:
        groups, masks, left_out: from `prune.run`. example: float32 (N, C, H, W), normalized.
        edited: state-dict name -> a tensor that the method changed. The edited network is verified; the counts before
            are those of `bundle`.

    Returns:
        The plan, and the bundle of the smaller network with the plan appended. Groups that fail the verification with
        these weights are not cut and are added to the plan's `left_out`.
    """
    network = _edited(bundle.module, edited or {})
    channels, failed = _verified(network, groups, masks.channels, example)
    tensors = models.removed_positions(groups, channels)
    before = (total_params(bundle.module), total_macs(bundle.module, example))
    attributes = models.cut(network, tensors)
    after = (total_params(network), total_macs(network, example))
    if tensors:
        _check_smaller(before, after)
        shapes = [tuple(models.checked_logits(net, example).shape) for net in (bundle.module, network)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"the output has shape {shapes[1]} after the cut, {shapes[0]} before")
    removed = {
        g: tuple((~keep).nonzero().flatten().tolist()) for g, keep in channels.items() if not keep.all()
    }
    plan = Plan(
        removed=removed, tensors=tensors, attributes=attributes,
        left_out={**left_out, **failed}, params=after[0], macs=after[1], params_before=before[0], macs_before=before[1],
    )  # fmt: skip
    return plan, replace(bundle, module=network, plans=(*bundle.plans, plan))


def _edited(module: nn.Module, edited: Mapping[str, Tensor]) -> nn.Module:
    copy = deepcopy(module)
    state = copy.state_dict()
    for name, tensor in edited.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"is {tuple(state[name].shape)} there" if name in state else "is not there"
            raise ModelError(f"the method edited {name} {tuple(tensor.shape)}, which {found}")
        state[name].copy_(tensor)
    return copy


def _verified(
    network: nn.Module, groups: Sequence[Group], channels: Mapping[str, Tensor], example: Tensor
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if models.proof_failure(network, groups, channels, example) is None:
        return dict(channels), {}
    alone = {g: models.proof_failure(network, groups, {g: keep}, example) for g, keep in channels.items()}
    failed = {g: failure for g, failure in alone.items() if failure is not None}
    rest = {g: keep for g, keep in channels.items() if g not in failed}
    failure = models.proof_failure(network, groups, rest, example)
    if failure is not None:
        raise ModelError(
            f"the outputs of the cut and the masked network differ, but not for any single group: {failure}",
            "leave layers out with --set prune.skip='[\"LAYER\"]'",
        )
    return rest, failed


def _check_smaller(before: tuple[int, int], after: tuple[int, int]) -> None:
    if not (after[0] < before[0] and after[1] < before[1]):
        raise ModelError(
            f"the cut left params {before[0]} -> {after[0]} and macs {before[1]} -> {after[1]}: "
            "nothing was removed where it counts"
        )
