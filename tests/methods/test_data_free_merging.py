"""Merging equal units changes nothing, removing constant ones with compensation neither, on networks of every kind."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune.errors import EdgepruneError, UnsupportedModel
from edgeprune.methods._data_free import merging
from edgeprune.methods._data_free.pairing import Pair, greedy_matching, pair_saliency, scaled_saliency
from edgeprune.models import surgery
from edgeprune.models.tracing import Program, trace
from edgeprune.records import Group
from edgeprune.structure import groups
from edgeprune.structure.channel_paths import following_batch_norm

F = nn.functional

MERGEABLE = {
    "plain": {"a.0", "b.0"},
    "residual": {"stem.0", "one.0"},
    "depthwise": {"squeeze"},
    "grouped": {"c.0"},
    "concat": {"a.0", "b.0", "c.0"},
    "split": {"left.0", "right.0", "c.0"},
    "groupnormed": {"b"},
    "transposed": {"a.0", "up"},
}


def opened(network: nn.Module, x: Tensor) -> tuple[Program, dict[str, Group]]:
    return trace(network, x), {g.name: g for g in groups.find_groups(network, x).groups}


@cache
def known(name: str) -> tuple[nn.Module, Program, dict[str, Group]]:
    """One of the networks of nets.py, traced once; to be copied before it is changed."""
    network = nets.build(name)
    return network, *opened(network, nets.example())


def sequence(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """Layers with random weights, biases and statistics."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(*layers)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                low, high = (0.5, 1.5) if tensor.min() == tensor.max() == 1 else (-0.5, 0.5)
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return network.eval()


def perceptron(bias: bool = True) -> nn.Sequential:
    return sequence(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 5, bias=bias))


