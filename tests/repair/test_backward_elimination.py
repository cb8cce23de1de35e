"""Backward elimination against brute force: what each unit costs, and in which order units go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgeprune.repair import backward_elimination
from edgeprune.repair.backward_elimination import Order, Reader, eliminate


def reader(units: int, taps: int = 1, outputs: int = 4, seed: int = 0) -> tuple[Reader, Tensor]:
    """A reader of correlated inputs, and the inputs themselves, a 1 appended: float64 (n, F + 1)."""
    generator = torch.Generator().manual_seed(seed)
    width = units * taps
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(8 * width, width, generator=generator, dtype=torch.float64) @ mixing + 0.5
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weight = torch.randn(outputs, width, generator=generator)
    return Reader(weight, x.T @ x / len(x), owned(units, taps)), x


def owned(units: int, taps: int = 1) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(u * taps, (u + 1) * taps)) for u in range(units))


def ridge_of(given: Reader) -> float:
    assert given.moments is not None
    return backward_elimination.RIDGE * float(given.moments.diagonal()[:-1].mean())


def brute_force(given: Reader, x: Tensor, gone: tuple[int, ...]) -> float:
    """The least mean squared error, summed over outputs, of weights without the inputs of some units.

    The penalty is data, too: a row sqrt(ridge) e_f for every input f, on which the answer should stay what it was.
    """
    width = given.weight.shape[1]
    penalty = torch.zeros(width, width + 1, dtype=torch.float64)
    penalty.diagonal().fill_(ridge_of(given) ** 0.5)
    rows = torch.cat([x / len(x) ** 0.5, penalty])
    wanted = rows[:, :-1] @ given.weight.double().T
    lost = {f for unit in gone for f in given.features[unit]}
    used = rows[:, [f for f in range(width + 1) if f not in lost]]
    return float((used @ torch.linalg.lstsq(used, wanted).solution - wanted).pow(2).sum())


@pytest.mark.parametrize(("units", "taps"), [(6, 1), (5, 4)])
def test_the_cheapest_unit_goes_first_and_costs_what_brute_force_finds(units: int, taps: int) -> None:
    given, x = reader(units, taps)
    order = eliminate([given])
    costs = [brute_force(given, x, (u,)) for u in range(units)]
    assert order.units[0] == min(range(units), key=costs.__getitem__)
    assert order.errors[1] == pytest.approx(min(costs), rel=1e-6)


@pytest.mark.parametrize(("units", "taps"), [(7, 1), (5, 3)])
def test_every_step_is_the_best_one_and_errors_are_those_of_all_that_went(units: int, taps: int) -> None:
    given, x = reader(units, taps, seed=3)
    order = eliminate([given])
    assert len(order.units) == units - 1 == len(set(order.units)) and len(order.errors) == units
    for k in range(units - 1):
        before, left = order.units[:k], set(range(units)).difference(order.units[:k])
        errors = {u: brute_force(given, x, (*before, u)) for u in left}
        assert order.units[k] == min(errors, key=errors.__getitem__)
        assert order.errors[k + 1] == pytest.approx(errors[order.units[k]], rel=1e-6)
    assert order.errors[0] == 0 and list(order.errors) == sorted(order.errors)


def test_the_errors_of_several_readers_add_up() -> None:
    (one, x), (two, z) = reader(6, seed=1), reader(6, taps=2, outputs=3, seed=2)
    order = eliminate([one, two])
    for k in (1, 3, 5):
        gone = order.units[:k]
        both = brute_force(one, x, gone) + brute_force(two, z, gone)
        assert order.errors[k] == pytest.approx(both, rel=1e-6)
    firsts = {u: brute_force(one, x, (u,)) + brute_force(two, z, (u,)) for u in range(6)}
    assert order.units[0] == min(firsts, key=firsts.__getitem__)


def test_in_a_large_group_errors_are_still_those_of_all_that_went() -> None:
    """Of 200 units three go between two looks at all of them."""
    given, x = reader(200, seed=4)
    order = eliminate([given])
    assert sorted({*order.units, *range(200)}) == list(range(200)) and len(set(order.units)) == 199
    for k in (1, 2, 3, 30, 151):
        assert order.errors[k] == pytest.approx(brute_force(given, x, order.units[:k]), rel=1e-6)


@pytest.mark.parametrize("units", [8, 256])
def test_of_two_equal_units_one_costs_nearly_nothing_and_the_other_stays(units: int) -> None:
    """Nearly: the other takes its weights over, which the ridge counts. In a large group, too, only one goes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, units + 1, generator=generator, dtype=torch.float64)
    x[:, 5], x[:, 3], x[:, -1] = x[:, 2], x[:, 1], 1
    given = Reader(torch.randn(4, units, generator=generator), x.T @ x / len(x), owned(units))
    order = eliminate([given])
    pairs = [{2, 5}, {1, 3}]
    assert set(order.units[:2]) in [{a, b} for a in pairs[0] for b in pairs[1]]
    squares = given.weight.double().pow(2).sum(0)
    assert order.errors[2] < ridge_of(given) * float(squares[[1, 2, 3, 5]].sum())
    assert order.errors[3] > 10 * order.errors[2]


