"""Going on after an interruption, bit for bit; and checkpoints that are damaged, strange or hostile."""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import paths
import pytest
import torch
from image_sets import Small, same, stripes, weights
from torch import Tensor, nn

from edgeprune.data.collection import Split
from edgeprune.errors import UsageError, WorkdirError
from edgeprune.models.storage import Checkpoint, Progress, key
from edgeprune.recipe.schema import TuneTable
from edgeprune.train import loop
from edgeprune.train.job import Hooks, TrainingJob
from edgeprune.train.loop import CHECKPOINT, fit

TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)
CPU = torch.device("cpu")


@dataclass
class Interrupted:
    """Pixels that end the run at the n-th batch, as Ctrl-C or a kill would."""

    pixels: Tensor
    after: int
    seen: list[int] = field(default_factory=list)

    def take(self, indices: Tensor) -> Tensor:
        self.seen.append(len(indices))
        if len(self.seen) > self.after:
            raise KeyboardInterrupt
        return self.pixels[indices]

    def count(self) -> int:
        return len(self.pixels)


def watched(split: Split, after: int = 10**9) -> tuple[Split, Interrupted]:
    pixels = Interrupted(split.pixels.pixels, after)  # type: ignore[attr-defined]
    return replace(split, pixels=pixels), pixels


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)


@pytest.mark.parametrize("teacher", [None, Small(7)])
@pytest.mark.parametrize("after", [5, 6, 10])
def test_an_interrupted_training_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, teacher: nn.Module | None, after: int
) -> None:
    table = replace(TABLE, distill=0.5 if teacher else 0.0)
    whole, broken, resumed = Small(), Small(), Small()
    course = TrainingJob(stripes(), table, 3, tmp_path / "whole", teacher)
    history = fit(whole, course)
    course = replace(course, scratch=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        fit(broken, replace(course, split=watched(course.split, after)[0]))
    second = fit(resumed, course)
    # One batch is looked at before the first step, and an epoch has four.
    assert second.resumed == (after - 1) // 4
    assert second.losses == history.losses and len(second.losses) == 3
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": "adamw", "lr": 0.01},
        {"objective": "pgd", "attack_steps": 2, "keep": "best"},
        {"objective": "trades", "attack_steps": 1},
        {"mixed": "bf16"},
    ],
    ids=lambda change: "-".join(map(str, change.values())) or "sgd",
)
@pytest.mark.parametrize("after", [2, 8])
def test_a_training_goes_on_in_the_middle_of_an_epoch_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], after: int
) -> None:
    table = replace(TABLE, epochs=2, **change)
    course = TrainingJob(stripes(), table, 3, tmp_path / "whole", None, stripes(16, "val", 1))
    whole, resumed = Small(), Small()
    history = fit(whole, course)
    course = replace(course, scratch=tmp_path / "broken")
    often(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(Small(), replace(course, split=watched(course.split, after)[0]))
    split, pixels = watched(course.split)
    second = fit(resumed, replace(course, split=split))
    # One look before the first step, and the steps that the first run had not finished.
    assert len(pixels.seen) == 1 + 8 - (after - 1)
    assert (second.losses, second.validation, second.best) == (
        history.losses,
        history.validation,
        history.best,
    )
    assert same(weights(resumed), weights(whole))


def test_a_training_that_is_killed_in_the_middle_of_an_epoch_goes_on_there(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from edgeprune.train import loop as train
sys.path.insert(0, sys.argv[2])
from image_sets import Small, stripes
from edgeprune.recipe.schema import TuneTable
TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)
train.CHECKPOINT_SECONDS = 0.0
steps = []
def step(optimizer, lr):
    steps.append(lr)
    if len(steps) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
train.fit(Small(), train.TrainingJob(stripes(), TABLE, 5, Path(sys.argv[1])), train.Hooks(after_step=step))
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "killed"), str(paths.SUPPORT)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole, resumed, steps = Small(), Small(), Counter()
    fit(whole, TrainingJob(stripes(), TABLE, 5, tmp_path / "whole"))
    second = fit(resumed, TrainingJob(stripes(), TABLE, 5, tmp_path / "killed"), Hooks(after_step=steps))
    # The seventh step was killed before its checkpoint; of twelve, six were done.
    assert steps.count == 6 and second.resumed == 1
    assert same(weights(resumed), weights(whole))


@dataclass
class Counter:
    """A hook that counts its calls; its count is state."""

    count: int = 0
    stop_at: int = -1

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mask": {"a": torch.full((3,), self.count)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        assert state["mask"]["a"].tolist() == [self.count] * 3


def counting(counter: Counter) -> Hooks:
    return Hooks(after_step=counter, state=counter.state, restore=counter.restore)


