"""What every attack keeps to: its ball, the network as it was, the same for the same seed; and verdicts in full."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, build, example
from torch import Tensor, nn

from edgeprune import plugins
from edgeprune.attacks._base import STANDARD, Attack, Inputs
from edgeprune.errors import EdgepruneError, ModelError, UsageError
from edgeprune.models.queries import loss_and_gradient, wrong
from edgeprune.train.adversarial import Ball

NAMES = plugins.names("attacks")
# Small enough for a test; every part of each algorithm is met.
QUICK = {
    "fgsm": {},
    "pgd": {"steps": 6, "restarts": 2},
    "apgd-ce": {"steps": 12, "restarts": 2},
    "apgd-t": {"steps": 12, "classes": 3},
    "fab-t": {"steps": 8, "classes": 3},
    "square": {"queries": 60},
}
BALLS = {"Linf": Ball("Linf", 0.05), "L2": Ball("L2", 0.4)}
# Of adding and subtracting pixels in float32.
ROUNDING = 1e-6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quick(name: str) -> Attack:
    return plugins.build("attacks", name, QUICK[name])


class Blobs(nn.Module):
    """A trained classifier of bright patches, with dropout and batch-norm; gradients for all."""

    def __init__(self, classes: int) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(classes)
            self.body = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten()
            )
            self.head = nn.Linear(8 * 36, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def blobs(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (N, 1, 6, 6) in which class k is a little brighter at its own pixels."""
    generator = seeded(seed)
    y = torch.arange(count) % classes
    x = torch.rand(count, 1, 6, 6, generator=generator) * 0.6 + 0.15
    where = torch.arange(36).view(6, 6) % classes
    return (x + 0.2 * (where == y.view(-1, 1, 1, 1))).clamp(0, 1), y


@cache
def trained(classes: int = 5) -> Blobs:
    """Trained once; tests must leave it as it is, which is one of the tests."""
    network = Blobs(classes)
    x, y = blobs(300, classes, 0)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(60):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    for parameter in network.parameters():
        parameter.grad = None
    return network.eval()


def right(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of twice as many images the first that the trained network has right."""
    network, (x, y) = trained(classes), blobs(2 * count, classes, seed)
    with torch.no_grad():
        rows = (network(x).argmax(1) == y).nonzero().squeeze(1)[:count]
    assert len(rows) == count
    return x[rows], y[rows]


def length(change: Tensor, norm: str) -> Tensor:
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def survivors(network: nn.Module, images: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((~wrong(network(images), y)).sum())


class Counted:
    """A classifier that is no module, and counts the images that it is asked about."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.images, self.batches = network, 0, []

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        self.batches.append(x.clone())
        return self.network(x)


# Every attack


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_stays_in_its_ball_says_truly_what_is_broken_and_does_more_than_noise(
    name: str, norm: str
) -> None:
    network, ball = trained(), BALLS[norm]
    x, y = right(40, 5, 1)
    found = quick(name)(network, x, y, ball, seeded())
    assert found.images.shape == x.shape and found.images.dtype == torch.float32
    assert length(found.images - x, norm).max() <= ball.eps + ROUNDING
    assert found.images.min() >= 0 and found.images.max() <= 1
    with torch.no_grad():
        assert torch.equal(found.broken, network(found.images).argmax(1) != y)
    assert torch.equal(found.images[~found.broken], x[~found.broken])
    noise = min(survivors(network, ball.start(x, seeded(s)), y) for s in range(3))
    assert int((~found.broken).sum()) <= noise
    assert int(found.broken.sum()) >= 4


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_finds_the_same_and_global_chance_is_neither_used_nor_moved(
    name: str, norm: str
) -> None:
    x, y = right(12, 5, 2)
    state = torch.random.get_rng_state()
    first = quick(name)(trained(), x, y, BALLS[norm], seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    second = quick(name)(trained(), x, y, BALLS[norm], seeded(3))
    assert torch.equal(first.images, second.images) and torch.equal(first.queries, second.queries)
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("name", NAMES)
def test_modes_gradients_and_statistics_are_as_they_were_and_the_images_too(name: str) -> None:
    network = Blobs(5).train()
    network.body[1].eval()
    network.head.bias.requires_grad_(False)
    network.head.weight.grad = torch.full_like(network.head.weight, 7.0)
    before = [(n, p.requires_grad) for n, p in network.named_parameters()]
    modes = [layer.training for layer in network.modules()]
    values = {k: v.clone() for k, v in network.state_dict().items()}
    x, y = blobs(10, 5, 4)
    given = x.clone()
    quick(name)(network, x, y, BALLS["Linf"], seeded())
    assert [(n, p.requires_grad) for n, p in network.named_parameters()] == before
    assert [layer.training for layer in network.modules()] == modes
    assert all(torch.equal(v, values[k]) for k, v in network.state_dict().items())
    assert (network.head.weight.grad == 7).all() and network.body[0].weight.grad is None
    assert torch.equal(x, given)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 3])
