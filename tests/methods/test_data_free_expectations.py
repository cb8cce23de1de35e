"""Means and variances of activations from batch-norm alone, against closed forms and against samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.methods._data_free.impact import Moments, expected_activations
from edgeprune.models import tensors
from edgeprune.models.tracing import trace

Function = Callable[[Tensor, Tensor], Tensor]


class Behind(nn.Module):
    """Two convolutions with batch-norm, and what a function makes of them."""

    def __init__(self, function: Function, affine: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.n, self.m = nn.BatchNorm2d(6, affine=affine), nn.BatchNorm2d(6, affine=affine)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.n(self.a(x)), self.m(self.b(x)))


def of(*functions: Function, affine: bool = True) -> tuple[list[Moments | None], Behind]:
    """What is known of each function's value, and the network; a sine, of which nothing is known, marks the values."""
    network = Behind(
        lambda x, y: torch.cat([torch.sin(f(x, y)).reshape(1, -1) for f in functions], 1), affine
    )
    generator = torch.Generator().manual_seed(0)
    for norm in (network.n, network.m):
        if norm.affine:
            norm.weight.data = torch.randn(6, generator=generator)
            norm.bias.data = torch.randn(6, generator=generator)
    program = trace(network, nets.example())
    found = expected_activations(program, tensors(network))
    return [found.get(call.reads[0]) for call in program.calls if call.op == "sin"], network


def parameters(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """beta and gamma, float64."""
    return norm.bias.detach().double(), norm.weight.detach().double()


def test_a_batch_norm_puts_out_its_shift_and_its_squared_scale() -> None:
    (found,), network = of(lambda x, y: x)
    assert found is not None
    beta, gamma = parameters(network.n)
    assert torch.equal(found.mean, beta) and torch.equal(found.variance, gamma**2)


def test_a_batch_norm_without_scale_is_of_mean_zero_and_variance_one() -> None:
    (found,), _ = of(lambda x, y: x, affine=False)
    assert found is not None and found.mean.tolist() == [0] * 6 and found.variance.tolist() == [1] * 6


def test_a_rectified_gaussian_has_the_moments_of_the_closed_form() -> None:
    """E relu(z) = beta Phi(beta / |gamma|) + |gamma| phi(beta / |gamma|), and E relu(z)^2 likewise."""
    (found,), network = of(lambda x, y: torch.relu(x))
    assert found is not None
    beta, gamma = parameters(network.n)
    deviation = gamma.abs()
    density = torch.exp(-((beta / deviation) ** 2) / 2) / math.sqrt(2 * math.pi)
    below = (1 + torch.erf(beta / deviation / math.sqrt(2))) / 2
    mean = beta * below + deviation * density
    square = (beta**2 + deviation**2) * below + beta * deviation * density
    # The quadrature has a corner to get round: 33 nodes leave about a hundredth of a deviation.
    assert ((found.mean - mean).abs() < 0.02 * deviation).all()
    assert ((found.variance - (square - mean**2)).abs() < 0.03 * deviation**2).all()


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sigmoid, torch.tanh, functional.silu, functional.gelu, functional.softplus, functional.mish,
    functional.relu6, functional.hardswish, functional.hardsigmoid, functional.elu, functional.selu,
    lambda x: functional.leaky_relu(x, 0.3), lambda x: functional.hardtanh(x, -0.5, 2.0),
    lambda x: torch.clamp(x, -0.25, 0.75), lambda x: functional.gelu(x, approximate="tanh"),
)  # fmt: skip


def test_activations_have_the_moments_of_samples() -> None:
    found, network = of(*(lambda x, y, f=f: f(x) for f in ACTIVATIONS))
    beta, gamma = parameters(network.n)
    generator = torch.Generator().manual_seed(1)
    z = beta + gamma.abs() * torch.randn(100_000, 6, generator=generator, dtype=torch.float64)
    assert len(found) == len(ACTIVATIONS)
    for number, (moments, function) in enumerate(zip(found, ACTIVATIONS, strict=True)):
        assert moments is not None, number
        values = function(z)
        # Several deviations of the mean of so many samples, and a quadrature that sees corners as above.
        assert ((moments.mean - values.mean(0)).abs() < 0.03 * gamma.abs()).all(), number
        assert ((moments.variance - values.var(0)).abs() < 0.04 * gamma**2).all(), number


