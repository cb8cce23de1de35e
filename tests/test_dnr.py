"""DNR: the budget at every step and epoch, the dynamic term, resuming, and what is cut in the end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, SHAPE, build, example
from torch import Tensor, nn

from edgeprune.errors import UsageError
from edgeprune.methods import PruneTask, Training, dnr
from edgeprune.methods.dnr import DNR
from edgeprune.nn import perturb, surgery, train
from edgeprune.nn.allocate import Rules
from edgeprune.nn.costs import cost_model, total_params
from edgeprune.nn.data import Split, in_memory
from edgeprune.nn.graph import find_groups
from edgeprune.nn.objectives import of_table
from edgeprune.nn.rewiring import rewire
from edgeprune.nn.schedule import optimizer_of
from edgeprune.nn.train import Course, History, Hooks
from edgeprune.nn.units import of_channels, of_weights
from edgeprune.nn.wiring import Plan, Wiring
from edgeprune.recipe import TuneTable
from edgeprune.records import Masks

TABLE = TuneTable(epochs=3, lr=0.02, batch=16, augment=False, distill=0.0, mixed="fp32")
ROBUST = replace(TABLE, objective="pgd", attack_steps=2)
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


def watch(monkeypatch: pytest.MonkeyPatch, change: Callable[[Hooks, nn.Module], Hooks]) -> None:
    """Train with other hooks than the method's own."""

    def fit(module: nn.Module, course: Course, hooks: Hooks) -> History:
        return train.fit(module, course, change(hooks, module))

    monkeypatch.setattr(dnr, "fit", fit)


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
    train.fit(plain, Course(training.split, TABLE, 3, tmp_path / "b"))
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

    train.fit(
        network,
        Course(training.split, table, 3, scratch),
        Hooks(after_step=after_step, after_epoch=after_epoch, **options),
    )
    return network, masks


def test_with_clean_images_alone_and_no_dynamic_term_it_is_sparse_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, wanted = sparse_momentum(tmp_path / "a", TABLE)
    monkeypatch.setattr(perturb, "perturb", lambda *_, **__: pytest.fail("an attack was made"))
    network = build("plain")
    masks = flat(DNR(beta=1.0, rho=0.0)(network, task_of(network, "weight", tmp_path / "b", ROBUST)))
    assert same(masks, wanted)
    assert same(network.state_dict(), expected.state_dict())


def test_with_adversarial_images_alone_it_is_adversarial_training_on_a_rewired_network(
    tmp_path: Path,
) -> None:
    expected, wanted = sparse_momentum(tmp_path / "a", replace(ROBUST, beta=0.0))
    network = build("plain")
    masks = flat(DNR(beta=0.0, rho=0.0)(network, task_of(network, "weight", tmp_path / "b", ROBUST)))
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


def wired(kind: str, network: nn.Module, **plan: Any) -> tuple[Wiring, torch.optim.Optimizer]:
    """A network after a few steps of SGD on its budget."""
    task = task_of(network, kind, Path())
    wiring = DNR()._wiring(network, task, task.training)  # type: ignore[arg-type]
    wiring.plan = Plan(**{"epochs": 10, **plan})
    optimizer = optimizer_of(network, replace(TABLE, lr=0.05))
    split = images(32, 4)
    network.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = of_table(TABLE, None)(network, split.take(torch.arange(32)), split.labels, torch.Generator())
        loss.backward()
        optimizer.step()
        wiring.after_step(optimizer, 0.05)
    return wiring, optimizer


def answers(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(example(6, 9))


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
    wiring = Wiring(network, of_channels(groups), Plan(2), {groups[0].name: torch.ones(3, dtype=torch.bool)})
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


def pull(wiring: Wiring) -> tuple[float, dict[str, Tensor]]:
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
    for method, share in ((DNR(), 0.5), (DNR(), 0.4), (DNR(rate=0.2), 0.4)):
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

    def fit(module: nn.Module, course: Course, hooks: Hooks) -> History:
        history = train.fit(module, course, hooks)
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
    return dnr._first(method, network, task, 3)


def test_first_masks_are_exact_whatever_they_are_chosen_by() -> None:
    network = build("residual")
    task = task_of(network, "weight", Path())
    for init in ("global", "uniform", "random"):
        masks = first("weight", DNR(init=init))
        check_budget(task, masks)
        if init != "global":
            density = task.quota() / sum(task.units.sizes.values())
            floors = dnr._floors(task)
            for name, size in task.units.sizes.items():
                assert int(masks[name].sum()) >= floors[name]
                assert abs(int(masks[name].sum()) - density * size) <= 1
    assert not same(first("weight", DNR(init="uniform")), first("weight", DNR(init="random")))
    assert same(first("weight", DNR(start="scratch")), first("weight", DNR(init="random")))
    assert same(first("weight", DNR()), first("weight", DNR(init="global")))


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
        masks = dnr._first(DNR(init=init), network, replace(task, counts=counts), 3)
        assert {name: int(m.sum()) for name, m in masks.items()} == counts


def test_floors_give_way_where_the_budget_leaves_no_choice(tmp_path: Path) -> None:
    network = build("residual")
    task = task_of(network, "weight", tmp_path)
    least = sum(task.floors().values())
    others = total_params(network) - sum(task.units.sizes.values())
    tight = replace(task, rules=Rules({"params": float(others + least)}))
    assert dnr._floors(tight) == task.floors()
    assert dnr._floors(task)["one.0.weight"] == max(2, task.floors()["one.0.weight"])
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
    assert "scale kept the given values" in task.notes[0]


# Learning, and refusals


def test_half_of_the_weights_learn_what_there_is_to_learn(tmp_path: Path) -> None:
    table = replace(TABLE, epochs=8, lr=0.05)
    for kind in ("weight", "2:4", "channel"):
        network = build("plain")
        task = task_of(network, kind, tmp_path / kind.replace(":", ""), table)
        DNR(start="scratch")(network, task)
        right, of = train.accuracy(network, images(50, 8))
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
    with pytest.raises(UsageError, match="no images"):
        DNR()(network, replace(task_of(network, "weight", tmp_path), training=None))
    with pytest.raises(UsageError, match=r"tune\.epochs is 0"):
        DNR()(network, task_of(network, "weight", tmp_path, replace(TABLE, epochs=0)))
