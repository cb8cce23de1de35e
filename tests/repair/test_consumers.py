"""The layers that read a group, where a solved constant goes, and the least squares that solve them."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import Tensor, nn
from tracing_once import traced

from edgeprune.models import tensors
from edgeprune.records import Group
from edgeprune.repair.consumers import bias_of, consumers_of, output_scale, solve
from edgeprune.repair.input_moments import patches
from edgeprune.structure.groups import find_groups


def groups(name: str) -> tuple[nn.Module, dict[str, Group]]:
    network = nets.build(name)
    return network, {g.name: g for g in find_groups(network, nets.example()).groups}


@pytest.mark.parametrize(
    ("name", "group", "readers", "others"),
    [
        ("plain", "b.0", {"fc"}, set()),
        ("residual", "stem.0", {"one.0", "down.0"}, set()),
        ("depthwise", "up.0", {"squeeze", "project"}, set()),
        ("concat", "a.0", {"b.0", "c.0", "fc"}, set()),
        ("grouped", "a.0", set(), {"b.0"}),
        ("grouped", "b.0", {"c.0"}, set()),
        ("transposed", "a.0", set(), {"up"}),
    ],
)
def test_the_readers_of_a_group_are_told_apart(
    name: str, group: str, readers: set[str], others: set[str]
) -> None:
    network, found = groups(name)
    linear, rest = consumers_of(network, found[group])
    assert {r.path for r in linear} == readers and set(rest) == others
    assert all(r.layer is network.get_submodule(r.path) for r in linear)


def test_a_reader_knows_which_entries_of_its_patches_each_unit_owns() -> None:
    network, found = groups("plain")
    (conv,), _ = consumers_of(network, found["a.0"])
    (linear,), _ = consumers_of(network, found["b.0"])
    assert conv.features[3] == tuple(range(27, 36)) and len(conv.features) == 8
    # Behind the pooling and the flatten a channel is 4 x 4 inputs.
    assert linear.features[1] == tuple(range(16, 32)) and len(linear.features) == 12
    x = torch.zeros(1, 12, 4, 4)
    x[:, 7] = 1
    row = patches(linear.layer, x.flatten(1))[0, :-1]
    assert tuple(row.nonzero().flatten().tolist()) == linear.features[7]


def test_a_constant_goes_into_the_bias_or_into_the_batch_norm_behind() -> None:
    network, x = nets.build("residual"), nets.example(3)
    program = traced(network, x)
    for path, shift in (("one.0", torch.randn(16)), ("two", torch.randn(8)), ("fc", torch.randn(5))):
        place = bias_of(program, network, path)
        assert place.free and (place.bias is None) == (path == "one.0")
        seen: list[Tensor] = []
        end = {"one.0": "one.1", "two": "two", "fc": "fc"}[path]
        hook = network.get_submodule(end).register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        with torch.no_grad():
            network(x)
            place.add(shift)
            network(x)
            place.add(-shift)
        hook.remove()
        scale = output_scale(program, network, path) if path == "one.0" else torch.ones(len(shift))
        moved = (seen[1] - seen[0]).movedim(1, -1).reshape(-1, len(shift))
        torch.testing.assert_close(moved, (scale * shift).expand_as(moved), rtol=1e-4, atol=1e-5)


def test_a_constant_has_no_place_without_bias_and_batch_norm() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    place = bias_of(traced(network, nets.example()), network, "0")
    assert not place.free
    place.add(torch.ones(4))


class Words(nn.Module):
    """A batch-norm behind a linear layer that scales the words and not the layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.fc = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(24), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.a(x.flatten(1, 2))).flatten(1))


def test_a_batch_norm_over_words_is_no_place_for_a_layers_constant() -> None:
    network = Words().eval()
    program = traced(network, nets.example())
    assert not bias_of(program, network, "a").free
    assert torch.equal(output_scale(program, network, "a"), torch.ones(8))


def test_the_scale_of_an_output_is_that_of_the_batch_norm_behind() -> None:
    network = nets.build("plain")
    program, norm = traced(network, nets.example()), network.a[1]
    norm.weight.data[0] = -2.0
    scale = output_scale(program, network, "a.0")
    torch.testing.assert_close(scale, norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt())
    assert scale[0] > 0 and torch.equal(output_scale(program, network, "fc"), torch.ones(5))


