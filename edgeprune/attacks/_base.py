"""The contract of an attack, which perturbs images so that a model misclassifies them; one file per attack."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Generator, Tensor, nn

from edgeprune.errors import EdgepruneError, ModelError, UsageError
from edgeprune.models import Advance, AttackResult, Logits, as_logits, folded, on_replicas, wrong
from edgeprune.train import Ball, crafting

# AutoAttack's standard evaluation (Croce and Hein 2020), in its order; the members' defaults are its parameters.
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# Of a pixel in [0, 1] that was computed in float32.
ROUNDING = 1e-6
# Images on which a faster network must give the model's outputs.
EXAMPLES = 2

# A network of torch, or anything that gives logits (N, K) for pixels (N, C, H, W).
Model = nn.Module | Logits


@dataclass(frozen=True)
class Inputs:
    """What an attack starts from: images x (N, C, H, W) in [0, 1] that the model assigns to their classes y (N,).

    A network is in evaluation mode and its parameters have no gradients. advance: takes the number of finished images.
    """

    model: Model
    x: Tensor
    y: Tensor
    ball: Ball
    generator: Generator
    advance: Advance


class Attack(ABC):
    """A way to perturb images. Members are frozen dataclasses whose fields are their options.

    gradients: whether it needs them; then the model must be a network of torch.
    """

    gradients: ClassVar[bool]

    @final
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        generator: Generator,
        advance: Advance | None = None,
    ) -> AttackResult:
        """Images that are wrong where `broken`, else unchanged; `queries` leaves out the first and the last check."""
        if self.gradients and not isinstance(model, nn.Module):
            raise UsageError(
                f"{type(self).__name__} needs gradients, and {type(model).__name__} is no network of torch",
                "give the network that the file was made from, or take an attack without gradients: square",
            )
        _check(x, y)
        images, queries = x.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        progress = _Progress(advance, len(x))
        if not len(x):
            return AttackResult(images, torch.zeros_like(queries, dtype=torch.bool), queries)
        logits = as_logits(model)
        with _prepared(model, x) as faster:
            broken = self._misclassified(logits, x, y)
            rows = (~broken).nonzero().squeeze(1)
            progress(len(x) - len(rows))
            for attacked in (faster, model) if faster is not model else (model,):
                if not len(rows):
                    break
                given = Inputs(attacked, x[rows], y[rows], ball, generator, progress)
                found, more = self.perturb(given)
                found, queries[rows] = self._projected(found, x[rows], ball), queries[rows] + more
                out, again = self._verdicts(logits, attacked, found, y[rows])
                broken[rows[out]], images[rows[out]] = True, found[out]
                rows = rows[again]
        progress(len(x) - progress.done)
        return AttackResult(images, broken, queries)

    @abstractmethod
    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Return the perturbed images and how many queries each of them took, int64 (N,)."""

    def _misclassified(self, logits: Logits, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            output = logits(x)
        if output.shape[1] < 2:
            raise ModelError(
                f"the model has {output.shape[1]} logit, and a single class can't be misclassified"
            )
        if int(y.min()) < 0 or int(y.max()) >= output.shape[1]:
            raise UsageError(
                f"labels reach from {int(y.min())} to {int(y.max())}, and the model has {output.shape[1]} classes",
                "give images of the classes that the model was trained on",
            )
        return wrong(output, y)

    def _verdicts(self, logits: Logits, attacked: Model, found: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which images the model misclassifies; and which only its faster form does, by rounding: bool (n,) each."""
        with torch.no_grad():
            out = wrong(logits(found), y)
            if not isinstance(attacked, nn.Module) or out.all():
                return out, torch.zeros_like(out)
            return out, ~out & wrong(as_logits(attacked)(found), y)

    def _projected(self, found: Tensor, x: Tensor, ball: Ball) -> Tensor:
        if found.shape != x.shape:
            raise EdgepruneError(
                f"{type(self).__name__} returned images {tuple(found.shape)} for {tuple(x.shape)}"
            )
        return ball.project(torch.where(found.isfinite(), found.detach().to(x), x), x)


class _Progress:
    """Reports at most as many finished images as there are."""

    def __init__(self, advance: Advance | None, most: int) -> None:
        self.advance, self.most, self.done = advance, most, 0

    def __call__(self, images: int) -> None:
        images = min(images, self.most - self.done)
        self.done += images
        if self.advance is not None and images:
            self.advance(images)


@contextmanager
def _prepared(model: Model, x: Tensor) -> Iterator[Model]:
    """Of a network a faster one with the same outputs, on all threads; anything else as it is."""
    if not isinstance(model, nn.Module):
        yield model
        return
    with crafting(model), on_replicas(folded(model, x[:EXAMPLES]), x) as faster:
        yield faster


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 4 or x.dtype != torch.float32:
        raise UsageError(
            f"images are {x.dtype} {tuple(x.shape)}", "accepted: float32 (N, C, H, W), pixels in [0, 1]"
        )
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise UsageError(f"labels are {y.dtype} {tuple(y.shape)}", f"accepted: int64 ({len(x)},)")
    if len(x) and not bool(((x >= -ROUNDING) & (x <= 1 + ROUNDING)).all()):
        raise UsageError(
            f"pixels reach from {float(x.min()):.4g} to {float(x.max()):.4g}",
            "accepted: [0, 1]; divide by 255, and leave the normalization to the model (--mean, --std)",
        )