def image_network(activation: nn.Module | None = None) -> nn.Sequential:
    return sequence(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation or nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def tensors_of(
    network: nn.Module, group: Group, *roles: str
) -> list[tuple[str, Tensor, tuple[tuple[int, ...], ...]]]:
    """Tensors with the units' axis first, and the positions of each unit."""
    state = network.state_dict(keep_vars=True)
    return [
        (m.tensor, state[m.tensor].detach().movedim(m.axis, 0), m.positions)
        for m in group.members
        if m.role in roles and state[m.tensor].ndim
    ]


def make_equal(network: nn.Module, group: Group, source: int, copy: int, factor: float = 1.0) -> None:
    """Give a unit the rows and batch-norm entries of another one, or a multiple of what these two make together."""
    found = tensors_of(network, group, "producer", "norm")
    normed = any(name.endswith("running_mean") for name, _, _ in found)
    for name, tensor, positions in found:
        tensor[list(positions[copy])] = tensor[list(positions[source])]
        last = nn.BatchNorm2d if normed else (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        if name.endswith(("weight", "bias")) and isinstance(layer_of(network, name), last):
            tensor[list(positions[copy])] *= factor


def layer_of(network: nn.Module, tensor: str) -> nn.Module:
    return network.get_submodule(tensor.rpartition(".")[0])


def without(network: nn.Module, group: Group, removed: list[int]) -> nn.Module:
    """A copy with the units cut out."""
    small = deepcopy(network)
    keep = torch.ones(group.channels, dtype=torch.bool)
    keep[removed] = False
    surgery.cut(small, surgery.removed_positions((group,), {group.name: keep}))
    return small


@pytest.mark.parametrize(
    ("build", "shape"),
    [(perceptron, (4, 6)), (image_network, (4, 3, 8, 8)), (lambda: perceptron(bias=False), (4, 6))],
)
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_a_duplicate_or_a_multiple_goes_without_a_trace(
    build: Callable[[], nn.Module], shape: tuple[int, ...], factor: float
) -> None:
    network, x = build(), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    program, groups = opened(network, x)
    group = groups["0"]
    make_equal(network, group, 2, 6, factor)
    expected = network(x)
    rows = merging.unit_rows(network, group)
    saliency, scale = scaled_saliency(rows.incoming, rows.outgoing, rows.bias)
    assert merging.why_not_mergeable(program, network, group) is None
    assert merging.is_homogeneous(program, group)
    pair = greedy_matching(saliency, 1, scale=scale)[0]
    assert {pair.keep, pair.remove} == {2, 6}
    assert pair.saliency < 1e-6
    assert pair.scale == pytest.approx({2: factor, 6: 1 / factor}[pair.keep], rel=1e-5)
    merging.merge(network, group, [pair])
    torch.testing.assert_close(network(x), expected, rtol=0, atol=2e-6)
    small = without(network, group, [pair.remove])
    torch.testing.assert_close(small(x), expected, rtol=0, atol=2e-6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())


def test_a_pair_is_removed_and_kept_in_the_direction_that_it_says() -> None:
    """h = (.3, .9), w = (2, -1), (.5, 4): without unit 1 the outputs change by (h_0 - h_1) w_1 = (-.3, -2.4)."""
    network = perceptron()
    network[0], network[2] = nn.Linear(6, 2), nn.Linear(2, 2)
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.copy_(torch.tensor([0.3, 0.9]))
        network[2].weight.copy_(torch.tensor([[2.0, 0.5], [-1.0, 4.0]]))
    x = torch.zeros(1, 6)
    _, groups = opened(network, x)
    before = network(x)
    merging.merge(network, groups["0"], [Pair(keep=0, remove=1, saliency=0.0)])
    torch.testing.assert_close(network(x) - before, torch.tensor([[-0.3, -2.4]]))


@pytest.mark.parametrize("name", nets.NETS)
@given(seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=4)
def test_each_group_merges_without_a_trace_or_says_why_not(name: str, seed: int, data: st.DataObject) -> None:
    (network, program, groups), x = known(name), nets.example(2, seed)
    reasons = {g: merging.why_not_mergeable(program, network, group) for g, group in groups.items()}
    assert {g for g, why in reasons.items() if why is None} == MERGEABLE[name]
    assert all(why is None or len(why) > 30 for why in reasons.values())
    for g in sorted(MERGEABLE[name]):
        group, copy = groups[g], deepcopy(network).double()
        units = data.draw(st.permutations(range(group.channels)))[:4]
        factor = (
            data.draw(st.sampled_from([1.0, 0.3, 7.0])) if merging.is_homogeneous(program, group) else 1.0
        )
        pairs = [Pair(units[0], units[1], 0.0, factor), Pair(units[2], units[3], 0.0, factor)]
        for pair in pairs:
            make_equal(copy, group, pair.keep, pair.remove, factor)
        expected = copy(x.double())
        merging.merge(copy, group, pairs)
        torch.testing.assert_close(copy(x.double()), expected, rtol=1e-9, atol=1e-10)
        small = without(copy, group, [p.remove for p in pairs])
        torch.testing.assert_close(small(x.double()), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", nets.NETS)
def test_what_is_refused_would_not_have_been_exact(name: str) -> None:
    """Equal rows in the first of the layers that make a unit are not enough there."""
    (network, _, groups), x = known(name), nets.example(2)
    for g in groups.keys() - MERGEABLE[name]:
        copy, group = deepcopy(network).double(), groups[g]
        first = next(m.tensor for m in group.members if m.role == "producer")
        weight, places = next((t, p) for n, t, p in tensors_of(copy, group, "producer") if n == first)
        weight[list(places[1])] = weight[list(places[0])]
        expected = copy(x.double())
        merging.merge(copy, group, [Pair(0, 1, 0.0)])
        assert (copy(x.double()) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("activation", "homogeneous"),
    [
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.2), True),
        (nn.Dropout(), True),
        (nn.Identity(), True),
        (nn.PReLU(), True),
        (nn.PReLU(8), True),
        (nn.ReLU6(), False),
        (nn.Hardswish(), False),
        (nn.GELU(), False),
        (nn.Sigmoid(), False),
        (nn.SiLU(), False),
        (nn.Tanh(), False),
    ],
    ids=str,
)
def test_scaled_merges_are_exact_where_activations_scale(activation: nn.Module, homogeneous: bool) -> None:
    network, x = image_network(activation), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.fill_(0.25)
        network[1].weight[:2] *= 10  # far enough for a ReLU6 to bend
    program, groups = opened(network, x)
    group = groups["0"]
    assert merging.why_not_mergeable(program, network, group) is None
    assert merging.is_homogeneous(program, group) == homogeneous
    network = network.double()
    make_equal(network, group, 0, 1, 3.0)
    expected = network(x.double())
    merging.merge(network, group, [Pair(0, 1, 0.0, 3.0)])
    assert bool((network(x.double()) - expected).abs().max() < 1e-9) == homogeneous


def test_slopes_that_differ_keep_units_apart() -> None:
    network, x = image_network(nn.PReLU(8)), torch.rand(1, 3, 8, 8)
    program, groups = opened(network, x)
    assert "2 has another slope" in str(merging.why_not_mergeable(program, network, groups["0"]))


class Joined(nn.Module):
    """conv -> norm -> something -> conv, with the something given."""

    def __init__(self, middle: Callable[[Joined, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.norm, self.late = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 1, groups=8)
        self.b, self.fc, self.middle = nn.Conv2d(8, 6, 1), nn.Linear(6, 5), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(self.middle(self, self.norm(self.a(x))))).mean((2, 3)))


def joined(middle: Callable[[Joined, Tensor], Tensor]) -> tuple[nn.Module, Program, Group]:
    network = surgery.disturbed(Joined(middle), nets.example(4), 0)
    program, groups = opened(network, nets.example())
    return network, program, groups["a"]


@pytest.mark.parametrize(
    ("middle", "homogeneous"),
    [
        (lambda _, x: x * torch.sigmoid(x), False),
        (lambda _, x: x * F.relu6(x + 3) / 6, False),
        (lambda _, x: torch.relu(x) - 0.5 * torch.relu(-x), True),
        (lambda _, x: torch.relu(x) * x.mean((2, 3), keepdim=True), False),
        (lambda _, x: torch.relu(x + 1), False),
        (lambda _, x: torch.clamp(x, -1, 1), False),
        (lambda _, x: F.pad(torch.relu(x), (1, 1, 1, 1)), True),
        (lambda _, x: F.pad(torch.relu(x), (1, 1, 1, 1), value=1.0), False),
        (lambda _, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), True),
        (lambda _, x: torch.relu(x).permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2).unsqueeze(-1), True),
        (lambda _, x: F.adaptive_max_pool2d(x, 2), True),
        (lambda _, x: torch.cat([x, torch.relu(x)], 3), True),
        (lambda _, x: torch.maximum(x, 2 * x), True),
    ],
)
def test_what_treats_channels_alike_is_passed(
    middle: Callable[[Joined, Tensor], Tensor], homogeneous: bool
) -> None:
    network, program, group = joined(middle)
    x = nets.example(3, 2).double()
    assert merging.why_not_mergeable(program, network, group) is None
    assert merging.is_homogeneous(program, group) == homogeneous
    factor = 2.0 if homogeneous else 1.0
    network = network.double()
    make_equal(network, group, 4, 5, factor)
    expected = network(x)
    merging.merge(network, group, [Pair(4, 5, 0.0, factor)])
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda n, x: n.late(torch.relu(x)), "batch_norm in late scales each of its channels otherwise"),
        (lambda n, x: n.depthwise(x), "conv2d in depthwise has other filters for other channels"),
        (
            lambda n, x: x * n.late.weight.view(1, -1, 1, 1),
            "mul joins its channels with values of another layer",
        ),
        (
            lambda n, x: torch.cat([x, n.late.weight.view(8, 1, 1).expand_as(x)], 2),
            "cat puts channels of other",
        ),
        (lambda _, x: torch.softmax(x, 1), "softmax is not known to treat each of its channels by itself"),
        (lambda _, x: x.flip(1), "flip is not known to treat each of its channels by itself"),
        (lambda _, x: x - x.mean(1, keepdim=True), "mean adds up its channels"),
        (
            lambda _, x: F.interpolate(x, size=8) + x.mean((0, 2, 3)),
            "add joins its channels with themselves along",
        ),
        (lambda _, x: x.view(-1, 2, 4, 6, 6).transpose(1, 2).flatten(1, 2), "view takes its channels apart"),
        (
            lambda _, x: F.avg_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0],
            "avg_pool3d runs over its channels",
        ),
        (
            lambda _, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
            "uses the places of its maxima",
        ),
    ],
)
def test_what_tells_channels_apart_is_named(middle: Callable[[Joined, Tensor], Tensor], reason: str) -> None:
    network, program, group = joined(middle)
    found = merging.why_not_mergeable(program, network, group)
    assert found is not None
    assert reason in found
    assert not merging.is_homogeneous(program, group)


