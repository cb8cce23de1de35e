"""The repair stage: what it measures, what it may look at, and that it leaves its inputs alone."""

from __future__ import annotations

import platform
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from image_sets import same, stripes
from torch import Tensor, nn

from edgeprune.data.collection import Data, calibration_indices
from edgeprune.recipe.schema import TuneTable
from edgeprune.records import Bundle, InputSpec, Reading, Source
from edgeprune.train import tune
from edgeprune.train.evaluation import accuracy

SPEC = InputSpec((3, 8, 8), 2, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TABLE = TuneTable(epochs=3, lr=0.05, batch=16)


class Small(nn.Module):
    def __init__(self, seed: int = 0, norm: bool = True) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3)
            self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
            self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


@dataclass
class Watched:
    """Pixels that remember which of them were asked for."""

    pixels: Tensor
    asked: list[int] = field(default_factory=list)

    def take(self, indices: Tensor) -> Tensor:
        self.asked += indices.tolist()
        return self.pixels[indices]

    def count(self) -> int:
        return len(self.pixels)


@pytest.fixture
def data() -> Data:
    return Data(stripes(64), stripes(40, "test", 1), ("up", "lying"), (), "f")


def bundle(module: nn.Module) -> Bundle:
    return Bundle(module, Source("memory"), SPEC)


def repaired(
    given: Bundle, data: Data, scratch: Path, table: TuneTable = TABLE, teacher: Bundle | None = None
) -> tuple[Bundle, tuple[Reading, ...]]:
    return tune.run(given, data, table, calibration="small", teacher=teacher, seed=0, scratch=scratch)


def state(module: nn.Module) -> dict[str, Tensor]:
    return deepcopy(module.state_dict())


def test_an_accuracy_that_was_measured_already_is_not_measured_again(data: Data, tmp_path: Path) -> None:
    given, table = bundle(Small()), replace(TABLE, epochs=0)
    _, readings = tune.run(
        given, data, table, calibration="small", teacher=None, seed=0, scratch=tmp_path, measured=True
    )
    assert [r.conditions["stage"] for r in readings] == ["bn recalibrated"]


def test_the_ledger_has_the_accuracy_before_after_batch_norm_and_after_tuning(
    data: Data, tmp_path: Path
) -> None:
    given = bundle(Small())
    given.module.bn.running_mean.fill_(4.0)  # type: ignore[union-attr]
    before = state(given.module)
    tuned, readings = repaired(given, data, tmp_path, replace(TABLE, epochs=10, augment="off"))
    assert [r.conditions["stage"] for r in readings] == ["pruned", "bn recalibrated", "tuned"]
    for reading in readings:
        assert (reading.metric, reading.unit, reading.artifact, reading.n) == (
            "clean_accuracy",
            "fraction",
            "compressed",
            40,
        )
        assert reading.conditions["images"] == 40
        assert reading.where == f"local {platform.machine()} torch"
        assert reading.value is not None and reading.spread is not None
        assert reading.spread[0] <= reading.value <= reading.spread[1]
    assert readings[0].value == 0.5 and (readings[2].value or 0) >= 0.9
    assert same(state(given.module), before)
    assert not same(state(tuned.module), before)
    assert tuned.source == given.source and tuned.input == given.input and tuned.plans == given.plans


def test_the_last_reading_is_the_accuracy_of_the_bundle_that_comes_back(data: Data, tmp_path: Path) -> None:
    tuned, readings = repaired(bundle(Small()), data, tmp_path)
    mean, std = torch.tensor(SPEC.mean).view(1, 3, 1, 1), torch.tensor(SPEC.std).view(1, 3, 1, 1)

    class Normalized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tuned.module.eval()((x - mean) / std)

    correct, total = accuracy(Normalized(), data.held_out)
    assert readings[-1].value == correct / total


def test_the_interval_is_the_exact_binomial_one(tmp_path: Path) -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0]).repeat(len(x), 1)

    split = stripes(10, "test")
    ten = replace(split, labels=torch.tensor([0] * 7 + [1] * 3))
    _, readings = repaired(bundle(First()), Data(None, ten, ("a", "b"), (), ""), tmp_path)
    assert readings[0].value == 0.7
    # Clopper and Pearson for 7 of 10, from tables of the beta distribution.
    assert readings[0].spread == pytest.approx((0.34755, 0.93326), abs=1e-5)


def test_data_for_evaluation_trains_and_calibrates_nothing(data: Data, tmp_path: Path) -> None:
    given = bundle(Small())
    kept, readings = repaired(given, replace(data, train=None), tmp_path, teacher=bundle(Small(1)))
    assert [r.conditions["stage"] for r in readings] == ["pruned"]
    assert same(state(kept.module), state(given.module)) and kept.module is not given.module
    assert not list(tmp_path.iterdir())


def test_the_repair_does_not_depend_on_held_out_images(data: Data, tmp_path: Path) -> None:
    teacher = bundle(Small(1))
    first, _ = repaired(bundle(Small()), data, tmp_path / "a", teacher=teacher)
    other = replace(data, held_out=stripes(6, "test", 9))
    second, _ = repaired(bundle(Small()), other, tmp_path / "b", teacher=teacher)
    assert same(state(first.module), state(second.module))