def test_a_unit_that_is_always_zero_goes_first_and_costs_the_ridge_alone() -> None:
    given, x = reader(6)
    x[:, 4] = 0
    given = Reader(given.weight, x.T @ x / len(x), given.features)
    order = eliminate([given])
    assert order.units[0] == 4
    cost = ridge_of(given) * float(given.weight[:, 4].double().pow(2).sum())
    assert order.errors[1] == pytest.approx(cost, rel=1e-9) and order.errors[1] < 0.1 * order.errors[2]


def test_a_unit_that_nothing_reads_costs_nothing() -> None:
    given, _ = reader(6)
    given.weight[:, 2] = 0
    order = eliminate([given])
    assert order.units[0] == 2 and order.errors[1] == pytest.approx(0, abs=1e-12)


def test_a_constant_unit_goes_into_the_bias() -> None:
    given, x = reader(5)
    x[:, 3] = 3.0
    given = Reader(given.weight, x.T @ x / len(x), given.features)
    order = eliminate([given])
    # The constant is not penalized: all that the unit says is said by it.
    assert order.units[0] == 3
    assert order.errors[1] == pytest.approx(
        ridge_of(given) * float(given.weight[:, 3].double().pow(2).sum()), rel=1e-3
    )


def test_without_moments_the_energy_decides() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    wide = Reader(weight, None, owned(4), energy=torch.tensor([10.0, 1.0, 2.0, 0.5]))
    assert eliminate([wide]) == Order((3, 1, 2), (0.0, 1.0, 5.0, 23.0))
    # Without an energy either, the weights.
    assert eliminate([Reader(weight, None, owned(4))]) == Order((0, 3, 1), (0.0, 2.0, 4.0, 8.0))


def test_a_wide_reader_and_one_with_moments_decide_together() -> None:
    given, x = reader(4)
    energy = torch.tensor([0.0, 0.0, 0.0, 1e9])
    order = eliminate([given, Reader(torch.ones(1, 4), None, owned(4), energy)])
    assert 3 not in order.units
    assert order.errors[2] == pytest.approx(brute_force(given, x, order.units[:2]), rel=1e-6)


def test_a_group_of_one_unit_keeps_it() -> None:
    assert eliminate([Reader(torch.ones(2, 1), None, owned(1))]) == Order((), (0.0,))


def test_the_readers_are_not_changed_and_the_order_repeats_itself() -> None:
    given, _ = reader(130)
    assert given.moments is not None
    weight, kept = given.weight.clone(), given.moments.clone()
    assert eliminate([given]) == eliminate([given])
    assert torch.equal(given.weight, weight) and torch.equal(given.moments, kept)


def test_inputs_that_are_all_zero_do_no_harm() -> None:
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    nothing[-1, -1] = 1
    order = eliminate([Reader(torch.ones(2, 3), nothing, owned(3))])
    assert sorted(order.units) == [0, 1] and max(order.errors) < 1e-9
