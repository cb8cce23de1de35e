"""Training: bit-equal after an interruption, checkpoints, augmentation, accuracy."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import (
    Answers,
    Small,
    same,
    stripes,
    weights,
)
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.nn import progress
from edgeprune.nn.calling import modes
from edgeprune.nn.checkpoint import Checkpoint
from edgeprune.nn.data import Split
from edgeprune.nn.images import Decoded
from edgeprune.nn.train import CHECKPOINT, accuracy, augment, fit, mean_loss
from edgeprune.recipe import TuneTable

TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)


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


@pytest.mark.parametrize("teacher", [None, Small(7)])
@pytest.mark.parametrize("after", [5, 6, 10])
def test_an_interrupted_training_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, teacher: nn.Module | None, after: int
) -> None:
    split, table = stripes(), replace(TABLE, distill=0.5 if teacher else 0.0)
    whole = Small()
    history = fit(whole, split, table, teacher=teacher, seed=3, scratch=tmp_path / "whole")
    broken = Small()
    cut = replace(split, pixels=Interrupted(split.pixels.pixels, after))  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        fit(broken, cut, table, teacher=teacher, seed=3, scratch=tmp_path / "broken")
    resumed = Small()
    second = fit(resumed, split, table, teacher=teacher, seed=3, scratch=tmp_path / "broken")
    # One batch is looked at before the first step, and an epoch has four.
    assert second.resumed == (after - 1) // 4
    assert second.losses == history.losses and len(second.losses) == 3
    assert same(weights(resumed), weights(whole))


def test_training_is_decided_by_the_seed_and_leaves_the_global_chance_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = Small(), Small(), Small()
    fit(first, stripes(), TABLE, seed=1, scratch=tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    fit(second, stripes(), TABLE, seed=1, scratch=tmp_path / "b")
    fit(other, stripes(), TABLE, seed=2, scratch=tmp_path / "c")
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_training_learns(tmp_path: Path) -> None:
    module = Small()
    table = replace(TABLE, epochs=10, augment=False)
    history = fit(module, stripes(), table, seed=0, scratch=tmp_path)
    assert history.losses[-1] < 0.3 * history.losses[0]
    correct, total = accuracy(module, stripes())
    assert total == 64 and correct >= 62


def test_a_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    fit(Small(), stripes(), TABLE, seed=0, scratch=tmp_path)
    for change in (
        {"seed": 1},
        {"table": replace(TABLE, lr=0.01)},
        {"split": stripes(32)},
        {"module": Small(1)},
    ):
        asked = {"module": Small(), "split": stripes(), "table": TABLE, "seed": 0} | change
        assert fit(**asked, scratch=tmp_path).resumed == 0  # type: ignore[arg-type]
    assert fit(Small(1), stripes(), TABLE, seed=0, scratch=tmp_path).resumed == 3


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no", None])
def test_a_damaged_checkpoint_means_to_start_again(tmp_path: Path, damage: bytes | None) -> None:
    module = Small()
    fit(module, stripes(), TABLE, seed=0, scratch=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    again = Small()
    assert fit(again, stripes(), TABLE, seed=0, scratch=tmp_path).resumed == 0
    assert same(weights(again), weights(module))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"key": "k", "losses": Evil(marker)}, tmp_path / "c.pt")
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert Checkpoint(tmp_path / "c.pt", "k").restore(module, optimizer) == []
    assert not marker.exists()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.marker), "w")


def test_frozen_parameters_and_modes_stay_as_they_were(tmp_path: Path) -> None:
    module = Small()
    module.stem.requires_grad_(False)
    module.eval()
    module.drop.train()
    teacher = Small(1)
    before, teacher_before = weights(module), weights(teacher)
    fit(module, stripes(), replace(TABLE, distill=0.5), teacher=teacher, seed=0, scratch=tmp_path)
    after = weights(module)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["next.weight"], after["next.weight"])
    assert [name for name, layer in module.named_modules() if layer.training] == ["drop"]
    assert same(weights(teacher), teacher_before) and teacher.training
    assert all(p.is_contiguous() for p in module.parameters())


def test_weight_decay_leaves_biases_and_normalization_alone(tmp_path: Path) -> None:
    class Constant(nn.Module):
        """Its loss does not depend on its parameters, so that decay alone moves them."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return 0.0 * self.bn(self.conv(x)).mean((2, 3))[:, :2]

    module = Constant()
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(module, stripes(), replace(TABLE, weight_decay=0.1), seed=0, scratch=tmp_path)
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"conv.weight"}
    assert bool((module.conv.weight.abs() < before["conv.weight"].abs()).all())


