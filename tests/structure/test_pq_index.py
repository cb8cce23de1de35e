"""The PQ index, the bound and the counts of SAP: the paper's theorems, and exact numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeprune.errors import ModelError, UsageError
from edgeprune.structure.pq_index import keep_shares, pqi, sap_count, share_out, superfluous

ORDERS = [(0.5, 1.0), (1.0, 2.0)]
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)
PAIRS = st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 2.0)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian(d: int) -> Tensor:
    """Magnitudes of a normal distribution: its quantiles in equal steps."""
    return torch.special.ndtri(0.5 + 0.5 * (torch.arange(d, dtype=torch.float64) + 0.5) / d)


@pytest.mark.parametrize(
    ("w", "half", "one"),
    [
        ((1, 1, 1, 1), 0, 0),
        ((1, 0, 0, 0), 0.75, 0.5),
        ((1, 1, 0, 0), 0.5, 0.292893),
        ((1, 2, 3, 4), 0.055586, 0.087129),
        ((4, 3, 2, 1, 0, 0, 0, 0), 0.527793, 0.354503),
        ((3, 4), 0.005128, 0.010051),
        ((0.9, 0.1), 0.2, 0.219131),
        ((1, 10, 100, 1000), 0.528292, 0.447284),
    ],
)
def test_the_index_of_small_vectors(w: tuple[float, ...], half: float, one: float) -> None:
    assert pqi(vector(*w)) == pytest.approx(half, abs=5e-7)
    assert pqi(vector(*w), 1, 2) == pytest.approx(one, abs=5e-7)


@given(VALUES, PAIRS)
def test_the_index_is_bounded_and_blind_to_scale_sign_order_and_shape(
    values: list[float], orders: tuple[float, float]
) -> None:
    w, (p, q) = vector(*values), orders
    index = pqi(w, p, q)
    assert 0 <= index <= 1 - len(values) ** (1 / q - 1 / p) + 1e-12
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    for other in (7 * w, -w, w[order], w[None, :, None]):
        assert pqi(other, p, q) == pytest.approx(index, abs=1e-9)


def test_a_float32_network_gives_the_index_of_float64() -> None:
    w = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    assert pqi(w) == pqi(w.double())


@pytest.mark.parametrize(
    ("change", "half", "one"),
    [
        ((1, 2, 3, 4, 1, 2, 3, 4), 0.055586, 0.087129),  # cloning changes nothing
        ((1.5, 2, 3, 3.5), 0.025986, 0.046537),  # Robin Hood takes from the rich
        ((2, 3, 4, 5), 0.026807, 0.047421),  # a rising tide
        ((1, 2, 3, 4, 0), 0.244469, 0.183503),  # babies
        ((1, 2, 3, 104), 0.532366, 0.471496),  # Bill Gates
    ],
)
def test_what_makes_a_vector_sparser_raises_the_index(
    change: tuple[float, ...], half: float, one: float
) -> None:
    assert pqi(vector(*change)) == pytest.approx(half, abs=5e-7)
    assert pqi(vector(*change), 1, 2) == pytest.approx(one, abs=5e-7)
    if len(change) == 5:
        assert pqi(vector(*change)) == pytest.approx(1 - (1 - pqi(vector(1, 2, 3, 4))) * 4 / 5)
    assert pqi(vector(1, 2, 3, 204)) == pytest.approx(0.595676, abs=5e-7)


def test_theorem_two_holds_for_every_vector_order_and_count() -> None:
    """r entries hold all but eta_r of the sum of |w| ** p: then r is at least the bound."""
    generator = torch.Generator().manual_seed(3)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    for _ in range(20000):
        d = int(draw(1, 30))
        w = torch.randn(d, generator=generator, dtype=torch.float64).sign() * torch.rand(
            d, generator=generator, dtype=torch.float64
        ).pow(draw(0.2, 6))
        p = draw(0.1, 1.5)
        q, r = p + draw(0.05, 2), int(draw(1, d + 0.999))
        parts = w.abs().pow(p).sort(descending=True).values
        eta = float(parts[r:].sum() / parts[:r].sum())
        assert sap_count(w, p, q, eta=eta).bound <= r + 1e-9 * d


@pytest.mark.parametrize(("p", "q"), [*ORDERS, (0.2, 1.0), (0.5, 2.0), (0.01, 0.5)])
def test_the_bound_is_tight_for_equal_weights(p: float, q: float) -> None:
    for d in (2, 3, 8, 10, 12, 64, 1000, 4096):
        for k in {1, 2, d // 3 + 1, d // 2, 7 * d // 8, d - 1, d}:
            w = torch.zeros(d, dtype=torch.float32)
            w[:k] = 0.37
            count = sap_count(w, p, q)
            assert count.bound == pytest.approx(k, abs=1e-7)
            assert count.pruned == min(d - k, math.floor(d * 9 / 10))


@pytest.mark.parametrize(
    ("w", "p", "options", "bound", "pruned"),
    [
        ((4, 3, 2, 1, 0, 0, 0, 0), 0.5, {}, 3.777657, 4),
        ((4, 3, 2, 1, 0, 0, 0, 0), 1.0, {}, 3.333333, 4),
        ((4, 3, 2, 1, 0, 0, 0, 0), 0.5, {"eta": 0.1}, 3.12203, 4),
        ((4, 3, 2, 1, 0, 0, 0, 0), 1.0, {"eta": 0.1}, 2.754821, 5),
        ((4, 3, 2, 1, 0, 0, 0, 0), 0.5, {"gamma": 3}, 3.777657, 7),
        ((1, 10, 100, 1000), 0.5, {}, 1.886833, 2),
        ((1, 10, 100, 1000), 1.0, {}, 1.221978, 2),
        ((1, 10, 100, 1000), 0.5, {"gamma": 3}, 1.886833, 3),
        ((1, 2, 3, 4), 0.5, {}, 3.777657, 0),
    ],
)
def test_how_many_go(
    w: tuple[float, ...], p: float, options: dict[str, float], bound: float, pruned: int
) -> None:
    count = sap_count(vector(*w), p, 2 * p, **options)
    assert count.bound == pytest.approx(bound, abs=5e-7)
    assert count.pruned == pruned


@given(VALUES, PAIRS, st.floats(0, 2), st.floats(0.1, 5), st.floats(0.05, 0.99))
def test_more_goes_with_gamma_and_eta_and_never_all(
    values: list[float], orders: tuple[float, float], eta: float, gamma: float, beta: float
) -> None:
    w, (p, q), d = vector(*values), orders, len(values)
    count = sap_count(w, p, q, eta=eta, gamma=gamma, beta=beta)
    assert 0 <= count.pruned <= math.floor(beta * d + 1e-6)
    assert count.pruned < d
    assert sap_count(w, p, q, eta=eta, gamma=1.5 * gamma, beta=beta).pruned >= count.pruned
    more = sap_count(w, p, q, eta=eta + 0.5, gamma=gamma, beta=beta)
    assert more.pruned >= count.pruned
    sparser = sap_count(torch.cat([w, torch.zeros(1)]), p, q)
    if bool(w.any()):
        assert more.bound < count.bound
        assert sparser.pqi > pqi(w, p, q)
        assert sparser.bound / (d + 1) < sap_count(w, p, q).bound / d


def test_the_index_of_usual_distributions() -> None:
    d = 400_000
    steps = (torch.arange(d, dtype=torch.float64) + 0.5) / d
    expected = (
        (steps, 1 / 9, 0.133975),
        (gaussian(d), 0.152787, 1 - math.sqrt(2 / math.pi)),
        (-torch.log1p(-steps), 1 - math.pi / 4, 1 - 1 / math.sqrt(2)),
    )
    for w, half, one in expected:
        assert pqi(w) == pytest.approx(half, abs=2e-5)
        assert pqi(w, 1, 2) == pytest.approx(one, abs=2e-5)
    assert sap_count(gaussian(d), 1, 2).bound / d == pytest.approx(2 / math.pi, abs=2e-5)


@pytest.mark.parametrize(
    ("p", "options", "kept"),
    [
        (0.5, {}, [848, 773, 718, 675, 639, 608]),
        (1.0, {}, [637, 524, 452, 401, 361, 329]),
        (0.5, {"eta": 0.1}, [701, 546, 435, 350, 284, 231]),
        (0.5, {"gamma": 3}, [542, 482, 437, 401, 372, 347]),
    ],
)
def test_a_normal_vector_shrinks_by_itself_along_known_counts(
    p: float, options: dict[str, float], kept: list[int]
) -> None:
    w, found = gaussian(1000), []
    assert pqi(w, p, 2 * p) == pytest.approx({0.5: 0.1527, 1.0: 0.2019}[p], abs=5e-5)
    for _ in kept:
        w = w.sort().values[sap_count(w, p, 2 * p, **options).pruned :]
        found.append(len(w))
    assert found == kept


@pytest.mark.parametrize("w", [torch.zeros(5), torch.zeros(0)])
def test_nothing_but_zeros_has_no_index_and_loses_nothing(w: Tensor) -> None:
    assert pqi(w) == 0
    assert sap_count(w, gamma=9).pruned == 0
    assert sap_count(w).bound == len(w)


def test_tiny_weights_and_small_orders_give_numbers() -> None:
    w = torch.cat([torch.full((1000,), 1e-300, dtype=torch.float64), vector(1e-290)])
    assert 0 < pqi(w, 0.01, 0.02) < 1
    assert pqi(1e-30 * torch.ones(7)) == 0
    assert 0 < pqi(torch.rand(100_000), 0.05, 40.0) < 1


@pytest.mark.parametrize(("p", "q"), [(1, 1), (0, 1), (-1, 1), (2, 1), (0.5, math.inf), (math.nan, 1)])
def test_orders_that_make_no_index_are_refused(p: float, q: float) -> None:
    with pytest.raises(UsageError, match="needs 0 < p < q"):
        pqi(vector(1, 2), p, q)


@pytest.mark.parametrize(("name", "value"), [("eta", -0.1), ("gamma", 0), ("beta", 1), ("beta", 0)])
def test_a_rule_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} = "):
        sap_count(vector(1, 2), **{name: value})


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ModelError, match="3 numbers of which 2 are not finite"):
        pqi(vector(1, math.nan, math.inf))


@given(VALUES, PAIRS, st.floats(0, 2))
def test_the_superfluous_share_of_all_largest_parts_is_that_of_each(
    values: list[float], orders: tuple[float, float], eta: float
) -> None:
    w = vector(*values)
    shares = superfluous(w, *orders, eta)
    assert len(shares) == len(values) + 1 and shares[0] == 0
    largest = w.abs().sort(descending=True).values
    for n in range(1, len(values) + 1):
        count = sap_count(largest[:n], *orders, eta=eta)
        assert float(shares[n]) == pytest.approx(1 - count.bound / n, abs=1e-9)


def test_a_layer_keeps_the_share_that_its_index_says() -> None:
    scores = {"sparse": vector(4, 3, 2, 1, 0, 0, 0, 0), "even": torch.ones(6), "zero": torch.zeros(3)}
    assert keep_shares(scores, 0.5, 1.0) == {"sparse": 0.5, "even": 1.0, "zero": 1.0}
    assert keep_shares({"a": vector(1, 10, 100, 1000)}, 1.0, 2.0) == {"a": 0.5}


def test_squares_with_halved_orders_give_the_same_share() -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert keep_shares({"a": w**2}, 0.25, 0.5) == keep_shares({"a": w}, 0.5, 1.0)


def keep_counts(scores: dict[str, Tensor], k: int, floors: dict[str, int]) -> dict[str, int]:
    """k entries shared out by what each layer's index says it needs."""
    sizes = {name: values.numel() for name, values in scores.items()}
    wanted = {name: share * sizes[name] for name, share in keep_shares(scores, 0.5, 1.0).items()}
    return share_out(wanted, k, {name: min(floors.get(name, 0), size) for name, size in sizes.items()}, sizes)