def test_networks_of_two_and_three_classes_are_attacked(classes: int, name: str, norm: str) -> None:
    x, y = right(20, classes, 5)
    ball = Ball("Linf", 0.25) if norm == "Linf" else Ball("L2", 1.5)
    found = quick(name)(trained(classes), x, y, ball, seeded())
    assert found.broken.any()


class Flat(nn.Module):
    """Has every image right, with a gradient that is 0 (or cut off)."""

    def __init__(self, cut: bool) -> None:
        nn.Module.__init__(self)
        self.cut, self.scale = cut, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        answer = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).repeat(len(x), 1)
        return answer if self.cut else answer + self.scale * 0 * x.sum((1, 2, 3)).unsqueeze(1)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [False, True])
def test_a_network_without_slope_stands_and_nothing_crashes(name: str, norm: str, cut: bool) -> None:
    x, y = torch.rand(4, 1, 6, 6, generator=seeded()), torch.zeros(4, dtype=torch.int64)
    found = quick(name)(Flat(cut), x, y, BALLS[norm], seeded())
    assert not found.broken.any() and torch.equal(found.images, x)


class Fragile(nn.Module):
    """Answers rightly on one batch of images and NaN on all others."""

    def __init__(self, x: Tensor) -> None:
        nn.Module.__init__(self)
        self.x = x

    def forward(self, x: Tensor) -> Tensor:
        same = torch.stack([(image == self.x).flatten(1).all(1).any() for image in x])
        answer = torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0 * x.sum((1, 2, 3)).unsqueeze(1)
        return torch.where(same.unsqueeze(1), answer + x.flatten(1)[:, :4] * 0.01, torch.nan)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "fab-t"])
def test_logits_that_are_not_a_number_count_as_broken(name: str) -> None:
    x, y = torch.rand(3, 1, 4, 4, generator=seeded()), torch.zeros(3, dtype=torch.int64)
    assert wrong(torch.tensor([[torch.nan, 0.0], [1.0, torch.nan], [1.0, 0.0]]), y).tolist() == [
        True,
        True,
        False,
    ]
    assert quick(name)(Fragile(x), x, y, BALLS["Linf"], seeded()).broken.all()


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_wrong_anyway_are_broken_as_they_are_and_nothing_is_spent_on_them(name: str) -> None:
    x, y = right(12, 5, 6)
    y[::3] = (y[::3] + 1) % 5
    told: list[int] = []
    found = quick(name)(trained(), x, y, BALLS["Linf"], seeded(), told.append)
    assert found.broken[::3].all() and torch.equal(found.images[::3], x[::3])
    assert (found.queries[::3] == 0).all()
    assert sum(told) == 12 and min(told) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_the_images_is_kept_and_does_not_matter(name: str) -> None:
    network = build("plain", 3)
    x = example(6, seed=2)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = network(x).argmax(1)
    one = quick(name)(network, x, y, BALLS["Linf"], seeded())
    other = quick(name)(network, last, y, BALLS["Linf"], seeded())
    assert other.images.is_contiguous(memory_format=torch.channels_last)
    assert int((one.broken != other.broken).sum()) <= 1, "of rounding"


