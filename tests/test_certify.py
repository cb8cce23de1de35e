"""The certified change of the logits: small networks in full size, and no image ever changes them by more."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_banks import RESNET20
from programs import box_of, inputs, lively, run, within
from torch import Tensor, nn

from edgeprune.bounds.interval import Interval, Unbounded
from edgeprune.errors import ModelError
from edgeprune.methods._data_free.impact import (
    bundle_change,
    full_size,
    input_box,
    logit_change,
    margin_change,
)
from edgeprune.models import architectures, surgery
from edgeprune.models.bundle import from_module
from edgeprune.models.tracing import Program, trace
from edgeprune.prune import cut
from edgeprune.records import Bundle, InputSpec, Masks
from edgeprune.structure.groups import find_groups

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    dense: Bundle
    small: Bundle
    program: Program


def pruned(dense: Bundle, every: int = 4) -> Bundle:
    """One of `every` channels of each group cut."""
    example = torch.rand(2, *dense.input.shape, generator=torch.Generator().manual_seed(0))
    groups = find_groups(dense.module, example).groups
    masks = Masks({g.name: torch.arange(g.channels) % every != 1 for g in groups})
    return cut.run_cut(dense, groups, masks, {}, example)[1]


def edited(network: nn.Module, amount: float = 0.02) -> nn.Module:
    """Every tensor of floats changed a little, as merging and repair do."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.mul_(1 + amount * noise)
    return network


