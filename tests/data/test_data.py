"""Data sets: the same images from a folder, a tar or an array, in parts that share nothing."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import content, everything, folder, opened, picture, refusal
from PIL import Image, ImageOps
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.data import collection, images
from edgeprune.data.collection import calibration_images, in_memory
from edgeprune.data.splits import stratified
from edgeprune.errors import UsageError
from edgeprune.records import InputSpec


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


def test_folders_around_the_classes_and_files_of_the_system_do_not_matter(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "data",
        {"deep/er/train/a": 2, "deep/er/train/b": 2, "deep/er/test/a": 1, "deep/er/test/b": 1},
    )
    for name in ("Thumbs.db", ".DS_Store", "deep/er/train/a/._000.png", "deep/er/train/desktop.ini"):
        (root / name).write_text("no image")
    (root / "deep/er/train/.cache").mkdir()
    folder(root / "__MACOSX", {"train/a": 1})
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
def test_every_mode_becomes_the_input_of_the_model(tmp_path: Path, mode: str, channels: int) -> None:
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


STORED = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright, exif = Image.new("RGB", (12, 8)), Image.Exif()
    upright.paste((240, 0, 0), (0, 0, 4, 4))
    upright.paste((0, 240, 0), (8, 0, 12, 4))
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    STORED[orientation](upright).save(path, exif=exif, **how)  # type: ignore[no-untyped-call]
    file = images.ImageFile(path.name, path)
    assert images.describe(file).shape == (3, 8, 12)
    expected = np.asarray(upright).transpose(2, 0, 1).astype(int)
    assert np.abs(images.decode(file, (3, 8, 12)) - expected).max() <= 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"", b"garbage", b"II*\0\x08\0\0\0\x05\0\x12\x01", b"MM\0*\xff\xff\xff\xff"]
)
def test_an_image_with_a_broken_exif_is_read_as_it_is_stored(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "x.jpg"
    picture(0).save(path, exif=b"Exif\0\0" + exif)
    assert images.decode(images.ImageFile("x", path), (3, 8, 8)).shape == (3, 8, 8)


def test_of_several_frames_the_first_is_read_and_transparency_is_ignored_and_both_are_said(
    tmp_path: Path,
) -> None:
    first = Image.new("RGB", (8, 8), (200, 100, 0))
    for suffix, name in zip(("gif", "webp", "png", "tif"), "abcd", strict=True):
        (tmp_path / name).mkdir()
        more = {"lossless": True} if suffix == "webp" else {}
        other = Image.new("RGB", (8, 8), (0, 0, 250))
        first.save(tmp_path / name / f"0.{suffix}", save_all=True, append_images=[other], **more)
    see_through = np.dstack([np.asarray(first), np.zeros((8, 8), np.uint8)])
    Image.fromarray(see_through).save(tmp_path / "a/1.png")
    first.quantize(4).save(tmp_path / "a/2.png", transparency=0)
    data = opened(tmp_path, use="evaluate", spec=InputSpec((3, 8, 8), 4))
    expected = torch.tensor([200, 100, 0]).view(1, 3, 1, 1) / 255
    assert torch.allclose(everything(data.held_out), expected, atol=2 / 255)
    assert any("several frames" in note for note in data.notes)
    assert any("transparency is ignored" in note for note in data.notes)


def test_every_common_ending_is_read_in_any_case_and_the_rest_is_counted(tmp_path: Path) -> None:
    kinds = {
        "0.JPE": "JPEG",
        "1.jfif": "JPEG",
        "2.Tif": "TIFF",
        "3.tiff": "TIFF",
        "4.GIF": "GIF",
        "5.bmp": "BMP",
    }
    kinds |= {"6.ppm": "PPM", "7.pgm": "PPM", "8.WebP": "WEBP", "9.pbm": "PPM"}
    root = folder(tmp_path / "d", {"a": 1, "b": 1})
    for name, kind in kinds.items():
        mode = {"7.pgm": "L", "9.pbm": "1"}.get(name, "RGB")
        picture(5).convert(mode).save(root / "b" / name, kind)
    for name in ("a/x.heic", "a/y.HEIC", "labels.csv", "a/noend", "b/.hidden.png", "b/e.\x1b[31m"):
        (root / name).write_bytes(b"?")
    (root / "a/gone.png").symlink_to("nowhere")
    os.mkfifo(root / "b/pipe.png")
    data = opened(root, use="evaluate")
    assert len(data.held_out) == 2 + len(kinds)
    note = next(note for note in data.notes if note.startswith("passed over: "))
    for words in (
        *(
            "2 .heic files (such as 'a/x.heic')",
            "1 .csv file",
            "2 files without an ending (such as 'a/noend')",
        ),
        *("1 hidden image (such as 'b/.hidden.png')", "1 broken link", "1 device or pipe"),
    ):
        assert words in note, note
    assert "\x1b" not in note


def test_hard_links_in_a_tar_are_read_and_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    root, path = folder(tmp_path / "d", {"a": 2, "b": 2}), tmp_path / "d.tar"
    os.link(root / "b/001.png", root / "b/002.png")
    (root / "a/note.txt").write_text("?")
    (root / "a/link.png").symlink_to("000.png")
    with tarfile.open(path, "w") as archive:
        archive.add(root, "d")
        assert archive.getmember("d/b/002.png").islnk()
    data = opened(path, use="evaluate")
    assert data.held_out.labels.tolist() == [0, 0, 1, 1, 1]
    assert "1 .txt file (such as 'd/a/note.txt')" in data.notes[0]
    assert "1 link, device or sparse file (such as 'd/a/link.png')" in data.notes[0]


def test_what_is_passed_over_stands_beside_the_accuracy(tmp_path: Path) -> None:
    torch.save(nets.build("plain").state_dict(), tmp_path / "w.pt")
    root = folder(tmp_path / "d", dict.fromkeys("abcde", 2))
    (root / "a/x.heic").write_bytes(b"?")
    arch = f"{Path(nets.__file__)}:Plain"
    command = ["evaluate", str(tmp_path / "w.pt"), "--arch", arch, "--input", "3x8x8", "--data", str(root)]
    for more in ([], ["--json"]):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 0 and "1 .heic file (such as 'a/x.heic')" in done.stdout, done.output


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
    monkeypatch.setattr(collection, "MEMORY_BYTES", 1000)
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


def test_a_split_from_memory_takes_what_it_was_given() -> None:
    split = in_memory(
        "mine", torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4), torch.tensor([1, 0])
    )
    assert split.take(torch.tensor([1]))[0, 0, 0, 0] == pytest.approx(48 / 255)
    assert len(split) == 2 and split.labels.tolist() == [1, 0]


def test_notes_are_short_whatever_the_names_in_a_file(tmp_path: Path) -> None:
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y, **{"n" * 60_000: y})
    notes = opened(tmp_path / "d.npz", use="evaluate").notes
    assert any("nnn" in note for note in notes) and all(len(note) < 3000 for note in notes)
