"""Each calibrator's range against one worked out by hand, and what all of them promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.quantize.calibrators import CALIBRATORS, divergence, grid, ranges, squared_error
from edgeprune.quantize.observers import Seen, Tally


def binned(counts: list[int], low: float, high: float) -> Seen:
    """A tensor whose values fill bins of equal width between low and high."""
    array = np.array(counts, np.int64)
    return Seen(low, high, array, low, high, np.zeros(1), int(array.sum()))


def seen(values: np.ndarray) -> Seen:
    tally = Tally("x")
    tally.add(values.astype(np.float32))
    return tally.seen()


def one(item: Seen, calibrator: str, *, symmetric: bool = False) -> tuple[float, float]:
    return ranges({"x": item}, calibrator, symmetric=symmetric)["x"]


def test_minmax_is_what_was_seen_and_zero() -> None:
    assert one(binned([1, 2, 1], -1.0, 2.0), "minmax") == (-1.0, 2.0)
    assert one(binned([1, 2, 1], 1.0, 2.5), "minmax") == (0.0, 2.5)
    assert one(binned([1, 2, 1], -4.0, -1.0), "minmax") == (-4.0, 0.0)
    assert one(binned([1, 2, 1], -1.0, 2.0), "minmax", symmetric=True) == (-2.0, 2.0)


def test_a_percentile_leaves_out_one_in_ten_thousand_shared_out_on_both_ends() -> None:
    # 200,000 values: 10 are left out on each end. Of the 40 in the bins at the ends that is a quarter of the bin.
    item = binned([40, 99960, 99960, 40], -2.0, 2.0)
    low, high = one(item, "percentile")
    assert low == pytest.approx(-2 + 10 / 40) and high == pytest.approx(2 - 10 / 40)
    # Of the magnitudes 20 of the 80 in the last bin.
    assert one(item, "percentile", symmetric=True)[1] == pytest.approx(2 - 20 / 80)


def test_behind_a_relu_the_percentile_cuts_on_the_upper_end_only() -> None:
    low, high = one(binned([99960, 40], 0.0, 2.0), "percentile")
    assert low == 0.0
    assert high == pytest.approx(2 - 10 / 40)


def test_the_divergence_of_a_worked_example() -> None:
    # Bins 1..5 are kept, 4 lie outside. P = (2+1, 0, 3, 1+3) = (3, 0, 3, 4) / 10. Two levels of two bins each:
    # sums 2 and 4; the first is spread over the one bin that P fills, the second over two: Q = (2, 0, 2, 2) / 6.
    counts = np.array([1, 2, 0, 3, 1, 3])
    expected = 0.3 * math.log(0.3 * 3) + 0.3 * math.log(0.3 * 3) + 0.4 * math.log(0.4 * 3)
    assert divergence(counts, 1, 5, 2) == pytest.approx(expected)


def test_a_histogram_on_as_many_levels_as_bins_does_not_diverge() -> None:
    assert divergence(np.array([4, 0, 1, 7]), 0, 4, 4) == 0.0


def test_clipping_into_empty_bins_diverges_but_finitely() -> None:
    # All of P's last bin comes from outside: Q has nothing there.
    value = divergence(np.array([8, 0, 8]), 0, 2, 2)
    assert value == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(1e4))


def test_entropy_cuts_off_a_single_outlier_and_keeps_what_is_evenly_spread() -> None:
    rng = np.random.default_rng(0)
    bulk = rng.standard_normal(200_000)
    with_outlier = np.concatenate([bulk, [40.0]])
    low, high = one(seen(with_outlier), "entropy")
    assert 3.0 < high < 8.0 and -6.0 < low < -3.0
    assert 3.0 < one(seen(with_outlier), "entropy", symmetric=True)[1] < 8.0
    even = np.linspace(0, 1, 2_000_001)
    assert one(seen(even), "entropy") == (0.0, pytest.approx(1.0, abs=1e-3))


def test_zeros_behind_a_relu_do_not_narrow_the_entropy_range() -> None:
    bulk = np.abs(np.random.default_rng(0).standard_normal(200_000))
    many = np.concatenate([bulk, np.zeros(2_000_000)])
    assert one(seen(many), "entropy") == one(seen(bulk), "entropy")


def test_the_squared_error_of_a_worked_example() -> None:
    # Step 1 from 0 to 255: 10.25 becomes 10, 300 becomes 255.
    centres, weights = np.array([10.25, 300.0]), np.array([0.5, 0.5])
    assert squared_error(centres, weights, (0.0, 255.0), symmetric=False) == 0.5 * 0.0625 + 0.5 * 45**2
    # Signed, 127 is the end: step 1, 10.25 becomes 10 and 300 becomes 127.
    assert squared_error(centres, weights, (-127.0, 127.0), symmetric=True) == 0.5 * 0.0625 + 0.5 * 173**2


def test_mse_keeps_both_ends_where_clipping_costs_more_than_fine_steps_gain() -> None:
    assert one(binned([1] * 256, 0.0, 1.0), "mse") == (0.0, 1.0)
    assert one(binned([1] * 512, -1.0, 1.0), "mse") == (-1.0, 1.0)


def test_mse_clips_each_end_for_itself() -> None:
    rng = np.random.default_rng(1)
    # One value of n far out on one side. Keeping up to h costs (8 - h)**2 / n + ((1 + h) / 255)**2 / 12, which is
    # least where (8 - h) / n = (1 + h) / (12 * 255**2): at h = 4.95. The grid has steps of 8 / 32.
    values = np.concatenate([rng.uniform(-1, 1, 400_000), [8.0]])
    low, high = one(seen(values), "mse")
    assert low == pytest.approx(-1.0, abs=1e-3)
    assert high == pytest.approx(4.95, abs=0.25)


def test_mse_is_the_best_of_all_clippings_on_its_grid() -> None:
    item = seen(np.random.default_rng(2).standard_t(3, 50_000))
    edges = np.linspace(item.edge_low, item.edge_high, len(item.counts) + 1)
    centres, weights = (edges[:-1] + edges[1:]) / 2, item.counts / item.count
    best = squared_error(centres, weights, one(item, "mse"), symmetric=False)
    for low in (1.0, 0.75, 0.5, 0.25):
        for high in (1.0, 0.75, 0.5, 0.25):
            assert best <= squared_error(
                centres, weights, (low * item.low, high * item.high), symmetric=False
            )


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tensor_of_zeros_gets_a_unit_range_and_one_of_a_single_value_holds_it(
    calibrator: str, symmetric: bool
) -> None:
    zeros = one(seen(np.zeros(10)), calibrator, symmetric=symmetric)
    assert zeros == ((-1.0, 1.0) if symmetric else (0.0, 1.0))
    for value in (2.5, -0.3):
        low, high = one(seen(np.full(10, value)), calibrator, symmetric=symmetric)
        most = abs(float(np.float32(value)))
        assert max(-low, high) == pytest.approx(most)
        assert low < high and low <= 0 <= high


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("symmetric", [False, True])
@settings(max_examples=20)
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=40))
def test_a_range_contains_zero_has_width_and_lies_within_what_was_seen(
    calibrator: str, symmetric: bool, values: list[float]
) -> None:
    item = seen(np.array(values))
    low, high = one(item, calibrator, symmetric=symmetric)
    assert low <= 0.0 <= high and low < high
    scale, zero = grid(low, high, symmetric=symmetric)
    assert np.isfinite(scale) and np.float32(scale) > 0
    assert 0 <= zero <= 255
    if max(abs(item.low), abs(item.high)) > 1e-30:
        most = max(-item.low, item.high)
        assert max(-low, high) <= most
        if symmetric:
            assert low == -high
        else:
            assert low >= min(item.low, 0.0) and high <= max(item.high, 0.0)


def test_zero_is_exact_on_every_grid_and_the_ends_are_within_half_a_step() -> None:
    for low, high in ((-1.0, 2.0), (0.0, 6.0), (-3.0, 0.0), (-1e-3, 7.0)):
        scale, zero = grid(low, high, symmetric=False)
        ends = scale * (np.array([0, 255]) - zero)
        np.testing.assert_allclose(ends, [low, high], atol=scale / 2 + 1e-12)
    assert grid(0.0, 6.0, symmetric=False) == (6 / 255, 0)
    assert grid(-2.0, 2.0, symmetric=True) == (2 / 127, 0)