def bundle(name: str) -> Bundle:
    if name == "resnet20":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = lively(architectures.architecture(RESNET20))
        return from_module(network, torch.zeros(1, 3, 32, 32), mean=MEAN, std=STD)
    return from_module(nets.build(name), nets.example(), mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def cases() -> Callable[[str], Case]:
    """A network, its traced program and what is left of it after a cut, made once; not to be changed."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            dense = bundle(name)
            made[name] = Case(dense, pruned(dense), trace(dense.module, torch.zeros(1, *dense.input.shape)))
        return made[name]

    return get


def test_the_input_box_holds_every_normalized_image_and_nothing_more() -> None:
    spec = InputSpec((3, 4, 5), 10, MEAN, STD)
    box = input_box(spec)
    assert box.lo.shape == (1, 3, 4, 5) and box.lo.dtype == torch.float64
    for c in range(3):
        assert box.lo[0, c].unique().tolist() == pytest.approx([-MEAN[c] / STD[c]])
        assert box.hi[0, c].unique().tolist() == pytest.approx([(1 - MEAN[c]) / STD[c]])
    bare = input_box(InputSpec((1, 2, 2), 10, low=-0.5, high=2.0))
    assert bare.lo.unique().tolist() == [-0.5] and bare.hi.unique().tolist() == [2.0]


@pytest.mark.parametrize("name", nets.NETS)
def test_a_small_network_in_full_size_answers_as_it_does_small(cases, name: str) -> None:
    dense, small, program = cases(name)
    state = dense.module.state_dict()
    full = full_size(small.module.state_dict(), small.plans[0].tensors, state)
    assert {n: t.shape for n, t in full.items()} == {n: t.shape for n, t in state.items()}
    assert any(not torch.equal(full[n], state[n]) for n in full)
    x = nets.example(3)
    with torch.no_grad():
        assert torch.allclose(run(program, full, x)[program.output], small.module(x), atol=1e-5)


def test_what_was_cut_comes_back_as_zeros_and_variances_as_ones() -> None:
    dense_state = {"w": torch.rand(4, 3), "n.running_var": torch.rand(4), "extra": torch.ones(1)}
    small = {"w": torch.tensor([[5.0, 6.0], [7.0, 8.0]]), "n.running_var": torch.tensor([2.0, 3.0])}
    full = full_size(small, {"w": ((0, (0, 3)), (1, (1,))), "n.running_var": ((0, (0, 3)),)}, dense_state)
    assert full["w"].tolist() == [[0, 0, 0], [5, 0, 6], [7, 0, 8], [0, 0, 0]]
    assert full["n.running_var"].tolist() == [1, 2, 3, 1] and full["extra"].tolist() == [1]


def test_cuts_after_each_other_are_undone_from_the_last() -> None:
    dense = bundle("plain")
    smaller = pruned(pruned(dense), every=3)
    state = smaller.module.state_dict()
    for plan in reversed(smaller.plans):
        state = full_size(state, plan.tensors, dense.module.state_dict())
    program, x = trace(dense.module, nets.example()), nets.example(2)
    with torch.no_grad():
        assert torch.allclose(run(program, state, x)[program.output], smaller.module(x), atol=1e-5)
    change = bundle_change(dense, smaller, collapsed=True)
    assert change.lo.shape == (1, 5) and bool((change.lo < change.hi).all())


def test_a_plan_of_another_network_is_refused(cases) -> None:
    state = {"w": torch.zeros(2, 3)}
    with pytest.raises(ModelError, match=r"w has shape \(2, 3\), which the plan does not fit \(axis 0\)"):
        full_size(state, {"w": ((0, (0, 9)),)}, state)
    with pytest.raises(ModelError, match=r"axis 2"):
        full_size(state, {"w": ((2, (0,)),)}, state)
    dense, small, program = cases("plain")
    with pytest.raises(ModelError, match="the dense network's has"):
        logit_change(
            program, dense.module.state_dict(), small.module.state_dict(), box_of(nets.SHAPE), collapsed=True
        )


@pytest.mark.parametrize("name", (*nets.NETS, "resnet20"))
def test_no_image_changes_the_logits_by_more_than_is_certified(cases, name: str) -> None:
    dense, small, program = cases(name)
    other = edited(deepcopy(small.module).double())
    full = full_size(other.state_dict(), small.plans[0].tensors, dense.module.state_dict())
    box = input_box(dense.input)
    x = inputs(box, 3 if name == "resnet20" else 64)
    with torch.no_grad():
        before = deepcopy(dense.module).double()(x)
        seen = other(x) - before
    assert float(seen.abs().max()) > 1e-3
    for collapsed in (False, True):
        change = logit_change(program, dense.module.state_dict(), full, box, collapsed=collapsed)
        assert change.lo.shape == (1, dense.input.classes) and change.lo.dtype == torch.float64
        assert within(seen, change, before)
        margins = seen.unsqueeze(2) - seen.unsqueeze(1)
        assert float(margins.max()) <= float(margin_change(change))


def test_a_trained_resnet_changes_by_no_more_than_is_certified(cases, shared: Path) -> None:
    file = shared / "models" / "resnet20-cifar10-clean.pt"
    if not file.is_file():
        pytest.skip(f"no {file}")
    dense, small, program = cases("resnet20")
    network = architectures.architecture(RESNET20).eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    twin, tensors = deepcopy(network), small.plans[0].tensors
    surgery.cut(twin, tensors)
    full, box = full_size(twin.state_dict(), tensors, network.state_dict()), input_box(dense.input)
    x = inputs(box, 2)
    change = logit_change(program, network.state_dict(), full, box, collapsed=True)
    with torch.no_grad():
        before = network.double()(x)
        assert within(twin.double()(x) - before, change, before)


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("collapsed", [False, True])
def test_the_same_network_changes_nothing_at_all(cases, name: str, collapsed: bool) -> None:
    dense, _, program = cases(name)
    state = dense.module.state_dict()
    change = logit_change(program, state, deepcopy(state), box_of(nets.SHAPE), collapsed=collapsed)
    assert not change.lo.any() and not change.hi.any() and not margin_change(change)


@pytest.mark.parametrize("name", nets.NETS)
def test_for_one_image_alone_the_certified_change_is_the_change(cases, name: str) -> None:
    dense, _, program = cases(name)
    state = dense.module.state_dict()
    twin = edited(deepcopy(dense.module).double(), 0.3)
    x = nets.example().double()
    change = logit_change(program, state, twin.state_dict(), Interval(x, x), collapsed=False)
    with torch.no_grad():
        seen = twin(x) - deepcopy(dense.module).double()(x)
    assert within(seen, change, seen) and float(change.width.max()) < 1e-6
    assert torch.allclose(change.lo, seen, atol=1e-6) and bool((change.lo <= change.hi).all())


def test_a_change_of_the_last_layer_alone_is_certified_exactly() -> None:
    """W'x - Wx over a box is what W' - W makes of it: both ends are reached at corners."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    program, state = trace(network, torch.zeros(1, 3, 2, 2)), network.state_dict()
    twin = {
        n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
        for n, t in state.items()
    }
    change = logit_change(program, state, twin, box_of((3, 2, 2)), collapsed=False)
    weight = (twin["1.weight"].double() - state["1.weight"].double()).abs().sum(1)
    shift = twin["1.bias"].double() - state["1.bias"].double()
    assert torch.allclose(change.hi[0], shift + weight, rtol=1e-9)
    assert torch.allclose(change.lo[0], shift - weight, rtol=1e-9)


def test_a_small_edit_is_certified_tighter_than_the_ranges_of_the_logits_are_apart() -> None:
    network = nets.build("plain")
    program, state = trace(network, nets.example()), network.state_dict()
    twin = {n: t * 1.0001 if t.is_floating_point() else t for n, t in state.items()}
    wide = logit_change(
        program, state, edited(nets.build("plain"), 0.3).state_dict(), box_of(nets.SHAPE), collapsed=True
    )
    narrow = logit_change(program, state, twin, box_of(nets.SHAPE), collapsed=True)
    assert float(narrow.width.max()) < 0.01 * float(wide.width.min())


def test_units_that_no_one_reads_do_no_harm() -> None:
    """The removed unit's activation differs (its bias is gone), but its consumer has zeros there in both networks."""
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].bias.fill_(0.5)
        network[2].weight[:, 1] = 0
    program, state = trace(network, torch.zeros(1, 2)), network.state_dict()
    twin = {n: t.clone() for n, t in state.items()}
    twin["0.weight"][1], twin["0.bias"][1] = 0, 0
    change = logit_change(program, state, twin, box_of((2,)), collapsed=False)
    assert not change.lo.any() and not change.hi.any()


