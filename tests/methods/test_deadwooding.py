"""Deadwooding: dual sparsification, the exact cut, robust distillation; and going on after a kill."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune import plugins
from edgeprune.data.collection import Split, in_memory
from edgeprune.errors import UsageError
from edgeprune.methods._base import PruneTask, Training
from edgeprune.methods._deadwooding import constrained_distillation, shrinkage
from edgeprune.methods._deadwooding.constrained_distillation import Metric
from edgeprune.methods.deadwooding import Deadwooding
from edgeprune.models.costs import cost_model, total_params
from edgeprune.recipe.schema import TuneTable
from edgeprune.records import Masks
from edgeprune.structure.allocation import Rules
from edgeprune.structure.groups import find_groups
from edgeprune.structure.units import of_weights
from edgeprune.train import evaluation, job, loop
from edgeprune.train.objectives import objective_of
from edgeprune.train.tune import masking_hooks

GRANULARITIES = ("weight", "2:4", "channel")
TABLE = TuneTable(epochs=2, objective="fgsm", lr=0.02, batch=16, augment="off", mixed="fp32", val_share=0.25)


class Killed(Exception):
    """What ends a run in a test."""


def images(count: int, seed: int) -> Split:
    """Images whose class is the brightest of five places."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    pixels = torch.randint(0, 120, (count, *nets.SHAPE), generator=generator)
    for place in range(5):
        pixels[labels == place, :, place : place + 3, 1:7] += 100
    return in_memory("images", pixels.to(torch.uint8), labels)


def task_of(
    network: nn.Module, granularity: str, scratch: Path, table: TuneTable = TABLE, share: float = 0.5
) -> PruneTask:
    """What `prune.stage` would hand to the method, with half of the parameters to stay."""
    example = nets.example()
    groups = find_groups(network, example, ()).groups if granularity == "channel" else ()
    weights = None if granularity == "channel" else of_weights(network, granularity)
    limits = {} if granularity == "2:4" else {"params": share * total_params(network)}
    teacher = copy.deepcopy(network).eval()
    training = Training(images(64, 1), images(20, 2), table, scratch, 3, teacher, lambda bare: bare)
    return PruneTask(
        groups, cost_model(network, groups, example), Rules(limits), lambda bare, x: bare(x), weights=weights,
        training=training,
    )  # fmt: skip


def run(
    name: str, granularity: str, scratch: Path, method: Deadwooding, **task: Any
) -> tuple[nn.Module, Masks, PruneTask]:
    network = nets.build(name)
    given = task_of(network, granularity, scratch, **task)
    masks = method(network, given)
    return network, masks, given


