"""The method without data: every mode meets the budget, repeats itself, and takes first what nobody misses."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import nets
import pytest
import torch
from torch import Tensor, nn
from tracing_once import traced

from edgeprune import plugins
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.methods import data_free
from edgeprune.methods._base import PruneTask, SurveyMethod, counts
from edgeprune.models import costs, surgery
from edgeprune.records import InputSpec
from edgeprune.structure import groups
from edgeprune.structure.allocation import Rules

MODES = ("reconstruction", "baseline", "greedy", "stochastic")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_free, "trace", traced)


def images(count: int = 24) -> Tensor:
    shade = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    return shade * nets.example(count)


def call(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def task_for(network: nn.Module, share: float = 0.6, **more: object) -> PruneTask:
    found = groups.provable_groups(network, groups.find_groups(network, nets.example()), nets.example(), 0)
    model = costs.cost_model(network, found.groups, nets.example())
    rules = Rules({"macs": share * model.cost({})["macs"]})
    given: dict[str, object] = {"unlabelled": images(), "spec": InputSpec(nets.SHAPE, 5), "seed": 7, **more}
    return PruneTask(found.groups, model, rules, call, **given)  # type: ignore[arg-type]


def method(mode: str, **options: object) -> SurveyMethod:
    return plugins.build("methods", "data-free", {"mode": mode, **options})


@pytest.mark.parametrize("name", nets.NETS)
def test_every_mode_meets_the_budget_repeats_itself_and_leaves_the_structure(name: str) -> None:
    task = task_for(nets.build(name))
    for mode in MODES:
        results = []
        for _ in range(2):
            network = nets.build(name)
            shapes = {k: v.shape for k, v in network.state_dict().items()}
            masks = method(mode)(network, task)
            assert {k: v.shape for k, v in network.state_dict().items()} == shapes
            results.append((masks.channels, network))
        (one, network), (two, other) = results
        assert set(one) == {g.name for g in task.groups}
        assert all(torch.equal(one[g], two[g]) for g in one), mode
        state = other.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items()), mode
        assert surgery.proof_failure(network, task.groups, one, nets.example()) is None, mode
        surgery.cut(network, surgery.removed_positions(task.groups, one))
        assert costs.total_macs(network, nets.example()) <= task.rules.limits["macs"], mode


@pytest.mark.parametrize("mode", MODES)
def test_a_survey_changes_nothing_and_gives_a_curve_for_every_group(mode: str) -> None:
    network = nets.build("grouped")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    task = task_for(network)
    survey = method(mode).survey(network, task)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    for group in task.groups:
        loss = survey.losses[group.name]
        assert loss.shape == (group.channels + 1,) and loss[0] == float("inf") and loss[-1] == 0
        assert bool((loss[1:].diff() <= 0).all()) and loss[1] > 0


def test_mode_auto_looks_at_images_where_there_are_some() -> None:
    network = nets.build("residual")
    with_images, without = task_for(network), task_for(network, unlabelled=None)
    for task, mode in ((with_images, "reconstruction"), (without, "stochastic")):
        found = plugins.build("methods", "data-free", {})(deepcopy(network), task).channels
        named = method(mode)(deepcopy(network), replace(task, notes=[])).channels
        assert all(torch.equal(found[g], named[g]) for g in named)
    assert with_images.notes == [] and without.notes[0].startswith("Mode stochastic: ")


def test_reconstruction_leaves_the_weights_to_the_repair() -> None:
    network = nets.build("concat")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    method("reconstruction")(network, task_for(network))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def doubled() -> nn.Module:
    """Channels 4 to 7 of `a` are copies of 0 to 3."""
    network = nets.build("plain")
    with torch.no_grad():
        for tensor in network.a.state_dict().values():
            if tensor.ndim:
                tensor[4:] = tensor[:4]
    return network


def test_by_reconstruction_one_of_each_pair_of_copies_goes_first() -> None:
    network = doubled()
    lively = 2 * torch.randn(128, *nets.SHAPE, generator=torch.Generator().manual_seed(0))
    survey = method("reconstruction").survey(network, task_for(network, unlabelled=lively))
    order, loss = survey.detail["a.0"], survey.losses["a.0"]
    assert sorted(unit % 4 for unit in order.units[:4]) == [0, 1, 2, 3]
    assert order.errors[4] < 0.05 * order.errors[5]
    assert float(loss[4]) < 0.05 * float(loss[3])


@pytest.mark.parametrize("mode", ["baseline", "greedy", "stochastic"])
def test_copies_are_merged_without_a_change_of_the_answers(mode: str) -> None:
    dense, network = doubled(), doubled()
    task = task_for(network)
    survey = method(mode).survey(network, task)
    masks = method(mode, step=0.125).choose(network, task, survey, {"a.0": 4, "b.0": 12})
    assert sorted(u % 4 for u in masks.channels["a.0"].nonzero().flatten().tolist()) == [0, 1, 2, 3]
    surgery.cut(network, surgery.removed_positions(task.groups, masks.channels))
    x = images(8)
    with torch.no_grad():
        torch.testing.assert_close(network(x), dense(x), rtol=1e-5, atol=1e-5)
    assert "4 of 4 units were merged into another one" in task.notes[0]


def test_the_seed_counts_in_the_stochastic_mode_alone() -> None:
    network = nets.build("residual")
    task = task_for(network, 0.4)
    kept = counts(method("stochastic").survey(network, task), task)
    for mode, differs in (("greedy", False), ("stochastic", True)):
        chosen = []
        for seed in range(6):
            copy, asked = deepcopy(network), replace(task, seed=seed, notes=[])
            found = method(mode, step=0.2).choose(copy, asked, method(mode).survey(copy, asked), kept)
            chosen.append(torch.cat([found.channels[g] for g in sorted(found.channels)]).tolist())
        assert any(c != chosen[0] for c in chosen) == differs, mode


@pytest.mark.parametrize(
    "options",
    [{"score": "margin"}, {"alpha": 0.0}, {"alpha": 1.0}, {"step": 1.0}, {"pool": 1}, {"scaled": False}],
)
def test_the_options_of_the_paper_run(options: dict[str, object]) -> None:
    network = nets.build("plain")
    task = task_for(network)
    masks = method("stochastic", **options)(network, task)
    surgery.cut(network, surgery.removed_positions(task.groups, masks.channels))
    assert costs.total_macs(network, nets.example()) <= task.rules.limits["macs"]


def test_a_uniform_allocation_is_kept_to() -> None:
    network = nets.build("residual")
    task = task_for(network, 0.5)
    masks = method("reconstruction")(network, replace(task, rules=replace(task.rules, cuts={})))
    shares = [float(keep.double().mean()) for keep in masks.channels.values()]
    assert max(shares) - min(shares) <= 1 / 8


def test_a_group_that_only_other_convolutions_read_is_no_free_prey() -> None:
    """Nothing solves a transposed convolution anew; what its inputs are worth is measured all the same."""
    network = nets.build("transposed")
    task = task_for(network)
    survey = method("reconstruction").survey(network, task)
    assert set(survey.losses) == {"a.0", "up"}
    assert all(float(loss[len(loss) // 2]) > 0 for loss in survey.losses.values())
    order = survey.detail["a.0"]
    assert len(order.units) == 7 and list(order.errors) == sorted(order.errors)


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        ({"mode": "stochastics"}, "mode = 'stochastics' is not one of auto, reconstruction", "'stochastic'"),
        ({"mode": ""}, "mode = '' is not one of", ""),
        ({"score": "margins"}, "score = 'margins' is not one of paper, margin", "'margin'"),
        ({"alpha": 1.5}, r"alpha = 1.5 must be in \[0, 1\]", ""),
        ({"alpha": float("nan")}, "alpha = nan must be", ""),
        ({"step": 0.0}, r"step = 0.0 in \(0, 1\]", ""),
        ({"pool": 0}, "pool = 0 at least 1", ""),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], says: str, hint: str) -> None:
    network = nets.build("plain")
    with pytest.raises(UsageError, match=says) as caught:
        plugins.build("methods", "data-free", options)(network, task_for(network))
    assert hint in caught.value.hint


def test_an_option_that_there_is_not_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="data-free has no option 'alhpa'") as caught:
        plugins.build("methods", "data-free", {"alhpa": 0.5})
    assert "alpha" in caught.value.hint


def test_reconstruction_without_images_says_where_they_come_from() -> None:
    network = nets.build("plain")
    with pytest.raises(UsageError, match="mode 'reconstruction' needs images, and there are none") as caught:
        method("reconstruction")(network, task_for(network, unlabelled=None))
    assert "prune.repair" in caught.value.hint and "stochastic" in caught.value.hint


@pytest.mark.parametrize("mode", ["reconstruction", "stochastic"])
def test_a_task_that_says_nothing_of_the_input_is_refused(mode: str) -> None:
    network = nets.build("plain")
    with pytest.raises(UsageError, match="needs the shape of the network's input"):
        method(mode)(network, task_for(network, spec=None))


def test_labels_and_training_images_are_never_looked_at() -> None:
    network = nets.build("plain")
    poison = torch.full((8, *nets.SHAPE), float("nan"))
    for mode in MODES:
        clean, poisoned = task_for(network), task_for(network, images=poison, labels=torch.arange(8) % 5)
        one, two = (method(mode)(deepcopy(network), task).channels for task in (clean, poisoned))
        assert all(torch.equal(one[g], two[g]) for g in one)


def test_a_network_that_computes_no_numbers_does_not_pass_for_a_good_choice() -> None:
    network = nets.build("plain")

    def nonsense(given: nn.Module, x: Tensor) -> Tensor:
        return given(x) * float("nan")

    task = replace(task_for(network), logits=nonsense)
    losses = method("reconstruction").survey(network, task).losses
    assert all(bool((loss[1:-1] > 100).all()) for loss in losses.values())


def test_the_method_is_held_to_its_task() -> None:
    network = nets.build("plain")
    task = task_for(network)
    with pytest.raises(EdgepruneError, match="infeasible|can't be met"):
        method("baseline")(network, replace(task, rules=Rules({"macs": 1.0}, floor=0.5)))
