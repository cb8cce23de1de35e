"""What is said of two files without data: agreement, divergence and bounds on images made from the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import latency_files
import nets
import numpy as np
import pytest
import torch
from onnx_files import write_mirror

from edgeprune import confidence
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.errors import DeviceError, MissingDependency, UsageError
from edgeprune.measure import unlabelled
from edgeprune.measure.unlabelled import Pictures, answers, divergence
from edgeprune.models.bundle import from_module
from edgeprune.records import METRICS, InputSpec


def logits_of(*shares: tuple[float, ...]) -> np.ndarray:
    """Logits whose softmax is these shares."""
    return np.log(np.array(shares)).astype(np.float32)


def test_the_divergence_is_that_of_the_probabilities_dense_first() -> None:
    dense, compressed = logits_of((0.5, 0.5), (0.9, 0.1)), logits_of((0.25, 0.75), (0.9, 0.1))
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)  # 0.1438; the other way round it is 0.1308
    reading = divergence(dense, compressed + 7)  # a shift of all logits is no change
    assert reading.value == pytest.approx(first / 2, abs=1e-6)
    assert (reading.metric, reading.unit, reading.n) == ("synthetic_kl", "nats", 2)
    assert reading.conditions["largest"] == pytest.approx(first, abs=1e-6)


def test_equal_answers_diverge_by_nothing_and_are_certain() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    reading = divergence(logits, logits)
    assert reading.value == 0.0 and reading.spread == (0.0, 0.0)


def test_huge_logits_do_not_overflow() -> None:
    dense = np.array([[1e4, -1e4, 0.0]], np.float32)
    reading = divergence(dense, -dense)
    assert reading.value == pytest.approx(2e4) and reading.spread is None


def test_the_interval_of_the_mean_covers_as_often_as_it_says() -> None:
    """Of 200 sets of 60 exponential draws; 95 % minus what the percentile method loses on skewed values."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = unlabelled.interval_of_mean(rng.exponential(size=60))
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_the_interval_is_the_same_however_much_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).exponential(size=40)
    whole = unlabelled.interval_of_mean(values)
    monkeypatch.setattr(unlabelled, "AT_ONCE", 100)
    assert unlabelled.interval_of_mean(values) == pytest.approx(whole, rel=0.05)


def test_answers_that_are_no_numbers_are_left_out_and_counted() -> None:
    dense = logits_of((0.5, 0.5), (0.5, 0.5), (0.9, 0.1))
    bad = dense.copy()
    bad[0, 0] = np.nan
    reading = divergence(dense, bad)
    assert (reading.value, reading.n, reading.conditions["not_finite"]) == (0.0, 2, 1)
    nothing = divergence(dense, dense * np.nan)
    assert nothing.value is None and "no image had finite answers" in nothing.conditions["why"]


@pytest.mark.parametrize("other", [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros(3)])
def test_a_divergence_of_other_images_is_refused(other: np.ndarray) -> None:
    with pytest.raises(UsageError, match="same images"):
        divergence(np.zeros((3, 3), np.float32), other.astype(np.float32))
    with pytest.raises(UsageError):
        divergence(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))


def test_both_files_are_run_on_the_device_and_the_readings_say_what_they_are_not(tmp_path: Path) -> None:
    path = write_mirror(tmp_path / "mirror.onnx")
    images = torch.rand((30, 4, 1, 1), generator=torch.Generator().manual_seed(0))
    files = {"dense": path, "compressed": path}
    pictures = Pictures(images, {"synthesis": {"steps": 9}}, fitted=True)
    same, kl = answers(files, InputSpec((4, 1, 1), 4), pictures, Local())
    assert (same.metric, same.value, same.n) == ("synthetic_agreement", 1.0, 30)
    assert same.spread == confidence.binomial(30, 30) and kl.value == 0.0
    for reading in (same, kl):
        assert reading.where == Local().where() and reading.artifact == "compressed"
        assert reading.conditions["images"] == "synthetic"
        assert reading.conditions["synthesis"] == {"steps": 9} and reading.conditions["fitted"] is True
        assert reading.metric not in METRICS


def test_a_board_without_onnxruntime_leaves_the_answers_to_this_machine(tmp_path: Path) -> None:
    class Bare(Local):
        def ask(self, request: Mapping[str, Any], **_more: Any) -> dict[str, Any]:
            raise MissingDependency(f"no onnxruntime for {request['op']}", "pip install onnxruntime")

        def where(self) -> str:
            return "ssh://board aarch64"

    network = from_module(nets.build("plain"), nets.example())
    path = latency_files.exported("plain")
    pictures = Pictures(nets.example(6), {}, fitted=False)
    said: list[str] = []
    found = unlabelled.measure_unlabelled(
        network.input, {"dense": path, "compressed": path}, pictures, Bare(), said.append
    )
    rows = {r.metric: r for r in found}
    assert rows["synthetic_agreement"].value == 1.0
    assert rows["synthetic_agreement"].where == Local().where()
    assert any("ssh://board aarch64 has no ONNX Runtime: asked on this machine" in line for line in said)


def test_images_are_run_in_their_order_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlabelled, "BATCH", 3)
    images = torch.rand((8, 4, 1, 1), generator=torch.Generator().manual_seed(0))
    parts = list(Pictures(images, {}, fitted=False).batches())
    assert [len(part) for part in parts] == [3, 3, 2]
    np.testing.assert_array_equal(np.concatenate(parts), images.numpy())


def test_a_device_that_answers_other_classes_is_refused(tmp_path: Path) -> None:
    path = write_mirror(tmp_path / "mirror.onnx")
    pictures = Pictures(torch.rand(5, 4, 1, 1), {}, fitted=False)
    files = {"dense": path, "compressed": path}
    with pytest.raises(DeviceError, match="fake answered logits of 10 classes, the dense network has 4"):
        answers(files, InputSpec((4, 1, 1), 4), pictures, Fake())