def test_groups_and_programs_that_do_not_belong_together_are_no_reason_to_merge() -> None:
    network, x = perceptron(), torch.rand(1, 6)
    program, groups = opened(network, x)
    group = groups["0"]
    consumer = group.members[-1]
    assert consumer.role == "consumer"
    more = replace(group, members=(*group.members, replace(consumer, tensor="9.weight")))
    fewer = replace(group, members=group.members[:-1])
    ragged = replace(
        group, members=(*fewer.members, replace(consumer, positions=((0, 1), *consumer.positions[1:])))
    )
    reasons = [
        merging.why_not_mergeable(*case)
        for case in (
            (program, network, more),
            (program, network, fewer),
            (program, network, ragged),
            (trace(network[:2], x), network, group),
            (trace(network[1:], torch.rand(1, 8)), network, group),
        )
    ]
    assert reasons == [
        "the way from it to 9 could not be followed",
        "linear in 2 reads its channels without being a consumer of the group",
        "its units do not all have the same number of readers",
        "its channels are outputs of the network",
        "0 is used 0 times in the traced network, or not as a layer",
    ]
    assert not merging.is_homogeneous(program, ragged)


def test_new_channels_and_readers_of_another_dimension_are_named() -> None:
    class Wide(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(F.pad(self.a(x), (0, 0, 0, 0, 1, 1))).mean((2, 3)))

    class Across(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(x)).mean((1, 2)))

    network, _, group = joined(lambda _, x: x)
    wide, across = Wide(lambda _, x: x), Across(lambda _, x: x)
    wide.b, across.b = nn.Conv2d(10, 6, 1), nn.Linear(6, 6)
    reasons = [
        merging.why_not_mergeable(trace(other, nets.example()), network, group) for other in (wide, across)
    ]
    assert "adds channels to it" in str(reasons[0])
    assert reasons[1] == "linear in b runs along another dimension than its channels"


