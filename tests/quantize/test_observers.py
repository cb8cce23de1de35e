"""What flows through a model is seen in one pass, exactly, whatever the order and the size of the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float_models import model_of, pictures, residual
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, helper

from edgeprune.errors import ModelError, UsageError
from edgeprune.quantize import observers
from edgeprune.quantize.calibrators import CALIBRATORS, ranges
from edgeprune.quantize.observers import BINS, Seen, load, observe, save
from edgeprune.quantize.prepare import prepare


def scaling(factors: list[float]) -> ModelProto:
    """Three channels, each times a constant."""
    node = helper.make_node("Mul", ["input", "k"], ["out"], "scale")
    return prepare(model_of([node], {"k": np.float32(factors).reshape(1, 3, 1, 1)}))


def assert_same(one: dict[str, Seen], other: dict[str, Seen], *, means: float = 1e-6) -> None:
    assert list(one) == list(other)
    for name, seen in one.items():
        for part in ("low", "high", "edge_low", "edge_high", "count"):
            assert getattr(seen, part) == getattr(other[name], part), (name, part)
        np.testing.assert_array_equal(seen.counts, other[name].counts)
        np.testing.assert_allclose(seen.mean, other[name].mean, rtol=means, atol=means)


def test_every_float_value_is_seen_and_the_input_first() -> None:
    seen = observe(residual(), pictures(4))
    assert list(seen) == ["input", "a", "r", "c", "s", "p", "f", "out"]
    assert seen["a"].count == 4 * 8 * 36 and seen["out"].count == 4 * 5


def test_whole_numbers_are_not_activations() -> None:
    nodes = [
        helper.make_node("Shape", ["input"], ["sizes"], "sizes"),
        helper.make_node("Reshape", ["input", "sizes"], ["out"], "reshape"),
    ]
    assert list(observe(prepare(model_of(nodes, {})), pictures(2))) == ["input", "out"]


def test_ranges_means_and_histograms_are_those_of_all_values() -> None:
    images = pictures(5)
    images[0, 0, 0, 0], images[3, 2, 1, 1] = -3.0, 8.0
    seen = observe(scaling([1.0, -2.0, 0.5]), images)["out"]
    values = (images * torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)).numpy()
    assert (seen.low, seen.high) == (values.min(), values.max())
    np.testing.assert_allclose(seen.mean, values.mean((0, 2, 3), dtype=np.float64), rtol=1e-6)
    # The bins are exact: numpy counts the same into the same edges, which are powers of two.
    edges = np.linspace(seen.edge_low, seen.edge_high, len(seen.counts) + 1)
    np.testing.assert_array_equal(seen.counts[:-1], np.histogram(values, edges)[0][:-1])
    assert seen.counts.sum() == seen.count == values.size
    assert seen.edge_low <= seen.low and seen.high < seen.edge_high
    assert 0.0 in edges
    assert BINS // 2 <= len(seen.counts) <= BINS


@pytest.mark.parametrize("batch", [1, "batch"])
def test_neither_the_order_nor_the_size_of_batches_changes_what_is_seen(
    batch: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From dark to bright, so that the histograms have to widen many times.
    images = pictures(23) * torch.logspace(-4, 3, 23).reshape(-1, 1, 1, 1)
    model = residual(batch)
    whole = observe(model, images)
    assert_same(whole, observe(model, images.flip(0)))
    monkeypatch.setattr(observers, "MOST_IMAGES", 1)
    assert_same(whole, observe(model, images), means=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_cached_pass_gives_the_ranges_of_a_pass_for_each_calibrator(
    tmp_path: Path, symmetric: bool
) -> None:
    images = pictures(16)
    save(observe(residual(), images), tmp_path / "seen.npz")
    cached = load(tmp_path / "seen.npz")
    for calibrator in CALIBRATORS:
        alone = ranges(observe(residual(), images), calibrator, symmetric=symmetric)
        assert ranges(cached, calibrator, symmetric=symmetric) == alone


def test_what_is_saved_is_read_back_whole(tmp_path: Path) -> None:
    seen = observe(residual(), pictures(3))
    save(seen, tmp_path / "seen.npz")
    assert_same(seen, load(tmp_path / "seen.npz"), means=0)
    save({}, tmp_path / "none.npz")
    assert load(tmp_path / "none.npz") == {}
    assert [file.name for file in tmp_path.glob("*.tmp")] == []


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"nothing of the kind")
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UsageError, match="holds no observed activations"):
            load(tmp_path / name)


@given(
    st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), min_size=1, max_size=5
    )
)
def test_any_values_in_any_batches_are_counted_as_all_at_once(batches: list[list[float]]) -> None:
    parts, whole = observers.Tally("x"), observers.Tally("x")
    for batch in batches:
        parts.add(np.float32(batch))
    whole.add(np.float32([value for batch in batches for value in batch]))
    one, other = parts.seen(), whole.seen()
    assert (one.low, one.high, one.edge_low, one.edge_high) == (
        other.low, other.high, other.edge_low, other.edge_high,
    )  # fmt: skip
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.counts.sum() == one.count == other.count
    assert len(one.counts) <= BINS
    assert one.edge_low <= one.low and one.high <= one.edge_high


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-20])
def test_a_tensor_of_one_value_has_one_bin(value: float) -> None:
    seen = observe(scaling([value] * 3), torch.ones(2, 3, 6, 6))["out"]
    assert seen.low == seen.high == np.float32(value)
    assert seen.counts.tolist() == [2 * 108]
    assert seen.edge_low <= seen.low <= seen.edge_high
    np.testing.assert_allclose(seen.mean, [value] * 3, rtol=1e-6)


def test_a_batch_size_that_is_written_into_the_model_is_kept_to() -> None:
    # Two images a time, which this sum mixes.
    nodes = [
        helper.make_node("Reshape", ["input", "rows"], ["a"], "rows"),
        helper.make_node("ReduceMax", ["a", "axes"], ["out"], "mixes", keepdims=1),
    ]
    model = prepare(model_of(nodes, {"rows": np.int64([2, 108]), "axes": np.int64([0])}, shape=(2, 3, 6, 6)))
    images = pictures(4)
    seen = observe(model, images)["out"]
    expected = images.reshape(2, 2, 108).amax(1)
    assert (seen.low, seen.high, seen.count) == (float(expected.min()), float(expected.max()), 216)
    with pytest.raises(UsageError, match="2 images at a time"):
        observe(model, pictures(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused_and_counted(bad: float) -> None:
    images = pictures(4)
    images[1, 0, 0, 0] = images[3, 2, 5, 5] = bad
    with pytest.raises(
        UsageError, match="2 of 4 calibration images hold NaN or infinity, the first is number 1"
    ):
        observe(residual(), images)


def test_no_images_and_images_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="no calibration images"):
        observe(residual(), pictures(0))
    for wrong in (torch.zeros(2, 1, 6, 6), torch.zeros(2, 3, 6, 6, dtype=torch.float64)):
        with pytest.raises(UsageError, match="the model takes float32"):
            observe(residual(), wrong)


def test_an_activation_that_is_not_finite_is_named() -> None:
    nodes: list[Any] = [
        helper.make_node("Exp", ["input"], ["big"], "big"),
        helper.make_node("Relu", ["big"], ["out"], "relu"),
    ]
    with pytest.raises(ModelError, match="big holds 108 values that are NaN or infinite, of 108"):
        images = torch.zeros(2, 3, 6, 6)
        images[1] = 1000.0
        observe(prepare(model_of(nodes, {})), images)