class Centred(nn.Module):
    """Logits less what they are on average, or random weights have one class for all images."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        nn.Module.__init__(self)
        self.network = network
        with torch.no_grad():
            self.mean = network(x).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) - self.mean


@pytest.mark.parametrize("network", NETS)
@pytest.mark.parametrize("name", ["apgd-t", "fab-t", "square"])
def test_every_kind_of_network_is_attacked(name: str, network: str) -> None:
    x = example(4, seed=1)
    module = Centred(build(network), x)
    with torch.no_grad():
        y = module(x).argmax(1)
    found = quick(name)(module, x, y, Ball("Linf", 0.3), seeded())
    assert found.broken.any()


@given(st.integers(0, 10**6), st.sampled_from(NAMES), st.sampled_from(list(BALLS)), st.floats(1e-4, 2.0))
@settings(max_examples=40, deadline=None)
def test_whatever_the_radius_pixels_stay_legal(seed: int, name: str, norm: str, eps: float) -> None:
    network, x = trained(), torch.rand(3, 1, 6, 6, generator=seeded(seed)).round(decimals=1)
    with torch.no_grad():
        y = network(x).argmax(1)
    found = quick(name)(network, x, y, Ball(norm, eps), seeded(seed))
    assert found.images.isfinite().all() and found.images.min() >= 0 and found.images.max() <= 1
    assert length(found.images - x, norm).max() <= eps * (1 + 1e-5) + ROUNDING


def test_no_images_are_no_work() -> None:
    none = torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64)
    for name in NAMES:
        found = quick(name)(trained(), *none, BALLS["Linf"], seeded())
        assert found.images.shape == (0, 1, 6, 6) and found.broken.shape == (0,)


def test_a_larger_ball_leaves_fewer_standing_and_the_largest_none() -> None:
    x, y = right(30, 5, 8)
    for name in ("pgd", "apgd-ce", "apgd-t", "fab-t"):
        left = [
            int((~quick(name)(trained(), x, y, Ball("Linf", eps), seeded()).broken).sum())
            for eps in (0.005, 0.05, 0.15, 0.6)
        ]
        assert left == sorted(left, reverse=True) and left[-1] == 0, (name, left)


# FGSM and PGD


class Linear(nn.Module):
    """Two classes with the logits (b - w x, w x - b)."""

    def __init__(self, w: Tensor, b: float) -> None:
        nn.Module.__init__(self)
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w - self.b
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_fgsm_and_pgd_on_a_linear_network_are_the_closed_form(name: str) -> None:
    w = torch.randn(16, generator=seeded(1))
    x, y = torch.rand(8, 1, 4, 4, generator=seeded(2)), torch.zeros(8, dtype=torch.int64)
    corner = (x + 0.1 * w.sign().view(1, 1, 4, 4)).clamp(0, 1)
    reached = corner.flatten(1) @ w
    # Images of class 0 are those below b; between the corners' scores some break and others stand.
    b = float(torch.maximum(x.flatten(1) @ w, reached.median()).max()) + 1e-3
    found = plugins.build("attacks", name, {})(Linear(w, b), x, y, Ball("Linf", 0.1), seeded())
    assert torch.equal(found.broken, reached > b)
    if name == "fgsm":
        assert torch.allclose(found.images[found.broken], corner[found.broken], atol=1e-6)
    beyond = plugins.build("attacks", name, {})(
        Linear(w, float(reached.min()) - 1e-3), x, y, Ball("Linf", 0.1), seeded()
    )
    assert beyond.broken.all()


def test_pgd_walks_to_the_corner_and_restarts_only_what_stands() -> None:
    w = torch.randn(16, generator=seeded(1))
    x, y = torch.rand(6, 1, 4, 4, generator=seeded(2)), torch.zeros(6, dtype=torch.int64)
    corner = (x + 0.1 * w.sign().view(1, 1, 4, 4)).clamp(0, 1)
    attack = plugins.build("attacks", "pgd", {"steps": 5, "restarts": 3})
    safe = Linear(w, float((corner.flatten(1) @ w).max()) + 1)
    images, queries = attack.perturb(Inputs(safe, x, y, Ball("Linf", 0.1), seeded(), lambda _: None))
    assert torch.allclose(images, corner, atol=1e-6)
    assert queries.tolist() == [18] * 6, "5 steps and a last look, three times"
    one = Linear(w, float((corner.flatten(1) @ w).median()))
    found = attack(one, x, y, Ball("Linf", 0.1), seeded())
    right = (x.flatten(1) @ w) <= one.b
    assert (found.queries[~found.broken] == 18).all()
    assert (found.queries[found.broken & right] <= 6).all()


def test_a_chosen_step_is_taken() -> None:
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    attack = plugins.build("attacks", "pgd", {"steps": 1, "step": 0.001})
    start = Ball("Linf", 0.1).start(x, seeded())
    given = Inputs(Linear(torch.ones(4), 9.0), x, y, Ball("Linf", 0.1), seeded(), lambda _: None)
    images, _ = attack.perturb(given)
    assert torch.allclose(images, Ball("Linf", 0.1).project(start + 0.001, x), atol=1e-7)


# What is refused


@pytest.mark.parametrize("name", [n for n in NAMES if n != "square"])
def test_an_attack_with_gradients_refuses_a_model_without(name: str) -> None:
    x, y = blobs(2, 5, 0)
    with pytest.raises(UsageError, match="needs gradients, and Counted is no network") as caught:
        quick(name)(Counted(trained()), x, y, BALLS["Linf"], seeded())
    assert "square" in caught.value.hint


def test_square_runs_on_any_function_of_images() -> None:
    x, y = right(8, 5, 3)
    counted = Counted(trained())
    found = quick("square")(counted, x, y, BALLS["Linf"], seeded())
    assert torch.equal(found.images, quick("square")(trained(), x, y, BALLS["Linf"], seeded()).images)
    assert counted.images == int(found.queries.sum()) + 2 * 8, "one look before and one behind"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.full((2, 1, 6, 6), 128.0), torch.zeros(2, dtype=torch.int64), "pixels reach from 128 to 128"),
        (torch.full((2, 1, 6, 6), -0.5), torch.zeros(2, dtype=torch.int64), "pixels reach from -0.5"),
        (torch.full((2, 1, 6, 6), torch.nan), torch.zeros(2, dtype=torch.int64), "pixels reach from nan"),
        (torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "torch.uint8"),
        (torch.zeros(2, 36), torch.zeros(2, dtype=torch.int64), r"\(2, 36\)"),
        (torch.zeros(2, 1, 6, 6), torch.zeros(3, dtype=torch.int64), r"labels are torch.int64 \(3,\)"),
        (torch.zeros(2, 1, 6, 6), torch.zeros(2), r"labels are torch.float32 \(2,\)"),
        (torch.zeros(2, 1, 6, 6), torch.tensor([0, 5]), "labels reach from 0 to 5, and the model has 5"),
        (torch.zeros(2, 1, 6, 6), torch.tensor([-1, 0]), "labels reach from -1 to 0"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quick("fgsm")(trained(), x, y, BALLS["Linf"], seeded())


def test_a_model_that_does_not_answer_with_logits_is_refused() -> None:
    x, y = blobs(2, 5, 0)
    for answer, message in (
        (torch.zeros(2), r"for a batch \(2, 1, 6, 6\) is \(2,\)"),
        (torch.zeros(3, 5), r"is \(3, 5\), not logits"),
        (torch.zeros(2, 1), "has 1 logit"),
    ):
        with pytest.raises(ModelError, match=message):
            quick("square")(lambda _, a=answer: a, x, y, BALLS["Linf"], seeded())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd", {"steps": 0}),
        ("pgd", {"restarts": 0}),
        ("pgd", {"step": -1.0}),
        ("apgd-ce", {"steps": 0}),
        ("apgd-ce", {"rho": 1.5}),
        ("apgd-t", {"classes": 0}),
        ("fab-t", {"steps": 0}),
        ("square", {"queries": 0}),
        ("square", {"first": 0.0}),
    ],
)
def test_options_that_make_no_attack_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        plugins.build("attacks", name, options)


# The contract


@dataclass(frozen=True)
class Cheat(Attack):
    """Leaves the ball, the pixels' range and the numbers; what it returns is for the base to mend."""

    gradients: ClassVar[bool] = False
    shape: tuple[int, ...] = ()

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        found = given.x + 100 * torch.tensor([1.0, -1.0]).repeat(18).view(1, 1, 6, 6)
        found[:, :, 0] = torch.nan
        return (found if not self.shape else torch.zeros(self.shape)), torch.ones_like(given.y)


