"""Progressive removal: so many units a step and each of them once, what survives is right, and no data is looked at."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy

import nets
import programs
import pytest
import torch
from torch import Tensor, nn
from tracing_once import traced

from edgeprune import plugins
from edgeprune.bounds import interval
from edgeprune.methods._base import PruneTask
from edgeprune.methods._data_free import progressive
from edgeprune.methods._data_free.progressive import Rules, Thinning, single_saliency
from edgeprune.models import costs, surgery
from edgeprune.records import InputSpec
from edgeprune.structure.allocation import Rules as Budget
from edgeprune.structure.groups import find_groups

MODES = progressive.MODES
SHAPE = (1, 4, 4)


def perceptron(
    *widths: int, bias: bool = True, activation: type[nn.Module] = nn.ReLU, seed: int = 0
) -> nn.Sequential:
    """16 pixels to 3 classes through hidden layers of these widths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (16, *widths, 3)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, bias=bias), activation()]
    network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / sizes[0] ** 0.5)
    return network.eval()


def pixels(count: int = 64) -> Tensor:
    return torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(1))


def thinning(network: nn.Module, shape: tuple[int, int, int] = SHAPE, **rules: object) -> Thinning:
    example = torch.zeros(1, *shape)
    groups = find_groups(network, example).groups
    box = programs.box_of(shape, 0.0, 1.0)
    return Thinning(network, traced(network, example), groups, box, Rules(**rules))  # type: ignore[arg-type]


def half(thinned: Thinning) -> dict[str, int]:
    return {g.name: g.channels // 2 for g in thinned.groups}


class Counting(Thinning):
    """Keeps what was alive after every step."""

    def step(self, *args: object) -> int:
        gone = Thinning.step(self, *args)  # type: ignore[arg-type]
        self.__dict__.setdefault("seen", []).append(
            (args[0], gone, {g: a.clone() for g, a in self.alive.items()})
        )
        return gone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [0.03, 0.1, 0.25])
def test_every_step_takes_its_quota_and_no_unit_comes_back(mode: str, step: float) -> None:
    """After t steps min(cap, t * ceil(step * n)) units of a group of n are gone."""
    made = thinning(perceptron(20, 13), mode=mode, step=step)
    thinned = Counting(made.network, made.program, made.groups, made.box, made.rules)
    kept = {"1": 9, "3": 6}
    thinned.run(kept, 0)
    for group in thinned.groups:
        cap, quota = group.channels - kept[group.name], math.ceil(step * group.channels)
        steps = [(gone, alive[group.name]) for g, gone, alive in thinned.seen if g is group]
        for t, (gone, alive) in enumerate(steps, 1):
            assert int((~alive).sum()) == min(cap, t * quota)
            assert gone == min(quota, cap - (t - 1) * quota)
        for (_, before), (_, after) in itertools.pairwise(steps):
            assert bool((before | ~after).all()), "what was gone stays gone"
    assert {g: int(a.sum()) for g, a in thinned.alive.items()} == kept
    before = sum(p.numel() for p in thinned.network.parameters())
    surgery.cut(thinned.network, surgery.removed_positions(thinned.groups, thinned.alive))
    after = sum(p.numel() for p in thinned.network.parameters())
    assert (before, after) == (20 * 17 + 13 * 21 + 3 * 14, 9 * 17 + 6 * 10 + 3 * 7)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_asks_for_more_than_there_are_pairs_is_made_up_for(mode: str) -> None:
    thinned = thinning(perceptron(12, 9), mode=mode, step=1.0)
    thinned.run({"1": 1, "3": 2}, 0)
    assert [int(a.sum()) for a in thinned.alive.values()] == [1, 2]
    assert thinned.merged + thinned.free == 11 + 7


@pytest.mark.parametrize("mode", MODES)
def test_what_is_cut_is_zero_and_changes_nothing_more(mode: str) -> None:
    network = perceptron(16, 12)
    thinned = thinning(network, mode=mode)
    thinned.run(half(thinned), 0)
    with torch.no_grad():
        whole = network(pixels())
        surgery.cut(network, surgery.removed_positions(thinned.groups, thinned.alive))
        torch.testing.assert_close(network(pixels()), whole, rtol=1e-5, atol=1e-6)
    assert bool((whole.std(0) > 0).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["plain", "groupnormed", "residual"])
