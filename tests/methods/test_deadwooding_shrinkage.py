"""Multipliers and shrinkage: worked examples, and what must hold for every number."""

from __future__ import annotations

import copy
import math

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune.errors import UsageError
from edgeprune.methods._deadwooding import shrinkage
from edgeprune.records import Group, Member
from edgeprune.structure.groups import find_groups
from edgeprune.structure.units import channel_sums

NUMBERS = st.floats(-4, 4, width=32)
SIZES = st.floats(0, 3, width=32)


def minimizer(c: Tensor, lam: Tensor, tau: float) -> Tensor:
    """argmin_w (w - c)^2 + lam * max(0, |w| - tau), coordinate by coordinate."""
    return c.sign() * torch.where(c.abs() <= tau, c.abs(), (c.abs() - lam / 2).clamp(min=tau))


def test_dual_ascent_with_an_exact_minimizer_follows_the_worked_sequence() -> None:
    c = torch.tensor([1.0, 0.4, -0.2, 0.05], dtype=torch.float64)
    lam = torch.zeros(4, dtype=torch.float64)
    expected = [
        ([0.45, 0.15, 0.05, 0.0], [1.0, 0.4, -0.2, 0.05], 0.9),
        ([0.7875, 0.2625, 0.0875, 0.0], [0.775, 0.325, -0.175, 0.05], 0.675),
        ([1.0406, 0.3469, 0.1156, 0.0], [0.6063, 0.2688, -0.1563, 0.05], 0.5063),
        ([1.2305, 0.4102, 0.1367, 0.0], [0.4797, 0.2266, -0.1422, 0.05], 0.3797),
    ]
    for lams, weights, violation in expected:
        w = minimizer(c, lam, 0.1)
        found = (w.abs() - 0.1).clamp(min=0)
        lam = shrinkage.dual_update(lam, w.abs() - 0.1, 0.5)
        # The sequence is written with four decimals.
        assert torch.allclose(w, torch.tensor(weights, dtype=torch.float64), atol=6e-5)
        assert torch.allclose(lam, torch.tensor(lams, dtype=torch.float64), atol=6e-5)
        assert float(found[0]) == pytest.approx(violation, abs=6e-5)


@given(st.lists(st.tuples(SIZES, NUMBERS), min_size=1, max_size=8), SIZES, SIZES)
def test_a_multiplier_never_falls_and_stands_still_exactly_when_its_constraint_holds(
    pairs: list[tuple[float, float]], rho: float, cap: float
) -> None:
    lam = torch.tensor([a for a, _ in pairs], dtype=torch.float64)
    violation = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    after = shrinkage.dual_update(lam, violation, rho, cap)
    assert bool((after >= lam).all())
    assert bool((after <= torch.maximum(lam, torch.tensor(cap, dtype=torch.float64))).all())
    rises = (violation > 0) & (lam + rho * violation > lam) & (lam < cap)
    assert torch.equal(after > lam, rises)


def test_a_step_or_a_cap_below_zero_is_refused() -> None:
    one = torch.ones(1)
    for rho, cap in ((-0.1, 1.0), (0.1, -1.0)):
        with pytest.raises(UsageError, match="at least 0"):
            shrinkage.dual_update(one, one, rho, cap)


def test_the_proximal_step_leaves_exact_zeros() -> None:
    w = torch.tensor([0.25, -0.05, 0.1])
    shrinkage.prox_shrink_(w, torch.ones(3, dtype=torch.bool), 0.1)
    assert torch.allclose(w, torch.tensor([0.15, 0.0, 0.0]))
    assert int((w == 0).sum()) == 2


def test_the_proximal_step_stops_at_the_slack_and_leaves_what_is_within_it() -> None:
    w = torch.tensor([0.25, -0.05, 0.12, -0.5])
    shrinkage.prox_shrink_(w, torch.tensor([True, True, True, False]), 0.1, tau=0.1)
    assert torch.allclose(w, torch.tensor([0.15, -0.05, 0.1, -0.5]))