def test_an_operator_without_a_bound_is_named() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cumsum(self.a(x), 1))

    network = Sums()
    program, state = trace(network, torch.zeros(1, 4)), network.state_dict()
    same = logit_change(program, state, state, box_of((4,)), collapsed=True)
    assert not same.hi.any(), "nothing changes before it"
    twin = edited(deepcopy(network)).state_dict()
    with pytest.raises(Unbounded, match="cumsum can't be bounded: there is no rule for cumsum"):
        logit_change(program, state, twin, box_of((4,)), collapsed=True)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 5)), min_size=1, max_size=6),
)
def test_the_change_of_a_margin_is_the_worst_pair_of_two_different_classes(
    pairs: list[tuple[float, float]],
) -> None:
    lo = torch.tensor([[p[0] for p in pairs]], dtype=torch.float64)
    hi = lo + torch.tensor([[p[1] for p in pairs]], dtype=torch.float64)
    wanted = max(
        (float(hi[0, i] - lo[0, j]) for i in range(len(pairs)) for j in range(len(pairs)) if i != j),
        default=0.0,
    )
    assert float(margin_change(Interval(lo, hi))) == pytest.approx(wanted)


def test_an_equal_shift_of_all_logits_changes_no_margin() -> None:
    shift = torch.full((2, 5), 3.0)
    assert margin_change(Interval(shift, shift)).tolist() == [0, 0]