def test_a_layer_that_runs_twice_has_no_rows_of_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.loop, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.fc(torch.relu(self.loop(torch.relu(self.loop(x)))))

    network, x = Twice().eval(), torch.rand(2, 6)
    program, groups = opened(network, x)
    for group in groups.values():
        assert merging.why_not_mergeable(program, network, group) is not None


def test_merging_many_units_of_a_trained_like_layer_changes_little_and_saves_what_it_says() -> None:
    network, x = perceptron(), torch.rand(50, 6, generator=torch.Generator().manual_seed(3))
    group = opened(network, x)[1]["0"]
    with torch.no_grad():
        network[0].weight[4:] = network[0].weight[:4] + 1e-3
        network[0].bias[4:] = network[0].bias[:4]
    expected = network(x)
    rows = merging.unit_rows(network, group)
    pairs = greedy_matching(pair_saliency(rows.incoming, rows.outgoing, rows.bias))
    assert {frozenset((p.keep, p.remove)) for p in pairs} == {frozenset((i, i + 4)) for i in range(4)}
    merging.merge(network, group, pairs)
    small = without(network, group, [p.remove for p in pairs])
    # |delta| <= sum over pairs of ||W_i - W_j|| ||x|| ||A_j||, Lipschitz
    bound = sum(p.saliency for p in pairs) * x.norm(dim=1)
    assert bool(((small(x) - expected).norm(dim=1) <= bound).all())
    assert sum(p.numel() for p in small.parameters()) == 4 * 7 + 5 * 5


