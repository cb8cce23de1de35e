"""Adversarial images by projected gradient steps, in an Linf or L2 ball; pixels are in [0, 1]."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import ModelError, UsageError
from edgeprune.models import full, logits, modes
from edgeprune.quantities import check_choice
from edgeprune.recipe import NORMS

# An FGSM step of 1.25 eps from a random point (Wong et al. 2020); steps of PGD that add up to 2.5 eps, so that any
# point of the ball can be reached from any other (Madry et al. 2018).
FGSM_REACH = 1.25
PGD_REACH = 2.5
# Standard deviation of the noise at which TRADES starts; at the image itself its gradient is 0.
TRADES_NOISE = 0.001


@dataclass(frozen=True)
class Ball:
    """Every image within `eps` (in units of pixels in [0, 1]) of a given one in `norm`, "Linf" or "L2"."""

    norm: str
    eps: float

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UsageError(f"eps = {self.eps} must be finite and more than 0", "for example 8/255")

    def project(self, found: Tensor, x: Tensor) -> Tensor:
        """The nearest images in the ball around `x`, clipped to [0, 1]: still in the ball, as `x` is in [0, 1]."""
        if self.norm == "Linf":
            return torch.clamp(found, x - self.eps, x + self.eps).clamp(0, 1)
        change = found - x
        shrink = (self.eps / _length(change).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
        return (x + change * shrink).clamp(0, 1)

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Uniformly random points of the balls around `x`, clipped to [0, 1]."""
        if self.norm == "Linf":
            noise = 2 * torch.rand(x.shape, generator=generator) - 1
        else:
            noise = torch.randn(x.shape, generator=generator)
            radius = torch.rand(len(x), generator=generator) ** (1 / max(1, math.prod(x.shape[1:])))
            noise = _direction(noise) * radius.view(-1, *[1] * (x.ndim - 1))
        return self.project(x + self.eps * noise.to(x), x)

    def step(self, found: Tensor, gradient: Tensor, size: float) -> Tensor:
        """The step of length `size` in the norm that raises a linear loss most; NaN in a gradient counts as 0."""
        usable = torch.nan_to_num(gradient, nan=0.0)
        return found + size * (usable.sign() if self.norm == "Linf" else _direction(usable))


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Summed over the images, so that no image's gradient depends on how many others there are."""
    return functional.cross_entropy(output, y, reduction="sum")


@contextmanager
def crafting(module: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients for its parameters; both are restored."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with modes(None, module):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def pgd(  # noqa: PLR0913
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int,
    step: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018); a `step` of 0 is 2.5 eps / steps.

    Modes of all layers, `requires_grad` of all parameters and what is in `.grad` are restored, also when the network
    fails. All random numbers come from the generator; without one the start is `x` itself.

    Returns:
        Like `x`, in the ball and in [0, 1], detached.
    """
    x = x.detach()
    start = x if generator is None else ball.start(x, generator)
    size = step or PGD_REACH * ball.eps / max(1, steps)
    with crafting(module):
        return _climb(lambda at: cross_entropy(full(logits(module, at)), y), start, x, ball, steps, size)


def trades(
    module: nn.Module, x: Tensor, ball: Ball, *, steps: int, step: float, generator: torch.Generator
) -> Tensor:
    """Ascent on KL(softmax(f(x)) || softmax(f(x'))) from x' = x + 0.001 N(0, 1); otherwise as `pgd`.

    The inner problem of TRADES (Zhang et al. 2019, algorithm 1).
    """
    x = x.detach()
    noise = torch.randn(x.shape, generator=generator).to(x)
    with crafting(module):
        clean = functional.log_softmax(full(logits(module, x)), dim=1)

        def divergence(at: Tensor) -> Tensor:
            moved = functional.log_softmax(full(logits(module, at)), dim=1)
            return functional.kl_div(moved, clean, reduction="sum", log_target=True)

        return _climb(divergence, ball.project(x + TRADES_NOISE * noise, x), x, ball, steps, step)


def _climb(
    loss: Callable[[Tensor], Tensor], found: Tensor, x: Tensor, ball: Ball, steps: int, step: float
) -> Tensor:
    for _ in range(steps):
        found = ball.project(ball.step(found, _gradient(loss, found), step), x)
    return found


def _gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        value = loss(point)
    found = torch.autograd.grad(value, point, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise ModelError(
            "the attack finds no gradient: the network's output does not depend on its input",
            "look for detach(), no_grad() or argmax in its forward, or train with --objective natural",
        )
    return found


def _direction(change: Tensor) -> Tensor:
    finite = torch.nan_to_num(change)
    largest = finite.abs().amax(dim=tuple(range(1, change.ndim)), keepdim=True)
    scaled = finite / torch.where(largest > 0, largest, torch.ones_like(largest))
    return scaled / _length(scaled).clamp_min(torch.finfo(change.dtype).tiny)


def _length(change: Tensor) -> Tensor:
    return torch.linalg.vector_norm(change, dim=tuple(range(1, change.ndim)), keepdim=True)
