"""Prunable units: what a channel of a group owns, summed over its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgeprune.records import Group


def channel_sums(group: Group, values: Mapping[str, Tensor], roles: Sequence[str]) -> Tensor:
    """Sum a value per parameter entry over the entries that each channel owns.

    Args:
        values: state-dict name -> a number per entry, shaped like the parameter; missing tensors count nothing.
        roles: which members count (producer, norm, consumer).

    Returns:
        float64 (C,).
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        if member.role not in roles or member.tensor not in values:
            continue
        value = values[member.tensor]
        flat = value.movedim(member.axis, 0).reshape(value.shape[member.axis], -1).double().sum(1)
        lengths = {len(p) for p in member.positions}
        if lengths == {1}:
            total += flat[torch.tensor([p[0] for p in member.positions])]
            continue
        owner = torch.tensor([unit for unit, p in enumerate(member.positions) for _ in p], dtype=torch.long)
        where = torch.tensor([q for p in member.positions for q in p], dtype=torch.long)
        total.index_add_(0, owner, flat[where])
    return total