def test_what_is_the_same_for_all_entries_passes() -> None:
    (plain, *others), _ = of(
        lambda x, y: torch.relu(x),
        lambda x, y: functional.dropout(torch.relu(x), 0.5, False),
        lambda x, y: functional.max_pool2d(torch.relu(x), 2),
        lambda x, y: functional.avg_pool2d(torch.relu(x), 2),
        lambda x, y: functional.adaptive_avg_pool2d(torch.relu(x), 1),
        lambda x, y: torch.relu(x).mean((2, 3)),
        lambda x, y: torch.relu(x).mean((-1, -2), keepdim=True),
    )
    assert plain is not None and len(others) == 6
    for found in others:
        assert found is not None
        assert torch.equal(found.mean, plain.mean) and torch.equal(found.variance, plain.variance)


def test_a_flatten_repeats_a_channel_for_each_of_its_positions() -> None:
    (plain, found), _ = of(lambda x, y: x, lambda x, y: functional.avg_pool2d(x, 4).flatten(1))
    assert found is not None and plain is not None and found.mean.shape == (24,)
    assert torch.equal(found.variance, plain.variance.repeat_interleave(4))
    # As the network's own flatten orders them.
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 2, 2).flatten(1)
    assert torch.equal(found.mean, plain.mean[x[0].long()])


def test_a_sum_adds_and_a_concatenation_joins() -> None:
    found, _ = of(
        lambda x, y: x,
        lambda x, y: torch.relu(y),
        lambda x, y: x + torch.relu(y),
        lambda x, y: torch.cat([torch.relu(y), x], 1),
        lambda x, y: torch.cat([torch.relu(y), x], -3),
    )
    first, second, total, joined, again = (m for m in found if m is not None)
    assert torch.equal(total.mean, first.mean + second.mean)
    assert torch.equal(total.variance, first.variance + second.variance)
    assert torch.equal(joined.mean, torch.cat([second.mean, first.mean]))
    assert torch.equal(joined.variance, torch.cat([second.variance, first.variance]))
    assert torch.equal(again.mean, joined.mean)


def test_nothing_is_said_of_what_is_not_known() -> None:
    functions: tuple[Function, ...] = (
        lambda x, y: torch.cumsum(x, 1),
        lambda x, y: torch.relu(torch.softmax(x, 1)),
        lambda x, y: x * y,
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: x + 1.0,
        lambda x, y: torch.cat([x, y], 2),
        lambda x, y: torch.cat([x, torch.cos(y)], 1),
        lambda x, y: x.permute(0, 2, 3, 1).flatten(1),
        lambda x, y: x.mean(1),
        lambda x, y: x.mean((1, 2, 3), keepdim=True),
        lambda x, y: x.mean(),
        lambda x, y: functional.max_pool2d(x, 2, return_indices=True)[0],
    )
    assert of(*functions)[0] == [None] * len(functions)


def test_without_batch_norm_nothing_is_known() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    assert expected_activations(trace(network, nets.example()), tensors(network)) == {}


def test_a_batch_norm_that_remembers_nothing_says_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    assert expected_activations(trace(network.eval(), nets.example()), tensors(network)) == {}


@pytest.mark.parametrize("name", nets.NETS)
def test_what_is_known_has_a_value_for_each_channel(name: str) -> None:
    network = nets.build(name)
    program = trace(network, nets.example())
    found = expected_activations(program, tensors(network))
    for call in program.calls:
        if call.name in found:
            moments = found[call.name]
            assert len(moments.mean) == len(moments.variance) == call.shape[1]
            assert moments.mean.dtype == torch.float64 and bool((moments.variance >= 0).all())
    norms = [c.name for c in program.calls if c.op == "batch_norm"]
    assert set(norms) <= set(found)


def test_a_network_whose_statistics_fit_its_data_has_the_expected_means() -> None:
    """Batch-norm fitted to Gaussian channels: the expectation of what the next layer gets is what it gets."""
    network = nets.build("plain")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    with torch.no_grad():
        answers = network.a[0](x)
        network.a[1].running_mean.copy_(answers.mean((0, 2, 3)))
        network.a[1].running_var.copy_(answers.var((0, 2, 3)))
        real = torch.relu(network.a[1](answers))
    program = trace(network, nets.example())
    found = expected_activations(program, tensors(network))[program.readers("b.0.weight")[0].reads[0]]
    torch.testing.assert_close(found.mean, real.mean((0, 2, 3)).double(), rtol=0.05, atol=0.03)