def test_a_budget_is_shared_out_by_the_index() -> None:
    """Needs are 4 of 8 and 6 of 6: at half of them 2 and 3, and 5 more entries go 2 to 3."""
    scores = {"sparse": vector(4, 3, 2, 1, 0, 0, 0, 0), "even": torch.ones(6)}
    assert keep_counts(scores, 10, {}) == {"sparse": 4, "even": 6}
    assert keep_counts(scores, 5, {}) == {"sparse": 2, "even": 3}
    assert keep_counts(scores, 12, {}) == {"sparse": 6, "even": 6}
    assert keep_counts(scores, 5, {"sparse": 3}) == {"sparse": 3, "even": 2}
    assert keep_counts(scores, 14, {}) == {"sparse": 8, "even": 6}
    assert keep_counts({}, 0, {}) == {}


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8)), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.floats(0, 1),
)
def test_counts_add_up_exactly_within_floors_and_sizes(
    layers: list[tuple[int, int]], seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.rand(n, generator=generator) ** 4 for i, (n, _) in enumerate(layers)}
    floors = {f"l{i}": least for i, (_, least) in enumerate(layers)}
    low = sum(min(n, least) for n, least in layers)
    k = low + round(share * (sum(n for n, _ in layers) - low))
    counts = keep_counts(scores, k, floors)
    assert sum(counts.values()) == k
    assert all(min(floors[n], len(scores[n])) <= counts[n] <= len(scores[n]) for n in counts)
    assert counts == keep_counts(scores, k, floors)
