"""Scores, allocation and budgets: exact worked numbers, and what every method must keep to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune import plugins
from edgeprune.errors import EdgepruneError, InfeasibleBudget, UsageError
from edgeprune.methods._base import Method, PruneTask, ScoreMethod, Survey, SurveyMethod, counts
from edgeprune.models import costs, surgery
from edgeprune.records import Group, InputSpec, Masks, Member
from edgeprune.structure import groups
from edgeprune.structure.allocation import Rules, allocate, keep_largest, levels, losses_of, timed_levels
from edgeprune.structure.groups import find_groups
from edgeprune.structure.units import channel_sums


def call(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return network(x)


def task_for(name: str, limits: dict[str, float], **rules: object) -> tuple[nn.Module, PruneTask]:
    network = nets.build(name)
    found = groups.provable_groups(network, find_groups(network, nets.example()), nets.example(), 0)
    model = costs.cost_model(network, found.groups, nets.example())
    absolute = {m: share * model.cost({})[m] for m, share in limits.items()}
    images, labels = nets.example(40), torch.arange(40) % 5
    rule, spec = Rules(absolute, **rules), InputSpec(nets.SHAPE, 5)  # type: ignore[arg-type]
    return network, PruneTask(found.groups, model, rule, call, images, labels, 7, spec)


def test_levels_are_multiples_never_zero_and_never_below_the_floor() -> None:
    assert levels(64, 16, 0.1) == (64, 48, 32, 16)
    assert levels(64, 16, 0.5) == (64, 48, 32)
    assert levels(16, 16, 0.1) == (16, 8)
    assert levels(24, 16, 0.0) == (24, 16, 8)
    assert levels(5, 1, 0.5) == (5, 4, 3)
    assert levels(1, 8, 0.0) == (1,)
    assert levels(70, 16, 0.1) == (70, 64, 48, 32, 16)


def test_where_times_are_known_steps_are_finer() -> None:
    assert timed_levels(16, 16, 0.1) == (16, 12, 8, 4)
    assert timed_levels(64, 16, 0.7) == (64, 60, 56, 52, 48)
    assert timed_levels(128, 16, 0.8) == (128, 120, 112, 104)
    assert timed_levels(48, 16, 0.5) == (48, 44, 40, 36, 32, 28, 24)
    assert timed_levels(512, 16, 0.9) == levels(512, 16, 0.9) == (512, 496, 480, 464)
    assert timed_levels(64, 4, 0.75) == (64, 60, 56, 52, 48)
    assert timed_levels(6, 16, 0.3) == (6, 4, 2)
    assert timed_levels(16, 1, 0.8) == (16, 15, 14, 13)
    assert timed_levels(1, 16, 0.1) == (1,)
    for channels in range(1, 300):
        # The multiples are among them.
        assert set(timed_levels(channels, 16, 0.1)) >= {
            k for k in range(16, channels, 16) if k >= 0.1 * channels
        }


def test_exactly_so_many_are_kept_whatever_ties() -> None:
    scores = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.9, 0.1])
    assert keep_largest(scores, 3).tolist() == [True, True, False, False, True, False]


TRAINING = {
    n for n in plugins.names("methods") if "(TrainingMethod)" in plugins.path_of("methods", n).read_text()
}


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("method", sorted(set(plugins.names("methods")) - TRAINING))
def test_every_method_meets_the_budget_repeats_itself_and_leaves_the_weights_alone(
    name: str, method: str
) -> None:
    network, task = task_for(name, {"macs": 0.6}, floor=0.1)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    masks = plugins.build("methods", method, {})(network, task)
    again = plugins.build("methods", method, {})(nets.build(name), task)
    assert all(torch.equal(masks.channels[g], again.channels[g]) for g in masks.channels)
    # data-free merges units: what is left answers alike masked and cut.
    if method != "data-free":
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert surgery.proof_failure(network, task.groups, masks.channels, nets.example()) is None
    surgery.cut(network, surgery.removed_positions(task.groups, masks.channels))
    assert costs.total_macs(network, nets.example()) <= task.rules.limits["macs"]


def test_several_limits_hold_at_once() -> None:
    network, task = task_for("plain", {"macs": 0.7, "params": 0.3})
    masks = plugins.build("methods", "magnitude", {})(network, task)
    surgery.cut(network, surgery.removed_positions(task.groups, masks.channels))
    assert costs.total_macs(network, nets.example()) <= task.rules.limits["macs"]
    assert costs.total_params(network) <= task.rules.limits["params"]


def test_an_impossible_budget_says_how_far_it_got() -> None:
    network, task = task_for("plain", {"macs": 0.001}, floor=0.5)
    with pytest.raises(InfeasibleBudget, match=r"macs: the limit is .* the least possible .* % of dense"):
        plugins.build("methods", "magnitude", {})(network, task)


def test_alignment_gives_way_to_the_budget_and_no_further() -> None:
    _, task = task_for("plain", {"macs": 0.2}, multiple_of=8, floor=0.1)
    scores = {g.name: torch.ones(g.channels, dtype=torch.float64) for g in task.groups}
    losses = losses_of(scores)
    found = allocate(losses, task.costs, task.rules)
    assert found.multiple_of < 8 and found.cost["macs"] <= task.rules.limits["macs"]
    loose = allocate(
        losses, task.costs, replace(task.rules, limits={"macs": 0.7 * task.costs.cost({})["macs"]})
    )
    assert loose.multiple_of == 8
    assert all(k % 4 == 0 or k == task.costs.channels[g] for g, k in loose.kept.items())


def test_uniform_allocation_keeps_the_same_share_everywhere() -> None:
    _, task = task_for("residual", {"macs": 0.5}, cuts={})
    scores = {g.name: torch.rand(g.channels, dtype=torch.float64) for g in task.groups}
    kept = allocate(losses_of(scores), task.costs, task.rules).kept
    shares = [k / task.costs.channels[g] for g, k in kept.items()]
    assert max(shares) - min(shares) <= 1 / 8


def test_a_budget_that_holds_already_removes_nothing() -> None:
    _, task = task_for("residual", {"macs": 1.0})
    kept = allocate(
        losses_of({g.name: torch.ones(g.channels) for g in task.groups}), task.costs, task.rules
    ).kept
    assert kept == dict(task.costs.channels)


def test_scores_become_losses_that_grow_ever_faster() -> None:
    """S log(S / R) for what stays, R of S: 8 of 1, 4 and 3, then 7, 4 and nothing."""
    (loss,) = losses_of({"a": torch.tensor([1.0, 4.0, 3.0])}).values()
    assert loss.tolist() == pytest.approx([math.inf, 8 * math.log(8 / 4), 8 * math.log(8 / 7), 0])
    assert losses_of({"a": torch.zeros(3)})["a"][1:].tolist() == [0, 0, 0]


def test_what_costs_nothing_goes_first_and_what_costs_much_stays() -> None:
    _, task = task_for("residual", {"macs": 0.7}, floor=0.25)
    free, dear = (torch.full((17,), value, dtype=torch.float64) for value in (0.0, 1.0))
    dear[16], dear[0] = 0, math.inf
    losses = {g.name: (free if g.name == "one.0" else dear)[-g.channels - 1 :] for g in task.groups}
    kept = allocate(losses, task.costs, task.rules).kept
    assert kept["one.0"] < 16 and all(kept[g] == 8 for g in kept if g != "one.0")


class Counted(SurveyMethod):
    """A method of curves alone; `more` channels than it was told to keep."""

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def survey(self, network: nn.Module, task: PruneTask) -> Survey:
        curves = {g.name: torch.linspace(1, 0, g.channels + 1).double() ** 2 for g in task.groups}
        return Survey(curves, detail="mine")

    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        raise AssertionError("channels are surveyed")

    def choose(self, network: nn.Module, task: PruneTask, survey: Survey, kept: Mapping[str, int]) -> Masks:
        assert survey.detail == "mine"
        return Masks(
            channels={g.name: torch.arange(g.channels) < kept[g.name] + self.more for g in task.groups}
        )


def test_a_method_that_surveys_is_told_the_counts_that_its_curves_lead_to() -> None:
    network, task = task_for("concat", {"macs": 0.5})
    method = Counted()
    expected = counts(method.survey(network, task), task)
    masks = method(network, task)
    assert {g: int(keep.sum()) for g, keep in masks.channels.items()} == expected
    assert task.costs.cost(expected)["macs"] <= task.rules.limits["macs"]
    with pytest.raises(EdgepruneError, match=r"Counted left macs at \d+, more than the budget of"):
        Counted(more=2)(network, task)
    with pytest.raises(InfeasibleBudget):
        method(network, replace(task, rules=Rules({"macs": 1.0})))


def test_a_method_that_changes_the_structure_is_caught() -> None:
    class Cutting(Method):
        def prune(self, network: nn.Module, task: PruneTask) -> Masks:
            network.fc = nn.Linear(8, 7)
            return Masks(channels={})

    network, task = task_for("residual", {"macs": 1.0})
    with pytest.raises(EdgepruneError, match="Cutting changed the structure of the network"):
        Cutting()(network, task)


def test_channel_sums_are_as_computed_by_hand() -> None:
    group = Group("a", 2, (
        Member("w", 0, ((0,), (1,)), "producer"),
        Member("v", 1, ((0, 1), (2,)), "consumer"),
    ))  # fmt: skip
    values = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "v": torch.tensor([[1.0, 10.0, 100.0]])}
    assert channel_sums(group, values, ("producer",)).tolist() == [3.0, 7.0]
    assert channel_sums(group, values, ("consumer",)).tolist() == [11.0, 100.0]
    assert channel_sums(group, values, ("producer", "consumer")).tolist() == [14.0, 107.0]


def test_magnitude_is_the_share_of_the_groups_squared_norm() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 3, bias=False)).eval()
    network[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    network[2].weight.data = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    x = torch.rand(1, 2)
    groups = find_groups(network, x).groups
    task = PruneTask(groups, costs.cost_model(network, groups, x), Rules({}), call)
    scores = plugins.build("methods", "magnitude", {}).scores(network, task)
    # squared norms: 9 + 16 = 25 and 1
    assert scores["0"].tolist() == pytest.approx([25 / 26, 1 / 26])


def test_taylor_predicts_the_change_of_the_loss_to_first_order() -> None:
    """For a tiny consumer weight the expansion is exact: removing the channel changes the loss by the score's root."""
    network = nets.build("plain")
    network.b[0].weight.data[:, 3] *= 1e-4
    found = groups.provable_groups(network, find_groups(network, nets.example()), nets.example(), 0)
    images, labels = nets.example(1, seed=5), torch.tensor([2])
    task = PruneTask(
        found.groups, costs.cost_model(network, found.groups, nets.example()), Rules({}), call, images, labels
    )
    score = float(plugins.build("methods", "taylor", {}).scores(network, task)["a.0"][3])
    masked = deepcopy(network).double()
    surgery.mask(masked, found.groups, {"a.0": torch.arange(8) != 3})
    x, loss = images.double(), nn.functional.cross_entropy
    change = (loss(masked(x), labels) - loss(deepcopy(network).double()(x), labels)).item()
    assert abs(change) > 0 and score == pytest.approx(change**2, rel=0.04)


