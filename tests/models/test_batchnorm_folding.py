"""Folding batch-norms away and answering in lanes: the same answers and gradients, and nothing where it is unsound."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from edgeprune.attacks._base import Attack
from edgeprune.attacks.apgd_ce import ApgdCe
from edgeprune.attacks.apgd_t import ApgdT
from edgeprune.attacks.fab_t import FabT
from edgeprune.errors import ModelError
from edgeprune.models import queries
from edgeprune.models.batchnorm_folding import folded
from edgeprune.models.replicas import LEAST_IMAGES, Replicas, on_replicas
from edgeprune.models.tracing import trace
from edgeprune.train.adversarial import Ball


def norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


def gradient(network: nn.Module, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    return torch.autograd.grad(functional.cross_entropy(network(point), torch.zeros(len(x)).long()), point)[0]


# Folding


@pytest.mark.parametrize(
    "name", ["plain", "residual", "depthwise", "grouped", "concat", "split", "transposed"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_batch_norm_is_left_and_answers_and_gradients_stay(name: str, layout: torch.memory_format) -> None:
    network, x = nets.build(name), nets.example(5).contiguous(memory_format=layout)
    before = deepcopy(network.state_dict())
    quick = folded(network, x[:2])
    assert norms(quick) == 0 < norms(network)
    assert torch.allclose(quick(x), network(x), atol=1e-6)
    assert torch.allclose(gradient(quick, x), gradient(network, x), atol=1e-6)
    assert not quick.training and not any(p.requires_grad for p in quick.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters()), "the network itself is not touched"


@pytest.mark.parametrize("name", sorted(nets.NETS))
def test_what_is_folded_is_what_the_traced_program_says(name: str) -> None:
    """A convolution or linear layer whose output goes into a batch-norm and nowhere else."""
    network = nets.build(name)
    program = trace(network, nets.example())
    made = {call.name: call for call in program.calls}
    pairs = 0
    for call in program.calls:
        if call.op == "batch_norm" and call.reads[0] in made:
            maker = made[call.reads[0]]
            pairs += maker.op in ("conv2d", "linear") and program.users(maker.name) == (call,)
    assert norms(network) - norms(folded(network, nets.example(2))) == pairs


class Both(nn.Module):
    """What the convolution makes is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return (self.bn(made) + 0.1 * made).mean((2, 3))


class Twice(nn.Module):
    """One convolution in front of two batch-norms."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn(self.conv(x)) + self.other(self.conv(x.flip(3)))).mean((2, 3))


class Tied(nn.Module):
    """The kernel is used elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn(self.conv(x)) + functional.conv2d(x, self.conv.weight, padding=1)).mean((2, 3))


class After(nn.Module):
    """The batch-norm comes behind the nonlinearity."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.relu(self.conv(x))).mean((2, 3))


class Sequence(nn.Module):
    """Batch-norm of the places of a sequence, which is not what the linear layer makes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.places(
            self.linear(x.flatten(1, 2).unsqueeze(0).expand(1, -1, -1).reshape(len(x), 24, 8))
        ).sum(2)


def equipped(network: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.conv, network.bn, network.other = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(6),
        )
        network.linear, network.places = nn.Linear(8, 5), nn.BatchNorm1d(24)
        for layer in (network.bn, network.other, network.places):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.running_mean)
    return network.eval()


def parametrized(network: nn.Module) -> nn.Module:
    parametrizations.weight_norm(network.a[0])
    return network


def hooked(network: nn.Module) -> nn.Module:
    network.a[0].register_forward_hook(lambda layer, given, made: made * 2)
    return network


def of_batches(network: nn.Module) -> nn.Module:
    network.a[1].running_mean = network.a[1].running_var = None
    return network


@pytest.mark.parametrize("kind", [Both, Twice, Tied, After, Sequence])
def test_where_it_would_be_unsound_the_network_itself_is_used(kind: type[nn.Module]) -> None:
    network = equipped(kind())
    assert folded(network, nets.example(2)) is network


