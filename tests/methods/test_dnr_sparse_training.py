"""A network on its budget between epochs: growth at zero, live momentum, and the dynamic term with its gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import build, example
from torch import Tensor, nn
from training_tasks import TABLE, answers, images, task_of

from edgeprune.methods._dnr.sparse_training import Plan, SparseTraining
from edgeprune.methods.dnr import DNR
from edgeprune.structure.groups import find_groups
from edgeprune.structure.units import of_channels
from edgeprune.train.job import optimizer_of
from edgeprune.train.objectives import objective_of


def wired(kind: str, network: nn.Module, **plan: Any) -> tuple[SparseTraining, torch.optim.Optimizer]:
    """A network after a few steps of SGD on its budget."""
    task = task_of(network, kind, Path())
    wiring = DNR().sparse_training(network, task, task.training)  # type: ignore[arg-type]
    wiring.plan = Plan(**{"epochs": 10, **plan})
    optimizer = optimizer_of(network, replace(TABLE, lr=0.05))
    split = images(32, 4)
    network.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective_of(TABLE, None)(
            network, split.take(torch.arange(32)), split.labels, torch.Generator()
        )
        loss.backward()
        optimizer.step()
        wiring.after_step(optimizer, 0.05)
    return wiring, optimizer


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_growing_does_not_change_the_answers_and_pruning_does(kind: str) -> None:
    network = build("residual")
    wiring, optimizer = wired(kind, network)
    before = answers(network)
    old = dict(wiring.masks)
    pruned = copy.deepcopy(network)
    wiring.after_epoch(0, optimizer)
    grown = {name: mask & ~old[name] for name, mask in wiring.masks.items()}
    assert any(bool(g.any()) for g in grown.values())
    # Zero what stayed of the old masks alone in a copy: only pruning, no growth.
    values = dict(network.named_parameters())
    for name, parameter in pruned.named_parameters():
        if name in wiring.weights:
            parameter.data[values[name] == 0] = 0
    assert torch.equal(answers(pruned), answers(network))
    assert not torch.equal(before, answers(network))
    for name, mask in wiring.units.entries({n: ~g for n, g in grown.items()}, network, ("consumer",)).items():
        assert bool((values[name][~mask] == 0).all()), "what grows starts at zero"


def test_what_is_traded_for_itself_starts_at_zero_unless_values_are_revived() -> None:
    kept = {}
    for revive in (False, True):
        network = build("plain")
        wiring, optimizer = wired("weight", network, revive_value=revive)
        old = dict(wiring.masks)
        wiring.after_epoch(0, optimizer)
        both = {name: old[name] & mask for name, mask in wiring.masks.items()}
        kept[revive] = sum(
            int(torch.count_nonzero(wiring.weights[name].detach().reshape(-1)[m])) for name, m in both.items()
        )
    assert kept[True] > kept[False]


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_the_momentum_of_what_is_not_there_lives(kind: str) -> None:
    wiring, optimizer = wired(kind, build("residual"))
    stays = wiring.units.entries(wiring.masks, wiring.network, ("consumer",))
    for name, keep in stays.items():
        gone = optimizer.state[wiring.weights[name]]["momentum_buffer"][~keep]
        assert float(gone.abs().max()) > 0


def test_momentum_of_what_is_pruned_is_left_as_it_is() -> None:
    wiring, optimizer = wired("weight", build("plain"))
    before = {n: optimizer.state[w]["momentum_buffer"].clone() for n, w in wiring.weights.items()}
    wiring.after_epoch(0, optimizer)
    assert all(
        torch.equal(optimizer.state[w]["momentum_buffer"], before[n]) for n, w in wiring.weights.items()
    )


def test_a_channel_scores_by_the_norm_of_the_slices_that_read_it() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 2))
    network[3].weight.data = torch.tensor([[1, 0.1, 2], [0.5, 0.2, -1]])
    groups = find_groups(network, example()).groups
    wiring = SparseTraining(
        network, of_channels(groups), Plan(2), {groups[0].name: torch.ones(3, dtype=torch.bool)}
    )
    norms = wiring.scores(wiring.weights)[groups[0].name]
    assert norms.tolist() == pytest.approx([1.1180, 0.2236, 2.2361], abs=1e-4)
    assert int(norms.argmin()) == 1


def test_the_schedule_trades_nothing_after_the_last_epoch_or_beyond_its_end() -> None:
    paper = Plan(200)
    assert [paper.rate_after(e) for e in (0, 1, 50, 100)] == pytest.approx([0.5, 0.4975, 0.375, 0.25])
    assert paper.rate_after(198) > 0 == paper.rate_after(199)
    short = Plan(8, until=0.5)
    assert [short.rate_after(e) for e in range(8)] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0, 0, 0])
    assert Plan(8, until=0.0).rate_after(0) == 0
    assert Plan(8, rate=0.0).rate_after(0) == 0


# The dynamic term


def pull(wiring: SparseTraining) -> tuple[float, dict[str, Tensor]]:
    wiring.network.zero_grad()
    value = wiring.penalty()
    value.backward()
    return value.item(), {
        n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in wiring.weights.items()
    }


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_the_dynamic_term_pulls_towards_the_weights_at_the_epochs_start(kind: str) -> None:
    wiring, optimizer = wired(kind, build("plain"), rho=0.5)
    assert wiring.penalty().item() == 0, "the first epoch has no anchor"
    wiring.after_epoch(0, optimizer)
    start = {name: w.detach().clone() for name, w in wiring.weights.items()}
    value, gradient = pull(wiring)
    assert value == 0
    assert all(bool((g == 0).all()) for g in gradient.values())
    for w in wiring.weights.values():
        w.data += torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    value, gradient = pull(wiring)
    away = {name: w.detach() - start[name] for name, w in wiring.weights.items()}
    assert value == pytest.approx(0.25 * sum(float((a**2).sum()) for a in away.values()), rel=1e-5)
    for name, a in away.items():
        assert torch.allclose(gradient[name], 0.5 * a, atol=1e-6)


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_admm_pulls_what_the_next_rewiring_would_remove_to_zero_and_adds_it_up(kind: str) -> None:
    wiring, optimizer = wired(kind, build("plain"), rho=0.5, regularizer="admm", rate=0.5)
    wiring.after_epoch(0, optimizer)
    name = next(n for n in wiring.weights if bool(wiring.duals[n].any()))
    weak = wiring.duals[name] != 0
    start = wiring.weights[name].detach().clone()
    _, gradient = pull(wiring)
    assert torch.allclose(gradient[name][weak], 0.5 * 2 * start[weak])
    assert bool((gradient[name][~weak] == 0).all())
    assert bool((wiring.anchors[name][weak] == 0).all())
    assert torch.equal(wiring.anchors[name][~weak], start[~weak])
    assert torch.equal(wiring.duals[name][weak], start[weak])


def test_admms_duals_grow_while_a_weight_stays_weak_and_end_with_it() -> None:
    wiring, optimizer = wired("weight", build("plain"), regularizer="admm", rate=0.2, epochs=100)
    for epoch in range(4):
        wiring.after_epoch(epoch, optimizer)
        active = wiring.units.entries(wiring.masks, wiring.network)
        for name, dual in wiring.duals.items():
            assert name not in active or bool((dual[~active[name]] == 0).all())
            assert not bool((wiring.anchors[name][dual != 0] != 0).any())