def test_what_an_attack_returns_is_put_into_the_ball_and_judged_again() -> None:
    x, y = right(6, 5, 1)
    told: list[int] = []
    seen = Counted(trained())
    found = Cheat()(seen, x, y, Ball("Linf", 0.03), seeded(), told.append)
    last = seen.batches[-1]
    assert torch.equal(last[:, :, 0], x[:, :, 0]), "where it was no number, the image itself"
    assert (last - x).abs().max() <= 0.03 + ROUNDING and last.min() >= 0 and last.max() <= 1
    with torch.no_grad():
        assert torch.equal(found.broken, trained()(last).argmax(1) != y)
    assert told == [6], "what the attack did not tell, the base tells"


def test_an_attack_that_loses_images_is_a_bug() -> None:
    x, y = right(6, 5, 1)
    with pytest.raises(EdgepruneError, match=r"Cheat returned images \(2, 1, 6, 6\) for \(6, 1, 6, 6\)"):
        Cheat(shape=(2, 1, 6, 6))(trained(), x, y, BALLS["Linf"], seeded())


def test_the_standard_evaluation_is_made_of_members_with_its_own_parameters() -> None:
    members = {name: plugins.build("attacks", name, {}) for name in STANDARD}
    assert (members["apgd-ce"].steps, members["apgd-ce"].restarts, members["apgd-ce"].rho) == (100, 1, 0.75)
    assert (members["apgd-t"].steps, members["apgd-t"].classes, members["apgd-t"].rho) == (100, 9, 0.75)
    assert (members["fab-t"].steps, members["fab-t"].classes) == (100, 9)
    assert (members["square"].queries, members["square"].first, members["square"].rescale) == (
        5000,
        0.8,
        False,
    )