@pytest.mark.parametrize("change", [parametrized, hooked, of_batches])
def test_layers_that_do_more_than_their_class_says_are_left_alone(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    network = change(nets.build("plain"))
    quick = folded(network, nets.example(2))
    assert norms(quick) == 1 and isinstance(quick.a[1], nn.BatchNorm2d)
    assert torch.allclose(quick(nets.example(3)), network(nets.example(3)), atol=1e-6)


def test_a_network_that_fails_or_has_nothing_to_fold_is_given_back() -> None:
    plain = nets.build("groupnormed")
    assert folded(plain, nets.example(2)) is plain
    network = nets.build("plain")
    assert folded(network, torch.rand(2, 4, 8, 8)) is network


def test_a_copy_that_answers_otherwise_is_not_used() -> None:
    """A network that looks at its own weights."""

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.build("plain")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (1 + isinstance(self.net.a[1], nn.BatchNorm2d))

    network = Watching().eval()
    assert folded(network, nets.example(2)) is network


# Lanes


@pytest.mark.parametrize("count", [2 * LEAST_IMAGES, 9, 16])
def test_lanes_give_the_same_answers_and_gradients(count: int, two_threads: None) -> None:
    network, x = nets.build("residual").requires_grad_(False), nets.example(count)
    with on_replicas(network, x) as lanes:
        assert isinstance(lanes, Replicas) and torch.get_num_threads() == 1
        with torch.no_grad():
            assert torch.allclose(lanes(x), network(x), atol=1e-6)
        assert torch.allclose(gradient(lanes, x), gradient(network, x), atol=1e-7)
        assert not lanes(x).requires_grad
    assert torch.get_num_threads() == 2


def test_one_thread_a_few_images_or_a_network_that_can_not_be_copied_have_no_lanes(
    two_threads: None,
) -> None:
    network, x = nets.build("plain"), nets.example(2 * LEAST_IMAGES)
    with on_replicas(network, x[1:]) as same:
        assert same is network

    class Whole(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("not this one")

    whole = Whole()
    with on_replicas(whole, x) as same:
        assert same is whole
    torch.set_num_threads(1)
    with on_replicas(network, x) as same:
        assert same is network


def test_lanes_share_tensors_and_not_what_layers_keep_while_they_run(two_threads: None) -> None:
    class Keeping(nn.Module):
        """Keeps its input between two layers: two threads in one would mix them up."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            torch.rand(200, 200) @ torch.rand(200, 200)
            return self.fc(self.kept.flatten(1))

    network, x = Keeping().requires_grad_(False), nets.example(32)
    with on_replicas(network, x) as lanes:
        assert len({id(copy) for copy in lanes.copies}) == 2
        assert len({id(copy.fc.weight) for copy in lanes.copies}) == 1
        for _ in range(20):
            assert torch.allclose(lanes(x), network(x), atol=1e-6)


def test_what_fails_in_a_lane_fails_outside_of_it_and_the_threads_are_given_back(two_threads: None) -> None:
    x = nets.example(16)
    with pytest.raises(ModelError, match="fails on a batch"), on_replicas(nets.build("plain"), x) as lanes:
        lanes(torch.rand(16, 4, 8, 8))
    assert torch.get_num_threads() == 2


def test_a_network_cut_off_from_its_input_has_the_gradient_zero(two_threads: None) -> None:
    network, x = nets.build("plain").requires_grad_(False), nets.example(16)

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x.detach())

    with on_replicas(Cut(), x) as lanes:
        assert gradient(lanes, x).abs().max() == 0


@pytest.mark.parametrize("attack", [ApgdCe(steps=8), ApgdT(steps=8, classes=2), FabT(steps=4, classes=2)])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.01), ("L2", 0.1)])
def test_attacks_find_the_same_on_one_thread_and_on_two(
    attack: Attack, norm: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "ROWS", 5)  # so that a lane takes its images in three goes
    network, x = nets.build("residual"), nets.example(24, seed=5)
    with torch.no_grad():
        network.fc.bias -= network(x).mean(0)  # so that every class is some image's
        y = network(x).argmax(1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(attack(network, x, y, Ball(norm, eps), torch.Generator().manual_seed(0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].broken, found[1].broken) and found[0].broken.any()
    assert torch.equal(found[0].queries, found[1].queries)
    assert torch.allclose(found[0].images, found[1].images, atol=1e-4)