def test_what_hooks_remember_comes_back_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often(monkeypatch)
    course = TrainingJob(stripes(), TABLE, 0, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(Small(), course, counting(Counter(stop_at=7)))
    again = Counter()
    fit(Small(), course, counting(again))
    assert again.count == 12


def test_a_training_that_was_done_is_not_done_again(tmp_path: Path) -> None:
    course = TrainingJob(stripes(), TABLE, 0, tmp_path)
    first, second, steps = Small(), Small(), Counter()
    history = fit(first, course)
    again = fit(second, course, Hooks(after_step=steps))
    assert again == replace(history, resumed=3) and steps.count == 0
    assert same(weights(first), weights(second))


@pytest.mark.parametrize(
    "change",
    [
        lambda course: replace(course, seed=1),
        lambda course: replace(course, table=replace(TABLE, lr=0.01)),
        lambda course: replace(course, split=stripes(32)),
        lambda course: replace(course, validation=stripes(8)),
        lambda course: replace(course, teacher=Small(2)),
    ],
    ids=["seed", "table", "images", "validation", "teacher"],
)
def test_a_checkpoint_of_another_training_is_not_used(
    tmp_path: Path, change: Callable[[TrainingJob], TrainingJob]
) -> None:
    course = TrainingJob(stripes(), replace(TABLE, epochs=1), 0, tmp_path)
    fit(Small(), course)
    assert fit(Small(), course).resumed == 1
    assert fit(Small(), change(course)).resumed == 0


def test_a_checkpoint_of_other_weights_or_hooks_is_not_used(tmp_path: Path) -> None:
    course = TrainingJob(stripes(), replace(TABLE, epochs=1), 0, tmp_path)
    fit(Small(), course, counting(Counter()))
    assert fit(Small(), course, counting(Counter())).resumed == 1
    assert fit(Small(), course, counting(Counter(5))).resumed == 0
    assert fit(Small(1), course, counting(Counter(5))).resumed == 0


@pytest.mark.parametrize("damage", ["empty", "other", "short", "flipped"])
def test_a_damaged_checkpoint_means_to_start_again(tmp_path: Path, damage: str) -> None:
    module, again = Small(), Small()
    course = TrainingJob(stripes(), replace(TABLE, epochs=2), 0, tmp_path)
    fit(module, course)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    place = content.index(module.head.weight.detach().numpy().tobytes()[:16])
    content[place] ^= 1
    broken = {"empty": b"", "other": b"PK\x03\x04 no", "short": path.read_bytes()[:2000], "flipped": content}
    path.write_bytes(broken[damage])
    assert fit(again, course).resumed == 0
    assert same(weights(again), weights(module))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    marker, content = tmp_path / "ran", io.BytesIO()
    torch.save({"key": "k", "progress": Evil(marker)}, content)
    found = content.getvalue()
    (tmp_path / "c.pt").write_bytes(hashlib.sha256(found).digest() + found)
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert Checkpoint(tmp_path / "c.pt", "k").restore(module, optimizer, CPU) is None
    assert not marker.exists()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.marker), "w")


def test_all_of_the_progress_comes_back(tmp_path: Path) -> None:
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    saved = Checkpoint(tmp_path / "deep" / "c.pt", "k")
    assert saved.restore(module, optimizer, CPU) is None
    progress = Progress(
        2, 5, 1.25, [0.5, 0.25], [0.75, 0.5], 0, {"module": weights(module), "hooks": {"n": 1}}
    )
    saved.save(module, optimizer, progress, {"mask": torch.tensor([True, False]), "lr": 0.5})
    found = saved.restore(module, optimizer, CPU)
    assert found is not None
    first, state = vars(found[0]), found[1]
    assert same(first.pop("kept")["module"], weights(module))
    assert first == {name: value for name, value in vars(progress).items() if name != "kept"}
    assert state["mask"].tolist() == [True, False] and state["lr"] == 0.5
    assert [path.name for path in saved.path.parent.iterdir()] == ["c.pt"]


def test_a_checkpoint_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).mkdir()
    with pytest.raises(WorkdirError, match=r"training\.pt can't be written"):
        fit(Small(), TrainingJob(stripes(), TABLE, 0, tmp_path))


def test_a_key_hears_every_value_type_and_shape() -> None:
    base: dict[str, Any] = {"a": torch.zeros(4), "b": [1, 2.0, True, None, "x"]}
    others: list[dict[str, Any]] = [
        {**base, "a": torch.zeros(2, 2)},
        {**base, "a": torch.zeros(4, dtype=torch.int32)},
        {**base, "a": torch.tensor([0, 0, 0, 1e-30])},
        {**base, "b": [1, 2.0, 1, None, "x"]},
        {"c": base["a"], "b": base["b"]},
    ]
    keys = {key("s", [], value) for value in (base, *others)} | {key("t", [], base)}
    assert len(keys) == 7
    assert key("s", [], base) == key("s", [], {"a": torch.zeros(4), "b": [1, 2.0, True, None, "x"]})
    with pytest.raises(UsageError, match="a set can't be kept in a checkpoint"):
        key("s", [], {"a": {1}})
