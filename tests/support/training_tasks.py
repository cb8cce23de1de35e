"""What a training method is handed in tests, small enough to train in a second, and what must hold of its choice."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nets import SHAPE, example
from torch import Tensor, nn

from edgeprune.data.collection import Split, in_memory
from edgeprune.methods._base import PruneTask, Training
from edgeprune.models.costs import cost_model, total_params
from edgeprune.recipe.schema import TuneTable
from edgeprune.records import Masks
from edgeprune.structure.allocation import Rules
from edgeprune.structure.groups import find_groups
from edgeprune.structure.units import of_weights

TABLE = TuneTable(epochs=3, lr=0.02, batch=16, augment="off", distill=0.0, mixed="fp32")
ROBUST = replace(TABLE, objective="pgd", attack_steps=2)


def images(count: int, seed: int) -> Split:
    """Images whose class is the brightest of five places."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    pixels = torch.randint(0, 120, (count, *SHAPE), generator=generator)
    for place in range(5):
        pixels[labels == place, :, place : place + 3, 1:7] += 100
    return in_memory("images", pixels.to(torch.uint8), labels)


def task_of(
    network: nn.Module, kind: str, scratch: Path, table: TuneTable = TABLE, **rules: Any
) -> PruneTask:
    """What the stage would hand to the method; half of the parameters or multiply-accumulates may stay."""
    groups = find_groups(network, example()).groups if kind == "channel" else ()
    costs = cost_model(network, groups, example())
    limits = {
        "weight": {"params": 0.5 * total_params(network)},
        "2:4": {},
        "channel": {"macs": 0.5 * costs.cost({})["macs"], "params": 0.6 * costs.cost({})["params"]},
    }[kind]
    teacher = copy.deepcopy(network).eval()
    training = Training(images(48, 1), images(20, 2), table, scratch, 3, teacher, lambda bare: bare)
    return PruneTask(
        groups, costs, Rules(**{"limits": limits, **rules}), lambda bare, x: bare(x), training=training,
        weights=None if kind == "channel" else of_weights(network, kind),
    )  # fmt: skip


def flat(masks: Masks) -> dict[str, Tensor]:
    return {name: keep.flatten() for name, keep in {**masks.channels, **masks.weights}.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def check_budget(task: PruneTask, masks: Mapping[str, Tensor]) -> None:
    units = task.units
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    if units.granularity == "weight":
        assert sum(kept.values()) == task.quota()
    if units.granularity == "2:4":
        assert all((masks[name][blocks].sum(1) == 2).all() for name, blocks in units.blocks.items())
    if units.granularity == "channel":
        cost = task.costs.cost(kept)
        assert all(cost[m] <= limit for m, limit in task.rules.limits.items())
        assert min(kept.values()) >= 1
        for name, size in units.sizes.items():
            if task.rules.multiple_of == 1 and kept[name] < size:
                more = task.costs.cost({**kept, name: kept[name] + 1})
                assert any(more[m] > limit for m, limit in task.rules.limits.items())


def answers(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(example(6, 9))
