"""What augmentation may do to an image, and that a network which minds it is spared it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import Answers, stripes
from torch import Tensor, nn

from edgeprune import api
from edgeprune.data.collection import Data, in_memory
from edgeprune.recipe.schema import TuneTable
from edgeprune.train.augmentation import augment, choose_augmentation

AUTO = TuneTable(epochs=1)


class Sides(nn.Module):
    """Which half of an image is brighter: 0 for the left one."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 2)
        with torch.no_grad():
            self.conv.weight.fill_(1 / 27)
            self.conv.bias.zero_()
            self.fc.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 8))
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 2)), 1))


def sides(count: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).integers(0, 60, (count, 8, 8, 3), np.uint8)
    y = np.arange(count) % 2
    for image, label in zip(x, y, strict=True):
        image[:, label * 4 : label * 4 + 4] += 120
    return x, y


def lying(count: int) -> Data:
    x, y = sides(count)
    split = in_memory("train", torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y))
    return Data(split, split, ("left", "right"), (), "")


@settings(max_examples=25)
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


@settings(max_examples=15)
@given(count=st.integers(2, 9), parts=st.integers(1, 3), seed=st.integers(0, 99))
def test_an_image_is_augmented_the_same_in_whichever_part_of_the_batch_it_comes(
    count: int, parts: int, seed: int
) -> None:
    x = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    whole = augment(x, torch.Generator().manual_seed(seed))
    for rank in range(min(parts, count)):
        part = slice(rank, None, parts)
        found = augment(x[part], torch.Generator().manual_seed(seed), count=count, part=part)
        assert torch.equal(found, whole[part])


def test_augmentation_reaches_every_shift_and_both_mirrors() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(2000, 1, 8, 8)
    out = augment(x, torch.Generator().manual_seed(0))
    different = {tuple(image.flatten().tolist()) for image in out}
    assert len(different) == 2 * 3 * 3


@pytest.mark.parametrize("count", [12, 64, 400])
def test_mirrors_are_left_out_where_a_class_is_lost_by_them(count: int) -> None:
    table, notes = choose_augmentation(Sides(), lying(count), AUTO, 0)
    assert table == replace(AUTO, augment="shift")
    assert "shifted by up to an eighth" in notes[0]
    assert "not mirrored" in notes[1] and f"of {count // 2} images of class" in notes[1]


def test_one_class_of_many_that_is_lost_is_enough() -> None:
    """Classes 0 and 1 mirror each other; of the other 18 only the brightness counts."""
    x, y = sides(400)
    y = np.where(np.arange(400) < 40, y, 2 + np.arange(400) % 18)
    split = in_memory("train", torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y))
    split.pixels.pixels[40:, 0, 0, :] = split.labels[40:, None].to(torch.uint8) * 10 + 60
    split.pixels.pixels[:40, 0, 0, :] = 0

    def answer(pixels: Tensor) -> Tensor:
        mark = ((pixels[:, 0, 0, 3] * 255 - 60) / 10).round().long()
        side = (pixels[..., 4:].sum((1, 2, 3)) > pixels[..., :4].sum((1, 2, 3))).long()
        return nn.functional.one_hot(torch.where(mark > 1, mark, side), 20).float()

    data = Data(split, split, tuple(f"c{k}" for k in range(20)), (), "")
    table, notes = choose_augmentation(Answers(answer), data, AUTO, 0)
    assert table.augment in {"off", "shift"} and "of 20 images of class 'c" in notes[-1]


def test_what_the_network_does_not_mind_is_done_and_said() -> None:
    split = stripes(64)

    def upright(x: Tensor) -> Tensor:
        across, down = (
            (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)),
            (x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3)),
        )
        return torch.stack([across, down], 1)

    table, notes = choose_augmentation(Answers(upright), Data(split, split, ("a", "b"), (), ""), AUTO, 0)
    assert table.augment == "on" and len(notes) == 1 and "shifted" in notes[0] and "mirrored" in notes[0]


def test_what_the_user_names_is_done_with_a_warning_where_it_harms() -> None:
    for word in ("on", "mirror"):
        table, notes = choose_augmentation(Sides(), lying(64), replace(AUTO, augment=word), 0)
        assert table.augment == word and notes[-1].startswith(f"WARNING: tune.augment = {word!r}")
    for table in (replace(AUTO, augment="off"), replace(AUTO, epochs=0)):
        assert choose_augmentation(Sides(), lying(64), table, 0) == (table, ())
    assert choose_augmentation(Sides(), replace(lying(64), train=None), AUTO, 0) == (AUTO, ())


@pytest.mark.parametrize("kind", ["shift", "mirror"])
def test_one_kind_of_augmentation_leaves_the_other_out(kind: str) -> None:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = augment(x, torch.Generator().manual_seed(0), kinds=(kind,))
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(out, x, strict=True)]
    same = [bool(torch.equal(a, b)) for a, b in zip(out, x, strict=True)]
    assert any(mirrored) == (kind == "mirror") and any(same)
    assert all(m or s for m, s in zip(mirrored, same, strict=True)) == (kind == "mirror")


@pytest.mark.parametrize("method", ["magnitude", "deadwooding"])
def test_every_training_is_spared_what_the_dense_network_minds(method: str, tmp_path: Path) -> None:
    x, y = sides(80)
    np.savez(tmp_path / "d.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    torch.manual_seed(0)
    run = api.compress(
        Sides(), torch.rand(2, 3, 8, 8), data=str(tmp_path / "d.npz"), budget={"macs": "80 %"},
        output=tmp_path / "run", prune={"method": method}, tune={"epochs": 2, "batch": 16},
        export={"precision": "fp32"},
        measure={"iterations": 10, "seconds": 0.5, "warmup": 1},
    )  # fmt: skip
    assert any("not mirrored (tune.augment)" in note for note in run.report.notes), run.report.notes