def test_taylor_measures_what_layers_with_batch_norm_can_miss() -> None:
    """The loss at a count is the cut network's, with batch-norm going by the same images, above the dense one's."""
    network, task = task_for("residual", {"macs": 0.5})
    method = plugins.build("methods", "taylor", {})
    before = deepcopy(network.state_dict())
    scores = method.scores(network, task)
    found = method.survey(network, task).losses
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            assert task.images is not None and task.labels is not None
            return float(nn.functional.cross_entropy(deepcopy(net).train()(task.images), task.labels))

    for group in task.groups:
        rises = {group.channels: 0.0}
        for kept in range(1, group.channels):
            small = deepcopy(network)
            masks = {group.name: keep_largest(scores[group.name], kept)}
            surgery.cut(small, surgery.removed_positions(task.groups, {**full_masks(task), **masks}))
            rises[kept] = loss(small) - loss(network)
        for kept in (group.channels // 2, group.channels // 4):
            expected = max(v for k, v in rises.items() if k >= kept and k % (group.channels // 8) == 0)
            assert float(found[group.name][kept]) == pytest.approx(expected, abs=2e-5)


def full_masks(task: PruneTask) -> dict[str, torch.Tensor]:
    return {g.name: torch.ones(g.channels, dtype=torch.bool) for g in task.groups}


@pytest.mark.parametrize(
    ("name", "options", "cuts"),
    [("residual", {"measured": False}, None), ("residual", {}, {}), ("unnormed", {}, None)],
)
def test_taylor_goes_by_the_scores_where_nothing_is_to_be_measured(
    name: str, options: dict[str, object], cuts: dict[str, float] | None
) -> None:
    if name == "unnormed":
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )
        groups = find_groups(network, nets.example()).groups
        model = costs.cost_model(network, groups, nets.example())
        labels = torch.arange(40) % 3
        task = PruneTask(groups, model, Rules({}), call, nets.example(40), labels)
    else:
        network, task = task_for(name, {"macs": 0.5}, cuts=cuts)
    found = plugins.build("methods", "taylor", options).survey(network, task)
    expected = losses_of(found.detail)
    assert all(torch.equal(v, expected[g]) for g, v in found.losses.items())


def test_taylor_says_when_a_network_does_not_take_batch_norm_without_statistics() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.build("plain")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) + 0 * self.net.a[1].running_mean.sum()

    network = Own().eval()
    found = find_groups(network, nets.example()).groups
    task = PruneTask(
        found, costs.cost_model(network, found, nets.example()), Rules({}),
        call, nets.example(40), torch.zeros(40, dtype=torch.int64),
    )  # fmt: skip
    survey = plugins.build("methods", "taylor", {}).survey(network, task)
    assert all(torch.equal(v, losses_of(survey.detail)[g]) for g, v in survey.losses.items())
    assert any("by their scores" in note for note in task.notes)


def test_taylor_without_images_says_what_to_do() -> None:
    network, task = task_for("plain", {"macs": 0.5})
    with pytest.raises(UsageError, match="needs training images") as caught:
        plugins.build("methods", "taylor", {})(network, replace(task, images=None, labels=None))
    assert "--data" in caught.value.hint


def test_random_scores_depend_on_the_seed_alone() -> None:
    network, task = task_for("plain", {"macs": 0.5})
    method = plugins.build("methods", "uniform_random", {})
    first, other = method.scores(network, task), method.scores(network, replace(task, seed=8))
    assert torch.equal(first["a.0"], method.scores(nets.build("plain", 4), task)["a.0"])
    assert not torch.equal(first["a.0"], other["a.0"])


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"nowhere": torch.ones(8, dtype=torch.bool)}, "does not exist"),
        ({"a.0": torch.ones(7, dtype=torch.bool)}, r"must be bool \(8,\)"),
        ({"a.0": torch.zeros(8, dtype=torch.bool)}, "kept no channel"),
        ({}, "more than the budget"),
    ],
)
def test_a_method_that_breaks_its_contract_is_caught(channels: dict[str, torch.Tensor], message: str) -> None:
    class Wrong(Method):
        def prune(self, network: nn.Module, task: PruneTask) -> Masks:
            return Masks(channels=channels)

    network, task = task_for("plain", {"macs": 0.5})
    with pytest.raises(EdgepruneError, match=message):
        Wrong()(network, task)


def test_scores_that_are_not_numbers_are_refused() -> None:
    class Broken(ScoreMethod):
        def scores(self, network: nn.Module, task: PruneTask) -> dict[str, torch.Tensor]:
            return {"a.0": torch.full((8,), float("nan"))}

    network, task = task_for("plain", {"macs": 0.5})
    with pytest.raises(EdgepruneError, match="not finite"):
        Broken()(network, task)