def test_groups_that_are_not_told_of_stay_whole_and_unchanged(mode: str, name: str) -> None:
    network = nets.build(name)
    dense = deepcopy(network.state_dict())
    thinned = thinning(network, nets.SHAPE, mode=mode)
    thinned.run({}, 0)
    assert all(bool(alive.all()) for alive in thinned.alive.values())
    torch.testing.assert_close(network.state_dict(), dense, rtol=0, atol=0)
    first, *others = thinned.groups
    thinned.run({first.name: first.channels - 2}, 0)
    assert int(thinned.alive[first.name].sum()) == first.channels - 2
    assert all(bool(thinned.alive[g.name].all()) for g in others)


def run(
    network: nn.Module, seed: int, shape: tuple[int, int, int] = SHAPE, **rules: object
) -> dict[str, list[bool]]:
    thinned = thinning(network, shape, **rules)
    thinned.run(half(thinned), seed)
    return {g: alive.tolist() for g, alive in thinned.alive.items()}


@pytest.mark.parametrize("score", progressive.SCORES)
def test_a_seed_gives_the_same_masks_and_weights_and_another_one_others(score: str) -> None:
    networks = [perceptron(32, 24) for _ in range(5)]
    masks = [
        run(n, seed, mode="stochastic", score=score)
        for n, seed in zip(networks, (0, 0, 1, 2, 3), strict=True)
    ]
    assert masks[0] == masks[1] and any(m != masks[0] for m in masks[2:])
    torch.testing.assert_close(networks[0].state_dict(), networks[1].state_dict(), rtol=0, atol=0)
    for mode in ("baseline", "greedy"):
        assert run(perceptron(32, 24), 0, mode=mode, score=score) == run(
            perceptron(32, 24), 1, mode=mode, score=score
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_copies_and_multiples_go_first_and_change_no_answer(mode: str, factor: float) -> None:
    network = perceptron(24, 20)
    with torch.no_grad():
        network[1].weight[12:], network[1].bias[12:] = (
            factor * network[1].weight[:12],
            factor * network[1].bias[:12],
        )
        expected = network(pixels())
    thinned = thinning(network, mode=mode)
    thinned.run({"1": 12}, 0)
    assert sorted(u % 12 for u in thinned.alive["1"].nonzero().flatten().tolist()) == list(range(12))
    surgery.cut(network, surgery.removed_positions(thinned.groups, thinned.alive))
    torch.testing.assert_close(network(pixels()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_of_nothing_but_copies_becomes_one_unit(mode: str) -> None:
    network = perceptron(16)
    with torch.no_grad():
        network[1].weight[:], network[1].bias[:] = network[1].weight[0].clone(), network[1].bias[0].clone()
        expected = network(pixels())
    thinned = thinning(network, mode=mode)
    thinned.run({"1": 1}, 0)
    torch.testing.assert_close(network(pixels()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["greedy", "stochastic"])
def test_units_that_are_always_zero_go_before_any_other(mode: str) -> None:
    network = perceptron(20)
    with torch.no_grad():
        network[1].weight[::5], network[1].bias[::5] = -network[1].weight[::5].abs(), -1
        network[3].weight[:, ::5] *= 100
        expected = network(pixels())
    thinned = thinning(network, mode=mode)
    thinned.run({"1": 16}, 0)
    assert (~thinned.alive["1"]).nonzero().flatten().tolist() == [0, 5, 10, 15]
    assert thinned.notes() == (f"Mode {mode}: 0 of 4 units were merged into another one, 4 were always 0.",)
    torch.testing.assert_close(network(pixels()), expected)


def test_the_slopes_of_a_prelu_do_not_end_the_merging_when_channels_are_zeroed() -> None:
    network = nets.build("groupnormed")
    thinned = thinning(network, nets.SHAPE, mode="greedy")
    thinned.run({"b": 3}, 0)
    assert thinned.merged == 5


@pytest.mark.parametrize("name", nets.NETS)
def test_every_unit_is_accounted_for_on_networks_of_every_kind(name: str) -> None:
    network = nets.build(name)
    thinned = thinning(network, nets.SHAPE, step=0.2)
    thinned.run(half(thinned), 0)
    assert {g: int(a.sum()) for g, a in thinned.alive.items()} == half(thinned)
    assert surgery.proof_failure(network, thinned.groups, thinned.alive, nets.example()) is None
    gone = sum(g.channels - g.channels // 2 for g in thinned.groups)
    assert thinned.notes()[0].startswith(f"Mode stochastic: {thinned.merged} of {gone} units were merged")
    assert ("went alone" in thinned.notes()[0]) == (thinned.merged + thinned.free < gone)
    assert bool(thinned.unbounded) == (name in ("groupnormed", "transposed")) and len(
        thinned.notes()
    ) == 1 + bool(thinned.unbounded)


class Sorted(nn.Module):
    """Something without a bound between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.flatten(1)))
        return self.c(torch.relu(torch.cumsum(self.b(x), 1)))


def test_what_can_not_be_bounded_is_said_and_thinned_by_saliency() -> None:
    thinned, saliency = (
        thinning(nets_like, mode=m) for nets_like, m in zip(copies(), MODES[::-2], strict=True)
    )
    for each in (thinned, saliency):
        each.run({"a": 6, "b": 16}, 3)
    assert set(thinned.unbounded) == {"a"}
    assert "cumsum can't be bounded" in thinned.notes()[1]
    assert (
        thinned.notes()[1].startswith("1 of ") and "were thinned by saliency alone: a: " in thinned.notes()[1]
    )
    assert torch.equal(thinned.alive["a"], saliency.alive["a"]) and len(saliency.notes()) == 1


def copies() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Sorted().eval()
    return [network, deepcopy(network)]


def test_bounds_that_outgrow_their_numbers_are_none() -> None:
    network = perceptron(12, 12)
    with torch.no_grad():
        network[3].weight.mul_(1e30)
        network[5].weight.mul_(1e30)
    thinned = thinning(network)
    thinned.box = interval.Interval(thinned.box.lo * 1e290, thinned.box.hi * 1e290)
    thinned.run({"1": 6, "3": 6}, 0)
    assert set(thinned.unbounded) == {"1", "3"}


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("mode", MODES)
def test_activations_that_do_not_scale_are_merged_as_equals(activation: type[nn.Module], mode: str) -> None:
    network = perceptron(16, activation=activation)
    with torch.no_grad():
        for tensor in (network[1].weight, network[1].bias):
            tensor[7] = tensor[6]
            tensor[8:] = 2 * tensor[:8]
        expected = network(pixels())
    thinned = thinning(network, mode=mode)
    thinned.run({"1": 14}, 0)
    assert (
        sorted(thinned.alive["1"][[6, 7]].tolist())
        == sorted(thinned.alive["1"][[14, 15]].tolist())
        == [False, True]
    )
    torch.testing.assert_close(network(pixels()), expected, rtol=1e-4, atol=1e-5)


def test_layers_without_bias_and_a_network_of_one_layer() -> None:
    thinned = thinning(perceptron(16, 12, bias=False))
    thinned.run(half(thinned), 0)
    assert [int(a.sum()) for a in thinned.alive.values()] == [8, 6]
    single = thinning(perceptron())
    single.run({}, 0)
    assert single.alive == {} and single.notes()[0].startswith("Mode stochastic: 0 of 0 units")


def test_the_saliency_of_a_single_unit_is_what_makes_it_times_what_reads_it() -> None:
    network = perceptron(8)
    (group,) = find_groups(network, torch.zeros(1, *SHAPE)).groups
    made = torch.cat([network[1].weight, network[1].bias[:, None]], 1).double().norm(dim=1)
    expected = made * network[3].weight.double().norm(dim=0)
    torch.testing.assert_close(single_saliency(network, group), expected.detach())


class Poisoned:
    """Data that nobody may look at."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the data's {name} was looked at")


@pytest.mark.parametrize("mode", MODES)
def test_data_is_not_touched(mode: str) -> None:
    network = perceptron(16, 12)
    example = torch.zeros(1, *SHAPE)
    groups = find_groups(network, example).groups
    model = costs.cost_model(network, groups, example)
    poison: Tensor = Poisoned()  # type: ignore[assignment]

    def never(*_: object) -> Tensor:
        raise AssertionError("the network was asked for answers")

    task = PruneTask(
        groups, model, Budget({"macs": model.cost({"1": 8, "3": 6})["macs"]}, cuts={}), never,
        poison, poison, 0, InputSpec(SHAPE, 3), poison,
    )  # fmt: skip
    found = plugins.build("methods", "data-free", {"mode": mode})(network, task)
    assert {g: int(keep.sum()) for g, keep in found.channels.items()} == {"1": 8, "3": 6}
