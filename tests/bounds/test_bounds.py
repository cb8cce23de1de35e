"""Bounds of activations and of changes: worked examples to the digit, and nothing observed ever lies outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_banks import RESNET20, Op, built
from programs import box_of, contains, inputs, outside, run, within
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.bounds.activations import Activation, activation, applied, changes, values
from edgeprune.bounds.interval import Interval, Unbounded
from edgeprune.bounds.propagation import Bounds, activation_bounds, consumer_impact, delta_from
from edgeprune.methods._data_free.impact import input_box
from edgeprune.models import architectures
from edgeprune.models.tracing import Call, Program, trace
from edgeprune.records import InputSpec

BANKS = ("activations", "pools", "arithmetic", "moves", "layers")
# Group norm and transposed convolutions have no rule.
NETWORKS = tuple(name for name in nets.NETS if name not in ("groupnormed", "transposed"))
ALL = (*BANKS, *NETWORKS)
_TRACED: dict[str, tuple[Program, dict[str, Tensor], tuple[int, ...]]] = {}


@pytest.fixture(scope="module")
def traced() -> Callable[[str], tuple[Program, dict[str, Tensor], tuple[int, ...]]]:
    def get(name: str) -> tuple[Program, dict[str, Tensor], tuple[int, ...]]:
        if name not in _TRACED:
            network, shape = built(name)
            _TRACED[name] = trace(network, torch.zeros(1, *shape)), dict(network.state_dict()), shape
        return _TRACED[name]

    return get


@pytest.mark.parametrize("name", (*ALL, "resnet20"))
def test_every_activation_of_every_input_in_the_box_lies_in_its_interval(traced, name: str) -> None:
    """Without any tolerance: bounds in float64 and in float32 are widened by more than their own rounding."""
    program, state, shape = traced(name)
    box = box_of(shape)
    found = run(program, state, inputs(box, 3 if name == "resnet20" else 8))
    for dtype in (torch.float64, torch.float32):
        for collapsed in (False, True):
            bounds = activation_bounds(program, state, box_of(shape, dtype=dtype), collapsed=collapsed)
            assert not bounds.causes
            assert set(bounds.intervals) >= {c.name for c in program.calls if c.shape} - set(bounds.constants)
            assert outside(bounds, found) == []


def starts_at(program: Program, bounds: Bounds, name: str, seed: int) -> Interval:
    """Three candidates: all entries change, none does, one does and by at least 0.2."""
    shape = tuple(bounds.intervals[name].lo.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    amount = torch.rand((3, *shape), generator=generator, dtype=torch.float64) / 8
    lo, hi = -amount, amount / 2
    lo[1:], hi[1:] = 0, 0
    lo[2].view(-1)[0], hi[2].view(-1)[0] = 0.2, 0.3
    return Interval(lo, hi)


def added(start: Interval, candidate: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Changes within a start, for a call of this shape: anything inside, then only ends."""
    lo, hi = (
        end[candidate].expand(shape[1:] if shape[:1] == (1,) else shape) for end in (start.lo, start.hi)
    )
    share = torch.rand((count, *lo.shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share[count // 2 :] = share[count // 2 :].round()
    return lo + (hi - lo) * share


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("collapsed", [False, True], ids=["positions", "collapsed"])
def test_every_change_lies_in_its_bound_and_no_change_makes_none(traced, name: str, collapsed: bool) -> None:
    """T2.4: a change of zero stays exactly zero through every operator. A bank changes all that its operators read."""
    program, state, shape = traced(name)
    bounds = activation_bounds(program, state, box_of(shape), collapsed=collapsed)
    x = inputs(box_of(shape), 2)
    before = run(program, state, x)
    shaped = [c.name for c in program.calls if c.name in bounds.intervals and c.op not in ("gt", "le", "lt")]
    some_starts = shaped[1:2] if name in BANKS else shaped[:-1]
    for i, start in enumerate(some_starts):
        amounts = starts_at(program, bounds, start, i)
        change = delta_from(program, state, bounds, {start: amounts})
        assert not change.lo[1].any() and not change.hi[1].any()
        for candidate in (0, 2):
            some = {start: added(amounts, candidate, len(x), program.shape_of(start))}
            after = run(program, state, x, some)[program.output]
            bound = Interval(change.lo[candidate], change.hi[candidate])
            assert within(after - before[program.output], bound, before[program.output]), start


def test_the_change_of_a_resnet_lies_in_its_bound(traced) -> None:
    program, state, shape = traced("resnet20")
    bounds = activation_bounds(program, state, box_of(shape), collapsed=True)
    x = inputs(box_of(shape), 1)
    before = run(program, state, x)[program.output]
    for start in ("conv2d", "conv2d_8", "add_6", "conv2d_18"):
        amounts = starts_at(program, bounds, start, 0)
        change = delta_from(program, state, bounds, {start: amounts})
        assert not change.lo[1].any() and not change.hi[1].any()
        after = run(program, state, x, {start: added(amounts, 0, len(x), program.shape_of(start))})
        assert within(after[program.output] - before, Interval(change.lo[0], change.hi[0]), before)


@pytest.mark.parametrize("which", ["clean", "robust"])
def test_trained_resnets_keep_to_their_bounds(shared: Path, which: str) -> None:
    file = shared / "models" / f"resnet20-cifar10-{which}.pt"
    if not file.is_file():
        pytest.skip(f"no {file}")
    network = architectures.architecture(RESNET20).eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    program, state = trace(network, torch.zeros(1, 3, 32, 32)), network.state_dict()
    box = input_box(InputSpec((3, 32, 32), 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = inputs(box, 2)
    found = run(program, state, x)
    for collapsed in (False, True):
        bounds = activation_bounds(program, state, box, collapsed=collapsed)
        assert outside(bounds, found) == []
        start = program.calls[-6].name
        amounts = starts_at(program, bounds, start, 0)
        change = delta_from(program, state, bounds, {start: amounts})
        after = run(program, state, x, {start: added(amounts, 0, len(x), program.shape_of(start))})
        difference = after[program.output] - found[program.output]
        assert within(difference, Interval(change.lo[0], change.hi[0]), found[program.output])


# Worked examples


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()
    return layer


@pytest.fixture(scope="module")
def worked() -> nn.Module:
    """T2.3: x in [0, 1]^2, three hidden units, two logits."""
    return nn.Sequential(
        linear([[1, -2], [0.5, 0.5], [-1, -1]], [0, -0.25, -0.5]),
        nn.ReLU(),
        linear([[1, 2, -1], [-1, 0.5, 3]], [0.1, -0.1]),
    )


def near(interval: Interval, pairs: list[tuple[float, float]]) -> bool:
    wanted = torch.tensor(pairs, dtype=torch.float64)
    return torch.allclose(
        torch.stack([interval.lo.double(), interval.hi.double()], -1).view(-1, 2), wanted, atol=1e-6
    )


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_worked_example_comes_out_to_the_digit(
    worked: nn.Module, collapsed: bool, dtype: torch.dtype
) -> None:
    program, state = trace(worked, torch.zeros(1, 2)), worked.state_dict()
    first, relu, second = program.calls
    bounds = activation_bounds(program, state, box_of((2,), 0, 1, dtype), collapsed=collapsed)
    assert near(bounds.intervals[first.name], [(-2, 1), (-0.25, 0.75), (-2.5, -0.5)])
    assert near(bounds.intervals[relu.name], [(0, 1), (0, 0.75), (0, 0)])
    hidden = bounds.intervals[relu.name]
    assert not hidden.hi[0, 2], "unit 2 is provably dead"
    # Remove unit 1 and let unit 0 stand for it: the logits change by (h0 - h1) times unit 1's outgoing weights.
    difference = Interval(hidden.lo[:, 0] - hidden.hi[:, 1], hidden.hi[:, 0] - hidden.lo[:, 1])
    assert near(difference, [(-0.75, 1)])
    impact = consumer_impact(program, state, second, [[1]], difference)
    assert near(impact, [(-1.5, 2), (-0.375, 0.5)])
    change = delta_from(program, state, bounds, {second.name: impact})
    assert near(change, [(-1.5, 2), (-0.375, 0.5)])
    assert float((change.hi - change.lo).sum()) == pytest.approx(4.375, abs=1e-4)


def test_what_is_seen_of_the_worked_example_nearly_fills_its_bounds(worked: nn.Module) -> None:
    x = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = worked[1](worked[0](x))
        change = (hidden[:, :1] - hidden[:, 1:2]) * worked[2].weight[:, 1]
    assert torch.allclose(change.amin(0), torch.tensor([-1.5, -0.375]), atol=0.02)
    assert bool((change.amin(0) >= torch.tensor([-1.5, -0.375])).all())
    assert bool((change.amax(0) <= torch.tensor([2.0, 0.5])).all())


def test_an_affine_layer_maps_intervals_as_in_the_reference() -> None:
    """T2.8."""
    layer = linear([[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5]], [-1, 1])
    program = trace(layer, torch.zeros(1, 3))
    box = Interval(torch.tensor([[-0.9, -0.1, 0.1]]), torch.tensor([[0.9, 0.1, 0.9]]))
    bounds = activation_bounds(program, layer.state_dict(), box, collapsed=False)
    assert near(bounds.intervals[program.output], [(-1.45, -0.05), (0.05, 1.45)])
    assert bounds.intervals["input"].lo is not bounds.intervals[program.output].lo


def test_a_bias_is_no_change_and_a_fall_is_one_behind_a_relu_too() -> None:
    """B5: pushing a change through bias and ReLU as if it were an activation makes 5 of 0, and 0 of [-1, -0.5]."""
    network = nn.Sequential(linear([[1.0]], [0.0]), linear([[1.0]], [5.0]), nn.ReLU())
    program, state = trace(network, torch.zeros(1, 1)), network.state_dict()
    bounds = activation_bounds(program, state, box_of((1,), 0, 1), collapsed=False)
    start = Interval(torch.tensor([[0.0], [-1.0]]).double(), torch.tensor([[0.0], [-0.5]]).double())
    change = delta_from(program, state, bounds, {program.calls[0].name: start})
    assert change.lo[0] == change.hi[0] == 0
    assert near(Interval(change.lo[1], change.hi[1]), [(-1, -0.5)])


def test_a_relu_that_is_off_before_and_after_lets_nothing_through_and_no_interval_is_upside_down() -> None:
    """B9: the input's interval is not the first layer's; ReLU of a negative interval is [0, 0], not (0, -2)."""
    network = nn.Sequential(linear([[1.0], [1.0], [1.0]], [-3.0, 3.0, 0.0]), nn.ReLU())
    program, state = trace(network, torch.zeros(1, 1)), network.state_dict()
    bounds = activation_bounds(program, state, box_of((1,)), collapsed=False)
    assert near(bounds.intervals[program.calls[0].name], [(-4, -2), (2, 4), (-1, 1)])
    assert near(bounds.intervals[program.output], [(0, 0), (2, 4), (0, 1)])
    start = Interval(torch.full((1, 3), -0.5).double(), torch.full((1, 3), 1.0).double())
    change = delta_from(program, state, bounds, {program.calls[0].name: start})
    # Off: 0. On: as it is. Either: relu(x + d) - relu(x) for x in [-1, 1].
    assert near(change, [(0, 0), (-0.5, 1), (-0.5, 1)])


def test_a_unit_that_the_change_itself_turns_on_or_off_is_not_taken_for_always_off_or_on() -> None:
    network = nn.Sequential(linear([[1.0], [1.0]], [-1.25, 1.25]), nn.ReLU())
    program, state = trace(network, torch.zeros(1, 1)), network.state_dict()
    bounds = activation_bounds(program, state, box_of((1,)), collapsed=False)
    start = Interval(torch.full((1, 2), -2.0).double(), torch.full((1, 2), 1.0).double())
    change = delta_from(program, state, bounds, {program.calls[0].name: start})
    # Off in [-2.25, -0.25]: a rise by 1 shows 0.75. On in [0.25, 2.25]: a fall by 2 shows all of it at 2.25.
    assert near(change, [(0, 0.75), (-2, 1)])


def test_the_change_of_a_product_counts_both_changes_together() -> None:
    """1 · 1 becomes 3 · 3: changes by 8, of which 4 are the product of the two changes."""
    program = trace(Applied(lambda x: x[:, :2] * x[:, 2:]), torch.zeros(1, 4))
    one = torch.ones(1, 4, dtype=torch.float64)
    bounds = activation_bounds(program, {}, Interval(one, one), collapsed=False)
    change = delta_from(program, {}, bounds, {program.input: Interval(2 * one, 2 * one)})
    exact = torch.full_like(change.lo, 8)
    assert contains(change, exact) and torch.allclose(change.hi, exact)


@pytest.mark.parametrize("op", [nn.Linear(6, 4), nn.Conv2d(2, 3, 3, padding=1, stride=2)])
def test_the_bound_of_one_affine_layer_is_what_its_corners_reach(op: nn.Module) -> None:
    shape = (6,) if isinstance(op, nn.Linear) else (2, 5, 5)
    program, state = trace(op, torch.zeros(1, *shape)), op.state_dict()
    box = Interval(
        torch.linspace(-2, 0, 6)[:2].sum() * torch.ones(1, *shape).double(), box_of(shape, 0, 3).hi
    )
    found = activation_bounds(program, state, box, collapsed=False).intervals[program.output]
    op = op.double()
    rows = torch.autograd.functional.jacobian(lambda x: op(x).flatten(), box.lo).flatten(1)
    corners = torch.where(rows > 0, box.hi.flatten(), box.lo.flatten())
    with torch.no_grad():
        best = torch.stack([op(c.view(1, *shape)).flatten()[i] for i, c in enumerate(corners)])
    assert torch.allclose(found.hi.flatten(), best, rtol=1e-12)


def test_the_bound_of_a_deep_network_without_negative_weights_is_what_the_corners_reach() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nets.conv_bn(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 4)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    program, state = trace(network, torch.zeros(1, *nets.SHAPE)), network.state_dict()
    box = box_of(nets.SHAPE, 0.0, 1.0)
    found = activation_bounds(program, state, box, collapsed=False).intervals[program.output]
    with torch.no_grad():
        assert torch.allclose(found.hi, network.double()(box.hi), rtol=1e-10)
        assert torch.allclose(found.lo, network(box.lo), rtol=1e-10)


def test_a_box_of_one_point_gives_the_activations_themselves(traced) -> None:
    program, state, shape = traced("layers")
    x = inputs(box_of(shape), 1)[:1]
    bounds = activation_bounds(program, state, Interval(x, x), collapsed=False)
    found = run(program, state, x)[program.output]
    assert contains(bounds.intervals[program.output], found)
    attended = program.call(program.output).reads[-1]
    rest = slice(0, -bounds.intervals[attended].lo.numel())
    output = bounds.intervals[program.output]
    assert float((output.hi - output.lo)[:, rest].max()) < 1e-9


@pytest.mark.parametrize("name", nets.NETS)
def test_collapsed_bounds_hold_all_bounds_of_positions(traced, name: str) -> None:
    program, state, shape = traced(name)
    box = box_of(shape)
    fine, coarse = (activation_bounds(program, state, box, collapsed=c).intervals for c in (False, True))
    for call in program.calls:
        if call.name in fine:
            assert bool((coarse[call.name].lo <= fine[call.name].lo + 1e-9).all())
            assert bool((coarse[call.name].hi >= fine[call.name].hi - 1e-9).all())
    convolved = next(c for c in program.calls if c.op == "conv2d")
    assert coarse[convolved.name].lo.shape == (1, convolved.shape[1], 1, 1)
    assert fine[convolved.name].lo.shape == convolved.shape


PADDED: dict[str, nn.Module] = {
    "conv2d": nn.Conv2d(3, 2, 3, padding=1),
    "conv2d same": nn.Conv2d(3, 2, 3, padding="same"),
    "avg_pool2d": nn.AvgPool2d(3, 1, 1),
    "avg_pool2d without padding": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max_pool2d": nn.MaxPool2d(3, 1, 1),
    "pad": nn.ZeroPad2d(1),
    "pad with 3": nn.ConstantPad2d(1, 3.0),
}


@pytest.mark.parametrize("name", PADDED)
def test_the_border_of_a_padded_image_sees_what_is_padded(name: str) -> None:
    """Where all values have one sign, a hull over the positions that forgets the border is too small."""
    layer = PADDED[name]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
    program, state = trace(layer, torch.zeros(1, 3, 5, 5)), layer.state_dict()
    for low in (1.0, -2.0):
        box = box_of((3, 5, 5), low, low + 1)
        found = run(program, state, inputs(box, 4))
        for collapsed in (False, True):
            bounds = activation_bounds(program, state, box, collapsed=collapsed)
            assert outside(bounds, found) == []
            if name in ("max_pool2d", "avg_pool2d without padding"):
                ends = bounds.intervals[program.output]
                assert near(Interval(ends.lo.amin(), ends.hi.amax()), [(low, low + 1)])


# Functions of one number


class Applied(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SideBySide(nn.Module):
    def __init__(self, ops: dict[str, Op]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(op if isinstance(op, nn.Module) else Applied(op) for op in ops.values())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Functions(list[Call]):
    """Calls that apply a function to each number; says little of itself when a test fails."""

    def __repr__(self) -> str:
        return f"{len(self)} functions"

    def known(self) -> list[tuple[Call, Activation]]:
        return [(call, function) for call in self if (function := activation(call))]


@pytest.fixture(scope="module")
def functions(traced) -> Functions:
    calls = Functions(c for c in traced("activations")[0].calls if len(c.reads) == 1 and activation(c))
    unique = {(c.op, c.args[1:]): c for c in calls}
    assert {c.op for c in calls} >= {"relu", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "tanh"}
    return Functions(unique.values())


# What is lost where numbers get too small to have all their digits is not part of the bounds.
ENDS = st.floats(-12, 12, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0)
SHARES = st.lists(st.floats(0, 1), min_size=8, max_size=8)


@settings(max_examples=60)
@given(low=ENDS, high=ENDS, change_low=ENDS, change_high=ENDS, shares=SHARES)
def test_no_function_leaves_its_bounds(
    functions: Functions,
    low: float,
    high: float,
    change_low: float,
    change_high: float,
    shares: list[float],
) -> None:
    """Bounds in float32 hold what float64 finds, to the last digit."""
    x = Interval(torch.tensor([min(low, high)]), torch.tensor([max(low, high)]))
    change = Interval(
        torch.tensor([min(change_low, change_high)]), torch.tensor([max(change_low, change_high)])
    )
    share = torch.tensor([*shares, 0.0, 1.0], dtype=torch.float64)
    points = _between(x, share).unsqueeze(1)
    steps = _between(change, share.flip(0)).unsqueeze(0)
    for call, function in functions.known():
        before, after = applied(call, points), applied(call, points + steps)
        assert contains(values(call, function, x), before), call.name
        moved = changes(function, change, x)
        room = 1e-13 * (1 + before.abs().max() + after.abs().max())
        assert bool((after - before >= moved.lo.double() - room).all()), call.name
        assert bool((after - before <= moved.hi.double() + room).all()), call.name


def _between(x: Interval, share: Tensor) -> Tensor:
    lo, hi = x.lo.double(), x.hi.double()
    return torch.maximum(torch.minimum(lo + (hi - lo) * share, hi), lo)


@settings(max_examples=40)
@given(low=st.floats(-6, 6, width=32), width=st.floats(0, 6, width=32))
def test_bounds_of_values_are_reached(functions: Functions, low: float, width: float) -> None:
    x = Interval(torch.tensor([low]).double(), torch.tensor([low + width]).double())
    points = _between(x, torch.linspace(0, 1, 2001, dtype=torch.float64))
    for call, function in functions.known():
        bound, seen = values(call, function, x), applied(call, points)
        room = 1e-3 * (seen.max() - seen.min()) + 1e-6 * (1 + seen.abs().max())
        assert bool(bound.lo >= seen.min() - room) and bool(bound.hi <= seen.max() + room), call.name


@given(low=st.floats(-4, 8), width=st.floats(0, 4), change_low=st.floats(-8, 8), change_width=st.floats(0, 4))
def test_bounds_of_changes_of_clamps_are_reached(
    functions: Functions, low: float, width: float, change_low: float, change_width: float
) -> None:
    """relu(x + d) - relu(x), clamps and their leaky relatives have exact bounds."""
    x = Interval(torch.tensor([low]).double(), torch.tensor([low + width]).double())
    change = Interval(torch.tensor([change_low]).double(), torch.tensor([change_low + change_width]).double())
    share = torch.linspace(0, 1, 801, dtype=torch.float64)
    points, steps = _between(x, share).unsqueeze(1), torch.cat([change.lo, change.hi]).unsqueeze(0)
    for call, function in functions.known():
        if function.clamp and 0 <= function.leak <= 1:
            bound = changes(function, change, x)
            seen = applied(call, points + steps) - applied(call, points)
            assert float(bound.hi) == pytest.approx(float(seen.max()), abs=0.02), call.name
            assert float(bound.lo) == pytest.approx(float(seen.min()), abs=0.02), call.name


# Changes: candidates, starts, consumers


def test_candidates_do_not_know_of_each_other(traced) -> None:
    program, state, shape = traced("depthwise")
    bounds = activation_bounds(program, state, box_of(shape), collapsed=True)
    start = program.calls[3].name
    amounts = starts_at(program, bounds, start, 5)
    together = delta_from(program, state, bounds, {start: amounts})
    for i in range(3):
        alone = delta_from(
            program, state, bounds, {start: Interval(amounts.lo[i : i + 1], amounts.hi[i : i + 1])}
        )
        assert torch.allclose(alone.lo, together.lo[i : i + 1]) and torch.allclose(
            alone.hi, together.hi[i : i + 1]
        )


def test_changes_of_several_calls_add_up(traced) -> None:
    program, state, shape = traced("residual")
    bounds = activation_bounds(program, state, box_of(shape), collapsed=False)
    x = inputs(box_of(shape), 3)
    before = run(program, state, x)[program.output]
    chosen = ("conv2d", "relu_1", "add", program.output)
    starts = {name: starts_at(program, bounds, name, i) for i, name in enumerate(chosen)}
    change = delta_from(program, state, bounds, starts)
    some = {n: added(s, 0, len(x), program.shape_of(n)) for n, s in starts.items()}
    after = run(program, state, x, some)[program.output]
    assert within(after - before, Interval(change.lo[0], change.hi[0]), before)
    alone = delta_from(program, state, bounds, {program.output: starts[program.output]})
    assert torch.equal(alone.lo, starts[program.output].lo) and change.lo[0].sum() < alone.lo[0].sum()


def test_a_change_of_the_input_is_a_start_too(traced) -> None:
    program, state, shape = traced("concat")
    bounds = activation_bounds(program, state, box_of(shape), collapsed=False)
    x = inputs(box_of(shape), 3)
    start = Interval(torch.full((2, 3, 8, 8), -0.1).double(), torch.full((2, 3, 8, 8), 0.1).double())
    change = delta_from(program, state, bounds, {program.input: start})
    before = run(program, state, x)[program.output]
    after = run(program, state, x, {program.input: added(start, 1, len(x), (1, *shape))})[program.output]
    assert within(after - before, Interval(change.lo[1], change.hi[1]), before)


def test_channels_may_be_given_without_their_positions(traced) -> None:
    program, state, shape = traced("plain")
    bounds = activation_bounds(program, state, box_of(shape), collapsed=True)
    amount = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = amount[:, :, None, None].expand(4, 8, 8, 8)
    flat, full = (delta_from(program, state, bounds, {"conv2d": Interval(-a, a)}) for a in (amount, spread))
    assert bool((flat.lo <= full.lo + 1e-12).all()) and bool((flat.hi >= full.hi - 1e-12).all())
    with pytest.raises(ValueError, match=r"the start at conv2d has shape \(4, 7\), expected \(B, 8, 8, 8\)"):
        delta_from(program, state, bounds, {"conv2d": Interval(-amount[:, :7], amount[:, :7])})
    with pytest.raises(ValueError, match="the box has shape"):
        activation_bounds(program, state, box_of((4, 8, 8)), collapsed=True)


def test_bounds_of_activations_make_bounds_of_changes_tighter(traced) -> None:
    program, state, shape = traced("plain")
    start = {"conv2d": Interval(torch.full((1, 8), -0.01).double(), torch.full((1, 8), 0.01).double())}
    small, large = (
        delta_from(program, state, activation_bounds(program, state, box, collapsed=True), start)
        for box in (box_of(shape, 0.3, 0.31), box_of(shape, -9, 9))
    )
    assert (small.hi - small.lo).sum() < 0.8 * (large.hi - large.lo).sum()


LAYERS = {
    "linear": nn.Linear(6, 4),
    "conv": nn.Conv2d(4, 6, 3, padding=1),
    "conv without padding": nn.Conv2d(4, 6, 3),
    "grouped conv": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise conv": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "conv along one axis": nn.Conv1d(4, 5, 3, padding=1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_impact_on_a_consumer_holds_what_it_changes(name: str) -> None:
    layer = LAYERS[name]
    shape = {"linear": (6,), "conv along one axis": (4, 9)}.get(name, (4, 5, 5))
    program, state = trace(layer, torch.zeros(1, *shape)), layer.state_dict()
    positions = [[0], [3, 1], [2], [1]]
    delta = Interval(
        torch.tensor([-0.5, 0.1, -1.0, 0.0]).double(), torch.tensor([1.0, 0.3, -0.2, 0.0]).double()
    )
    impact = consumer_impact(program, state, program.calls[0], positions, delta)
    outputs = program.calls[0].shape[1]
    assert impact.lo.shape == (4, outputs, *(1,) * (len(shape) - 1))
    x = inputs(box_of(shape), 8)
    share = torch.rand((4, len(x), *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share[:, ::2] = share[:, ::2].round()
    before = run(program, state, x)[program.output]
    for i, chosen in enumerate(positions):
        mask = torch.zeros(shape[0], dtype=torch.float64).index_fill_(0, torch.tensor(chosen), 1.0)
        step = (delta.lo[i] + (delta.hi[i] - delta.lo[i]) * share[i]) * mask.view(
            -1, *(1,) * (len(shape) - 1)
        )
        after = run(program, state, x + step)[program.output]
        assert within(after - before, Interval(impact.lo[i], impact.hi[i]), before)
    assert not impact.lo[3].any() and not impact.hi[3].any()


def test_the_impact_on_a_linear_layer_is_its_column_times_the_change() -> None:
    layer = LAYERS["linear"]
    program = trace(layer, torch.zeros(1, 6))
    delta = Interval(torch.tensor([-1.0, 2.0]).double(), torch.tensor([3.0, 2.0]).double())
    impact = consumer_impact(program, layer.state_dict(), program.calls[0], [[2], [0, 5]], delta)
    column, both = layer.weight[:, 2].double(), layer.weight[:, [0, 5]].double().sum(1)
    assert torch.allclose(impact.lo[0], torch.minimum(-column, 3 * column))
    assert torch.allclose(impact.hi[1], 2 * both) and torch.allclose(impact.lo[1], 2 * both)


def test_only_layers_with_input_channels_have_an_impact(traced) -> None:
    program, state, _ = traced("plain")
    relu = next(c for c in program.calls if c.op == "relu")
    with pytest.raises(
        Unbounded, match=r"relu in a\.2 can't be bounded: only convolutions and linear layers"
    ):
        consumer_impact(program, state, relu, [[0]], Interval(torch.zeros(1), torch.ones(1)))


# What has no bound


class Partly(nn.Module):
    """One branch has no bound, the other one has."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.stem, self.odd, self.even = nn.Conv2d(3, 4, 3, padding=1), Applied(op), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((self.odd(x) + torch.relu(self.even(x))).mean((2, 3)))


UNCOVERED: dict[str, tuple[Op, str]] = {
    "cumsum": (lambda x: torch.cumsum(x, 1), "there is no rule for cumsum"),
    "fft": (lambda x: torch.fft.fft(x).abs(), "there is no rule for fft_fft"),
    "log": (torch.log, "there is no rule for log"),
    "quotient": (lambda x: x / x.tanh(), "it divides by something else than a number"),
    "to": (lambda x: x.half().float(), r"it rounds to torch\.float16"),
    "clamp": (lambda x: x.clamp(min=x.mean()), "its limits are tensors"),
    "div": (lambda x: torch.div(x, 2, rounding_mode="floor"), "or rounds"),
    "dropout": (functional.dropout, "there is no rule for native_dropout"),
    "conv2d": (lambda x: functional.conv2d(x, x[:1, :, :1, :1].tanh()), "its weights depend on the input"),
    "batch_norm": (nn.BatchNorm2d(4, track_running_stats=False), "the statistics of its batch"),
    "index": (lambda x: x[:, x.mean((0, 2, 3)).argsort()], "there is no rule for argsort"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_an_operator_without_a_bound_is_named_and_poisons_only_what_depends_on_it(name: str) -> None:
    op, reason = UNCOVERED[name]
    network = Partly(op).eval()
    program, state = trace(network, torch.zeros(1, *nets.SHAPE)), network.state_dict()
    for collapsed in (False, True):
        bounds = activation_bounds(program, state, box_of(nets.SHAPE), collapsed=collapsed)
        bad = [c for c in program.calls if c.name in bounds.causes]
        assert bad and {c.layer for c in bad} <= {"odd", "odd.op", "", "fc"}
        assert bad[-1].name == program.output
        messages = {str(bounds.causes[c.name]) for c in bad}
        assert len(messages) == 1 and re.search(r"in odd(\.op)? can't be bounded: ", messages.pop())
        assert next(c.name for c in program.calls if c.layer == "even") in bounds.intervals
        start = {program.calls[0].name: Interval(-torch.ones(1, 4).double(), torch.ones(1, 4).double())}
        with pytest.raises(Unbounded, match=reason) as caught:
            delta_from(program, state, bounds, start)
        assert caught.value.layer.startswith("odd") and caught.value.exit_code == 4
        even = next(c.name for c in program.calls if c.op == "relu")
        change = delta_from(program, state, bounds, {even: next(iter(start.values()))})
        assert change.lo.shape == (1, 3) and bool((change.hi > change.lo).all())


def test_bounds_that_outgrow_their_dtype_are_not_guessed() -> None:
    network = nn.Sequential(*(linear([[1e10]], [0.0]) for _ in range(6)))
    program, state = trace(network, torch.zeros(1, 1)), network.state_dict()
    fine = activation_bounds(program, state, box_of((1,)), collapsed=False)
    assert not fine.causes and fine.intervals[program.output].hi > 1e59
    coarse = activation_bounds(program, state, box_of((1,), dtype=torch.float32), collapsed=False)
    assert [c.name for c in program.calls if c.name in coarse.causes] == [c.name for c in program.calls[3:]]
    assert "exceed torch.float32" in str(coarse.causes[program.output])
    start = {program.calls[0].name: Interval(-torch.ones(1, 1), torch.ones(1, 1))}
    with pytest.raises(Unbounded, match=r"linear in 4 can't be bounded: its bounds exceed torch\.float32"):
        delta_from(program, state, fine, start)
