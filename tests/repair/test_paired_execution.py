"""Two networks side by side, call by call: they answer as they do alone, and what differs is known at each call."""

from __future__ import annotations

from copy import deepcopy

import nets
import pytest
import torch
from torch import Tensor, nn
from tracing_once import traced

from edgeprune.errors import UnsupportedModel
from edgeprune.models import surgery
from edgeprune.models.tracing import Call
from edgeprune.repair.paired_execution import Execution, check_batches, check_same_calls, run_pairwise
from edgeprune.structure.groups import find_groups


class Windows(nn.Module):
    """The quarters of an image, each an entry of a batch of its own: traced for one image, there are always four.

    And what a class token and a scale for each channel do: weights are expanded to the batch, or viewed as one image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(48, 12), nn.Linear(12, 8), nn.Linear(40, 5)
        self.token, self.scale = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale.view(1, 3, 1, 1)
        parts = x.reshape(x.shape[0], 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(4 * x.shape[0], 48)
        parts = torch.relu(self.b(torch.relu(self.a(parts)))).reshape(x.shape[0], 32)
        return self.fc(torch.cat([self.token.expand(x.shape[0], -1), parts], 1))


class Sequence(nn.Module):
    """The batch is the second dimension, and for a while in one with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x.flatten(2).permute(2, 0, 1)))
        y = torch.relu(y.reshape(64, 6 * x.shape[0]) + 0.1)
        return self.fc(y.reshape(64, x.shape[0], 6).mean(0))


def halved(network: nn.Module) -> nn.Module:
    """The network without every second channel of what can be cut."""
    small = deepcopy(network)
    groups = find_groups(network, nets.example()).groups
    masks = {g.name: torch.arange(g.channels) % 2 == 0 for g in groups}
    surgery.cut(small, surgery.removed_positions(groups, masks))
    return small


@pytest.mark.parametrize("name", nets.NETS)
def test_the_walk_gives_the_answers_of_the_networks_themselves(name: str) -> None:
    networks = [nets.build(name), halved(nets.build(name))]
    programs = [traced(n, nets.example()) for n in networks]
    check_same_calls(*programs)
    images = nets.example(5)
    assert all(check_batches(n, p, images[:2]) for n, p in zip(networks, programs, strict=True))
    dense, small = (Execution(n, p, images.split(3)) for n, p in zip(networks, programs, strict=True))
    seen: list[str] = []

    def visit(first: Call, second: Call, moved: bool) -> None:
        assert first.name in dense.values and second.name not in small.values
        assert all(len(small.values[name]) == len(dense.values[first.name]) == 2 for name in second.reads)
        reads = zip(first.reads, second.reads, strict=True)
        same = all(torch.equal(a, b) for m, n in reads for a, b in _pairs(dense.values[m], small.values[n]))
        assert moved or same
        seen.append(second.name)

    run_pairwise(dense, small, visit)
    assert seen == [c.name for c in programs[1].calls]
    for side, network in zip((dense, small), networks, strict=True):
        # Nothing is kept but the answer.
        assert set(side.values) == {side.program.output}
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(side.values[side.program.output]), network(images))


def _pairs(first: list[object], second: list[object]) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(first, second, strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]


def test_a_layer_that_is_changed_on_the_way_runs_as_changed() -> None:
    dense = nets.build("plain")
    small = halved(dense)
    expected = deepcopy(small)
    with torch.no_grad():
        expected.fc.bias.add_(3.0)
    programs = [traced(n, nets.example()) for n in (dense, small)]
    sides = [Execution(n, p, [nets.example(4)]) for n, p in zip((dense, small), programs, strict=True)]

    def visit(first: Call, second: Call, moved: bool) -> None:
        if second.op == "linear":
            assert moved
            with torch.no_grad():
                small.fc.bias.add_(3.0)

    run_pairwise(sides[0], sides[1], visit)
    with torch.no_grad():
        torch.testing.assert_close(sides[1].values[programs[1].output][0], expected(nets.example(4)))


def test_what_does_not_differ_is_run_once_and_not_said_to_have_moved() -> None:
    network = nets.build("residual")
    copy = deepcopy(network)
    with torch.no_grad():
        copy.two.weight[0] += 1
    programs = [traced(n, nets.example()) for n in (network, copy)]
    sides = [Execution(n, p, [nets.example(2)]) for n, p in zip((network, copy), programs, strict=True)]
    moved: list[str] = []
    run_pairwise(*sides, lambda first, second, yes: moved.append(second.op) if yes else None)  # type: ignore[func-returns-value]
    # All that comes behind the convolution that was changed, but not that one itself.
    assert moved == ["batch_norm", "add", "relu", "mean", "linear"]


def test_networks_of_other_calls_can_not_be_walked_side_by_side() -> None:
    plain, residual = (traced(nets.build(n), nets.example()) for n in ("plain", "residual"))
    with pytest.raises(UnsupportedModel, match="makes 9 operator calls and the compressed one 15"):
        check_same_calls(plain, residual)
    one = traced(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU()), nets.example())
    other = traced(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Sigmoid()), nets.example())
    with pytest.raises(UnsupportedModel, match="calls relu at '2' where the compressed one calls sigmoid"):
        check_same_calls(one, other)
    check_same_calls(plain, plain)


@pytest.mark.parametrize(("kind", "several"), [(Windows, True), (Sequence, False)])
def test_a_program_for_one_image_is_run_on_several_or_found_out(kind: type[nn.Module], several: bool) -> None:
    network = kind().eval()
    program = traced(network, nets.example())
    assert check_batches(network, program, nets.example(2)) == several
    # For one image at a time it is right in any case.
    side, other = (Execution(network, program, nets.example(3).split(1)) for _ in range(2))
    run_pairwise(side, other, lambda *_: None)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(side.values[program.output]), network(nets.example(3)))


def test_several_outputs_are_not_compared() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x.flatten(1))
            return y, 2 * y

    network = Two().eval()
    assert not check_batches(network, traced(network, nets.example()), nets.example(2))
