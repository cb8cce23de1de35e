"""Adversarial images: closed forms on linear networks, what they must keep to, and what they must leave as it was."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import Answers, Small, same, weights
from nets import NETS, build, example
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.models.inference import logits
from edgeprune.quantities import eps_of
from edgeprune.train.adversarial import FGSM_REACH, Ball, crafting, cross_entropy, pgd, trades

NORMS = ("Linf", "L2")
# Of adding and subtracting pixels in float32.
ROUNDING = 1e-6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fgsm(
    module: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator | None = None
) -> Tensor:
    """One step of eps from `x` itself, or of 1.25 eps from a random point (Wong et al. 2020)."""
    step = ball.eps if generator is None else FGSM_REACH * ball.eps
    return pgd(module, x, y, ball, steps=1, step=step, generator=generator)


class Linear(nn.Module):
    """Two classes with the logits (0, w x): of an image of class 0 the loss rises along w."""

    def __init__(self, w: Tensor) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(score), score], 1)


def length(change: Tensor, norm: str) -> Tensor:
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def flags(module: nn.Module) -> list[tuple[str, bool]]:
    modes = [(name, layer.training) for name, layer in module.named_modules()]
    return modes + [(name, parameter.requires_grad) for name, parameter in module.named_parameters()]


def half_frozen(seed: int = 0) -> Small:
    """A network whose layers differ in mode and whose parameters differ in requires_grad."""
    network = Small(seed).train()
    network.bn2.eval()
    network.stem.weight.requires_grad_(False)
    return network


# Closed forms


def test_fgsm_on_a_linear_network_adds_eps_times_the_sign_and_clamps() -> None:
    w = torch.tensor([2.0, -0.5, 0.0, 1e-3, -3.0, 4.0])
    x = torch.tensor([0.5, 0.5, 0.5, 0.99, 0.01, 1.0]).view(1, 1, 2, 3)
    zeros, ones = torch.tensor([0]), torch.tensor([1])
    up, down = (x + 0.031 * w.sign().view_as(x)).clamp(0, 1), (x - 0.031 * w.sign().view_as(x)).clamp(0, 1)
    assert torch.allclose(fgsm(Linear(w), x, zeros, Ball("Linf", 0.031)), up, atol=1e-7)
    assert torch.allclose(fgsm(Linear(w), x, ones, Ball("Linf", 0.031)), down, atol=1e-7)


def test_pgd_on_a_linear_network_walks_to_the_fgsm_point_and_stays() -> None:
    network, x, y = Linear(torch.ones(4)), torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    walk = [float(pgd(network, x, y, Ball("Linf", 0.031), steps=k, step=0.01).max()) for k in range(1, 8)]
    assert walk == pytest.approx([0.51, 0.52, 0.53, 0.531, 0.531, 0.531, 0.531], abs=1e-6)
    last = pgd(network, x, y, Ball("Linf", 0.031), steps=4, step=0.01)
    assert torch.equal(last, fgsm(network, x, y, Ball("Linf", 0.031)))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_pgd_in_l2_on_a_linear_network_goes_eps_along_the_weights(steps: int) -> None:
    w = torch.randn(12, generator=seeded(0))
    x = torch.rand(5, 3, 2, 2, generator=seeded(1)) * 0.4 + 0.3
    far = x + 0.1 * (w / w.norm()).view(1, 3, 2, 2)
    found = pgd(Linear(w), x, torch.zeros(5, dtype=torch.int64), Ball("L2", 0.1), steps=steps)
    assert torch.allclose(found, far, atol=1e-6)
    assert length(found - x, "L2").tolist() == pytest.approx([0.1] * 5, rel=1e-5)
    back = fgsm(Linear(w), x, torch.ones(5, dtype=torch.int64), Ball("L2", 0.1))
    assert torch.allclose(back, 2 * x - far, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_from_every_random_start_linf_pgd_reaches_the_worst_corner(seed: int) -> None:
    w = torch.randn(12, generator=seeded(9))
    x, y = torch.rand(4, 3, 2, 2, generator=seeded(8)), torch.tensor([0, 1, 0, 1])
    corner = (x + 0.1 * (w.sign().view(1, 3, 2, 2) * (1 - 2 * y).view(4, 1, 1, 1))).clamp(0, 1)
    found = pgd(Linear(w), x, y, Ball("Linf", 0.1), steps=7, generator=seeded(seed))
    assert torch.allclose(found, corner, atol=1e-6)


def test_a_step_in_l2_does_not_depend_on_the_size_of_the_gradient() -> None:
    ball, x = Ball("L2", 1.0), torch.zeros(4, 1, 1, 2)
    direction = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    scale = torch.tensor([1.0, 1e-30, 1e30, 0.0]).view(4, 1, 1, 1)
    moved = ball.step(x, direction * scale, 0.5).flatten(1)
    assert torch.allclose(moved, torch.tensor([[0.3, 0.4]] * 3 + [[0.0, 0.0]]))


# Properties


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(NORMS),
    eps=st.floats(1e-3, 3.0),
    steps=st.integers(0, 4),
    reach=st.floats(0.01, 10.0),
    random_start=st.booleans(),
)
def test_attacked_images_are_in_the_ball_and_are_images(
    seed: int, norm: str, eps: float, steps: int, reach: float, random_start: bool
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    chance = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=chance))
    x = torch.rand(4, 3, 2, 2, generator=chance).mul(1.4).sub(0.2).clamp(0, 1)
    y = torch.randint(0, 3, (4,), generator=chance)
    ball, generator = Ball(norm, eps), chance if random_start else None
    for found in (
        pgd(network, x, y, ball, steps=steps, step=reach * eps, generator=generator),
        trades(network, x, ball, steps=steps, step=reach * eps, generator=chance),
        fgsm(network, x, y, ball, generator=generator),
        ball.start(x, chance),
    ):
        assert float(length(found - x, norm).max()) <= eps + ROUNDING
        assert float(found.min()) >= 0 and float(found.max()) <= 1
        assert not found.requires_grad and found.shape == x.shape


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), norm=st.sampled_from(NORMS), eps=st.floats(0.01, 1.0))
def test_projecting_keeps_what_is_inside_and_finds_the_nearest_of_what_is_outside(
    seed: int, norm: str, eps: float
) -> None:
    chance, ball = seeded(seed), Ball(norm, eps)
    x = torch.full((6, 1, 2, 2), 0.5)
    inside = x + 0.99 * (ball.start(x, chance) - x)
    assert torch.allclose(ball.project(inside, x), inside, atol=ROUNDING)
    outside = x + torch.randn(6, 1, 2, 2, generator=chance)
    nearest = ball.project(outside, x)
    assert torch.allclose(ball.project(nearest, x), nearest, atol=ROUNDING)
    if eps < 0.5:  # the walls of [0, 1] are farther away, so the ball alone decides
        others = ball.start(x.repeat(50, 1, 1, 1), chance).view(50, 6, 4)
        gaps = (others - outside.view(1, 6, 4)).norm(dim=2)
        assert bool(((nearest - outside).flatten(1).norm(dim=1) <= gaps.min(0).values + 1e-5).all())


def test_random_starts_fill_the_ball_evenly_and_come_from_the_generator_alone() -> None:
    x = torch.full((4000, 1, 1, 3), 0.5)
    before = torch.get_rng_state()
    cube = (Ball("Linf", 0.1).start(x, seeded(0)) - x).flatten(1) / 0.1
    # Of a point spread evenly in a ball of d dimensions, (distance / radius)^d is even in [0, 1].
    shares = length(Ball("L2", 0.1).start(x, seeded(0)) - x, "L2") / 0.1
    assert torch.equal(torch.get_rng_state(), before)
    # Standard errors: 0.577 / sqrt(12000) = 0.005 and 0.289 / sqrt(4000) = 0.0046; five of them are allowed.
    assert float(cube.mean()) == pytest.approx(0, abs=0.026) and float(cube.std()) == pytest.approx(
        0.577, abs=0.02
    )
    assert float((shares**3).mean()) == pytest.approx(0.5, abs=0.023)
    assert torch.equal(Ball("L2", 0.1).start(x, seeded(0)), Ball("L2", 0.1).start(x, seeded(0)))
    assert not torch.equal(Ball("L2", 0.1).start(x, seeded(0)), Ball("L2", 0.1).start(x, seeded(1)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_attacks_raise_the_loss_of_every_network_and_of_each_image_by_itself(name: str, norm: str) -> None:
    network, x, y = build(name), example(6), torch.tensor([0, 1, 2, 3, 4, 0])
    ball = Ball(norm, 0.02 if norm == "Linf" else 0.15)
    found = pgd(network, x, y, ball, steps=5)
    losses = [
        nn.functional.cross_entropy(logits(network, seen).detach(), y, reduction="none")
        for seen in (x, fgsm(network, x, y, ball), found)
    ]
    assert bool((losses[0] < losses[2]).all())
    assert float(losses[2].sum()) >= 0.98 * float(losses[1].sum())
    alone = torch.cat([pgd(network, x[i : i + 1], y[i : i + 1], ball, steps=5) for i in range(6)])
    # Kernels of other batch sizes round differently, and a sign may flip where a gradient is all but 0.
    assert float(((alone - found).abs() < 1e-4).float().mean()) > 0.98


@pytest.mark.parametrize("norm", NORMS)
def test_the_attack_of_trades_moves_the_answers_apart(norm: str) -> None:
    network, x = build("plain"), example(6)
    ball = Ball(norm, 0.05 if norm == "Linf" else 0.5)
    found = trades(network, x, ball, steps=7, step=ball.eps / 3, generator=seeded(0))
    start = trades(network, x, ball, steps=0, step=1.0, generator=seeded(0))
    assert 0 < float((start - x).abs().max()) < 0.006
    assert float((start - x).std()) == pytest.approx(0.001, rel=0.1)
    network.double()
    clean = torch.log_softmax(network(x.double()), 1).detach()

    def apart(seen: Tensor) -> Tensor:
        return (clean.exp() * (clean - torch.log_softmax(network(seen.double()), 1).detach())).sum(1)

    assert bool((apart(found) > 20 * apart(ball.start(x, seeded(1)))).all())
    assert bool((apart(found) > 10_000 * apart(start)).all())


def test_one_step_of_trades_follows_the_gradient_of_its_divergence() -> None:
    """KL(p || q), not KL(q || p): their gradients point elsewhere as soon as there are three classes."""
    network, x, ball = build("plain").double(), example(3).double(), Ball("L2", 1.0)
    network.fc.weight.data.mul_(300)  # type: ignore[union-attr]
    start = trades(network, x, ball, steps=0, step=1.0, generator=seeded(0)).requires_grad_()
    p, q = torch.softmax(network(x), 1).detach(), torch.softmax(network(start), 1)
    (gradient,) = torch.autograd.grad((p * (p / q).log()).sum(), start)
    wanted = start.detach() + 0.01 * gradient / gradient.flatten(1).norm(dim=1).view(3, 1, 1, 1)
    found = trades(network, x, ball, steps=1, step=0.01, generator=seeded(0))
    assert torch.allclose(found, wanted.clamp(0, 1), atol=1e-8)


def test_the_loss_of_an_attack_is_summed() -> None:
    assert float(cross_entropy(torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64))) == pytest.approx(
        6 * math.log(4)
    )


# What is left as it was


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "trades"])
@pytest.mark.parametrize("name", NETS)
def test_modes_statistics_flags_and_gradients_are_left_as_they_were(name: str, attack: str) -> None:
    network, x, y = build(name).train(), example(3), torch.tensor([0, 1, 2])
    first, *rest = network.parameters()
    first.requires_grad_(False)
    rest[0].grad = torch.full_like(rest[0], 7.0)
    next(iter(network.children())).eval()
    before, state, rng = flags(network), weights(network), torch.get_rng_state()
    given_x = x.clone()
    ball = Ball("Linf", 0.03)
    if attack == "fgsm":
        fgsm(network, x, y, ball, generator=seeded(0))
    elif attack == "pgd":
        pgd(network, x, y, ball, steps=2, generator=seeded(0))
    else:
        trades(network, x, ball, steps=2, step=0.01, generator=seeded(0))
    assert flags(network) == before and same(weights(network), state)
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, given_x)
    assert torch.equal(rest[0].grad, torch.full_like(rest[0], 7.0))
    assert all(parameter.grad is None for parameter in [first, *rest[1:]])


def test_the_attack_looks_at_the_network_in_evaluation_mode() -> None:
    network, x, y = half_frozen(), torch.rand(4, 3, 8, 8, generator=seeded(0)), torch.tensor([0, 1, 0, 1])
    evaluating = Small(0).eval()
    for seen in (network, evaluating):
        found = pgd(seen, x, y, Ball("L2", 0.5), steps=3, generator=seeded(1))
        assert torch.equal(found, pgd(evaluating, x, y, Ball("L2", 0.5), steps=3, generator=seeded(1)))


def test_modes_and_flags_are_restored_after_a_failure() -> None:
    network = half_frozen()
    before = flags(network)

    with pytest.raises(ZeroDivisionError), crafting(network):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        raise ZeroDivisionError
    assert flags(network) == before
    with pytest.raises(ModelError, match=r"batch \(2, 5, 8, 8\) in evaluation mode"):
        pgd(network, torch.rand(2, 5, 8, 8), torch.tensor([0, 1]), Ball("Linf", 0.1), steps=1)
    assert flags(network) == before
    with pytest.raises(ModelError, match=r"batch \(2, 5, 8, 8\) in evaluation mode"):
        trades(network, torch.rand(2, 5, 8, 8), Ball("Linf", 0.1), steps=1, step=0.1, generator=seeded(0))
    with pytest.raises(KeyboardInterrupt), crafting(network):
        raise KeyboardInterrupt
    assert flags(network) == before


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_not_a_number_counts_as_zero(norm: str) -> None:
    class Root(nn.Module):
        """Each image's first pixel under a root: at 0 its slope is infinite, and infinity times 0 is NaN."""

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            score = (flat[:, :1] * 0).sqrt().sum(1) + flat[:, 1:].sum(1)
            return torch.stack([torch.zeros_like(score), score], 1)

    x = torch.full((2, 1, 1, 3), 0.5)
    found = fgsm(Root(), x, torch.tensor([0, 0]), Ball(norm, 0.1)).flatten(1)
    side = 0.1 if norm == "Linf" else 0.1 / math.sqrt(2)
    assert torch.allclose(found, torch.tensor([[0.5, 0.5 + side, 0.5 + side]] * 2))
    broken = Linear(torch.full((3,), math.nan))
    assert torch.equal(pgd(broken, x, torch.tensor([0, 1]), Ball(norm, 0.1), steps=3), x)
    infinite = Ball(norm, 1.0).step(x, torch.tensor([math.inf, 1.0, -math.inf]).expand_as(x), 0.1)
    assert bool(infinite.isfinite().all())