@given(st.lists(NUMBERS, min_size=1, max_size=6), SIZES, SIZES)
def test_the_proximal_step_minimizes_what_it_says(values: list[float], kappa: float, tau: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    w = v.clone()
    shrinkage.prox_shrink_(w, torch.ones(len(v), dtype=torch.bool), kappa, tau)

    def cost(u: Tensor) -> Tensor:
        return (u - v) ** 2 / 2 + kappa * (u.abs() - tau).clamp(min=0)

    for step in (-1.0, -0.1, -1e-3, 1e-3, 0.1, 1.0):
        assert bool((cost(w) <= cost(w + step) + 1e-12).all())
    assert bool((w * v >= 0).all())


def test_a_mask_chooses_the_entries_of_a_matrix_in_any_memory_layout() -> None:
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = (
        torch.zeros(72, dtype=torch.bool).index_fill(0, torch.tensor([0, 5, 17, 71]), True).view(2, 4, 3, 3)
    )
    w = nn.Parameter(start.to(memory_format=torch.channels_last).clone())
    shrinkage.prox_shrink_(w, mask, 0.1)
    assert torch.allclose(w.detach()[mask], start[mask].sign() * (start[mask].abs() - 0.1).clamp(min=0))
    assert torch.equal(w.detach()[~mask], start[~mask])
    assert w.grad is None


def test_the_block_threshold_scales_a_block_and_leaves_the_others() -> None:
    w = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0]]))
    group = Group("g", 3, (Member("w", 0, ((0,), (1,), (2,)), "producer"),))
    owned = shrinkage.blocks(group, {"w": w})
    norms = torch.tensor([5.0, 0.5, 10.0], dtype=torch.float64) / math.sqrt(2)
    assert torch.allclose(shrinkage.block_norms(owned), norms)
    shrinkage.block_shrink_(owned, torch.tensor([True, True, False]), 1.0)
    left = 1 - 1 / float(norms[0])
    assert torch.allclose(w.detach(), torch.tensor([[3 * left, 4 * left], [0.0, 0.0], [6.0, 8.0]]))
    assert torch.equal(w.detach()[1], torch.zeros(2))


@pytest.mark.parametrize("name", list(nets.NETS))
def test_a_block_is_all_that_a_channel_owns_and_shrinks_by_the_threshold(name: str) -> None:
    network = nets.build(name)
    parameters = dict(network.named_parameters())
    for group in find_groups(network, nets.example(), ()).groups:
        changed = copy.deepcopy(network)
        owned = shrinkage.blocks(group, dict(changed.named_parameters()))
        roles = ("producer", "norm", "consumer")
        squares = channel_sums(group, {k: p.detach().double() ** 2 for k, p in parameters.items()}, roles)
        counts = channel_sums(group, {k: torch.ones_like(p).double() for k, p in parameters.items()}, roles)
        before = shrinkage.block_norms(owned)
        assert torch.allclose(before, (squares / counts).sqrt())
        assert torch.equal(owned.sizes, counts)
        chosen = torch.arange(group.channels) % 2 == 0
        kappa, tau = float(before.median()) / 2, float(before.min()) / 2
        shrinkage.block_shrink_(owned, chosen, kappa, tau)
        expected = torch.where(chosen, torch.maximum(before.clamp(max=tau), before - kappa), before)
        # Weights are float32.
        assert torch.allclose(shrinkage.block_norms(owned), expected, rtol=1e-5)
        shrinkage.block_shrink_(owned, chosen, 1e9)
        assert bool((shrinkage.block_norms(owned)[chosen] == 0).all())


def test_a_bank_keeps_its_history_and_a_weight_that_was_never_chosen_keeps_zero() -> None:
    bank = shrinkage.zeros({"a": None, "b": 3}, cap=1.0)
    bank.update({"a": 0.5, "b": torch.tensor([0.25, 0.0, -7.0])}, 1.0)
    bank.update({"a": 2.0}, {"a": 1.0, "b": 1.0})
    bank.update({"b": torch.tensor([0.5, 0.0, 0.0])}, {"a": 1.0, "b": 0.5})
    assert bank.history == {"a": [0.5, 1.0, 1.0], "b": pytest.approx([0.25 / 3, 0.25 / 3, 0.5 / 3])}
    assert bank.values["b"].tolist() == [0.5, 0.0, 0.0]


def test_a_bank_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    bank = shrinkage.zeros({"a": None, "b": 2}, cap=5.0, start=1.0)
    bank.update({"a": 0.5, "b": torch.tensor([0.25, 1.0])}, 0.5)
    state = bank.state()
    other = shrinkage.zeros({"a": None, "b": 2}, cap=5.0)
    other.restore(state)
    for each in (bank, other):
        each.update({"a": 1.0}, 0.5)
    assert other.history == bank.history
    assert {k: v.tolist() for k, v in other.values.items()} == {k: v.tolist() for k, v in bank.values.items()}
    assert state["history"]["a"] == [1.25]


def test_a_bank_refuses_names_it_does_not_have_and_violations_that_are_no_numbers() -> None:
    bank = shrinkage.zeros({"a": None})
    with pytest.raises(UsageError, match="no multiplier is named 'b'"):
        bank.update({"b": 1.0}, 1.0)
    with pytest.raises(UsageError, match="the violation of a is not finite"):
        bank.update({"a": math.nan}, 1.0)
