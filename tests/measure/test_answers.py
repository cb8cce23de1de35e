"""Accuracy and agreement: what the file itself answers, in the order of the images."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx_files import Mirror, Pictures, artifact, write_mirror

from edgeprune import confidence
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.errors import DeviceError, UsageError
from edgeprune.measure import answers


def test_accuracy_counts_what_the_file_answers(tmp_path: Path) -> None:
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]][:, :, None, None]
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 0, 1, 2])  # the last three are wrong
    path = write_mirror(tmp_path / "mirror.onnx")
    reading, logits = answers.accuracy(
        artifact(path, (4, 1, 1), 4), Pictures(x, labels), Local(), name="dense"
    )
    assert (reading.metric, reading.value, reading.n, reading.artifact) == (
        "clean_accuracy",
        0.7,
        10,
        "dense",
    )
    assert reading.spread == pytest.approx((0.3475471, 0.9332605), abs=1e-6)
    assert reading.conditions["right"] == 7
    np.testing.assert_array_equal(logits, x[:, :, 0, 0])


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 100])
def test_images_keep_their_order_through_chunks_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(answers, "CHUNK_IMAGES", chunk)
    monkeypatch.setattr(answers, "BATCH", 4)
    x = np.random.default_rng(0).random((9, 4, 1, 1), dtype=np.float32)
    path = write_mirror(tmp_path / "mirror.onnx")
    device = Mirror(temporary)
    reading, logits = answers.accuracy(
        artifact(path, (4, 1, 1), 4), Pictures(x, x[:, :, 0, 0].argmax(axis=1)), device, name="dense"
    )
    np.testing.assert_array_equal(logits, x[:, :, 0, 0])
    assert reading.value == 1.0
    assert device.sizes == [min(chunk, 9 - i) for i in range(0, 9, chunk)]
    assert list(temporary.iterdir()) == []


def test_logits_that_are_no_numbers_count_as_wrong(tmp_path: Path) -> None:
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3]][:, :, None, None]
    x[0] = np.nan
    pictures = Pictures(x, np.array([0, 1, 2, 3]))
    path = write_mirror(tmp_path / "mirror.onnx")
    reading, logits = answers.accuracy(
        artifact(path, (4, 1, 1), 4), pictures, Mirror(tmp_path), name="compressed"
    )
    assert reading.value == 0.75
    assert reading.conditions["not_finite"] == 1
    assert answers.agreement(logits, logits).value == 0.75


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0]])
def test_labels_that_the_model_does_not_have_are_refused(tmp_path: Path, labels: list[int]) -> None:
    path = write_mirror(tmp_path / "mirror.onnx")
    pictures = Pictures(np.zeros((2, 4, 1, 1), np.float32), np.array(labels))
    with pytest.raises(UsageError, match="the model answers 4 classes"):
        answers.accuracy(artifact(path, (4, 1, 1), 4), pictures, Mirror(tmp_path), name="dense")


def test_images_of_another_size_than_the_model_eats_are_refused(tmp_path: Path) -> None:
    path = write_mirror(tmp_path / "mirror.onnx")
    pictures = Pictures(np.zeros((2, 3, 1, 1), np.float32), np.array([0, 1]))
    with pytest.raises(UsageError, match=r"float32 \(N, 4, 1, 1\)"):
        answers.accuracy(artifact(path, (4, 1, 1), 4), pictures, Local(), name="dense")


def test_no_held_out_images_is_a_usage_error(tmp_path: Path) -> None:
    path = write_mirror(tmp_path / "mirror.onnx")
    pictures = Pictures(np.zeros((0, 4, 1, 1), np.float32), np.zeros(0, int))
    with pytest.raises(UsageError, match="'test' of the data has no images"):
        answers.accuracy(artifact(path, (4, 1, 1), 4), pictures, Fake(), name="dense")


def test_answers_of_the_wrong_shape_are_a_device_error(tmp_path: Path) -> None:
    class Short(Mirror):
        def get(self, there: str, here: Path) -> None:
            np.save(here, np.zeros((1, 4), np.float32))

    class Broken(Mirror):
        def get(self, there: str, here: Path) -> None:
            here.write_bytes(b"")

    path = write_mirror(tmp_path / "mirror.onnx")
    pictures = Pictures(np.zeros((2, 4, 1, 1), np.float32), np.array([0, 1]))
    for device, said in ((Short(tmp_path), "expected float32"), (Broken(tmp_path), "not a readable .npy")):
        with pytest.raises(DeviceError, match=said):
            answers.accuracy(artifact(path, (4, 1, 1), 4), pictures, device, name="dense")


def test_agreement_is_the_share_of_equal_answers() -> None:
    dense = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    compressed = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    reading = answers.agreement(dense, compressed)
    assert (reading.value, reading.n, reading.artifact) == (0.75, 4, "compressed")
    assert reading.spread == confidence.binomial(3, 4)
    for other in (compressed[:3], compressed[:, :2], compressed[0]):
        with pytest.raises(UsageError, match="same images"):
            answers.agreement(dense, other)
