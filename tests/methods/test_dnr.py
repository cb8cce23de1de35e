"""DNR: the budget at every step and epoch, what is there first, resuming, and what is cut in the end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, build
from torch import Tensor, nn
from training_tasks import ROBUST, TABLE, answers, check_budget, flat, images, same, task_of

from edgeprune.errors import UsageError
from edgeprune.methods import dnr
from edgeprune.methods._dnr.rewiring import rewire
from edgeprune.methods.dnr import DNR
from edgeprune.models import surgery
from edgeprune.models.costs import total_params
from edgeprune.recipe.schema import TuneTable
from edgeprune.structure.allocation import Rules
from edgeprune.train import evaluation, loop
from edgeprune.train.job import History, Hooks, TrainingJob

NORMLESS = "groupnormed"
# No layer of "transposed" has input channels in fours.
KINDS = [
    (name, kind)
    for name in NETS
    for kind in ("weight", "2:4", "channel")
    if (name, kind) != ("transposed", "2:4")
]


class Killed(Exception):
    """What ends a run in a test."""


def watch(monkeypatch: pytest.MonkeyPatch, change: Callable[[Hooks, nn.Module], Hooks]) -> None:
    """Train with other hooks than the method's own."""

    def fit(module: nn.Module, course: TrainingJob, hooks: Hooks) -> History:
        return loop.fit(module, course, change(hooks, module))

    monkeypatch.setattr(dnr, "fit", fit)


