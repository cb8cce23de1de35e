"""Pair saliency and matching: exact zeros, both directions, no unit twice; merging costs what the saliency says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.methods._data_free.pairing import Pair, greedy_matching, pair_saliency, scaled_saliency


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(incoming: Tensor, outgoing: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, pair by pair."""
    rows = incoming.double()
    if bias is not None:
        rows = torch.cat([rows, bias.double()[:, None]], 1)
    channels = len(rows)
    found = torch.full((channels, channels), math.inf, dtype=torch.float64)
    for i in range(channels):
        for j in range(channels):
            if i != j:
                found[i, j] = (rows[i] - rows[j]).norm() * outgoing[j].double().norm()
    return found


def test_the_saliency_of_three_units_is_as_computed_by_hand() -> None:
    incoming, bias = torch.tensor([[1.0, 0.0], [4.0, 4.0], [1.0, 0.0]]), torch.tensor([0.0, 0.0, 2.0])
    outgoing = torch.tensor([[1.0], [-2.0], [0.5]])
    found = pair_saliency(incoming, outgoing, bias)
    expected = [
        [math.inf, 10.0, 1.0],
        [5.0, math.inf, 0.5 * math.sqrt(29)],
        [2.0, 2 * math.sqrt(29), math.inf],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("channels", "width"), [(1, 3), (2, 1), (17, 40), (300, 9000)])