def test_only_calibration_images_set_the_statistics(data: Data, tmp_path: Path) -> None:
    assert data.train is not None
    watched = Watched(data.train.pixels.pixels)  # type: ignore[attr-defined]
    many = replace(data, train=replace(data.train, pixels=watched))
    recipe = tmp_path / "few.toml"
    recipe.write_text('title = "few"\ncount = 10\nseed = 3\nselection = "balanced"\n')
    given = bundle(Small())
    tune.run(
        given, many, replace(TABLE, epochs=0), calibration=str(recipe), teacher=None, seed=0, scratch=tmp_path
    )
    assert watched.asked == calibration_indices(data.train.labels, str(recipe)).tolist()


def test_new_statistics_are_taken_when_they_fit_better(data: Data, tmp_path: Path) -> None:
    good, _ = repaired(bundle(Small()), data, tmp_path / "a", replace(TABLE, epochs=10, augment="off"))
    broken = bundle(deepcopy(good.module))
    broken.module.bn.running_mean.add_(5.0)  # type: ignore[union-attr]
    fixed, readings = repaired(broken, data, tmp_path / "b", replace(TABLE, epochs=0))
    assert readings[1].conditions["statistics"] == "new" and readings[1].conditions["layers"] == 1
    assert (readings[1].value or 0) >= 0.9 > (readings[0].value or 1)
    assert not same(state(fixed.module), state(broken.module))


def test_old_statistics_stay_when_they_fit_better(data: Data, tmp_path: Path) -> None:
    class Weighed(Small):
        """Answers by its first channel's normalized mean, so that its own statistics decide."""

        def forward(self, x: Tensor) -> Tensor:
            edge = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean((1, 2, 3)) * 20
            seen = self.bn(edge.view(-1, 1, 1, 1).expand(-1, 8, 1, 1))[:, 0, 0, 0]
            return torch.stack([seen, -seen], 1) * 3

    given = bundle(Weighed())
    with torch.no_grad():
        x = (data.train.take(torch.arange(64)) - 0.5) / 0.25  # type: ignore[union-attr]
        edge = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean((1, 2, 3)) * 20
        given.module.bn.running_mean.fill_(edge.mean())  # type: ignore[union-attr]
        given.module.bn.running_var.fill_(edge.var() / 25)  # type: ignore[union-attr]
    kept, readings = repaired(given, data, tmp_path, replace(TABLE, epochs=0))
    conditions = readings[1].conditions
    assert conditions["statistics"] == "old ones kept"
    assert conditions["loss with old"] < conditions["loss with new"]
    assert readings[1].value == readings[0].value
    assert same(state(kept.module), state(given.module))


@pytest.mark.parametrize("epochs", [0, 1])
def test_steps_that_the_recipe_leaves_out_leave_no_reading(data: Data, tmp_path: Path, epochs: int) -> None:
    _, readings = repaired(bundle(Small()), data, tmp_path, replace(TABLE, epochs=epochs, recalibrate=False))
    assert [r.conditions["stage"] for r in readings] == ["pruned", "tuned"][: 1 + epochs]
    _, readings = repaired(bundle(Small(norm=False)), data, tmp_path, replace(TABLE, epochs=0))
    assert [r.conditions["stage"] for r in readings] == ["pruned"]


def test_the_teacher_counts_by_its_weight_and_is_left_alone(data: Data, tmp_path: Path) -> None:
    teacher = bundle(Small(1))
    before = state(teacher.module)
    results = []
    for number, (who, weight) in enumerate([(teacher, 0.5), (None, 0.5), (teacher, 0.0), (None, 0.0)]):
        table = replace(TABLE, distill=weight)
        results.append(state(repaired(bundle(Small()), data, tmp_path / str(number), table, who)[0].module))
    assert not same(results[0], results[1])
    assert same(results[1], results[2]) and same(results[1], results[3])
    assert same(state(teacher.module), before)


def test_a_network_frozen_for_inference_is_trained_and_one_frozen_in_part_stays_so(
    data: Data, tmp_path: Path
) -> None:
    frozen = bundle(Small().requires_grad_(False))
    tuned, _ = repaired(frozen, data, tmp_path / "a")
    assert not torch.equal(tuned.module.conv.weight, frozen.module.conv.weight)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in frozen.module.parameters())
    partly = bundle(Small())
    partly.module.conv.requires_grad_(False)  # type: ignore[union-attr]
    tuned, _ = repaired(partly, data, tmp_path / "b")
    assert torch.equal(tuned.module.conv.weight, partly.module.conv.weight)  # type: ignore[arg-type]
    assert not torch.equal(tuned.module.head.weight, partly.module.head.weight)  # type: ignore[arg-type]


def test_a_killed_repair_goes_on_and_ends_the_same(data: Data, tmp_path: Path) -> None:
    class Killed(Watched):
        def take(self, indices: Tensor) -> Tensor:
            if len(self.asked) > 200:
                raise KeyboardInterrupt
            return Watched.take(self, indices)

    assert data.train is not None
    killed = replace(data, train=replace(data.train, pixels=Killed(data.train.pixels.pixels)))  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        repaired(bundle(Small()), killed, tmp_path / "a")
    assert len(list((tmp_path / "a").iterdir())) == 1
    again, readings = repaired(bundle(Small()), data, tmp_path / "a")
    whole, expected = repaired(bundle(Small()), data, tmp_path / "b")
    assert same(state(again.module), state(whole.module)) and readings == expected
