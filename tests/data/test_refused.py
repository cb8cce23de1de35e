"""Data that can't be used: refused with what was found and where, never with another error."""

from __future__ import annotations

import contextlib
import io
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import content, folder, opened, picture, refusal
from PIL import Image

from edgeprune.data import images
from edgeprune.errors import ModelError, UsageError
from edgeprune.records import InputSpec


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    layout = {"train/cat": 6, "train/dog": 5, "test/cat": 3, "test/dog": 2}
    return folder(tmp_path / "pets", layout)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return folder(tmp_path / "pets", {"cat": 10, "dog": 20})


def test_a_training_part_that_is_the_held_out_part_is_refused(parts: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    for part in ("train", "test"):
        (twice / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (twice / part / name).symlink_to(parts / "train" / name)
    assert "each of the 11 training images" in refusal(twice).message


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
        "words": "no images found (1 .txt file (such as 'a.txt'), 0 folders)",
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
    "objects": (lambda: {"x": np.array([object()]), "y": [0]}, "nothing is unpickled"),
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
        with pytest.raises((UsageError, ModelError), match="d.npz"):
            opened(path)


def test_a_flipped_bit_is_a_damaged_member_whether_or_not_it_can_be_read(tmp_path: Path) -> None:
    path, x = tmp_path / "d.npz", np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.savez(path, x_train=x, y_train=[0, 0, 1, 1], x_test=x, y_test=[0, 0, 1, 1])
    raw = path.read_bytes()
    pixels = raw.index(x.tobytes())
    for place in (pixels, pixels + x.size - 1, raw.index(b"descr"), raw.index(b"NUMPY")):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"member 'x_train.npy' is damaged: .*CRC"):
            opened(path)


def npy(descr: str, shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"", "x is no array"),
        (b"garbage", "x is no array"),
        (b"\x93NUMPY\x01\x00\x28\x23" + b"(" * 9000, "x is no array"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "format is 3.0"),
        (npy("'|u1'", "(1000000000000, 8, 8, 3)", b"abc"), "is 192000000000000 bytes, and holds 3"),
        (npy("'|u1'", f"({2**62}, 8, 8, 3)", b"abc"), "and holds 3"),
        (npy("'|u1'", "(-8, -8, 8, 3)", bytes(1536)), "says uint8 (-8, -8, 8, 3)"),
        (npy("'|u1'", "(2, 8, 8, 3)", bytes(385)), "is 384 bytes, and holds 385"),
        (npy("'|S0'", "(1000000000000,)"), "is |S0"),
        (npy("[('a', '|u1')]", "(8,)", bytes(8)), "accepted are whole numbers"),
        (npy("'|O'", "(2,)", b"cos\nsystem\n(S'true'\ntR."), "nothing is unpickled"),
    ],
)
def test_a_member_that_is_no_array_of_numbers_is_refused_by_name(
    tmp_path: Path, member: bytes, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("x.npy", member)
        file.writestr("y.npy", npy("'|u1'", "(2,)", b"\0\1"))
    assert message in refusal(tmp_path / "d.npz").message


@pytest.mark.parametrize("suffix", [".npz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz"])
def test_what_unpacks_to_hundreds_of_times_its_size_is_refused(tmp_path: Path, suffix: str) -> None:
    path, size = tmp_path / f"d{suffix}", 2**24
    if suffix == ".npz":
        np.savez_compressed(
            path, x=np.zeros((size // 192, 8, 8, 3), np.uint8), y=np.zeros(size // 192, np.int64)
        )
    else:
        kind = suffix.rpartition(".")[2].replace("tgz", "gz")
        with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
            archive.add(folder(tmp_path / "pets", {"a": 2, "b": 2}), "pets")
            for name in ("pets/a/zeros.txt", "pets/b/zeros.png"):
                member = tarfile.TarInfo(name)
                member.size = size
                archive.addfile(member, io.BytesIO(bytes(size)))
    assert "unpacks to more than 500 times as many" in refusal(path).message


def test_a_tar_whose_header_names_a_negative_size_ends(tmp_path: Path) -> None:
    path, header = tmp_path / "d.tar", bytearray(tarfile.TarInfo("a/x.png").tobuf())
    header[124:136] = b"\xff" * 11 + b"\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(tarfile.TarInfo("a").tobuf()) + header + bytes(1024))
    assert "has -256 bytes" in refusal(path).message


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded(whole: Path) -> None:
    path = whole / "dog/scans.jpg"
    picture(0, size=(64, 64)).save(path, progressive=True)
    raw = path.read_bytes()
    assert len(opened(whole).held_out)
    path.write_bytes(raw[:-2] + raw[raw.rindex(b"\xff\xda") : -2] * 200 + raw[-2:])
    assert "more than 100 scans" in refusal(whole).message


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused_because_nothing_says_what_is_white(whole: Path, mode: str) -> None:
    Image.new(mode, (8, 8), 1).save(whole / "dog/deep.tif")
    assert "'dog/deep.tif' has pixels of 32 bits" in refusal(whole).message


def test_no_format_is_read_that_runs_another_program(whole: Path) -> None:
    (whole / "dog/x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    assert "not an image that can be read" in refusal(whole).message


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
    with contextlib.suppress(UsageError, ModelError):
        assert len(opened(path).held_out) >= 1