@pytest.mark.parametrize("pairs", [[Pair(0, 1, 0.0), Pair(1, 2, 0.0)], [Pair(3, 3, 0.0)], [Pair(0, 8, 0.0)]])
def test_a_unit_in_two_pairs_is_refused(pairs: list[Pair]) -> None:
    network = perceptron()
    group = opened(network, torch.rand(1, 6))[1]["0"]
    before = deepcopy(network.state_dict())
    with pytest.raises(EdgepruneError, match="of 0 is in [12] pairs, accepted: each of units 0 to 7 in one"):
        merging.merge(network, group, pairs)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    merging.merge(network, group, [])
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_rows_hold_the_batch_norm() -> None:
    network = image_network().double()
    group = opened(nn.Sequential(*deepcopy(network)).float(), torch.rand(1, 3, 8, 8))[1]["0"]
    rows = merging.unit_rows(network, group)
    patch = torch.rand(1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = network[1](F.conv2d(patch, network[0].weight, network[0].bias)).flatten()
    torch.testing.assert_close(rows.incoming @ patch.flatten() + rows.bias, expected)
    torch.testing.assert_close(rows.outgoing, network[4].weight.detach().transpose(0, 1).flatten(1))


def test_rows_of_units_that_several_layers_make_are_refused() -> None:
    network = nets.build("residual")
    _, groups = opened(network, nets.example())
    with pytest.raises(UnsupportedModel, match="joined from what 2 layers make"):
        merging.unit_rows(network, groups["two"])


def reads_of(network: nn.Module, group: Group, x: Tensor) -> dict[str, Tensor]:
    """Mean of every input channel of the layers that read a group."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in {m.tensor.rpartition(".")[0] for m in group.members if m.role == "consumer"}:

        def see(layer: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            axes = [
                d
                for d in range(inputs[0].ndim)
                if d != (inputs[0].ndim - 1 if isinstance(layer, nn.Linear) else 1)
            ]
            found[name] = inputs[0].mean(axes)

        handles.append(network.get_submodule(name).register_forward_pre_hook(see))
    surgery.checked_logits(network, x)
    for handle in handles:
        handle.remove()
    return found


def make_constant(network: nn.Module, group: Group, units: list[int]) -> None:
    for name, tensor, positions in tensors_of(network, group, "producer", "norm"):
        places = [p for unit in units for p in positions[unit]]
        layer = layer_of(network, name)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and name.endswith("weight"):
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels
            tensor[places] = tensor[places] if depthwise else 0.0
        elif name.endswith("bias") and isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            tensor[places] = 2.0


@pytest.mark.parametrize("name", nets.NETS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=4)
def test_a_constant_unit_of_any_group_goes_without_a_trace(name: str, seed: int) -> None:
    """Residual sums, depthwise and grouped layers too; circular padding, so that all of the image is interior."""
    (network, program, groups), x = known(name), nets.example(2, seed).double()
    network = deepcopy(network).double()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0):
            layer.padding_mode = "circular"
        elif isinstance(layer, nn.ConvTranspose2d):  # one tap for each output, and all of them the same
            layer.weight.data = (
                layer.weight.data.mean((2, 3), keepdim=True).expand(layer.weight.shape).clone()
            )
    for group in groups.values():
        copy = deepcopy(network)
        units = [seed % group.channels] if group.channels < 8 else [0, seed % group.channels]
        make_constant(copy, group, units)
        expected = copy(x)
        means = reads_of(copy, group, x)
        merging.compensate(program, copy, group, units, means)
        torch.testing.assert_close(copy(x), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            without(copy, group, sorted(set(units)))(x), expected, rtol=1e-9, atol=1e-10
        )


def test_with_zero_padding_compensation_is_exact_in_the_interior_and_nowhere_else() -> None:
    network = sequence(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.AvgPool2d(8)
    )
    x = nets.example(2)
    program, groups = opened(nn.Sequential(*network, nn.Flatten()), x)
    with torch.no_grad():
        network[0].weight[3] = 0
        network[0].bias[3] = 0.7
    before = network[:3](x)
    mean = torch.zeros(8)
    mean[3] = 0.7
    merging.compensate(program, network, groups["0"], [3], {"2": mean})
    change = (network[:3](x) - before).abs().amax((0, 1))
    assert change[1:-1, 1:-1].max() < 1e-6
    assert change[0].min() > 1e-3


def test_readers_that_can_take_no_constant_only_lose_the_unit() -> None:
    network = sequence(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 5))
    program, groups = opened(network, torch.rand(1, 6))
    kept = deepcopy(network)
    merging.compensate(program, network, groups["0"], [1], {"2": torch.ones(8)})
    surgery.mask(kept, (groups["0"],), {"0": torch.arange(8) != 1})
    torch.testing.assert_close(network.state_dict(), kept.state_dict(), rtol=0, atol=0)


def test_means_that_do_not_fit_are_refused() -> None:
    network = perceptron()
    program, groups = opened(network, torch.rand(1, 6))
    with pytest.raises(EdgepruneError, match=r"means \(8,\) are needed for the input of 2, got \(7,\)"):
        merging.compensate(program, network, groups["0"], [0], {"2": torch.ones(7)})
    with pytest.raises(EdgepruneError, match=r"means \(8,\) are needed for the input of 2, got none"):
        merging.compensate(program, network, groups["0"], [0], {"0": torch.ones(8)})


def test_the_batch_norm_behind_a_layer_is_found_when_it_is_its_own() -> None:
    program = trace(nets.build("residual"), nets.example())
    assert following_batch_norm(program, "two") == "bn"
    assert following_batch_norm(program, "one.0") == "one.1"
    assert following_batch_norm(program, "fc") is None
    assert following_batch_norm(program, "nowhere") is None


def test_a_batch_norm_that_two_layers_share_belongs_to_neither() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn, self.fc = (
                nn.Linear(6, 8),
                nn.Linear(6, 8),
                nn.BatchNorm1d(8),
                nn.Linear(8, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(self.a(x)) + self.bn(self.b(x)))

    program = trace(Shared().eval(), torch.rand(2, 6))
    assert following_batch_norm(program, "a") is None


def test_a_batch_norm_without_statistics_is_neither_folded_nor_shifted() -> None:
    network = sequence(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    program, groups = opened(network, nets.example())
    assert following_batch_norm(program, "0") is None
    found = merging.why_not_mergeable(program, network, groups["0"])
    assert found == "batch_norm in 1 normalizes with the statistics of the batch"


def test_one_layer_alone_has_no_units_to_merge() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    assert groups.find_groups(network, torch.rand(1, 3, 2, 2)).groups == ()


@pytest.mark.parametrize("channels", [2, 9])
def test_a_layer_of_identical_channels_shrinks_by_half_without_a_trace(channels: int) -> None:
    network = sequence(
        nn.Linear(6, channels, bias=False), nn.ReLU(), nn.Linear(channels, 5, bias=False)
    ).double()
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        network[0].weight.copy_(network[0].weight[:1].expand(channels, 6).clone())
    group = opened(deepcopy(network).float(), x.float())[1]["0"]
    expected = network(x)
    rows = merging.unit_rows(network, group)
    pairs = greedy_matching(pair_saliency(rows.incoming, rows.outgoing, rows.bias))
    assert len(pairs) == channels // 2
    assert all(p.saliency == 0 for p in pairs)
    merging.merge(network, group, pairs)
    torch.testing.assert_close(without(network, group, [p.remove for p in pairs])(x), expected)