def chosen(masks: Masks) -> dict[str, Tensor]:
    """Masks by the names of units, flat."""
    return {name: keep.flatten() for name, keep in {**masks.channels, **masks.weights}.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# Transposed has no layer whose input channels make blocks of four.
CASES = [(n, g) for n in nets.NETS for g in GRANULARITIES if (n, g) != ("transposed", "2:4")]


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_every_network_keeps_exactly_its_budget_and_what_is_gone_stays_zero(
    name: str, granularity: str, tmp_path: Path
) -> None:
    # `Method.__call__` holds the masks against the budget: exact counts, two of each block of four.
    network, masks, task = run(name, granularity, tmp_path, Deadwooding())
    units = chosen(masks)
    assert any(not bool(keep.all()) for keep in units.values())
    if granularity == "weight":
        assert sum(int(keep.sum()) for keep in units.values()) == task.quota()
        # What is gone is exactly what the budget wants gone, and nothing else became zero.
        assert total_params(network) == int(0.5 * total_params(nets.build(name)))
    parameters = dict(network.named_parameters())
    entries = task.units.entries(units, network)
    assert entries
    for parameter, stays in entries.items():
        assert bool((parameters[parameter][~stays] == 0).all())
        assert bool((parameters[parameter][stays] != 0).any())
    assert all(bool(torch.isfinite(value).all()) for value in network.state_dict().values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_same_seed_gives_the_same_masks_and_weights(granularity: str, tmp_path: Path) -> None:
    first, one, _ = run("residual", granularity, tmp_path / "one", Deadwooding())
    second, other, _ = run("residual", granularity, tmp_path / "other", Deadwooding())
    assert same(chosen(one), chosen(other))
    assert same(first.state_dict(), second.state_dict())


class Counted(nn.Module):
    """A network that counts its forward passes in training mode, and that a kill hits when none are left."""

    def __init__(self, bare: nn.Module, left: list[int]) -> None:
        super().__init__()
        self.bare, self.left = bare, left

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if not self.left[0]:
                raise Killed
            self.left[0] -= 1
        return self.bare(x)


# Of five epochs with four steps each two are stage A's: a kill in its second, in stage B's second, and in its third.
KILLS = [
    ("weight", 6),
    ("weight", 14),
    ("weight", 17),
    ("2:4", 6),
    ("2:4", 14),
    ("channel", 6),
    ("channel", 17),
]


@pytest.mark.parametrize(("granularity", "passes"), KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_been_and_repeats_no_whole_epoch(
    granularity: str, passes: int, tmp_path: Path
) -> None:
    table, method = replace(TABLE, epochs=5), Deadwooding(stage_a=0.4, per_weight=passes == 6)
    whole, masks, task = run("plain", granularity, tmp_path / "whole", method, table=table)
    left = [passes]
    killed = task_of(nets.build("plain"), granularity, tmp_path / "killed", table)
    assert killed.training is not None
    training = replace(killed.training, deployed=lambda bare: Counted(bare, left))
    killed = replace(killed, training=training)
    with pytest.raises(Killed):
        method(nets.build("plain"), killed)
    left[0] = 100
    again = nets.build("plain")
    assert same(chosen(method(again, killed)), chosen(masks))
    assert same(again.state_dict(), whole.state_dict())
    assert killed.record == task.record
    assert 100 - left[0] == 20 - passes // 4 * 4


def test_deadwood_shrinks_and_multipliers_never_fall(tmp_path: Path) -> None:
    table = replace(TABLE, epochs=6, objective="natural")
    _, _, task = run("plain", "weight", tmp_path, Deadwooding(stage_a=0.67), table=table)
    record = task.record["deadwooding"]
    assert record["epochs"] == [4, 2]
    assert len(record["deadwood"]) == len(record["violation"]["deadwood"]) == 5
    assert record["deadwood"][-1] < record["deadwood"][0] / 2
    assert record["violation"]["deadwood"][-1] < record["violation"]["deadwood"][0] / 2
    for curve in record["lambda"].values():
        assert len(curve) == 4
        assert curve == sorted(curve)
        assert curve[0] > 0


def test_without_a_dual_step_nothing_shrinks_and_stage_a_is_training_as_usual(tmp_path: Path) -> None:
    table = replace(TABLE, epochs=2, weight_decay=0.0)
    method = Deadwooding(stage_a=0.5, rho_s=0.0)
    _, masks, task = run("plain", "weight", tmp_path / "one", method, table=table)
    reference = nets.build("plain")
    assert task.training is not None
    course = job.TrainingJob(
        task.training.split, replace(table, epochs=1, distill=0.0), task.training.seed, tmp_path / "two"
    )
    loop.fit(reference, course)
    assert same(chosen(masks), task.keep(task.units.norms(reference)))
    assert all(set(curve) == {0.0} for curve in task.record["deadwooding"]["lambda"].values())


def test_a_fixed_penalty_stays_what_it_is(tmp_path: Path) -> None:
    _, _, task = run("plain", "channel", tmp_path, Deadwooding(stage_a=0.5, fixed_penalty=1.5))
    assert all(curve == [1.5] for curve in task.record["deadwooding"]["lambda"].values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_constraints_stage_b_is_plain_masked_training_bit_for_bit(
    granularity: str, tmp_path: Path
) -> None:
    method = Deadwooding(stage_a=0.0, rho_kd=0.0, init_kd=0.0, rho_adv=0.0, init_adv=0.0)
    table = replace(TABLE, objective="natural", distill=0.0)
    network, masks, task = run("residual", granularity, tmp_path / "one", method, table=table)
    reference = nets.build("residual")
    task.units.apply(reference, chosen(masks))
    training = task.training
    assert training is not None
    course = job.TrainingJob(
        training.split,
        replace(table, keep="best"),
        training.seed,
        tmp_path / "two",
        None,
        training.validation,
    )
    stays = task.units.entries(chosen(masks), reference)
    history = loop.fit(reference, course, masking_hooks(reference, stays))
    assert same(network.state_dict(), reference.state_dict())
    record = task.record["deadwooding"]
    assert (record["validation"], record["best"]) == (list(history.validation), history.best)
    assert record["violation"] == {"deadwood": record["violation"]["deadwood"]}
    assert record["epochs"] == [0, 2]


def test_the_multipliers_of_stage_b_rise_by_the_mean_violation_up_to_the_cap(tmp_path: Path) -> None:
    method = Deadwooding(
        stage_a=0.0, rho_kd=0.5, init_kd=1.0, rho_adv=100.0, init_adv=1.0, eps_kd=0.0, eps_adv=0.0, cap=3.0
    )
    _, _, task = run("plain", "weight", tmp_path, method, table=replace(TABLE, epochs=3))
    record = task.record["deadwooding"]
    over = record["violation"]["kd"]
    assert record["kd"] == over, "a slack of 0 leaves the distance whole"
    kd = [1.0, 1.0 + 0.5 * over[0], 1.0 + 0.5 * over[0] + 0.5 * over[1]]
    assert record["lambda_kd"] == pytest.approx(kd)
    assert record["lambda_adv"] == [1.0, 3.0, 3.0]


def test_a_constraint_that_holds_costs_nothing_and_its_multiplier_stands_still(tmp_path: Path) -> None:
    method = Deadwooding(stage_a=0.0, init_kd=1.0, init_adv=1.0, eps_kd=1e6, eps_adv=1e6)
    _, _, task = run("plain", "weight", tmp_path, method)
    record = task.record["deadwooding"]
    assert record["slack"] == {"kd": 1e6, "adv": 1e6}
    assert record["violation"]["kd"] == record["violation"]["adv"] == [0.0, 0.0]
    assert record["lambda_kd"] == record["lambda_adv"] == [1.0, 1.0]
    assert min(record["kd"] + record["adv"]) > 0


def test_the_natural_objective_leaves_the_constraint_on_clean_images_and_says_so(tmp_path: Path) -> None:
    table = replace(TABLE, objective="natural")
    _, _, task = run("plain", "weight", tmp_path, Deadwooding(), table=table)
    assert set(task.record["deadwooding"]["slack"]) == {"kd"}
    assert "robustness is not trained" in task.notes[0]


def test_each_constraint_can_be_left_out(tmp_path: Path) -> None:
    without_kd = Deadwooding(stage_a=0.0, rho_kd=0.0, init_kd=0.0)
    without_adv = Deadwooding(stage_a=0.0, rho_adv=0.0, init_adv=0.0)
    for method, left in ((without_kd, "adv"), (without_adv, "kd")):
        _, _, task = run("plain", "weight", tmp_path / left, method, table=replace(TABLE, epochs=1))
        assert set(task.record["deadwooding"]["slack"]) == {left}


def test_distances_of_the_worked_example() -> None:
    t, s, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([0])
    assert torch.allclose(t.softmax(1), torch.tensor([[0.66524, 0.24473, 0.09003]]), atol=5e-6)
    found = {
        "one": Metric(temperature=1.0), "four": Metric(temperature=4.0),
        "tv": Metric("tv"), "w1": Metric("w1"), "ce": Metric("ce"),
    }  # fmt: skip
    values = {name: float(metric(s, t, y)) for name, metric in found.items()}
    # Six decimals are written; the logarithm of three classes alike is that of 3.
    expected = {"one": 0.266217, "four": 0.328202, "tv": 0.331908, "w1": 0.575210, "ce": 1.098612}
    assert values == pytest.approx(expected, abs=2e-6)


def test_the_cost_of_a_batch_is_the_lagrangian_over_the_sum_of_weights() -> None:
    network, teacher = nets.build("groupnormed"), nets.build("groupnormed", seed=5)
    x, y = nets.example(6), torch.arange(6) % 5
    objective = objective_of(TABLE, None)
    bank = shrinkage.Multipliers(
        {"kd": torch.tensor(2.0, dtype=torch.float64), "adv": torch.tensor(0.5, dtype=torch.float64)}
    )
    slack = {"kd": 1e-4, "adv": 2e-4}
    metric = Metric("teacher_clean", 2.0)
    stage = constrained_distillation.Distillation(
        objective, "ce", teacher, metric, slack, {"kd": 1.0, "adv": 1.0}, bank
    )
    found = float(stage.loss(network, x, y, torch.Generator().manual_seed(1)).detach())
    moved = objective.attack(network, x, y, torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = teacher(x)
        kd = float(constrained_distillation.divergence(wanted, network(x), 2.0))
        adv = float(constrained_distillation.divergence(wanted, network(moved), 2.0))
        ce = float(nn.functional.cross_entropy(network(x), y))
    assert kd > slack["kd"]
    assert adv > slack["adv"]
    # The network has no batch-norm, so images do not influence each other but by the order of sums.
    assert found == pytest.approx((ce + 2.0 * (kd - 1e-4) + 0.5 * (adv - 2e-4)) / 3.5, rel=1e-5)


def test_a_teacher_that_is_worse_than_knowing_nothing_gives_no_slack(tmp_path: Path) -> None:
    network = nets.build("plain")
    for granted, own in ((True, (0.5, 0.7)), (False, (0.7, 0.7))):
        task = task_of(network, "weight", tmp_path)
        assert Deadwooding().slack(own, task) == (own[0] if granted else 0.0)
        assert bool(task.notes) != granted


def test_the_own_value_of_a_teacher_is_its_distance_under_the_attack(tmp_path: Path) -> None:
    teacher, split = nets.build("plain"), images(20, 2)
    metric = Metric("ce")
    own, nothing = constrained_distillation.teacher_distance(
        teacher, split, objective_of(TABLE, None), metric, 3
    )
    again = constrained_distillation.teacher_distance(teacher, split, objective_of(TABLE, None), metric, 3)
    clean = constrained_distillation.teacher_distance(
        teacher, split, objective_of(replace(TABLE, objective="natural"), None), metric, 3
    )
    assert (own, nothing) == again
    assert nothing == pytest.approx(1.609438, abs=1e-5)
    assert clean[0] == pytest.approx(
        evaluation.mean_loss(teacher, split.take(torch.arange(20)), split.labels), rel=1e-5
    )
    assert own > clean[0]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"score": "l1"}, "score = 'l1' is not one of auto, raw, layer"),
        ({"distance": "kl"}, "distance = 'kl' is not one of teacher_clean, ce, tv, w1"),
        ({"loss_a": "mse"}, "loss_a = 'mse' is not one of objective, ce"),
        ({"rho_s": -1.0}, "rho_s = -1.0 must be a number from 0 to 1e+06"),
        ({"stage_a": 1.0}, "stage_a = 1.0 must be a number from 0 to 0.99"),
        ({"temperature": 0.0}, "temperature = 0.0 must be a number from 0.01 to 1000"),
        ({"eps_adv": float("nan")}, "eps_adv = nan must be a number from -1e+06 to 1e+06"),
        ({"cap": "ten"}, "cap = 'ten' must be a number from 0 to 1e+06"),
        ({"per_weight": "yes"}, "per_weight = 'yes' must be true or false"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UsageError) as refusal:
        plugins.build("methods", "deadwooding", options)
    assert found in refusal.value.message


def test_without_training_images_it_says_so(tmp_path: Path) -> None:
    network = nets.build("plain")
    task = replace(task_of(network, "weight", tmp_path), training=None)
    with pytest.raises(UsageError, match="method deadwooding trains the network"):
        Deadwooding()(network, task)


@pytest.mark.parametrize(("total", "share", "first"), [
    (10, 0.25, 2), (1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (9, 0.0, 0), (60, 0.25, 15),
])  # fmt: skip
def test_both_stages_get_an_epoch_where_there_are_two(total: int, share: float, first: int) -> None:
    assert Deadwooding(stage_a=share).stages(total) == (first, total - first)


def test_scores_by_layer_do_not_care_for_a_layers_scale(tmp_path: Path) -> None:
    network, scaled = nets.build("plain"), nets.build("plain")
    with torch.no_grad():
        dict(scaled.named_parameters())["a.0.weight"].mul_(1e-3)
    kept = []
    for each in (network, scaled):
        task = task_of(each, "weight", tmp_path)
        kept.append(task.keep(Deadwooding(score="layer").scores("weight", task.units.norms(each))))
    assert same(*kept)