def test_a_loss_that_is_not_finite_ends_the_training_with_the_place(tmp_path: Path) -> None:
    module = Answers(lambda x: x.mean((2, 3))[:, :2] @ torch.full((2, 2), math.nan))
    with pytest.raises(ModelError, match="loss is nan in epoch 1, step 1 of 4") as caught:
        fit(module, stripes(), TABLE, seed=0, scratch=tmp_path)
    assert "tune.lr=0.005" in caught.value.hint
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_learning_rate_far_too_high_ends_as_a_clear_error_or_finite(tmp_path: Path) -> None:
    try:
        history = fit(Small(), stripes(), replace(TABLE, lr=100.0), seed=0, scratch=tmp_path)
        assert all(math.isfinite(loss) for loss in history.losses)
    except ModelError as error:
        assert "diverged" in error.message


def test_networks_that_need_their_features_contiguous_train_too(tmp_path: Path) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 * 6 * 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(len(x), -1))

    assert len(fit(Viewing(), stripes(), TABLE, seed=0, scratch=tmp_path).losses) == 3


def test_too_little_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training needs at least 2"):
        fit(Small(), stripes(1), TABLE, seed=0, scratch=tmp_path)
    frozen = Small().requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter that can be trained"):
        fit(frozen, stripes(), TABLE, seed=0, scratch=tmp_path)
    assert len(fit(Small(), stripes(3), TABLE, seed=0, scratch=tmp_path).losses) == 3


def test_accuracy_counts_and_an_answer_that_is_not_finite_is_wrong() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    answers = torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 1.0], [math.nan, 0.0], [0.0, math.inf]])
    split = Split("test", labels, Decoded(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)))
    module = Answers(lambda x: answers[(x.flatten() * 255).round().long()])
    assert accuracy(module, split, batch=2) == (2, 5)
    assert module.training


def test_mean_loss_is_the_mean_over_images_whatever_the_batch() -> None:
    split = stripes(10)
    images, module = split.take(torch.arange(10)), Small().eval()
    expected = float(nn.functional.cross_entropy(module(images), split.labels).detach())
    for batch in (3, 10, 100):
        assert mean_loss(module, images, split.labels, batch) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_an_augmented_image_is_a_window_of_the_mirrored_or_plain_image(
    height: int, width: int, seed: int
) -> None:
    x = torch.rand(6, 2, height, width, generator=torch.Generator().manual_seed(seed))
    out = augment(x, torch.Generator().manual_seed(seed))
    reach = min(height // 8, width - 1)
    padded = nn.functional.pad(x, (reach,) * 4, mode="reflect") if reach else x
    assert out.shape == x.shape
    for image, source in zip(out, padded, strict=True):
        windows = [
            source[:, a : a + height, b : b + width]
            for a in range(2 * reach + 1)
            for b in range(2 * reach + 1)
        ]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)


def test_augmentation_is_off_when_the_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(x: Tensor, generator: torch.Generator) -> Tensor:
        raise AssertionError("augmented")

    monkeypatch.setattr("edgeprune.nn.train.augment", never)
    fit(Small(), stripes(), replace(TABLE, epochs=1, augment=False), seed=0, scratch=tmp_path)


def test_modes_are_put_back_after_an_error() -> None:
    first, second = Small(), Small().eval()
    first.bn.eval()
    with pytest.raises(KeyError), modes(second, first):
        assert second.drop.training and not first.training
        raise KeyError
    assert first.training and not first.bn.training and not second.drop.training


def test_bars_are_silent_when_nobody_looks_and_shown_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(_slowly(), 3, "letters")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "letters" in err and "left" in err


def _slowly() -> Iterator[int]:
    yield from range(3)
