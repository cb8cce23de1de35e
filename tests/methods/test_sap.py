"""SAP: exact cuts at every granularity and scope, rewinding, stopping by itself, and going on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune import plugins, train
from edgeprune.data.collection import Split, in_memory
from edgeprune.errors import InfeasibleBudget, UsageError
from edgeprune.methods._base import PruneTask, Training
from edgeprune.methods._sap import schedule
from edgeprune.methods._sap.schedule import CutSchedule, Rule
from edgeprune.methods.sap import Sap
from edgeprune.models import costs, surgery
from edgeprune.recipe.schema import TuneTable
from edgeprune.records import InputSpec, Masks
from edgeprune.structure.allocation import Rules
from edgeprune.structure.groups import find_groups, provable_groups
from edgeprune.structure.pq_index import pqi
from edgeprune.structure.units import Units, of_weights
from edgeprune.train import job, loop

GRANULARITIES = ("channel", "weight", "2:4")
TABLE = TuneTable(epochs=2, lr=0.05, batch=20, distill=0.0, augment="off")


def images(count: int, seed: int) -> Split:
    """Five classes, told apart by where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 5
    x = torch.randint(0, 120, (count, *nets.SHAPE), generator=generator)
    for label in range(5):
        x[y == label, label % 3, label : label + 3] += 120
    return in_memory(f"images {seed}", x.to(torch.uint8), y)


def task_for(
    name: str, granularity: str, scratch: Path, budget: float | None = 0.3, **table: Any
) -> tuple[nn.Module, PruneTask]:
    """A task with a share of MACs or of prunable weights as its budget; None is without one."""
    network = nets.build(name)
    groups, weights = (), None
    if granularity == "channel":
        found = find_groups(network, nets.example())
        groups = provable_groups(network, found, nets.example(), 0).groups
    else:
        weights = of_weights(network, granularity)
    model = costs.cost_model(network, groups, nets.example())
    limits = {}
    if budget is not None and granularity == "channel":
        limits = {"macs": budget * model.cost({})["macs"]}
    if budget is not None and granularity == "weight":
        total = sum(weights.sizes.values()) if weights else 0
        limits = {"params": model.cost({})["params"] - total + int(budget * total)}
    training = Training(
        images(40, 1), images(20, 2), replace(TABLE, **table), scratch, 3, None, lambda module: module
    )
    task = PruneTask(
        groups, model, Rules(limits), lambda module, x: module(x), seed=3, spec=InputSpec(nets.SHAPE, 5),
        weights=weights, training=training,
    )  # fmt: skip
    return network, task


def kept(masks: Masks) -> dict[str, Tensor]:
    return {**masks.channels, **masks.weights}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# The network with a transposed convolution has no layer with blocks of four.
