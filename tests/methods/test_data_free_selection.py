"""Choosing candidates: worked examples of the scores, and the walk against a slow one that follows the definition."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeprune.errors import EdgepruneError
from edgeprune.methods._data_free.selection import (
    Candidates,
    anneal,
    entropy,
    greedy,
    margin_score,
    paper_score,
)


def baseline(candidates: Candidates, quota: int) -> list[int]:
    """The order of the list: what greedy does without a pool."""
    return greedy(candidates, margin_score, quota, 0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bounds(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random intervals; every third one is that of its neighbour, so that there are ties."""
    centre = torch.randn((count, classes), generator=seeded(seed), dtype=torch.float64)
    radius = torch.rand((count, classes), generator=seeded(seed + 1), dtype=torch.float64)
    for i in range(2, count, 3):
        centre[i], radius[i] = centre[i - 1], radius[i - 1]
    return centre - radius, centre + radius


def single(count: int, classes: int, seed: int) -> Candidates:
    """Candidates that have no unit in common."""
    lo, hi = bounds(count, classes, seed)
    return Candidates(lo, hi, tuple((2 * i, 2 * i + 1) for i in range(count)))


def widths(lo: Tensor, hi: Tensor) -> Tensor:
    return (hi - lo).sum(1)


def test_the_entropy_of_equal_bounds_is_zero_and_of_dissimilar_ones_ln_n() -> None:
    equal = torch.tensor([[-2.0] * 10, [0.0] * 10])
    assert entropy(equal, equal + 1).tolist() == [0.0, 0.0]
    assert entropy(torch.zeros(1, 10), torch.zeros(1, 10)).tolist() == [0.0]
    apart = 2 * torch.arange(10.0)[None]
    assert float(entropy(apart, apart + 1, threshold=0.99)) == pytest.approx(math.log(10), abs=1e-9)


@pytest.mark.parametrize("size", [1.0, 0.1, 1 / 3, 1e6])
def test_the_entropy_of_bounds_that_overlap_in_part_may_exceed_ln_n(size: float) -> None:
    """(-i, i) for i = 1..10 at 0.9: each is like those at most 2 away, p = .3, .4, .5 x 6, .4, .3."""
    hi = size * torch.arange(1.0, 11.0, dtype=torch.float64)[None]
    assert float(entropy(-hi, hi)) == pytest.approx(3.5349, abs=5e-5)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_the_entropy_is_that_of_counting_one_by_one(classes: int, count: int, seed: int) -> None:
    lo, hi = bounds(count, classes, seed)
    for row, found in enumerate(entropy(lo, hi).tolist()):
        a, b = lo[row].tolist(), hi[row].tolist()
        hull = max(0, *b) - min(0, *a)
        shares = [
            sum(1 - (abs(a[i] - a[j]) + abs(b[i] - b[j])) / (2 * hull) >= 0.9 for j in range(classes))
            / classes
            for i in range(classes)
        ]
        assert found == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)


def test_many_classes_and_candidates_are_counted_in_parts() -> None:
    lo, hi = bounds(40, 700, 3)
    torch.testing.assert_close(
        entropy(lo, hi), torch.cat([entropy(lo[i : i + 1], hi[i : i + 1]) for i in range(40)])
    )


def test_the_score_of_the_list_itself_is_a_mean_of_ranks() -> None:
    """L = 600, 1200, 900, 900 and equal entropies: a sigmoid would call all of them 1."""
    hi = torch.tensor([600.0, 1200.0, 900.0, 900.0], dtype=torch.float64)[:, None].expand(4, 10) / 10
    found = paper_score(torch.zeros(4, 10), hi, 0.75)(torch.zeros(4, 10), hi)
    torch.testing.assert_close(found, 0.75 * torch.tensor([0, 1, 0.5, 0.5]).double() + 0.25 * 0.5)


def test_entropy_decides_when_the_widths_are_equal() -> None:
    uniform, uneven = [-1.0, -1.0, -1.0, -1.0], [-3.5, -0.3, -0.1, -0.1]
    lo = torch.tensor([uneven, uniform], dtype=torch.float64)
    score = paper_score(lo, torch.zeros(2, 4), 0.75)
    assert score(lo, torch.zeros(2, 4)).tolist() == [0.75 * 0.5 + 0.25, 0.75 * 0.5]