def test_blocks_and_matrix_products_agree_with_the_definition(channels: int, width: int) -> None:
    incoming, outgoing, bias = random(channels, width), random(channels, 5, seed=1), random(channels, seed=2)
    picked = slice(None, None, max(1, channels // 12))
    found = pair_saliency(incoming, outgoing, bias)[picked, picked]
    torch.testing.assert_close(
        found, by_hand(incoming[picked], outgoing[picked], bias[picked]), rtol=1e-9, atol=0
    )


@given(data=st.data(), channels=st.integers(2, 9), width=st.integers(1, 5))
def test_it_is_zero_exactly_for_equal_rows_and_for_units_that_nothing_reads(
    data: st.DataObject, channels: int, width: int
) -> None:
    values = st.sampled_from([0.0, 1.0, -1.0, 0.1, 1 / 3, 1e-4, 1.0 + 2**-23, 1e3])
    rows = data.draw(st.lists(st.lists(values, min_size=width + 2, max_size=width + 2), min_size=channels))
    table = torch.tensor(rows)
    incoming, bias, outgoing = table[:, :width], table[:, width], table[:, width + 1 :]
    zero = pair_saliency(incoming, outgoing, bias) == 0
    for i in range(len(rows)):
        for j in range(len(rows)):
            equal = rows[i][: width + 1] == rows[j][: width + 1]
            assert bool(zero[i, j]) == (i != j and (equal or rows[j][-1] == 0))


def test_one_digit_in_one_weight_of_many_is_still_a_difference() -> None:
    """||W_i||^2 + ||W_j||^2 - 2 <W_i, W_j> would say 0, or less."""
    incoming = random(1, 4000).repeat(3, 1)
    incoming[1, 7] = torch.nextafter(incoming[1, 7], torch.tensor(9.0))
    step = float((incoming[1, 7] - incoming[0, 7]).double())
    found = pair_saliency(incoming, torch.ones(3, 1))
    assert found[0, 1] == found[1, 0] == found[1, 2] == pytest.approx(step, rel=1e-6)
    assert found[0, 2] == found[2, 0] == 0


def test_biases_of_zero_and_opposite_biases_are_numbers_like_any_other() -> None:
    incoming, outgoing = torch.tensor([[1.0], [2.0], [2.0]]), torch.ones(3, 1)
    off = ~torch.eye(3, dtype=torch.bool)
    assert pair_saliency(incoming, outgoing, torch.zeros(3))[off].tolist() == [1, 1, 1, 0, 1, 0]
    opposite = pair_saliency(incoming, outgoing, torch.tensor([0.0, 1.5, -1.5]))
    assert bool(opposite[off].isfinite().all())
    assert float(opposite[1, 2]) == 3.0


def test_it_is_not_symmetric_because_only_what_reads_the_removed_unit_counts() -> None:
    found = pair_saliency(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    assert (float(found[0, 1]), float(found[1, 0])) == (3.0, 1.0)


def test_weights_that_are_no_numbers_are_refused_by_unit() -> None:
    bad = torch.ones(3, 2)
    bad[1, 0] = math.nan
    with pytest.raises(ModelError, match="incoming weights of unit 1 are not finite"):
        pair_saliency(bad, torch.ones(3, 2))
    with pytest.raises(ModelError, match="outgoing weights of unit 1 are not finite"):
        scaled_saliency(torch.ones(3, 2), bad)


def test_a_multiple_of_a_row_costs_nothing_when_scales_are_allowed() -> None:
    incoming, bias = random(4, 30), random(4, seed=1)
    incoming[2], bias[2] = 2.5 * incoming[0], 2.5 * bias[0]
    saliency, scale = scaled_saliency(incoming, torch.ones(4, 3), bias)
    assert float(saliency[0, 2]) < 1e-5 > float(saliency[2, 0])
    assert float(scale[0, 2]) == pytest.approx(2.5, rel=1e-6)
    assert float(scale[2, 0]) == pytest.approx(0.4, rel=1e-6)


@pytest.mark.parametrize("channels", [2, 40])
def test_the_scale_is_the_best_one_and_never_worse_than_none(channels: int) -> None:
    incoming, bias, outgoing = random(channels, 6), random(channels, seed=1), random(channels, 4, seed=2)
    rows = torch.cat([incoming, bias[:, None]], 1).double()
    saliency, scale = scaled_saliency(incoming, outgoing, bias)
    plain = pair_saliency(incoming, outgoing, bias)
    assert bool((saliency <= plain).all())
    for i in range(channels):
        for j in range(channels):
            if i == j:
                continue
            product = float(rows[j] @ rows[i])
            best = product / float(rows[i] @ rows[i]) if product > 0 else 1.0
            assert float(scale[i, j]) == pytest.approx(best)
            cost = (rows[j] - best * rows[i]).norm() * outgoing[j].double().norm()
            assert float(saliency[i, j]) == pytest.approx(float(cost))


def test_equal_rows_keep_a_scale_of_one_and_a_cost_of_zero() -> None:
    saliency, scale = scaled_saliency(random(1, 50).repeat(6, 1), random(6, 2, seed=1), torch.zeros(6))
    assert float(saliency.fill_diagonal_(0).max()) == 0
    assert bool((scale == 1).all())


def test_a_row_of_zeros_is_not_scaled() -> None:
    saliency, scale = scaled_saliency(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.ones(2, 1))
    assert saliency.tolist() == [[math.inf, 5.0], [5.0, math.inf]]
    assert bool((scale == 1).all())


def test_the_matching_starts_with_the_best_pair_and_uses_no_unit_twice() -> None:
    """The numbers of a picker that skipped the first of its list and took .747 where .4154 was to be had."""
    saliency = torch.full((4, 4), 9.0, dtype=torch.float64)
    saliency[2, 0], saliency[0, 2], saliency[2, 1], saliency[1, 3] = 0.4154, 0.5, 0.42, 0.747
    assert greedy_matching(saliency) == [Pair(2, 0, 0.4154), Pair(1, 3, 0.747)]
    assert greedy_matching(saliency, 1) == [Pair(2, 0, 0.4154)]
    assert greedy_matching(saliency, 0) == []


def test_of_both_directions_the_cheaper_one_is_taken() -> None:
    saliency = pair_saliency(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    assert greedy_matching(saliency) == [Pair(keep=1, remove=0, saliency=1.0)]


def test_ties_are_taken_in_the_order_of_keep_and_remove() -> None:
    equal = torch.ones(5, 5, dtype=torch.float64).fill_diagonal_(math.inf)
    assert [(p.keep, p.remove) for p in greedy_matching(equal)] == [(0, 1), (2, 3)]


def test_forbidden_pairs_are_never_taken() -> None:
    saliency = torch.full((4, 4), math.inf, dtype=torch.float64)
    saliency[3, 1], saliency[1, 1], saliency[0, 2] = 2.0, 0.0, math.nan
    assert greedy_matching(saliency) == [Pair(3, 1, 2.0)]
    assert greedy_matching(torch.zeros(0, 0)) == []


@given(st.integers(2, 25), st.integers(0, 10**6), st.integers(1, 4))
def test_the_matching_is_that_of_walking_down_the_whole_list(channels: int, seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    saliency = (
        torch.randint(0, levels, (channels, channels), generator=generator).double().fill_diagonal_(math.inf)
    )
    scale = torch.rand((channels, channels), generator=generator, dtype=torch.float64)
    free, expected = set(range(channels)), []
    for value, i, j in sorted(
        (float(saliency[i, j]), i, j) for i in range(channels) for j in range(channels)
    ):
        if i != j and {i, j} <= free:
            free -= {i, j}
            expected.append(Pair(i, j, value, float(scale[i, j])))
    assert greedy_matching(saliency, scale=scale) == expected
    assert len(expected) == channels // 2


def test_the_walk_goes_on_past_the_first_part_of_a_long_list() -> None:
    """Units 0 and 1 fill the first 2 x 299 places; the others come last in a list of 90,000."""
    saliency = torch.full((300, 300), 5.0, dtype=torch.float64)
    saliency[:2] = saliency[:, :2] = 1.0
    saliency.fill_diagonal_(math.inf)
    pairs = greedy_matching(saliency)
    assert pairs[0] == Pair(0, 1, 1.0)
    assert [(p.keep, p.remove) for p in pairs[1:]] == [(k, k + 1) for k in range(2, 300, 2)]
