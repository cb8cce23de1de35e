"""Data sets: the same images from a folder, a tar or an array, parts that share nothing, bad input named."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.nn import data as data_module
from edgeprune.nn import images
from edgeprune.nn.data import Data, calibration_images, calibration_indices, in_memory, open_data
from edgeprune.nn.parts import stratified
from edgeprune.recipe import DataTable
from edgeprune.records import InputSpec

SPEC = InputSpec((3, 8, 8), 2)


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8)
    return Image.fromarray(values)


def folder(root: Path, layout: dict[str, int], first_seed: int = 0) -> Path:
    """Class folders with so many PNG images each, all different."""
    seed = first_seed
    for place, count in layout.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture(seed).save(root / place / f"{index:03}.png")
            seed += 1
    return root


def opened(path: Path, use: str = "all", spec: InputSpec = SPEC, seed: int = 0) -> Data:
    return open_data(DataTable(path=str(path), use=use), spec, seed)


def everything(split: data_module.Split) -> torch.Tensor:
    return split.take(torch.arange(len(split)))


def content(split: data_module.Split | None) -> set[bytes]:
    return set() if split is None else {image.numpy().tobytes() for image in everything(split)}


def refusal(path: Path, **more: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        opened(path, **more)  # type: ignore[arg-type]
    return caught.value


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    layout = {"train/cat": 6, "train/dog": 5, "test/cat": 3, "test/dog": 2}
    return folder(tmp_path / "pets", layout)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return folder(tmp_path / "pets", {"cat": 10, "dog": 20})


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".tgz"])
def test_a_tar_gives_the_same_data_as_the_folder_it_was_made_of(
    parts: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"pets{suffix}"
    compression = {".tar": "", ".tgz": "gz"}.get(suffix, suffix[5:])
    with tarfile.open(path, f"w:{compression}") as archive:  # type: ignore[call-overload]
        archive.add(parts, "some/where/pets")
    before = sorted(tmp_path.rglob("*"))
    ours, theirs = opened(path), opened(parts)
    assert sorted(tmp_path.rglob("*")) == before
    for mine, other in ((ours.train, theirs.train), (ours.held_out, theirs.held_out)):
        assert mine is not None and other is not None
        assert torch.equal(everything(mine), everything(other))
        assert torch.equal(mine.labels, other.labels)
    assert ours.labels == theirs.labels == ("cat", "dog")
    assert (ours.train and len(ours.train), len(ours.held_out)) == (11, 5)


def test_pixels_are_the_images_over_255_in_channel_order(tmp_path: Path) -> None:
    root = folder(tmp_path, {"test/a": 1, "test/b": 1})
    values = np.asarray(Image.open(root / "test/b/000.png"), np.float32)
    held_out = opened(root).held_out
    taken = held_out.take(torch.tensor([1]))
    assert taken.dtype == torch.float32
    assert torch.equal(taken[0], torch.from_numpy(values).permute(2, 0, 1) / 255)
    assert held_out.labels.dtype == torch.int64 and held_out.labels.tolist() == [0, 1]


def test_an_npz_gives_the_pixels_that_it_holds(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x[:4], y_train=[0, 1, 1, 0], x_test=x[4:], y_test=[1, 0])
    data = opened(tmp_path / "d.npz")
    assert data.train is not None and data.labels == ("0", "1")
    expected = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    assert torch.equal(everything(data.train), expected[:4])
    assert torch.equal(everything(data.held_out), expected[4:])
    assert data.held_out.labels.tolist() == [1, 0]


def test_batches_cover_an_order_once_and_keep_images_with_their_labels(parts: Path) -> None:
    split = opened(parts).train
    assert split is not None
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(1))
    batches = list(split.batches(4, order))
    assert [len(x) for x, _ in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([x for x, _ in batches]), split.take(order))
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels[order])
    assert torch.equal(torch.cat([y for _, y in split.batches(4)]), split.labels)


def test_a_set_without_parts_is_split_by_the_seed_and_says_so(whole: Path) -> None:
    data = opened(whole)
    assert data.train is not None
    assert data.held_out.labels.bincount().tolist() == [2, 4]
    assert data.train.labels.bincount().tolist() == [8, 16]
    assert not content(data.train) & content(data.held_out)
    assert len(content(data.train) | content(data.held_out)) == 30
    assert any("6 of its 30 images" in note and "seed 0" in note for note in data.notes)
    assert content(opened(whole).held_out) == content(data.held_out)
    assert content(opened(whole, seed=1).held_out) != content(data.held_out)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_a_stratified_split_is_a_partition_that_leaves_each_class_something(
    labels: list[int], share: float, seed: int
) -> None:
    values = np.array(labels)
    learn, hold = stratified(values, share, seed)
    assert sorted([*learn, *hold]) == list(range(len(labels)))
    for label in set(labels):
        count, held = labels.count(label), int((values[hold] == label).sum())
        assert held < count
        assert abs(held - share * count) <= 1 or held == 1


def test_training_images_that_are_copies_of_held_out_ones_are_left_out(parts: Path) -> None:
    copied = (parts / "test/cat/000.png").read_bytes()
    (parts / "train/dog/copy.png").write_bytes(copied)
    data = opened(parts)
    assert data.train is not None and len(data.train) == 11
    assert not content(data.train) & content(data.held_out)
    assert any("1 training images are copies" in note for note in data.notes)


def test_a_training_part_that_is_the_held_out_part_is_refused(parts: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    for part in ("train", "test"):
        (twice / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (twice / part / name).symlink_to(parts / "train" / name)
    assert "each of the 11 training images" in refusal(twice).message


@pytest.mark.parametrize("kind", ["folder", "tar", "npz"])
def test_data_for_evaluation_has_no_training_part(parts: Path, tmp_path: Path, kind: str) -> None:
    path = parts
    if kind == "tar":
        path = tmp_path / "pets.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(parts, "pets")
    if kind == "npz":
        path = tmp_path / "pets.npz"
        x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
        np.savez(
            path, x_train=np.array([object()] * 9), y_train=[0] * 9, x_test=x[:5], y_test=[0, 0, 0, 1, 1]
        )
    data = opened(path, use="evaluate")
    assert data.train is None
    assert data.held_out.labels.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(UsageError, match="for evaluation only"):
        calibration_images(data, "small")


def test_evaluation_reads_no_training_image(parts: Path) -> None:
    for image in (parts / "train").rglob("*.png"):
        image.write_bytes(b"not an image")
    assert len(opened(parts, use="evaluate").held_out) == 5


def test_a_set_without_parts_is_evaluated_whole(whole: Path) -> None:
    data = opened(whole, use="evaluate")
    assert data.train is None and len(data.held_out) == 30 and data.held_out.name == "all"


def test_a_set_with_only_a_test_part_is_for_evaluation(tmp_path: Path) -> None:
    data = opened(folder(tmp_path, {"test/a": 2, "test/b": 2}))
    assert data.train is None and len(data.held_out) == 4
    assert any("no train part" in note for note in data.notes)


def test_a_set_with_only_a_train_part_is_split_and_not_evaluated(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 5, "train/b": 5})
    data = opened(root)
    assert data.train is not None and len(data.train) == 8 and len(data.held_out) == 2
    assert "train part only" in refusal(root, use="evaluate").message
    assert len(opened(root / "train", use="evaluate").held_out) == 10


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_val_is_measured_on_when_there_is_no_test(tmp_path: Path, name: str) -> None:
    data = opened(folder(tmp_path, {"train/a": 2, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1}))
    assert data.held_out.name == "val" and len(data.held_out) == 2 and data.train and len(data.train) == 4


def test_val_is_left_alone_when_there_is_a_test_part(tmp_path: Path) -> None:
    layout = {f"{part}/{name}": 2 for part in ("train", "val", "test") for name in "ab"}
    data = opened(folder(tmp_path, layout))
    assert data.held_out.name == "test" and data.train and len(data.train) == 4
    assert any("val is not used" in note for note in data.notes)


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    data = opened(folder(tmp_path, {"bus": 5, "train": 5}))
    assert data.labels == ("bus", "train") and data.train and len(data.train) == 8


def test_folders_around_the_classes_hidden_files_and_other_files_do_not_matter(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "data",
        {"deep/er/train/a": 2, "deep/er/train/b": 2, "deep/er/test/a": 1, "deep/er/test/b": 1},
    )
    (root / "README.txt").write_text("hello")
    (root / "deep/er/train/a/.hidden.png").write_text("no image")
    (root / "deep/er/train/.cache").mkdir()
    data = opened(root)
    assert data.labels == ("a", "b") and data.train and len(data.train) == 4 and not data.notes


def test_an_empty_class_folder_keeps_its_place_and_is_noted(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 2, "train/b": 0, "train/c": 2, "test/a": 1, "test/b": 0, "test/c": 1})
    data = opened(root, spec=InputSpec((3, 8, 8), 3))
    assert data.labels == ("a", "b", "c") and data.held_out.labels.tolist() == [0, 2]
    assert "train has no image of: b" in data.notes and "test has no image of: b" in data.notes


def test_links_in_a_circle_are_followed_once(whole: Path) -> None:
    (whole / "cat" / "again").symlink_to(whole)
    assert opened(whole, use="evaluate").held_out.labels.bincount().tolist() == [10, 20]


def test_links_devices_and_climbing_names_in_a_tar_are_passed_over(parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    image = (parts / "train/cat/000.png").read_bytes()
    with tarfile.open(path, "w") as archive:
        archive.add(parts, "pets")
        for name in ("../climb/train/cat/x.png", "/absolute/train/cat/x.png", "pets/train/../../x.png"):
            member = tarfile.TarInfo(name)
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo("pets/train/cat/link.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert content(opened(path).train) == content(opened(parts).train)


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz"])
def test_a_tar_cut_short_anywhere_is_refused(parts: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pets{suffix}"
    with tarfile.open(path, f"w:{suffix[5:]}") as archive:  # type: ignore[call-overload]
        archive.add(parts, "pets")
    raw = path.read_bytes()
    used = len(raw.rstrip(b"\0")) if suffix == ".tar" else len(raw)
    for keep in {0, 100, used // 3, used // 2 // 512 * 512, used // 2, used - 20}:
        path.write_bytes(raw[:keep])
        assert refusal(path).message


def test_a_tar_damaged_in_the_middle_is_refused(parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(parts, "pets")
        header = archive.getmember("pets/train/cat/003.png").offset
    raw = bytearray(path.read_bytes())
    raw[header : header + 512] = b"\xff" * 512
    path.write_bytes(raw)
    assert "damaged" in refusal(path).message


def test_other_sizes_are_resized_on_the_shorter_side_and_cut_in_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(wide).save(tmp_path / name / "0.png")
    data = opened(tmp_path, use="evaluate")
    # 48x16 becomes 24x8, of which the middle 8 columns are the bright third; one column each side is blended.
    assert torch.allclose(data.held_out.take(torch.tensor([0]))[..., 1:-1], torch.tensor(200 / 255))
    assert any("16x48" in note and "8x8" in note for note in data.notes)
    same = np.repeat(wide[None], 2, 0)
    np.savez(tmp_path / "d.npz", x=same, y=[0, 1])
    arrays = opened(tmp_path / "d.npz", use="evaluate")
    assert torch.equal(everything(arrays.held_out), everything(data.held_out))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "CMYK", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_what_the_model_eats(tmp_path: Path, mode: str, channels: int) -> None:
    gray = np.full((8, 8), 255 if mode == "1" else 136, np.uint8)
    image = (
        Image.fromarray(gray.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(gray).convert(mode)
    )
    for name in "ab":
        (tmp_path / name).mkdir()
        image.save(
            tmp_path / name / ("0.jpg" if mode == "CMYK" else "0.png"),
            **({"quality": 100} if mode == "CMYK" else {}),
        )
    data = opened(tmp_path, use="evaluate", spec=InputSpec((channels, 8, 8), 2))
    pixels = everything(data.held_out)
    assert pixels.shape == (2, channels, 8, 8)
    assert torch.allclose(pixels, torch.tensor(float(gray[0, 0]) / 255), atol=2 / 255)


def test_gray_arrays_are_made_rgb_and_color_arrays_gray(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    np.savez(tmp_path / "gray.npz", x=gray, y=[0, 1])
    data = opened(tmp_path / "gray.npz", use="evaluate")
    assert torch.equal(everything(data.held_out), torch.from_numpy(gray)[:, None].expand(2, 3, 8, 8) / 255)
    assert "gray images are made RGB" in data.notes
    np.savez(tmp_path / "color.npz", x=np.repeat(gray[..., None], 3, 3), y=[0, 1])
    one = opened(tmp_path / "color.npz", use="evaluate", spec=InputSpec((1, 8, 8), 2))
    assert torch.equal(everything(one.held_out), torch.from_numpy(gray)[:, None] / 255)
    five = np.zeros((2, 8, 8, 5), np.uint8)
    np.savez(tmp_path / "five.npz", x=five, y=[0, 1])
    assert everything(opened(tmp_path / "five.npz", "evaluate", InputSpec((5, 8, 8), 2)).held_out).shape == (
        2,
        5,
        8,
        8,
    )
    assert "5 channels" in refusal(tmp_path / "five.npz", use="evaluate").message


def test_a_set_too_large_for_memory_gives_the_same_images_from_its_files(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = opened(parts)
    monkeypatch.setattr(data_module, "MEMORY_BYTES", 1000)
    on_demand = opened(parts)
    assert isinstance(on_demand.held_out.pixels, images.OnDemand)
    assert torch.equal(everything(on_demand.held_out), everything(decoded.held_out))
    assert on_demand.train and decoded.train
    assert torch.equal(everything(on_demand.train), everything(decoded.train))
    (parts / "test/cat/001.png").unlink()
    with pytest.raises(UsageError, match=r"test/cat/001\.png"):
        everything(on_demand.held_out)


def test_large_images_are_decoded_by_several_threads_in_order(tmp_path: Path) -> None:
    spec = InputSpec((3, 64, 64), 2)
    for name in "ab":
        (tmp_path / name).mkdir()
    for index in range(12):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(tmp_path / "ab"[index % 2] / f"{index:02}.png")
    pixels = everything(opened(tmp_path, use="evaluate", spec=spec).held_out)
    assert (pixels[:, 0, 0, 0] * 255).round().int().tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]


def test_the_fingerprint_changes_with_the_files_and_not_otherwise(parts: Path, tmp_path: Path) -> None:
    first = opened(parts).fingerprint
    assert opened(parts, seed=5).fingerprint == first
    os.utime(parts / "train/cat/000.png", ns=(1, 1))
    second = opened(parts).fingerprint
    (parts / "train/cat/000.png").rename(parts / "train/cat/other.png")
    third = opened(parts).fingerprint
    assert len({first, second, third}) == 3
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=[0, 0, 1, 1])
    before = opened(tmp_path / "d.npz", use="evaluate").fingerprint
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=[0, 1, 1, 1])
    assert opened(tmp_path / "d.npz", use="evaluate").fingerprint != before


def test_what_is_no_data_is_refused_and_the_message_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.txt").write_text("no image")
    flat = folder(tmp_path, {"flat": 3}) / "flat"
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "x.tar").write_bytes(b"no tar" * 500)
    cases: dict[str, str] = {
        "missing": "no data at",
        "empty": "no images found",
        "words": "no images found (1 other files",
        str(flat): "3 images, none in a class folder (such as '000.png')",
        "x.zip": "not a kind of data",
        "x.tar": "can't be read as a tar",
    }
    for name, message in cases.items():
        error = refusal(tmp_path / name)
        assert message in error.message and error.hint, (name, error.message)


@pytest.mark.parametrize("classes", [3, 1])
def test_another_number_of_classes_than_the_model_has_is_refused_with_both(whole: Path, classes: int) -> None:
    message = refusal(whole, spec=InputSpec((3, 8, 8), classes)).message
    assert "2 class folders (cat, dog)" in message and f"{classes} outputs" in message


def test_image_files_for_a_model_of_other_channels_are_refused(whole: Path) -> None:
    assert "5 channels" in refusal(whole, spec=InputSpec((5, 8, 8), 2)).message


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_an_unreadable_image_is_named(whole: Path, suffix: str, damage: str) -> None:
    path = whole / "dog" / f"zzz.{suffix}"
    picture(99, size=(64, 64)).save(path)
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[: len(raw) // 2], "text": b"hello", "empty": b""}[damage])
    error = refusal(whole)
    assert f"'dog/zzz.{suffix}'" in error.message and "remove" in error.hint


def test_an_image_of_far_too_many_pixels_is_refused_before_it_is_decoded(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    picture(1, size=(40, 40)).save(whole / "dog/large.png")
    assert "dog/large.png" in refusal(whole).message
    monkeypatch.setattr(images, "MAX_PIXELS", 10**12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "can't be decoded" in refusal(whole).message


BAD_ARRAYS: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "no x": (lambda: {"images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds images, but no x and y"),
    "no y": (lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8)}, "has no 'y'"),
    "mixed": (lambda: {"x": np.zeros(1), "y": [0], "x_test": np.zeros(1), "y_test": [0]}, "not both"),
    "float": (lambda: {"x": np.zeros((2, 8, 8, 3), np.float32), "y": [0, 1]}, "is float32 in [0, 0]"),
    "nan": (lambda: {"x": np.full((1, 8, 8, 3), np.nan), "y": [0]}, "192 values that are NaN"),
    "int": (lambda: {"x": np.zeros((2, 8, 8, 3), np.int64), "y": [0, 1]}, "is int64, accepted is uint8"),
    "flat": (lambda: {"x": np.zeros((2, 192), np.uint8), "y": [0, 1]}, "shape (2, 192)"),
    "channels first": (
        lambda: {"x": np.zeros((2, 3, 8, 8), np.uint8), "y": [0, 1]},
        "looks like (N, C, H, W)",
    ),
    "empty": (lambda: {"x": np.zeros((0, 8, 8, 3), np.uint8), "y": []}, "shape (0, 8, 8, 3)"),
    "float labels": (lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": [0.0, np.nan]}, "NaN"),
    "one-hot": (lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.eye(2, dtype=int)}, "shape (2, 2)"),
    "too few labels": (lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": [0]}, "for 2 images"),
    "label too large": (
        lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": [0, 2]},
        "from 0 to 2, the model has 2",
    ),
    "negative": (lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": [-1, 0]}, "from -1 to 0"),
    "objects": (lambda: {"x": np.array([object()]), "y": [0]}, "can't be read as .npz"),
    "too few images": (
        lambda: {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": [0, 1]},
        "too few to hold some out",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_wrong_arrays_are_refused_by_name(tmp_path: Path, case: str) -> None:
    make, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "d.npz", **make())  # type: ignore[arg-type]
    error = refusal(tmp_path / "d.npz")
    assert message in error.message and error.hint, error.message


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(
        path, x=np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), np.uint8), y=[0, 1] * 10
    )
    raw = path.read_bytes()
    damaged = [
        b"",
        b"PK\x03\x04",
        raw[: len(raw) // 2],
        raw[:200] + b"\0" * 300 + raw[500:],
        b"\x80\x04K\x01.",
        b"\x93NUMPY\x01\x00",
    ]
    for content_ in damaged:
        path.write_bytes(content_)
        assert "d.npz" in refusal(path).message


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
    counted: list[int] = []
    chosen = calibration_images(data, "small", counted.append)
    assert {image.numpy().tobytes() for image in chosen} == content(data.train)
    assert sum(counted) == len(chosen) == 11
    assert chosen.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"counts": 5}, "unknown key 'counts'"),
        ({"count": None}, "count is missing"),
        ({"count": "many"}, "must be of type int"),
        ({"count": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
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


def test_a_split_from_memory_takes_what_it_was_given() -> None:
    split = in_memory(
        "mine", torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4), torch.tensor([1, 0])
    )
    assert split.take(torch.tensor([1]))[0, 0, 0, 0] == pytest.approx(48 / 255)
    assert len(split) == 2 and split.labels.tolist() == [1, 0]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), suffix=st.sampled_from([".tar", ".tar.gz", ".npz"]))
def test_any_damage_is_refused_or_read_but_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, suffix: str
) -> None:
    chance = random.Random(seed)
    path = tmp_path_factory.mktemp("damaged") / f"d{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, x=np.arange(4 * 192, dtype=np.uint8).reshape(4, 8, 8, 3), y=[0, 0, 1, 1])
    else:
        with tarfile.open(path, "w:gz" if suffix == ".tar.gz" else "w:") as archive:
            archive.add(folder(path.parent / "pets", {"a": 2, "b": 2}), "pets")
    raw = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 2, 20))):
        place = chance.randrange(len(raw))
        raw[place : place + chance.randrange(40)] = chance.randbytes(chance.randrange(1, 40))
    path.write_bytes(raw)
    with contextlib.suppress(UsageError):
        assert len(opened(path).held_out) >= 1
