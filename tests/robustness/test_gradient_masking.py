"""The signs of a robustness that is none: each is seen on a model made to show it, and none on a plain one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgeprune.data.collection import Split, in_memory
from edgeprune.plugins import build
from edgeprune.recipe.schema import AttackTable
from edgeprune.robustness import gradient_masking, models_under_attack, stage
from edgeprune.robustness.job import Verdicts, attack_job

EPS = 2 / 255
SIDE, CLASSES = 6, 4


class Plain(nn.Module):
    """Two layers, as smooth as networks are."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one = nn.Parameter(torch.randn(24, 3 * SIDE * SIDE, generator=generator) / 10)
        self.two = nn.Parameter(torch.randn(CLASSES, 24, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x - 0.5).flatten(1) @ self.one.T) @ self.two.T


class Behind(nn.Module):
    """Something between the plain network and who asks it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.plain, self.change = Plain(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.plain(x))


class Turned(torch.autograd.Function):
    """The same value with a gradient that points the other way."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *above: Tensor) -> Tensor:
        return -above[0]


class Wavy(nn.Module):
    """Ripples on the pixels, invisible in the answer and steeper than anything else in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x + 1e-4 * torch.sin(1e6 * x))


class Sheltered(nn.Module):
    """More than 1.2 eps away from an image its answer is the right one again."""

    def __init__(self, centres: Tensor, y: Tensor) -> None:
        super().__init__()
        self.plain, self.centres, self.y = Plain(), centres, y

    def forward(self, x: Tensor) -> Tensor:
        far = (x[:, None] - self.centres[None]).abs().flatten(2).amax(2)
        nearest = far.argmin(1)
        lift = (far.amin(1) > 1.2 * EPS)[:, None] * nn.functional.one_hot(self.y[nearest], CLASSES)
        return self.plain(x) + 1e3 * lift


def images(count: int = 48) -> Split:
    pixels = torch.randint(90, 166, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return in_memory("test", pixels.to(torch.uint8), Plain()(pixels / 255).argmax(1))


def said(
    network: nn.Module,
    tmp_path: Path,
    name: str = "pgd",
    split: Split | None = None,
    ball: tuple[str, str] = ("Linf", "2/255"),
) -> str:
    split = split or images()
    job = attack_job(AttackTable(name=name, norm=ball[0], eps=ball[1]), seed=0, data="some")
    few = {
        "pgd": {"steps": 10}, "apgd-ce": {"steps": 10}, "apgd-t": {"steps": 10, "classes": 3},
        "fab-t": {"steps": 5, "classes": 3}, "square": {"queries": 300},
    }  # fmt: skip
    job = replace(job, attacks={n: build("attacks", n, few[n]) for n in job.attacks})
    victim = models_under_attack.of_network("net", network.eval(), "s")
    found = stage.run(victim, split, job, scratch=tmp_path / name, log=lambda _: None)
    return " ".join(gradient_masking.flags(victim, split, job, found))


def test_a_plain_network_shows_none_of_them(tmp_path: Path) -> None:
    assert said(Plain(), tmp_path) == "" and said(Plain(), tmp_path, "standard") == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a + 0.01 * torch.rand_like(a), "differently each time"),
        (lambda a: (5 * a).softmax(1), "are probabilities"),
        (lambda a: 1e5 * a, "is zero or not finite on"),
        (lambda a: a.detach() + 0 * a, "is zero or not finite on"),
        (lambda a: a.detach(), "No gradient reaches"),
        (lambda a: nn.functional.one_hot(a.argmax(1), CLASSES).float(), "No gradient reaches"),
    ],
)
def test_chance_probabilities_and_gradients_that_are_not_there_are_seen(
    tmp_path: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    assert says in said(Behind(change), tmp_path)


@pytest.mark.parametrize("network", [Behind(Turned.apply), Wavy()])
def test_an_attack_that_only_asks_and_does_better_is_seen(tmp_path: Path, network: nn.Module) -> None:
    assert "queries of Square, which only asks, broke" in said(network, tmp_path)


def test_so_it_is_in_the_standard_evaluation(tmp_path: Path) -> None:
    assert "square, which only asks, broke" in said(Behind(Turned.apply), tmp_path, "standard")


@pytest.mark.parametrize("network", [Behind(Turned.apply), Behind(lambda a: a.detach() + 0 * a)])
def test_images_that_stand_when_everything_may_be_changed_are_seen(
    tmp_path: Path, network: nn.Module
) -> None:
    assert "when it may change them into any other image" in said(network, tmp_path)


def test_a_larger_ball_that_helps_the_model_is_seen(tmp_path: Path) -> None:
    split = images()
    network = Sheltered(split.take(torch.arange(len(split))), split.labels)
    assert "with twice the eps" in said(network, tmp_path, split=split)


def test_more_steps_that_help_the_model_are_seen(tmp_path: Path) -> None:
    """A gradient that turns round once the images are broken by more than a little."""

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.calls = Plain(), 0

        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                self.calls = 0
                return self.plain(x)
            self.calls += 1
            return self.plain(x) if self.calls <= 20 else Turned.apply(self.plain(x))

    found = said(Returning(), tmp_path)
    assert "more steps must not help the model" in found


def test_labels_in_another_order_are_seen(tmp_path: Path) -> None:
    assert "no better than guessing" in said(Behind(lambda a: a.roll(1, 1)), tmp_path)


def test_where_no_gradient_is_it_is_said_truly_what_was_tried_and_square_is_asked(tmp_path: Path) -> None:
    network = Behind(lambda a: a.detach())
    alone, all_of_them = said(network, tmp_path), said(network, tmp_path, "standard")
    assert "the attacks went in random directions" in alone and "queries of Square" in alone
    assert "attacks without gradients alone were used" not in alone
    assert "attacks without gradients alone were used" in all_of_them and "random" not in all_of_them


@pytest.mark.parametrize(
    ("broken", "n", "fires"), [(1, 39, False), (1, 5, False), (2, 39, False), (3, 39, True), (18, 1000, True)]
)
def test_a_few_images_that_square_broke_by_chance_are_no_sign(broken: int, n: int, fires: bool) -> None:
    """The exact interval of 2 in 39 begins at 0.6 %, of 3 in 39 at 1.6 %, of 18 in 1000 at 1.07 %."""
    job = attack_job(AttackTable(name="standard", eps="2/255"), seed=0, data="some")
    by = ("square",) * broken + ("",) * (n - broken)
    tried = dict.fromkeys(job.attacks, n)
    found = Verdicts(by, tried, tried, dict.fromkeys(job.attacks, 0.0), "white box", 8)
    victim = models_under_attack.of_network("net", Plain().eval(), "s")
    flags = gradient_masking.flags(victim, images(n), job, found)
    assert any(f"square, which only asks, broke {broken} images" in flag for flag in flags) == fires


@pytest.mark.parametrize(
    ("norm", "eps", "fires"),
    [("Linf", "0.5", True), ("Linf", "0.49", False), ("L2", "5.2", True), ("L2", "5.19", False)],
)
def test_a_radius_that_reaches_gray_from_any_image_is_said(
    tmp_path: Path, norm: str, eps: str, fires: bool
) -> None:
    """3x6x6 pixels: half the diagonal is 0.5 sqrt(108) = 5.196."""
    found = said(Plain(), tmp_path, split=images(4), ball=(norm, eps))
    assert ("may become gray all over" in found) == fires