class Sign(nn.Module):
    """Class 1 where the pixels sum to more than a threshold."""

    def __init__(self, threshold: float) -> None:
        nn.Module.__init__(self)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1).sum(1) - self.threshold
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("name", NAMES)
def test_what_only_a_faster_stand_in_has_wrong_is_attacked_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's boundary comes before the network's: an attack on it alone would stop too early."""
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.int64)
    network, ball = Sign(8.5), BALLS["Linf"]
    alone = quick(name)(network, x, y, ball, seeded())
    monkeypatch.setattr("edgeprune.attacks._base.folded", lambda module, images: Sign(8.2))
    found = quick(name)(network, x, y, ball, seeded())
    assert alone.broken.all() and torch.equal(found.broken, alone.broken)
    assert torch.equal(wrong(network(found.images), y), found.broken)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_slope_is_found_where_gradients_are_switched_off(off: type[torch.no_grad]) -> None:
    network = Sign(8.0)
    with off():
        x = torch.full((2, 1, 4, 4), 0.5) * 1
        answer, losses, gradient = loss_and_gradient(network, x, lambda a: a[:, 1])
    assert torch.equal(gradient, torch.ones(2, 1, 4, 4)) and losses.tolist() == [0, 0]
    assert not answer.requires_grad and not losses.requires_grad