def test_attacks_work_where_gradients_are_switched_off_and_keep_the_layout() -> None:
    network, y = build("plain"), torch.tensor([0, 1])
    x = example(2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = pgd(network, x, y, Ball("Linf", 0.03), steps=2, generator=seeded(0))
        l2 = pgd(network, x, y, Ball("L2", 0.3), steps=2, generator=seeded(0))
    assert found.stride() == l2.stride() == x.stride()
    assert torch.equal(found, pgd(network, x, y, Ball("Linf", 0.03), steps=2, generator=seeded(0)))


def test_after_an_attack_in_mixed_precision_gradients_still_reach_the_weights() -> None:
    network, x, y = Small().train(), torch.rand(4, 3, 8, 8, generator=seeded(0)), torch.tensor([0, 1, 0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trades(network, x, Ball("Linf", 0.03), steps=2, step=0.01, generator=seeded(0))
        loss = cross_entropy(network(found).float(), y)
    loss.backward()
    assert found.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_images_that_ask_for_a_gradient_get_none_and_the_result_is_cut_off() -> None:
    network, x, y = build("plain"), example(2).requires_grad_(), torch.tensor([0, 1])
    for found in (
        pgd(network, x, y, Ball("L2", 0.3), steps=0),
        fgsm(network, x, y, Ball("Linf", 0.03)),
        trades(network, x, Ball("Linf", 0.03), steps=1, step=0.01, generator=seeded(0)),
    ):
        assert not found.requires_grad and x.requires_grad and x.grad is None


# Refusals


def test_a_network_that_hides_its_gradient_is_an_error() -> None:
    for hidden in (lambda x: x.detach().flatten(1)[:, :2], lambda x: torch.zeros(2, 2, requires_grad=True)):
        with pytest.raises(ModelError, match="no gradient") as caught:
            fgsm(Answers(hidden), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), Ball("Linf", 0.1))
        assert "detach" in caught.value.hint


def test_a_radius_is_read_from_text() -> None:
    assert eps_of("8/255", "Linf") == 8 / 255
    assert eps_of(" 0.03 ", "L2") == 0.03
    assert eps_of("3 %", "Linf") == 0.03
    assert eps_of("1", "Linf") == 1
    assert eps_of("3", "L2") == 3
    assert eps_of("", "Linf") == 8 / 255
    assert eps_of("  ", "L2") == 128 / 255


@pytest.mark.parametrize(
    ("text", "norm", "found", "hint"),
    [
        ("8", "Linf", "too large for Linf", "did you mean 8/255?"),
        ("128", "L2", "too large for L2", "did you mean 128/255?"),
        ("1000", "Linf", "too large", "for example 8/255"),
        ("0", "Linf", "more than 0", "8/255"),
        ("-8/255", "Linf", "more than 0", "8/255"),
        ("8/0", "Linf", "not a finite", ""),
        ("8 px", "Linf", "not a quantity", "number"),
        ("eight", "L2", "not a quantity", "number"),
        ("8/255", "l2", "not one of Linf, L2", "accepted: L2, Linf"),
    ],
)
def test_a_radius_that_makes_no_sense_is_refused(text: str, norm: str, found: str, hint: str) -> None:
    with pytest.raises(UsageError, match=found) as caught:
        eps_of(text, norm)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("norm", "eps"), [("L1", 0.1), ("Linf", 0.0), ("L2", -1.0), ("Linf", math.nan), ("L2", math.inf)]
)
def test_what_is_no_ball_is_refused(norm: str, eps: float) -> None:
    with pytest.raises(UsageError):
        Ball(norm, eps)
