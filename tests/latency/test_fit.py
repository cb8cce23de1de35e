"""Staircases through timings: steps are found, one wrong timing does not bend them, and what was timed comes back."""

from __future__ import annotations

import random

import pytest

from edgeprune.latency.table import fit


def blocks_of_sixteen(reads: int, makes: int) -> float:
    return 5e-6 + 1e-9 * reads * (-(-makes // 16) * 16)


def samples(count: int, seed: int = 0) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(4 * draw.randint(1, 32), 4 * draw.randint(1, 32)) for _ in range(count)]


def test_steps_of_sixteen_are_found_from_a_few_timings() -> None:
    stairs = fit([(r, m, blocks_of_sixteen(r, m)) for r, m in samples(40)])
    off = [abs(stairs.at(r, m) / blocks_of_sixteen(r, m) - 1) for r, m in samples(100, seed=1)]
    assert max(off) < 0.08 and sorted(off)[50] < 0.02
    # On one tread of the stairs nothing is gained by fewer channels; over its edge much is.
    assert stairs.at(64, 36) == pytest.approx(stairs.at(64, 48), rel=0.04)
    assert stairs.at(64, 32) < 0.9 * stairs.at(64, 36)


def test_a_slow_path_for_odd_widths_is_found() -> None:
    def slow(reads: int, makes: int) -> float:
        return blocks_of_sixteen(reads, makes) * (2.0 if reads % 4 else 1.0)

    draw = random.Random(3)
    rows = [(draw.randint(8, 128), 16 * draw.randint(1, 8)) for _ in range(60)]
    stairs = fit([(r, m, slow(r, m)) for r, m in rows])
    assert stairs.at(61, 64) > 1.5 * stairs.at(64, 64)


def test_a_disturbed_timing_does_not_bend_the_rest() -> None:
    rows = [(r, m, blocks_of_sixteen(r, m)) for r, m in samples(40)]
    disturbed = [(r, m, s * (3.0 if i == 7 else 1.0)) for i, (r, m, s) in enumerate(rows)]
    stairs = fit(disturbed)
    off = sorted(abs(stairs.at(r, m) / s - 1) for r, m, s in rows)
    assert off[35] < 0.06


@pytest.mark.parametrize("seconds", [0.0, 3e-6])
def test_one_timing_is_enough_and_may_be_nothing(seconds: float) -> None:
    assert fit([(8, 8, seconds)]).at(8, 8) == pytest.approx(seconds, abs=2e-8)


def test_parts_that_a_runtime_fuses_away_at_some_widths_cost_little_there() -> None:
    """As a batch-norm does that becomes part of its neighbour at multiples of 16: most timings are zero."""
    rows = [(c, c, 0.0 if c % 16 == 0 else 1e-8 * c) for c in range(8, 200, 8)]
    stairs = fit(rows)
    assert stairs.at(96, 96) < 0.3 * stairs.at(104, 104)
    assert stairs.at(104, 104) == pytest.approx(1.04e-6, rel=0.2)