@pytest.mark.parametrize(
    ("name", "granularity"),
    [(n, g) for n in nets.NETS for g in GRANULARITIES if (n, g) != ("transposed", "2:4")],
)
def test_the_budget_is_met_exactly_at_every_granularity(name: str, granularity: str, tmp_path: Path) -> None:
    """The call holds the masks against the budget: exactly so many weights, two of every block, the MACs."""
    network, task = task_for(name, granularity, tmp_path)
    modules = [n for n, _ in network.named_modules()]
    masks = Sap()(network, task)
    assert [n for n, _ in network.named_modules()] == modules
    assert task.record["pqi"]["stopped"] == "the budget is met"
    for parameter, keep in masks.weights.items():
        assert not network.get_parameter(parameter)[~keep].any()
    if granularity == "weight":
        assert sum(int(keep.sum()) for keep in masks.weights.values()) == task.quota()
    if granularity == "channel":
        assert surgery.proof_failure(network, task.groups, masks.channels, nets.example()) is None
        assert (
            task.costs.cost({g: int(k.sum()) for g, k in masks.channels.items()})["macs"]
            <= (task.rules.limits["macs"])
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scope", schedule.SCOPES)
@pytest.mark.parametrize("variant", ["tune", "paper", "oneshot"])
def test_every_scope_and_variant_meets_the_budget_and_loses_units_for_good(
    granularity: str, scope: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    real = CutSchedule.next

    def spy(self: CutSchedule, scores: Any, masks: Any, goal: float) -> tuple[dict[str, Tensor], float]:
        seen.append(dict(masks))
        return real(self, scores, masks, goal)

    network, task = task_for("plain", granularity, tmp_path, epochs=4)
    monkeypatch.setattr(
        Sap, "training_epochs", lambda *_: (1, 1, 1, 1) if variant != "oneshot" else (0, 0, 0, 0)
    )
    monkeypatch.setattr(CutSchedule, "next", spy)
    masks = Sap(scope=scope, variant=variant)(network, task)
    seen.append({name: keep.flatten() for name, keep in kept(masks).items()})
    for before, after in pairwise(seen):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    curves = task.record["pqi"]
    points = len(curves["iterations"])
    assert points == len(curves["accuracy"]) == len(curves["mean"])
    assert all(len(values) == points for part in ("layers", "kept") for values in curves[part].values())
    assert {n: values[-1] for n, values in curves["kept"].items()} == {
        n: int(keep.sum()) for n, keep in kept(masks).items()
    }


@pytest.mark.parametrize("variant", ["tune", "paper"])
def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sap = Sap(variant=variant, start="scratch", iterations=3)
    network, task = task_for("residual", "weight", tmp_path / "whole", epochs=8, keep="best")
    whole = sap(network, task)
    trained: list[str] = []
    calls = 0
    real, after = loop.fit, job.Hooks().after_epoch

    class Killed(BaseException):
        pass

    def killing(epoch: int, optimizer: torch.optim.Optimizer) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 6):
            raise Killed
        after(epoch, optimizer)

    def fit(module: nn.Module, course: job.TrainingJob, hooks: job.Hooks) -> job.History:
        trained.append(course.scratch.name)
        return real(module, course, replace(hooks, after_epoch=killing))

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(train, "fit", loop.fit)
    for _ in range(2):
        again, same_task = task_for("residual", "weight", tmp_path / "killed", epochs=8, keep="best")
        with pytest.raises(Killed):
            sap(again, same_task)
    again, same_task = task_for("residual", "weight", tmp_path / "killed", epochs=8, keep="best")
    masks = sap(again, same_task)
    assert equal(kept(masks), kept(whole))
    assert equal(dict(again.state_dict()), dict(network.state_dict()))
    assert same_task.record == task.record and same_task.notes == task.notes
    # A finished training is not repeated: only the two that were killed began twice.
    assert len(trained) == 4 + 2 and sorted(set(trained)) == [f"iteration-{i:02d}" for i in range(4)]
    done, once_more = task_for("residual", "weight", tmp_path / "killed", epochs=8, keep="best")
    assert equal(kept(sap(done, once_more)), kept(whole)) and len(trained) == 6
    assert equal(dict(done.state_dict()), dict(network.state_dict()))


def test_another_seed_budget_or_option_does_not_go_on_from_a_run(tmp_path: Path) -> None:
    def run(sap: Sap, budget: float) -> dict[str, Tensor]:
        network, task = task_for("plain", "weight", tmp_path, budget)
        return kept(sap(network, task))

    first = run(Sap(), 0.3)
    assert equal(first, run(Sap(), 0.3))
    assert not equal(first, run(Sap(), 0.2))
    assert not equal(first, run(Sap(scope="global"), 0.3))


def spied_fit(monkeypatch: pytest.MonkeyPatch, look: Callable[[nn.Module, job.TrainingJob], None]) -> None:
    real = loop.fit

    def fit(module: nn.Module, course: job.TrainingJob, hooks: job.Hooks) -> job.History:
        look(module, course)
        return real(module, course, hooks)

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(train, "fit", loop.fit)


def test_the_paper_rewinds_what_is_left_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, task = task_for("plain", "weight", tmp_path, epochs=4)
    given = {name: value.clone() for name, value in network.state_dict().items()}
    starts: list[dict[str, Tensor]] = []
    spied_fit(
        monkeypatch, lambda module, _: starts.append({k: v.clone() for k, v in module.state_dict().items()})
    )
    Sap(variant="paper", iterations=3)(network, task)
    assert len(starts) == 4 and equal(starts[0], given)
    pruned = [0]
    for start in starts[1:]:
        changed = {name: ~torch.isclose(start[name], given[name], rtol=0, atol=0) for name in given}
        assert all(not start[name][where].any() for name, where in changed.items())
        assert not any(where.any() for name, where in changed.items() if name not in task.units.sizes)
        pruned.append(sum(int(where.sum()) for where in changed.values()))
    left = [sum(n) for n in zip(*task.record["pqi"]["kept"].values(), strict=True)]
    assert [left[0] - n for n in left] == pruned
    assert left[-1] == task.quota()


def test_a_cut_takes_exactly_the_count_of_the_index(tmp_path: Path) -> None:
    """|m| shrinks by floor(d * I) in each layer: p = 0.5, q = 1, without slack."""
    network, task = task_for("residual", "weight", tmp_path, budget=None, epochs=3)
    Sap(variant="paper", iterations=2)(network, task)
    curves = task.record["pqi"]
    for name, left in curves["kept"].items():
        for step in range(2):
            gone = min(
                int(left[step] * curves["layers"][name][step] + 1e-6), left[step] - task.floors()[name]
            )
            assert left[step + 1] == left[step] - gone
    assert curves["stopped"] == "all its iterations are done"


def test_tuning_goes_on_from_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, task = task_for("plain", "weight", tmp_path, epochs=4)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    courses: list[job.TrainingJob] = []
    ends: list[dict[str, Tensor]] = []

    def look(module: nn.Module, course: job.TrainingJob) -> None:
        courses.append(course)
        now = {k: v.clone() for k, v in module.state_dict().items()}
        last = ends[-1] if ends else before
        stays = {k: (now[k] != 0) | (last[k] == 0) for k in now if k in task.units.sizes}
        assert all(torch.equal(now[k][keep], last[k][keep]) for k, keep in stays.items())
        ends.append(now)

    real = loop.fit

    def fit(module: nn.Module, course: job.TrainingJob, hooks: job.Hooks) -> job.History:
        look(module, course)
        history = real(module, course, hooks)
        ends.append({k: v.clone() for k, v in module.state_dict().items()})
        return history

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(train, "fit", loop.fit)
    Sap(iterations=2)(network, task)
    assert [course.table.epochs for course in courses] == [1, 3]
    assert len({course.seed for course in courses}) == 2


@pytest.mark.parametrize(
    ("sap", "epochs", "plan"),
    [
        (Sap(iterations=3), 9, (0, 2, 1, 6)),
        (Sap(iterations=6), 8, (0, 1, 1, 1, 1, 1, 3)),
        (Sap(variant="paper", iterations=3), 10, (3, 2, 2, 3)),
        (Sap(start="scratch", iterations=2), 3, (1, 1, 1)),
        (Sap(), 2, (0, 2)),
        (Sap(), 9, (0, 1, 1, 1, 6)),
        (Sap(), 1, (0, 1)),
        (Sap(variant="paper"), 4, (2, 2)),
        (Sap(variant="paper"), 20, (5, 5, 5, 5)),
        (Sap(variant="paper"), 60, (8, 8, 8, 7, 7, 7, 7, 8)),
        (Sap(variant="oneshot"), 4, (0, 0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_all_epochs_are_shared_out_and_training_follows_the_last_cut(
    sap: Sap, epochs: int, plan: tuple[int, ...], tmp_path: Path
) -> None:
    _, task = task_for("plain", "weight", tmp_path, epochs=epochs)
    assert sap.training_epochs(task, lambda: 7) == plan
    assert sum(plan) in (0, epochs)


def test_a_budget_reached_early_leaves_its_epochs_to_the_last_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, task = task_for("plain", "weight", tmp_path, budget=0.7, epochs=6)
    epochs: list[int] = []
    spied_fit(monkeypatch, lambda _, course: epochs.append(course.table.epochs))
    Sap(gamma=3.0, iterations=4)(network, task)
    assert sum(epochs) == 6 and len(epochs) < 4


def test_a_fixed_share_makes_a_lottery_ticket(tmp_path: Path) -> None:
    network, task = task_for("plain", "weight", tmp_path, budget=None, epochs=3)
    Sap(variant="paper", ratio=0.2, iterations=2, scope="global")(network, task)
    left = [sum(n) for n in zip(*task.record["pqi"]["kept"].values(), strict=True)]
    assert left[1] == left[0] - left[0] // 5 and left[2] == left[1] - left[1] // 5


def test_one_shot_cuts_by_the_first_training_always(tmp_path: Path) -> None:
    """Two steps of a fifth by the same weights take what one step takes of them."""
    network, task = task_for("plain", "weight", tmp_path / "a", budget=None, epochs=3)
    twice = kept(
        Sap(variant="paper", ratio=0.5, iterations=2, scope="global", from_dense=True)(network, task)
    )
    other, again = task_for("plain", "weight", tmp_path / "b", budget=None, epochs=2)
    dense: dict[str, Tensor] = {}
    table = replace(again.training.table, epochs=1)  # type: ignore[union-attr]
    loop.fit(other, job.TrainingJob(images(40, 1), table, 3, tmp_path / "c"))
    dense = again.units.norms(other)
    left = sum(int(keep.sum()) for keep in twice.values())
    bound = torch.cat([v for v in dense.values()]).sort(descending=True).values[left - 1]
    assert all(torch.equal(keep.flatten(), dense[name] >= bound) for name, keep in twice.items())


def test_without_a_budget_it_stops_when_nothing_is_superfluous(tmp_path: Path) -> None:
    network, task = task_for("plain", "weight", tmp_path, budget=None, epochs=10)
    with torch.no_grad():
        for name in task.units.sizes:
            network.get_parameter(name).fill_(0.1)
    masks = Sap()(network, task)
    assert all(bool(keep.all()) for keep in masks.weights.values())
    assert "nothing superfluous" in task.record["pqi"]["stopped"]
    assert "100 % of the prunable weights" in task.notes[-1]


def test_short_of_the_budget_the_last_cut_takes_the_rest(tmp_path: Path) -> None:
    network, task = task_for("plain", "weight", tmp_path)
    with torch.no_grad():
        for name in task.units.sizes:
            network.get_parameter(name).fill_(0.1)
    masks = Sap(variant="oneshot")(network, task)
    assert sum(int(keep.sum()) for keep in masks.weights.values()) == task.quota()
    assert any("count was 0 everywhere, short of the budget" in note for note in task.notes)


def test_a_loss_of_accuracy_takes_the_last_cut_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(18, 20), (18, 20), (10, 20)])
    monkeypatch.setattr(train, "robust_accuracy", lambda *_, **__: next(answers))
    network, task = task_for("plain", "weight", tmp_path, budget=None, epochs=4)
    masks = Sap(iterations=4, tolerance=0.1)(network, task)
    curves = task.record["pqi"]
    assert curves["accuracy"] == [0.9, 0.9, 0.5]
    assert "lost 40.0 points" in curves["stopped"]
    for name, keep in masks.weights.items():
        assert int(keep.sum()) == curves["kept"][name][1]
        assert int((network.get_parameter(name) != 0).sum()) == curves["kept"][name][1]
    assert "after 1 cuts" in task.notes[-1]


def test_the_index_falling_after_a_rise_is_a_collapse() -> None:
    assert not schedule.turned([])
    assert not schedule.turned([0.3, 0.25, 0.22])
    assert not schedule.turned([0.3, 0.2, 0.25, 0.3])
    assert schedule.turned([0.3, 0.2, 0.25, 0.3, 0.2])
    assert not schedule.turned([0.3, 0.2, 0.203, 0.199])


def test_the_three_phases_of_the_index_are_recorded_and_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falls, rises, falls: the weights of the peak stay. The phases are painted, what they do is not."""
    network, task = task_for("plain", "weight", tmp_path, budget=None, epochs=5)
    sharpness = iter([0.5, 2.0, 3.0, 0.2, 1.0])

    def paint(module: nn.Module, course: job.TrainingJob, hooks: job.Hooks) -> job.History:
        power = next(sharpness)
        with torch.no_grad():
            for name in task.units.sizes:
                w = module.get_parameter(name)
                w.copy_(torch.where(w != 0, torch.rand(w.shape, generator=g).add(0.01) ** power, 0))
        return job.History(())

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(loop, "fit", paint)
    monkeypatch.setattr(train, "fit", loop.fit)
    monkeypatch.setattr(train, "robust_accuracy", lambda *_, **__: (1, 2))
    masks = Sap(iterations=5)(network, task)
    mean = task.record["pqi"]["mean"]
    assert len(mean) == 5 and mean[0] > mean[1] < mean[2] < mean[3] > mean[4]
    assert "fell again after it had risen" in task.record["pqi"]["stopped"]
    assert {n: int(k.sum()) for n, k in masks.weights.items()} == {
        n: values[3] for n, values in task.record["pqi"]["kept"].items()
    }


def test_the_pattern_comes_block_by_block_and_cheapest_first() -> None:
    units = Units("2:4", {"w": 16}, shapes={"w": (2, 8)}, blocks={"w": torch.arange(16).view(4, 4)})
    w = torch.tensor(
        [[9.0, 8.0, 0.1, 0.2, 5.0, 5.0, 5.0, 5.0], [7.0, 0.0, 0.0, 6.0, 4.0, 3.0, 2.0, 2.0]],
        dtype=torch.float64,
    )
    scores, masks = {"w": w.flatten()}, units.all()
    cutter = CutSchedule(units, Rule(ratio=0.3), {"w": 0}, lambda _: 2.0)
    masks, _ = cutter.next(scores, masks)  # floor(16 * 0.3) = 4 weights are two blocks
    assert (~masks["w"]).nonzero().flatten().tolist() == [2, 3, 9, 10]
    masks, _ = cutter.next(scores, masks)  # floor(12 * 0.3) = 3 weights are one block
    assert (~masks["w"]).nonzero().flatten().tolist() == [2, 3, 9, 10, 14, 15]
    rows = CutSchedule(units, replace(cutter.rule, scope="unit"), {"w": 0}, lambda _: 2.0)
    assert (~rows.next(scores, units.all())[0]["w"]).nonzero().flatten().tolist() == [2, 3, 9, 10]


def test_counts_follow_each_other_until_the_goal_and_small_layers_are_left_alone() -> None:
    """Normal magnitudes go 1000, 848, 773, 718, ... ; of four even weights never one: floor(4 * I) is 0."""
    w = torch.special.ndtri(0.5 + 0.5 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    scores = {"large": w, "small": torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)}
    units = Units("weight", {"large": 1000, "small": 4}, shapes={"large": (10, 100), "small": (2, 2)})

    def excess(masks: Any) -> float:
        return sum(int(keep.sum()) for keep in masks.values()) / 100

    cutter = CutSchedule(units, Rule(), {"large": 1, "small": 1}, excess)
    for goal, left, rounds in ((11.0, 848, 1), (7.77, 773, 2), (7.22, 718, 3), (4.0, 396, None)):
        masks, counts = cutter.next(scores, units.all(), goal)
        assert int(masks["small"].sum()) == 4
        assert int(masks["large"].sum()) == left
        assert rounds is None or counts == pytest.approx(rounds, abs=1e-3)
        assert bool(masks["large"][-left:].all())
    assert cutter.needed(scores) > 10
    exact = cutter.exactly(scores, units.all(), 282)
    assert exact is not None and [int(keep.sum()) for keep in exact.values()] == [718, 4]
    assert cutter.exactly(scores, units.all(), 1003) is None


def test_scopes_count_rows_layers_or_everything() -> None:
    units = Units("weight", {"a": 8, "b": 4}, shapes={"a": (2, 4), "b": (1, 4)})
    scores = {
        "a": torch.tensor([1.0, 1, 1, 1, 9, 4, 0, 0], dtype=torch.float64),
        "b": torch.tensor([1.0, 0, 0, 0], dtype=torch.float64),
    }
    least = {"a": 1, "b": 1}

    def left(scope: str) -> list[list[int]]:
        after = CutSchedule(units, Rule(scope=scope), least, lambda _: 2.0).next(scores, units.all())[0]
        return [keep.int().tolist() for keep in after.values()]

    # Rows: 1 - 25 / (4 * 13) = 0.52, two of four. Layer: 1 - 81 / (8 * 17) = 0.40, three of eight. All:
    # 1 - 100 / (12 * 18) = 0.54, six of twelve, but the last one of b is its floor.
    assert left("unit") == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0]]
    assert left("layer") == [[0, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0]]
    assert left("global") == [[1, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0]]


def test_few_iterations_share_the_way_to_the_budget_evenly(tmp_path: Path) -> None:
    network, task = task_for("plain", "weight", tmp_path, budget=0.08, epochs=3)
    Sap(iterations=3)(network, task)
    curves = task.record["pqi"]
    left = [sum(n) for n in zip(*curves["kept"].values(), strict=True)]
    assert left[-1] == task.quota()
    even = (left[-1] / left[0]) ** (1 / 3)
    assert left[1] / left[0] == pytest.approx(even, rel=0.02)
    assert left[2] / left[1] == pytest.approx(even, rel=0.02)
    assert all(counts > 1 for counts in curves["counts"][:2]) and curves["counts"][-1] is None


def test_a_fixed_share_is_raised_to_get_there_and_without_pace_the_last_cut_takes_the_rest(
    tmp_path: Path,
) -> None:
    def left(sap: Sap, scratch: Path) -> list[int]:
        network, task = task_for("plain", "weight", scratch, budget=0.1, epochs=4)
        sap(network, task)
        return [sum(n) for n in zip(*task.record["pqi"]["kept"].values(), strict=True)]

    ticket = Sap(variant="paper", iterations=3, ratio=0.2, scope="global")
    dense, *steps = left(ticket, tmp_path / "paced")
    assert [n / dense for n in steps] == pytest.approx([0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1], rel=0.02)
    _, *steps = left(replace(ticket, pace=False), tmp_path / "rest")
    assert [n / dense for n in steps] == pytest.approx([0.8, 0.64, 0.1], abs=0.001)


def test_new_weights_are_drawn_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []
    spied_fit(
        monkeypatch, lambda module, _: starts.append(module.get_parameter("fc.weight").detach().clone())
    )
    for seed in (3, 3, 4):
        network, task = task_for("plain", "weight", tmp_path / str(len(starts)))
        Sap(start="scratch", iterations=1)(network, replace(task, seed=seed))
    given = nets.build("plain").get_parameter("fc.weight")
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[4])
    assert not torch.equal(starts[0], given) and starts[0].shape == given.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layers"}, "scope = 'layers' is not one of unit, layer, global"),
        ({"variant": "papers"}, "variant = 'papers'"),
        ({"start": "zero"}, "start = 'zero'"),
        ({"p": 2.0}, "0 < p < q"),
        ({"beta": 1.0}, "beta = 1"),
        ({"ratio": 1.0}, "ratio = 1"),
        ({"iterations": -1}, "iterations = -1"),
        ({"tolerance": 2.0}, "tolerance = 2"),
        ({"iterations": 3}, "2 epochs are too few to train 3 times"),
        ({"variant": "paper", "iterations": 2}, "2 epochs are too few to train 3 times"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    network, task = task_for("plain", "weight", tmp_path)
    with pytest.raises(UsageError, match=message):
        plugins.build("methods", "sap", options)(network, task)


def test_an_impossible_budget_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, task = task_for("plain", "weight", tmp_path, budget=0.0001)
    monkeypatch.setattr(loop, "fit", None)
    monkeypatch.setattr(train, "fit", loop.fit)
    with pytest.raises(InfeasibleBudget):
        Sap()(network, task)


def test_one_shot_needs_no_images_and_the_others_say_so(tmp_path: Path) -> None:
    network, task = task_for("plain", "weight", tmp_path)
    task = replace(task, training=None)
    with pytest.raises(UsageError, match="trains the network"):
        Sap()(network, task)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    masks = Sap(variant="oneshot")(network, task)
    for name, keep in masks.weights.items():
        assert torch.equal(network.get_parameter(name), before[name] * keep)
    assert task.record["pqi"]["accuracy"][-1] is None
    name = "fc.weight"
    assert task.record["pqi"]["layers"][name][0] == pqi(before[name])
