"""Intervals against known values, and against what they promise."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgeprune.confidence import binomial, quantile, quantile_interval


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.30849710781876083),
        (10, 10, 0.6915028921812392, 1.0),
        (5, 10, 0.187086028447399, 0.812913971552601),
        (1, 1, 0.025, 1.0),
        (0, 1, 0.0, 0.975),
    ],
)
def test_binomial_intervals_match_published_values(k: int, n: int, low: float, high: float) -> None:
    assert binomial(k, n) == pytest.approx((low, high), abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 200_000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.999]))
def test_binomial_intervals_are_the_beta_quantiles(n: int, share: float, level: float) -> None:
    k = round(share * n)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else stats.beta.ppf(tail, k, n - k + 1)
    high = 1.0 if k == n else stats.beta.ppf(1 - tail, k + 1, n - k)
    assert binomial(k, n, level) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(
    ("k", "n", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (1, 2, 1.0), (1, 2, 0.0)]
)
def test_a_share_that_can_not_be_is_refused(k: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="a share needs"):
        binomial(k, n, level)


def test_quantiles_are_linear_between_neighbors() -> None:
    assert quantile([1.0, 2.0, 4.0, 8.0], 0.5) == 3.0
    assert quantile([1.0, 2.0, 4.0, 8.0], 0.0) == 1.0
    assert quantile([1.0, 2.0, 4.0, 8.0], 1.0) == 8.0
    assert quantile([7.0], 0.9) == 7.0
    assert quantile([0.0, 10.0], 0.99) == pytest.approx(9.9)


@pytest.mark.parametrize(("samples", "q"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_a_quantile_of_nothing_is_refused(samples: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="a quantile needs"):
        quantile(samples, q)


@pytest.mark.parametrize(("q", "least"), [(0.5, 6), (0.9, 36), (0.99, 368)])
def test_a_quantile_has_an_interval_from_so_many_samples_on(q: float, least: int) -> None:
    assert quantile_interval(list(range(least - 1)), q) is None
    assert quantile_interval(list(range(least)), q) is not None


@pytest.mark.parametrize("n", [6, 10, 40, 200, 1000])
@pytest.mark.parametrize("q", [0.25, 0.5, 0.9])
def test_the_ranks_are_the_narrowest_that_keep_each_tail_below_2_5_percent(n: int, q: float) -> None:
    found = quantile_interval(list(range(1, n + 1)), q)
    low = max((j for j in range(1, n + 1) if stats.binom.cdf(j - 1, n, q) <= 0.025), default=None)
    high = min((j for j in range(1, n + 1) if stats.binom.sf(j - 1, n, q) <= 0.025), default=None)
    assert found == (None if low is None or high is None else (low, high))


def test_the_median_of_200_samples_lies_between_the_86th_and_the_115th() -> None:
    assert quantile_interval(list(range(1, 201)), 0.5) == (86, 115)


def test_the_interval_covers_the_true_quantile_as_often_as_it_says() -> None:
    rng = random.Random(0)
    true = -math.log(1 - 0.9)  # 90th percentile of the exponential distribution
    hits = 0
    for _ in range(1000):
        found = quantile_interval(sorted(rng.expovariate(1.0) for _ in range(60)), 0.9)
        hits += found is not None and found[0] <= true <= found[1]
    assert hits >= 935  # 950 expected at the least; 935 is two standard deviations below


@pytest.mark.parametrize(("q", "level"), [(0.0, 0.95), (1.0, 0.95), (0.5, 1.0)])
def test_an_interval_of_an_impossible_quantile_is_refused(q: float, level: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        quantile_interval([1.0, 2.0], q, level)