@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=8), st.lists(st.floats(0, 3e4), min_size=2, max_size=8)
)
def test_more_width_is_never_better_wherever_the_list_lies(listed: list[float], asked: list[float]) -> None:
    row = torch.tensor(listed, dtype=torch.float64)[:, None]
    probe = torch.tensor(sorted(asked), dtype=torch.float64)[:, None]
    found = paper_score(torch.zeros_like(row), row, 1.0)(torch.zeros_like(probe), probe)
    assert bool((found.diff() >= 0).all())
    wide = probe.diff(dim=0)[:, 0] > 1e-6 * max(1.0, *listed)
    assert bool((found.diff()[wide] > 0).all()), "no part of the scale is flat"


def test_the_scores_of_a_list_are_between_0_and_1_and_a_list_of_one_has_a_score() -> None:
    lo, hi = bounds(30, 5, 1)
    score = paper_score(lo, hi)
    assert bool(((score(lo, hi) >= 0) & (score(lo, hi) <= 1)).all())
    assert bool(score(3 * lo, 3 * hi).mean() > score(lo, hi).mean())
    assert paper_score(lo[:1], hi[:1])(lo[:1], hi[:1]).isfinite().all()


def test_the_margin_score_is_the_most_that_one_logit_gains_on_another() -> None:
    lo = torch.tensor([[-1.0, -2.0, 0.0], [-5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    hi = torch.tensor([[1.0, 3.0, 0.0], [5.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert margin_score(lo, hi).tolist() == [4.0, 7.0, 0.0]
    assert margin_score(torch.tensor([[-1.0]]), torch.tensor([[0.5]])).tolist() == [1.5]


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_margin_score_is_that_of_all_pairs_and_bounds_what_the_logits_do(classes: int, seed: int) -> None:
    lo, hi = bounds(4, classes, seed)
    pairs = list(permutations(range(classes), 2))
    expected = torch.stack([hi[:, i] - lo[:, j] for i, j in pairs]).amax(0)
    torch.testing.assert_close(margin_score(lo, hi), expected)
    change = lo + (hi - lo) * torch.rand(lo.shape, generator=seeded(seed), dtype=torch.float64)
    gains = torch.stack([change[:, i] - change[:, j] for i, j in pairs]).amax(0)
    assert bool((gains <= margin_score(lo, hi) + 1e-12).all())


def test_bounds_that_are_none_are_refused() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(EdgepruneError, match="bounds .* are needed, got"):
        Candidates(good, good[:1], ((0,), (1,)))
    with pytest.raises(EdgepruneError, match="not finite"):
        Candidates(good, good + math.inf, ((0,), (1,)))
    with pytest.raises(EdgepruneError, match="lower bound of candidate 1"):
        Candidates(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1), ((0,), (1,)))


def slow_walk(candidates: Candidates, quota: int, generator: torch.Generator, start: float) -> list[int]:
    """The definition, one candidate at a time, scored by widths."""
    total = torch.zeros(2, candidates.lo.shape[1], dtype=torch.float64)
    accepted, used, current, waiting, moved = [], set[int](), None, list(range(len(candidates.units))), True

    def take(index: int) -> None:
        accepted.append(index)
        used.update(candidates.units[index])
        total[0] += candidates.lo[index]
        total[1] += candidates.hi[index]

    while moved and len(accepted) < quota:
        moved, rejected = False, []
        for index in waiting:
            if len(accepted) == quota:
                break
            if used & set(candidates.units[index]):
                continue
            new = float((total[1] - total[0] + candidates.hi[index] - candidates.lo[index]).sum()) / (
                len(accepted) + 1
            )
            chance = float(torch.rand(1, generator=generator, dtype=torch.float64))
            temperature = start * (1 - len(accepted) / quota)
            if current is None or new <= current + 1e-12 * max(1, abs(current)):
                good = True
            else:
                good = temperature > 0 and chance < math.exp(
                    -(new - current) * (len(accepted) + 1) / temperature
                )
            if good:
                take(index)
                current, moved = new, True
            else:
                rejected.append(index)
        waiting = rejected
    for index in range(len(candidates.units)):
        if len(accepted) < quota and index not in accepted and not used & set(candidates.units[index]):
            take(index)
    return accepted


@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(0, 12), st.sampled_from([0.0, 0.2, 2.0, math.inf]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_the_walk_is_that_of_the_definition(
    count: int, classes: int, quota: int, start: float, seed: int
) -> None:
    candidates = single(count, classes, seed)
    found = anneal(candidates, widths, quota, generator=seeded(seed), start_temperature=start)
    assert found == slow_walk(candidates, quota, seeded(seed), start)


@given(st.integers(0, 30), st.integers(0, 12), st.integers(2, 10), st.integers(0, 10**6))
def test_every_way_meets_the_quota_and_uses_no_unit_twice(
    count: int, quota: int, units: int, seed: int
) -> None:
    lo, hi = bounds(count, 3, seed)
    drawn = torch.randint(0, units, (count, 2), generator=seeded(seed)).tolist()
    candidates = Candidates(lo, hi, tuple((a, b) if a != b else (a,) for a, b in drawn))
    score = paper_score(lo, hi)
    for found in (
        anneal(candidates, score, quota, generator=seeded(seed)),
        anneal(candidates, margin_score, quota, generator=seeded(seed), start_temperature=0.0),
        greedy(candidates, score, quota, 2 * quota),
        baseline(candidates, quota),
    ):
        used = [unit for index in found for unit in candidates.units[index]]
        assert len(used) == len(set(used))
        assert len(set(found)) == len(found) <= quota
        left = [i for i in range(count) if not set(candidates.units[i]) & set(used)]
        assert len(found) == quota or not left


def test_infinite_temperature_is_the_order_of_the_list() -> None:
    candidates = single(30, 3, 5)
    found = anneal(candidates, widths, 12, generator=seeded(), start_temperature=math.inf)
    assert found == baseline(candidates, 12) == list(range(12))


def by_width(*values: float) -> Candidates:
    hi = torch.tensor(values, dtype=torch.float64)[:, None]
    return Candidates(torch.zeros_like(hi), hi, tuple((i,) for i in range(len(values))))


def test_zero_temperature_takes_only_what_is_no_worse_until_nothing_is() -> None:
    """Mean widths 4, (4+3)/2, (7+3.5)/3, then 2 and 5 wait; the second walk finds nothing but what is worse."""
    candidates = by_width(4.0, 9.0, 3.0, 5.0, 3.5, 6.0)
    found = anneal(candidates, widths, 5, generator=seeded(), start_temperature=0.0)
    assert found == [0, 2, 4, 1, 3]


def test_equal_candidates_are_no_worse_than_each_other_in_spite_of_rounding() -> None:
    candidates = by_width(*[0.1] * 40)
    assert anneal(candidates, widths, 30, generator=seeded(), start_temperature=0.0) == list(range(30))


def test_the_temperature_falls_as_the_quota_fills_up() -> None:
    """The chance of what is worse by d than k of q that are there is exp(-d / (T (1 - k / q))), not the reverse."""
    for good, quota in ((1, 10), (5, 10), (9, 10), (1, 2)):
        candidates = by_width(*[1.0] * good, 2.0, *[1.0] * quota)
        runs = 400
        taken = sum(
            good in anneal(candidates, widths, quota, generator=seeded(s), start_temperature=2.0)[: good + 1]
            for s in range(runs)
        )
        chance = math.exp(-1 / (2.0 * (1 - good / quota)))
        assert abs(taken / runs - chance) < 4 * math.sqrt(chance * (1 - chance) / runs)


def test_the_start_temperature_is_the_spread_of_the_first_scores() -> None:
    candidates = single(50, 3, 9)
    spread = float(widths(candidates.lo[:32], candidates.hi[:32]).std(correction=0))
    assert anneal(candidates, widths, 20, generator=seeded(4)) == anneal(
        candidates, widths, 20, generator=seeded(4), start_temperature=spread
    )


def test_a_seed_decides_and_does_so_everywhere() -> None:
    candidates = by_width(*(float(1 + (7 * i) % 11) for i in range(24)))
    found = [anneal(candidates, widths, 8, generator=seeded(s)) for s in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] == [0, 8, 11, 16, 19, 22, 1, 2]
    assert len({tuple(f) for f in found}) > 2


def test_annealing_and_greedy_choice_do_less_harm_than_the_order_of_the_list() -> None:
    better = 0
    for seed in range(20):
        candidates = single(60, 4, 100 * seed)
        harm = [
            float(widths(candidates.lo[f].sum(0)[None], candidates.hi[f].sum(0)[None]))
            for f in (
                baseline(candidates, 15),
                anneal(candidates, widths, 15, generator=seeded(seed)),
                greedy(candidates, widths, 15, 60),
            )
        ]
        better += harm[1] < harm[0]
        assert harm[2] <= min(harm)
    assert better >= 16


def test_greedy_takes_the_best_together_with_what_it_has() -> None:
    """Two opposite shifts cancel: alone the third is worse than the second, after the first it is better."""
    lo = torch.tensor([[1.0, -1.0], [0.5, -1.2], [-1.2, 0.8]], dtype=torch.float64)
    candidates = Candidates(lo, lo, ((0,), (1,), (2,)))
    assert greedy(candidates, margin_score, 2, 3) == [1, 2]
    assert greedy(candidates, margin_score, 2, 2) == [1, 0]
    assert greedy(candidates, margin_score, 3, 1) == [0, 1, 2]
