"""Calibration recipes: which training images they choose."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from image_sets import content, folder, opened

from edgeprune.data import collection, images
from edgeprune.data.collection import calibration_digest, calibration_images, calibration_indices
from edgeprune.errors import UsageError


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    layout = {"train/cat": 6, "train/dog": 5, "test/cat": 3, "test/dog": 2}
    return folder(tmp_path / "pets", layout)


def labelled(counts: list[int]) -> torch.Tensor:
    return torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])


def recipe(tmp_path: Path, **values: object) -> str:
    table: dict[str, object] = {"title": "t", "count": 12, "seed": 0, "selection": "balanced"} | values
    lines = [
        f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in table.items() if v is not None
    ]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    return str(tmp_path / "c.toml")


def test_balanced_calibration_takes_equal_shares_and_fills_up_from_larger_classes(tmp_path: Path) -> None:
    labels = labelled([50, 2, 50])
    chosen = calibration_indices(labels, recipe(tmp_path))
    assert labels[chosen].bincount().tolist() == [5, 2, 5]
    assert len(set(chosen.tolist())) == 12
    assert torch.equal(chosen, calibration_indices(labels, recipe(tmp_path)))
    assert not torch.equal(chosen, calibration_indices(labels, recipe(tmp_path, seed=1)))


def test_first_and_random_calibration_and_sets_smaller_than_asked(tmp_path: Path) -> None:
    labels = labelled([20, 20])
    assert calibration_indices(labels, recipe(tmp_path, selection="first")).tolist() == list(range(12))
    drawn = calibration_indices(labels, recipe(tmp_path, selection="random"))
    assert len(set(drawn.tolist())) == 12 and drawn.tolist() != list(range(12))
    for selection in ("first", "random", "balanced"):
        everyone = calibration_indices(labelled([3, 2]), recipe(tmp_path, selection=selection))
        assert sorted(everyone.tolist()) == [0, 1, 2, 3, 4]


def test_calibration_images_are_training_images(parts: Path) -> None:
    data = opened(parts)
    chosen = calibration_images(data, "small")
    assert {image.numpy().tobytes() for image in chosen} == content(data.train)
    assert len(chosen) == 11
    assert chosen.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"counts": 5}, "unknown key 'counts'"),
        ({"count": None}, "count is missing"),
        ({"count": "many"}, "must be of type int"),
        ({"count": 0}, "between 1 and"),
        ({"seed": -1}, "between 0 and"),
        ({"seed": 2**32}, "between 0 and 4294967295"),
        ({"selection": "best"}, "'best' is not one of balanced, random, first"),
    ],
)
def test_a_wrong_calibration_recipe_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        calibration_indices(labelled([3]), recipe(tmp_path, **values))
    with pytest.raises(UsageError, match="no calibration is named 'smal'"):
        calibration_indices(labelled([3]), "smal")


def test_the_digest_of_the_chosen_images_is_that_of_their_numbers(tmp_path: Path) -> None:
    labels = labelled([3, 2])
    first = calibration_digest(labels, recipe(tmp_path, selection="first", count=2))
    assert first == hashlib.sha256(bytes([0] * 8 + [1] + [0] * 7)).hexdigest()
    assert first != calibration_digest(labels, recipe(tmp_path, selection="first", count=3))


def test_calibration_images_are_decoded_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.prepare(tmp_path)
    classes = ("bee", "cat", "dog", "fox")
    layout = {f"{part}/{name}": count for part, count in (("train", 6), ("test", 4)) for name in classes}
    folder(tmp_path / "images", layout)
    decodings: Counter[str] = Counter()

    def counted(file: images.ImageFile, shape: tuple[int, int, int]) -> np.ndarray:
        decodings[file.name] += 1
        return decode(file, shape)

    decode = images.decode
    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(collection, "MEMORY_BYTES", 1000)
    argv = [{"images.npz": "images", "fp32": "int8"}.get(word, word) for word in tiny.COMPRESS]
    done = tiny.edgeprune(tmp_path, *argv)
    assert done.exit_code == 0, done.output
    assert {count for name, count in decodings.items() if name.startswith("train/")} == {1}


def test_calibration_images_beyond_the_memory_for_them_are_decoded_again(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "MEMORY_BYTES", 1000)
    data = opened(parts)
    first = calibration_images(data, "small")
    assert len(data.calibration) == 1
    assert torch.equal(calibration_images(data, "small"), first)
    monkeypatch.setattr(collection, "CALIBRATION_BYTES", 10)
    small = opened(parts)
    assert torch.equal(calibration_images(small, "small"), first)
    assert not small.calibration
