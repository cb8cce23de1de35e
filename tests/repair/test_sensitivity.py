"""What thinning a group out costs: measured on a network that is afterwards bitwise what it was."""

from __future__ import annotations

import math
from copy import deepcopy

import nets
import pytest
import torch
from torch import Tensor, nn
from tracing_once import traced

from edgeprune.models import surgery
from edgeprune.records import Group
from edgeprune.repair import sensitivity
from edgeprune.repair.backward_elimination import Order, Reader, eliminate
from edgeprune.repair.consumers import Consumer, consumers_of, output_scale
from edgeprune.repair.input_moments import moments_of_inputs
from edgeprune.repair.sensitivity import Renormalized, SensitivityProbe, curve, divergence, effort, losses
from edgeprune.structure.groups import find_groups, provable_groups


def test_the_divergence_of_a_worked_example() -> None:
    dense, other = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    # p = (.665241, .244728, .090031); sum p ln p + ln 3
    assert divergence(dense, other) == pytest.approx(0.266217, abs=5e-7)
    assert divergence(other, dense) == pytest.approx(0.308994, abs=5e-7)
    assert divergence(dense, dense) == 0
    both = (torch.cat([dense, dense]), torch.cat([other, dense]))
    assert divergence(*both) == pytest.approx(0.266217 / 2, abs=5e-7)


def test_the_divergence_is_that_of_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(9, 5, generator=generator) for _ in range(2))
    assert divergence(dense, other) > 0
    assert divergence(dense + 7, other - 3) == pytest.approx(divergence(dense, other), rel=1e-5)
    p, q = dense.softmax(1), other.softmax(1)
    assert divergence(dense, other) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)


def test_a_single_logit_is_for_one_class_against_another() -> None:
    dense, other = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.0], [-1.0]])
    p = 1 / (1 + math.exp(-2))
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert divergence(dense, other) == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_answers_that_are_no_numbers_are_endlessly_far(bad: float) -> None:
    dense, other = torch.zeros(2, 3), torch.zeros(2, 3)
    other[1, 2] = bad
    assert divergence(dense, other) == math.inf


@pytest.mark.parametrize("groups", [1, 7, 60, 5000])
@pytest.mark.parametrize("macs", [1e4, 4e7, 2e9, 1e12])
def test_the_effort_stays_within_its_bounds_and_its_work(groups: int, macs: float) -> None:
    images, widths = effort(groups, macs)
    least = sensitivity.LEAST_IMAGES, sensitivity.LEAST_WIDTHS
    assert least[0] <= images <= sensitivity.MOST_IMAGES and least[1] <= widths <= sensitivity.MOST_WIDTHS
    assert images * widths * groups * macs <= sensitivity.WORK or (images, widths) == least


ORDER = Order((3, 0, 2, 1), (0.0, 1.0, 2.0, 6.0, 10.0))


def test_a_curve_passes_through_its_knots_and_follows_the_errors_between_them() -> None:
    # Errors 0, 1, 2, 6, 10 for 5, 4, 3, 2, 1 kept units.
    assert curve(ORDER, {5: 0.0, 3: 0.5, 1: 4.5}).tolist() == [math.inf, 4.5, 2.5, 0.5, 0.25, 0.0]
    # Beyond the last knot in proportion to the error.
    assert curve(ORDER, {5: 0.0, 3: 0.5}).tolist() == [math.inf, 2.5, 1.5, 0.5, 0.25, 0.0]
    assert curve(ORDER, {5: 0.0}).tolist() == [math.inf, 0, 0, 0, 0, 0]


def test_a_curve_never_falls_as_more_goes() -> None:
    """A measurement on few images may say that less is better; the counts are not chosen by that."""
    assert curve(ORDER, {5: 0.0, 4: 0.75, 3: 0.25, 1: 1.75}).tolist() == [math.inf, 1.75, 1.25, 0.75, 0.75, 0]


def test_all_units_cost_nothing_even_where_the_first_ones_to_go_have_no_error() -> None:
    order = Order((0, 1, 2), (0.0, 0.0, 0.0, 1.0))
    assert curve(order, {4: 0.0, 2: 0.125, 1: 2.0}).tolist() == [math.inf, 2.0, 0.125, 0.125, 0.0]
    still = Order((0, 1), (0.0, 0.0, 0.0))
    assert curve(still, {3: 0.0, 1: 0.5}).tolist() == [math.inf, 0.5, 0.5, 0.0]


def plant(name: str, images: Tensor) -> tuple[SensitivityProbe, tuple[Group, ...], dict[str, list[Consumer]]]:
    network = nets.build(name)
    groups = find_groups(network, nets.example()).groups
    readers = {g.name: consumers_of(network, g)[0] for g in groups}
    layers = {r.path: r.layer for found in readers.values() for r in found}
    moments = moments_of_inputs(network, layers, images, 16)
    return SensitivityProbe(network, network, traced(network, nets.example()), moments), groups, readers


def orders(
    given: SensitivityProbe, groups: tuple[Group, ...], readers: dict[str, list[Consumer]]
) -> dict[str, Order]:
    found = {}
    for group in groups:
        rows = [
            Reader(
                r.layer.get_parameter("weight").detach().flatten(1)
                * output_scale(given.program, given.bare, r.path)[:, None],
                given.moments.get(r.path),
                r.features,
            )
            for r in readers[group.name]
        ]
        count = group.channels
        found[group.name] = (
            eliminate(rows) if rows else Order(tuple(range(count - 1)), tuple(map(float, range(count))))
        )
    return found