# The budget, at every granularity and on every kind of network


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_budget_holds_after_every_step_and_every_epoch(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(name)
    task = task_of(network, kind, tmp_path)
    units = task.units
    steps: list[int] = []
    epochs: list[dict[str, Tensor]] = []

    def checked(hooks: Hooks, _module: nn.Module) -> Hooks:
        def after_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
            hooks.after_step(optimizer, lr)
            named = dict(network.named_parameters())
            stays = units.entries(hooks.state()["masks"], network, ("consumer",))
            assert stays
            assert all(bool((named[n][~keep] == 0).all()) for n, keep in stays.items())
            steps.append(1)

        def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
            hooks.after_epoch(epoch, optimizer)
            epochs.append(dict(hooks.state()["masks"]))
            check_budget(task, epochs[-1])

        check_budget(task, hooks.state()["masks"])
        return replace(hooks, after_step=after_step, after_epoch=after_epoch)

    watch(monkeypatch, checked)
    masks = flat(DNR()(network, task))
    assert len(steps) == 9
    assert len(epochs) == 3
    assert same(masks, epochs[-1])
    assert same(epochs[1], epochs[2]), "nothing is traded after the last epoch"
    found = task.record["dnr"]
    assert found["removed"][0] > 0 or kind == "channel"
    assert found["removed"][2] == found["grown"][2] == 0
    if kind != "channel":
        assert found["removed"] == found["grown"]
    assert json.loads(json.dumps(found)) == found
    assert {name: len(values) for name, values in found["density"].items()} == dict.fromkeys(units.sizes, 3)
    assert len(found["loss"]) == 3


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_what_went_is_zero_in_the_end(kind: str, tmp_path: Path) -> None:
    network = build("residual")
    task = task_of(network, kind, tmp_path)
    masks = flat(DNR()(network, task))
    named = dict(network.named_parameters())
    for name, keep in task.units.entries(masks, network).items():
        assert bool((named[name][~keep] == 0).all())


def test_channels_stay_on_the_levels_of_the_target(tmp_path: Path) -> None:
    network = build("residual")
    task = task_of(network, "channel", tmp_path, multiple_of=4)
    masks = DNR()(network, task).channels
    assert all(int(keep.sum()) % 4 == 0 for keep in masks.values())
    assert any(not bool(keep.all()) for keep in masks.values())
    check_budget(task, masks)


def test_a_network_that_may_keep_everything_is_only_trained(tmp_path: Path) -> None:
    network, plain = build("plain"), build("plain")
    task = task_of(network, "weight", tmp_path / "a", limits={"params": 1e9})
    masks = flat(DNR(regularizer="none")(network, task))
    training = task.training
    assert training is not None
    loop.fit(plain, TrainingJob(training.split, TABLE, 3, tmp_path / "b"))
    assert all(bool(keep.all()) for keep in masks.values())
    assert same(network.state_dict(), plain.state_dict())


# Rewiring


def sparse_momentum(scratch: Path, table: TuneTable, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The method in twenty lines: half of the largest weights, traded at 0.5, 0.333, ..., by the rule of `rewire`."""
    network = build("plain")
    task = task_of(network, "weight", scratch, table)
    training = task.training
    assert training is not None
    named = {name: network.get_parameter(name) for name in task.units.sizes}
    masks = task.keep(task.units.norms(network))
    task.units.apply(network, masks)

    def after_step(*_: object) -> None:
        task.units.apply(network, masks)

    def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch + 1 == table.epochs:
            return
        momenta = {name: optimizer.state[w]["momentum_buffer"] for name, w in named.items()}
        found = rewire(masks, named, momenta, 0.5 * (1 - epoch / table.epochs))
        task.units.apply(network, found.stayed)
        masks.update(found.masks)

    loop.fit(
        network,
        TrainingJob(training.split, table, 3, scratch),
        Hooks(after_step=after_step, after_epoch=after_epoch, **options),
    )
    return network, masks


def test_with_clean_images_alone_and_no_dynamic_term_it_is_sparse_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, wanted = sparse_momentum(tmp_path / "a", TABLE)
    monkeypatch.setattr("edgeprune.train.objectives.pgd", lambda *_, **__: pytest.fail("an attack was made"))
    network = build("plain")
    masks = flat(
        DNR(beta=1.0, rho=0.0, rate=0.5)(network, task_of(network, "weight", tmp_path / "b", ROBUST))
    )
    assert same(masks, wanted)
    assert same(network.state_dict(), expected.state_dict())


def test_with_adversarial_images_alone_it_is_adversarial_training_on_a_rewired_network(
    tmp_path: Path,
) -> None:
    expected, wanted = sparse_momentum(tmp_path / "a", replace(ROBUST, beta=0.0))
    network = build("plain")
    masks = flat(
        DNR(beta=0.0, rho=0.0, rate=0.5)(network, task_of(network, "weight", tmp_path / "b", ROBUST))
    )
    assert same(masks, wanted)
    assert same(network.state_dict(), expected.state_dict())


def losses(monkeypatch: pytest.MonkeyPatch, scratch: Path, beta: float, table: TuneTable) -> list[float]:
    """What the method's loss is on the first batch of an untouched network."""
    found: list[float] = []

    def look(hooks: Hooks, module: nn.Module) -> Hooks:
        assert hooks.loss is not None
        split = images(20, 5)
        x, y = split.take(torch.arange(20)), split.labels
        found.append(hooks.loss(module.train(), x, y, torch.Generator().manual_seed(1)).item())
        raise Killed

    watch(monkeypatch, look)
    network = build(NORMLESS)
    with pytest.raises(Killed):
        DNR(beta=beta)(network, task_of(network, "weight", scratch, table))
    return found


def test_the_loss_is_affine_in_the_share_of_clean_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = {beta: losses(monkeypatch, tmp_path, beta, ROBUST)[0] for beta in (0.0, 0.25, 0.5, 1.0)}
    assert at[0.0] > at[1.0]
    for beta in (0.25, 0.5):
        assert at[beta] == pytest.approx(beta * at[1.0] + (1 - beta) * at[0.0], abs=1e-6)


def test_the_share_of_clean_images_is_a_half_unless_the_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explicit = losses(monkeypatch, tmp_path, 0.5, ROBUST)
    assert losses(monkeypatch, tmp_path, -1.0, ROBUST) == explicit
    quarter = losses(monkeypatch, tmp_path, 0.25, ROBUST)
    assert losses(monkeypatch, tmp_path, -1.0, replace(ROBUST, beta=0.25)) == quarter != explicit


# The same seed, and after a kill


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_the_same_seed_gives_the_same_masks_and_weights(kind: str, tmp_path: Path) -> None:
    found = []
    for folder in ("a", "b"):
        network = build("residual")
        masks = flat(DNR(start="scratch")(network, task_of(network, kind, tmp_path / folder)))
        found.append((masks, network.state_dict()))
    assert same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("regularizer", ["proximal", "admm"])
@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_a_killed_run_goes_on_to_the_same_end(
    kind: str, regularizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = DNR(regularizer=regularizer, rho=0.1)
    whole = build("residual")
    task = task_of(whole, kind, tmp_path / "a", ROBUST)
    masks = flat(method(whole, task))

    def killed(hooks: Hooks, _module: nn.Module) -> Hooks:
        steps: list[int] = []

        def after_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
            hooks.after_step(optimizer, lr)
            steps.append(1)
            if len(steps) == 7:
                raise Killed

        return replace(hooks, after_step=after_step)

    watch(monkeypatch, killed)
    with pytest.raises(Killed):
        network = build("residual")
        method(network, task_of(network, kind, tmp_path / "b", ROBUST))
    watch(monkeypatch, lambda hooks, _: hooks)
    network = build("residual")
    again = task_of(network, kind, tmp_path / "b", ROBUST)
    assert same(flat(method(network, again)), masks)
    assert same(network.state_dict(), whole.state_dict())
    assert again.record == task.record


def test_another_budget_or_option_does_not_go_on_from_an_old_run(tmp_path: Path) -> None:
    for method, share in ((DNR(), 0.5), (DNR(), 0.4), (DNR(rate=0.4), 0.4)):
        network = build("plain")
        limits = {"params": share * total_params(network)}
        task = task_of(network, "weight", tmp_path, limits=limits)
        masks = method(network, task)
        fresh = build("plain")
        elsewhere = tmp_path / f"{share} {method.rate}"
        assert same(flat(method(fresh, task_of(fresh, "weight", elsewhere, limits=limits))), flat(masks))


@pytest.mark.parametrize("kind", ["weight", "2:4", "channel"])
def test_the_best_epochs_masks_belong_to_its_weights(kind: str, tmp_path: Path) -> None:
    network = build("plain")
    # So large a learning rate that the last epoch is not the best one.
    table = replace(TABLE, keep="best", lr=0.5, epochs=4)
    task = task_of(network, kind, tmp_path, table)
    masks = flat(DNR()(network, task))
    check_budget(task, masks)
    named = dict(network.named_parameters())
    for name, keep in task.units.entries(masks, network).items():
        assert bool((named[name][~keep] == 0).all())
    assert task.record["dnr"]["epochs"] == [0, 1, 2, 3]


# The physically smaller network


@pytest.mark.parametrize("name", NETS)
def test_the_cut_network_answers_as_the_masked_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(name)
    task = task_of(network, "channel", tmp_path)
    masked: list[Tensor] = []

    def fit(module: nn.Module, course: TrainingJob, hooks: Hooks) -> History:
        history = loop.fit(module, course, hooks)
        masked.append(answers(module))
        return history

    monkeypatch.setattr(dnr, "fit", fit)
    masks = DNR()(network, task)
    assert any(not bool(keep.all()) for keep in masks.channels.values())
    assert torch.allclose(answers(network), masked[0], atol=1e-6)
    params = sum(p.numel() for p in network.parameters())
    surgery.cut(network, surgery.removed_positions(task.groups, masks.channels))
    assert torch.allclose(answers(network), masked[0], atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) <= 0.6 * params


# What is there first


def first(kind: str, method: DNR) -> dict[str, Tensor]:
    network = build("residual")
    task = task_of(network, kind, Path())
    return dnr.first_masks(method, network, task, 3)


def test_first_masks_are_exact_whatever_they_are_chosen_by() -> None:
    network = build("residual")
    task = task_of(network, "weight", Path())
    for init in ("global", "uniform", "random"):
        masks = first("weight", DNR(init=init))
        check_budget(task, masks)
        if init != "global":
            density = task.quota() / sum(task.units.sizes.values())
            floors = dnr.layer_floors(task)
            for name, size in task.units.sizes.items():
                assert int(masks[name].sum()) >= floors[name]
                assert abs(int(masks[name].sum()) - density * size) <= 1
    assert not same(first("weight", DNR(init="uniform")), first("weight", DNR(init="random")))
    assert same(first("weight", DNR(start="scratch")), first("weight", DNR(init="random")))
    assert same(first("weight", DNR()), first("weight", DNR(init="global")))


def test_trained_weights_are_traded_more_gently_than_random_ones() -> None:
    network = build("plain")
    task = task_of(network, "weight", Path())
    assert task.training is not None
    for method, rate in ((DNR(), 0.2), (DNR(start="scratch"), 0.5), (DNR(rate=0.3), 0.3)):
        assert method.sparse_training(network, task, task.training).plan.rate == rate


@pytest.mark.parametrize("init", ["global", "uniform", "random"])
def test_first_channels_and_blocks_keep_their_rules(init: str) -> None:
    network = build("residual")
    task = task_of(network, "channel", Path())
    kept = {name: int(m.sum()) for name, m in first("channel", DNR(init=init)).items()}
    assert task.costs.cost(kept)["macs"] <= task.rules.limits["macs"]
    check_budget(task_of(network, "2:4", Path()), first("2:4", DNR(init=init)))


def test_a_recipe_that_shares_out_the_weights_is_heard_first(tmp_path: Path) -> None:
    network = build("plain")
    task = task_of(network, "weight", tmp_path)
    counts = {name: n // 2 for name, n in task.units.sizes.items()}
    short = task.quota() - sum(counts.values())
    counts[max(counts, key=lambda n: counts[n])] += short
    for init in ("global", "uniform", "random"):
        masks = dnr.first_masks(DNR(init=init), network, replace(task, counts=counts), 3)
        assert {name: int(m.sum()) for name, m in masks.items()} == counts


def test_floors_give_way_where_the_budget_leaves_no_choice(tmp_path: Path) -> None:
    network = build("residual")
    task = task_of(network, "weight", tmp_path)
    least = sum(task.floors().values())
    others = total_params(network) - sum(task.units.sizes.values())
    tight = replace(task, rules=Rules({"params": float(others + least)}))
    assert dnr.layer_floors(tight) == task.floors()
    assert dnr.layer_floors(task)["one.0.weight"] == max(2, task.floors()["one.0.weight"])
    check_budget(tight, flat(DNR(start="scratch")(network, tight)))


def test_from_scratch_the_given_weights_are_forgotten_and_the_teacher_is_not(tmp_path: Path) -> None:
    one, other = build("plain", 0), build("plain", 1)
    for network, folder in ((one, "a"), (other, "b")):
        task = task_of(network, "weight", tmp_path / folder)
        training = task.training
        assert training is not None
        teacher = training.teacher
        assert teacher is not None
        before = copy.deepcopy(teacher.state_dict())
        DNR(start="scratch")(network, task)
        assert same(teacher.state_dict(), before)
        assert task.notes == []
    assert same(one.state_dict(), other.state_dict())


def test_weights_that_no_layer_can_draw_are_named(tmp_path: Path) -> None:
    network = build("plain")
    network.register_parameter("scale", nn.Parameter(torch.ones(3)))
    task = task_of(network, "weight", tmp_path)
    DNR(start="scratch")(network, task)
    assert len(task.notes) == 1
    assert "no layer can initialize them: scale" in task.notes[0]


# Learning, and refusals


def test_half_of_the_weights_learn_what_there_is_to_learn(tmp_path: Path) -> None:
    table = replace(TABLE, epochs=8, lr=0.05)
    for kind in ("weight", "2:4", "channel"):
        network = build("plain")
        task = task_of(network, kind, tmp_path / kind.replace(":", ""), table)
        DNR(start="scratch")(network, task)
        right, of = evaluation.accuracy(network, images(50, 8))
        assert right / of > 0.9


def test_adamw_has_a_momentum_too(tmp_path: Path) -> None:
    network = build("plain")
    task = task_of(network, "weight", tmp_path, replace(TABLE, optimizer="adamw", lr=0.002))
    check_budget(task, flat(DNR()(network, task)))
    assert task.record["dnr"]["removed"][0] > 0


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"start": "given weights"}, "start = 'given weights'"),
        ({"init": "gloabl"}, "init = 'gloabl'"),
        ({"regularizer": "l2"}, "regularizer = 'l2'"),
        ({"beta": 1.5}, "beta = 1.5"),
        ({"beta": -0.5}, "beta = -0.5"),
        ({"rate": 1.5}, "rate = 1.5"),
        ({"rate": float("nan")}, "rate = nan"),
        ({"until": -1.0}, "until = -1"),
        ({"rho": -1.0}, "rho = -1"),
        ({"beta": 0.5}, "beta = 0.5 shares the loss"),
    ],
)
def test_an_option_that_is_not_accepted_is_refused(
    options: dict[str, Any], found: str, tmp_path: Path
) -> None:
    network = build("plain")
    with pytest.raises(UsageError, match="dnr") as error:
        DNR(**options)(network, task_of(network, "weight", tmp_path))
    assert found in error.value.message


def test_a_share_of_clean_images_means_nothing_to_trades(tmp_path: Path) -> None:
    network = build("plain")
    with pytest.raises(UsageError, match="trades"):
        DNR(beta=1.0)(network, task_of(network, "weight", tmp_path, replace(ROBUST, objective="trades")))
    task = task_of(network, "weight", tmp_path, replace(ROBUST, objective="trades"))
    check_budget(task, flat(DNR()(network, task)))


def test_without_a_budget_images_or_epochs_it_says_what_to_give(tmp_path: Path) -> None:
    network = build("plain")
    for kind in ("weight", "channel"):
        with pytest.raises(UsageError, match="budget") as error:
            DNR()(network, task_of(network, kind, tmp_path, limits={}))
        assert "--budget" in error.value.hint
    with pytest.raises(UsageError, match="no training images or no epochs"):
        DNR()(network, replace(task_of(network, "weight", tmp_path), training=None))
    with pytest.raises(UsageError, match=r"tune\.epochs is 0"):
        DNR()(network, task_of(network, "weight", tmp_path, replace(TABLE, epochs=0)))