def test_every_tensor_has_its_name() -> None:
    network = nets.build("plain")
    network.register_buffer("passing", torch.ones(2), persistent=False)
    found = tensors(network)
    assert set(found) == {*network.state_dict(), "passing"} and found["fc.weight"] is network.fc.weight


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """x: (200, F + 1), the constant last. y: (200, 3). start: (F + 1, 3). float64."""
    generator = torch.Generator().manual_seed(0)
    x, y, start = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((200, 7), (200, 3), (7, 3))
    )
    x[:, -1] = 1
    return x, y, start


def test_without_ridge_the_solution_is_that_of_least_squares(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, start = problem
    found = solve(x.T @ x, x.T @ y, start, None, constant=True, ridge=0.0)
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution, rtol=1e-9, atol=1e-9)


def test_features_that_are_not_kept_are_zero_and_the_others_make_up_for_them(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, y, start = problem
    found = solve(x.T @ x, x.T @ y, start, [4, 0, 3], constant=True, ridge=0.0)
    expected = torch.linalg.lstsq(x[:, [0, 3, 4, 6]], y).solution
    torch.testing.assert_close(found[[0, 3, 4, 6]], expected, rtol=1e-9, atol=1e-9)
    assert found[[1, 2, 5]].abs().max() == 0


def test_a_constant_that_may_not_change_is_taken_off_the_answers(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, y, start = problem
    found = solve(x.T @ x, x.T @ y, start, None, constant=False, ridge=0.0)
    expected = torch.linalg.lstsq(x[:, :-1], y - start[-1]).solution
    torch.testing.assert_close(found, torch.cat([expected, start[-1:]]), rtol=1e-9, atol=1e-9)


def test_an_endless_ridge_gives_the_start_and_still_the_best_constant(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, y, start = problem
    found = solve(x.T @ x, x.T @ y, start, None, constant=True, ridge=1e12)
    torch.testing.assert_close(found[:-1], start[:-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[-1], (y - x[:, :-1] @ start[:-1]).mean(0), rtol=1e-6, atol=1e-6)
    fixed = solve(x.T @ x, x.T @ y, start, None, constant=False, ridge=1e12)
    torch.testing.assert_close(fixed, start, rtol=1e-9, atol=1e-9)


def test_the_ridge_is_a_share_of_the_mean_square_of_the_inputs(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    """As least squares on more rows: sqrt(penalty) e_f for every input f, answered by its start."""
    x, y, start = problem
    ridge = 0.3
    penalty = (ridge * x[:, :-1].pow(2).sum() / 6).sqrt()
    more = torch.cat([penalty * torch.eye(6, dtype=torch.float64), torch.zeros(6, 1)], 1)
    expected = torch.linalg.lstsq(torch.cat([x, more]), torch.cat([y, penalty * start[:-1]])).solution
    found = solve(x.T @ x, x.T @ y, start, None, constant=True, ridge=ridge)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_moments_that_rounding_made_indefinite_are_solved_all_the_same() -> None:
    moments = torch.diag(torch.tensor([4.0, -0.5, 1.0], dtype=torch.float64))
    moments[0, 2] = moments[2, 0] = 1.0
    start, cross = torch.ones(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    found = solve(moments, cross, start, None, constant=True, ridge=0.0)
    torch.testing.assert_close(moments @ found, cross, rtol=1e-9, atol=1e-9)


def test_inputs_that_are_always_zero_keep_their_weights(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, start = problem
    x[:, 2] = 0
    found = solve(x.T @ x, x.T @ y, start, None, constant=True, ridge=1e-6)
    torch.testing.assert_close(found[2], start[2])
    nothing = torch.zeros_like(x)
    nothing[:, -1] = 1
    alone = solve(nothing.T @ nothing, nothing.T @ y, start, None, constant=True, ridge=0.1)
    torch.testing.assert_close(alone, torch.cat([start[:-1], y.mean(0)[None]]))