@pytest.mark.parametrize("name", nets.NETS)
def test_the_losses_of_every_group_are_curves_and_the_network_is_bitwise_as_before(name: str) -> None:
    images = nets.example(24)
    given, groups, readers = plant(name, images)
    before = {k: v.clone() for k, v in given.network.state_dict().items()}
    found = losses(given, groups, orders(given, groups, readers), readers, images, 1e6)
    assert all(torch.equal(v, before[k]) for k, v in given.network.state_dict().items())
    assert set(found) == {g.name for g in groups}
    for group in groups:
        loss = found[group.name]
        assert loss.dtype == torch.float64 and loss.shape == (group.channels + 1,)
        assert loss[0] == math.inf and loss[-1] == 0 and bool((loss[1:].diff() <= 0).all())
        # Also of groups that nothing reads but grouped and transposed convolutions.
        assert loss[1] > 1e-12, group.name


def test_the_loss_at_a_knot_is_the_divergence_of_the_thinned_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the moments unknown nothing is solved, so that it is the network whose consumer is masked."""
    images = nets.example(16)
    given, groups, readers = plant("residual", images)
    group = next(g for g in groups if g.name == "one.0")
    order = Order(tuple(range(15)), tuple(map(float, range(16))))
    blind = SensitivityProbe(given.network, given.bare, given.program, {})
    monkeypatch.setattr(sensitivity, "MOST_WIDTHS", 3)
    found = losses(blind, [group], {"one.0": order}, readers, images, 1e6)["one.0"]
    network = nets.build("residual")
    with torch.no_grad():
        dense = network(images)
        for kept in (12, 8, 4):
            network.two.weight[:, : 16 - kept] = 0
            assert float(found[kept]) == pytest.approx(divergence(dense, network(images)), rel=1e-6)


def test_readers_that_are_solved_anew_lose_less_than_blinded_ones() -> None:
    images = nets.example(64)
    given, groups, readers = plant("plain", images)
    found = orders(given, groups, readers)
    solved = losses(given, groups, found, readers, images, 1e6)
    blind = losses(
        SensitivityProbe(given.network, given.bare, given.program, {}), groups, found, readers, images, 1e6
    )
    for group in groups:
        assert float(solved[group.name][group.channels // 2]) < float(blind[group.name][group.channels // 2])


def test_a_group_with_a_duplicate_can_miss_it_for_nothing() -> None:
    images = nets.example(32)
    network = nets.build("plain")
    with torch.no_grad():
        for tensor in network.a.state_dict().values():
            if tensor.ndim:
                tensor[5] = tensor[2]
    groups = find_groups(network, nets.example()).groups
    readers = {g.name: consumers_of(network, g)[0] for g in groups}
    moments = moments_of_inputs(network, {"b.0": network.b[0]}, images, 16)
    given = SensitivityProbe(network, network, traced(network, nets.example()), moments)
    order = Order((5, 0, 1, 3, 4, 6, 7), tuple(map(float, range(8))))
    found = [
        losses(case, groups[:1], {"a.0": order}, readers, images, 1e6)["a.0"]
        for case in (given, SensitivityProbe(network, network, given.program, {}))
    ]
    # Not 0: the ridge keeps the weights of the other one near to what they were.
    assert float(found[0][7]) < 0.05 * float(found[1][7])


def test_answers_that_are_no_numbers_are_the_worst_and_a_finite_loss() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(192, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(torch.relu(self.a(x.flatten(1))) + 1)
            # No number as soon as any weight is missing.
            return y / (self.fc.weight.abs() > 0).all().to(y)

    network = Fragile().eval()
    images = nets.example(8)
    groups = find_groups(network, nets.example()).groups
    readers = {"a": consumers_of(network, groups[0])[0]}
    given = SensitivityProbe(network, network, traced(network, nets.example()), {})
    order = Order((0, 1, 2), (0.0, 1.0, 2.0, 3.0))
    found = losses(given, groups, {"a": order}, readers, images, 1e6)["a"]
    assert found.tolist() == [math.inf, sensitivity.WORST, sensitivity.WORST, sensitivity.WORST, 0]


def test_the_rise_of_several_groups_is_that_of_the_cut_network_and_measured_once() -> None:
    images, labels = nets.example(32), torch.arange(32) % 5
    network = nets.build("residual")
    groups = provable_groups(network, find_groups(network, nets.example()), nets.example(), 0).groups
    orders = {
        g.name: Order(tuple(range(g.channels - 1)), tuple(map(float, range(g.channels)))) for g in groups
    }
    calls = 0

    def loss(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return float(nn.functional.cross_entropy(net(images), labels))

    before = deepcopy(network.state_dict())
    plant = Renormalized(network, loss, groups, orders)
    kept = {g.name: g.channels - 3 - i for i, g in enumerate(groups)}
    small = deepcopy(network)
    masks = {g.name: torch.arange(g.channels) >= g.channels - kept[g.name] for g in groups}
    surgery.cut(small, surgery.removed_positions(groups, masks))
    with torch.no_grad():
        expected = loss(small.train()) - loss(deepcopy(network).train())
    calls = 0
    assert plant.rise(kept) == pytest.approx(expected, abs=1e-5)
    assert plant.rise(dict(kept)) == plant.rise(kept) and calls == 1
    assert plant.rise({}) == 0
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    network = nets.build("plain")
    groups = find_groups(network, nets.example()).groups
    orders = {
        g.name: Order(tuple(range(g.channels - 1)), tuple(map(float, range(g.channels)))) for g in groups
    }
    values = iter([1.0, math.nan])
    plant = Renormalized(network, lambda _net: next(values), groups, orders)
    assert plant.rise({groups[0].name: 3}) == sensitivity.WORST
