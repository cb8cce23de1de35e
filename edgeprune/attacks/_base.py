"""How to perturb an input so that the model errs: the contract of an attack; one file per attack."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Generator, Tensor, nn

from edgeprune.errors import EdgepruneError, ModelError, UsageError
from edgeprune.models import Advance, Logits, as_logits, folded, on_replicas, wrong
from edgeprune.train import Ball, crafting

# AutoAttack's standard evaluation (Croce and Hein 2020), in its order; the members' defaults are its parameters.
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# Of a pixel in [0, 1] that was computed in float32.
ROUNDING = 1e-6
# Images on which a faster network must answer as the model does.
EXAMPLES = 2

# A network of torch, or anything that gives logits (N, K) for pixels (N, C, H, W).
Model = nn.Module | Logits


@dataclass(frozen=True)
class Found:
    """What an attack found.

    images: float32 (N, C, H, W), wrong where `broken`, else as they were given. broken: bool (N,).
    queries: int64 (N,), how often the attack asked about each image, without the two looks of `__call__` itself.
    """

    images: Tensor
    broken: Tensor
    queries: Tensor


class Attack(ABC):
    """A way to perturb images. Members are frozen dataclasses whose fields are their options.

    gradients: whether it needs them; then the model is a network of torch. Others take anything that gives logits.
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
    ) -> Found:
        if self.gradients and not isinstance(model, nn.Module):
            raise UsageError(
                f"{type(self).__name__} needs gradients, and {type(model).__name__} is no network of torch",
                "give the network that the file was made from, or take an attack without gradients: square",
            )
        _check(x, y)
        images, queries = x.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        told = _Told(advance, len(x))
        if not len(x):
            return Found(images, torch.zeros_like(queries, dtype=torch.bool), queries)
        ask = as_logits(model)
        with _still(model, x) as quick:
            broken = self._first_look(ask, x, y)
            rows = (~broken).nonzero().squeeze(1)
            told(len(x) - len(rows))
            for asked in (quick, model) if quick is not model else (model,):
                if not len(rows):
                    break
                found, more = self.perturb(asked, x[rows], y[rows], ball, generator, told)
                found, queries[rows] = self._lawful(found, x[rows], ball), queries[rows] + more
                out, early = self._last_look(ask, asked, found, y[rows])
                broken[rows[out]], images[rows[out]] = True, found[out]
                rows = rows[early]
        told(len(x) - told.sum)
        return Found(images, broken, queries)

    @abstractmethod
    def perturb(
        self, model: Model, x: Tensor, y: Tensor, ball: Ball, generator: Generator, advance: Advance
    ) -> tuple[Tensor, Tensor]:
        """Perturb images that the model has right.

        A network comes in evaluation mode and without gradients of its parameters.
        """

    def _first_look(self, ask: Logits, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            answer = ask(x)
        if answer.shape[1] < 2:
            raise ModelError(
                f"the model answers with {answer.shape[1]} logit, and one class can't be mistaken"
            )
        if int(y.min()) < 0 or int(y.max()) >= answer.shape[1]:
            raise UsageError(
                f"labels reach from {int(y.min())} to {int(y.max())}, and the model answers {answer.shape[1]} classes",
                "give images of the classes that the model was trained on",
            )
        return wrong(answer, y)

    def _last_look(self, ask: Logits, asked: Model, found: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which images the model has wrong; and which only what stood for it has, by rounding: bool (n,) each."""
        with torch.no_grad():
            out = wrong(ask(found), y)
            stood_in = isinstance(asked, nn.Module) and not out.all()
            return out, ~out & wrong(as_logits(asked)(found), y) if stood_in else torch.zeros_like(out)

    def _lawful(self, found: Tensor, x: Tensor, ball: Ball) -> Tensor:
        if found.shape != x.shape:
            raise EdgepruneError(
                f"{type(self).__name__} gave images {tuple(found.shape)} for {tuple(x.shape)}"
            )
        return ball.project(torch.where(found.isfinite(), found.detach().to(x), x), x)


class _Told:
    """Passes on how many images are done, at most as many as there are, and remembers it."""

    def __init__(self, advance: Advance | None, most: int) -> None:
        self.advance, self.most, self.sum = advance, most, 0

    def __call__(self, images: int) -> None:
        images = min(images, self.most - self.sum)
        self.sum += images
        if self.advance is not None and images:
            self.advance(images)


@contextmanager
def _still(model: Model, x: Tensor) -> Iterator[Model]:
    """What is to be asked: of a network one that answers alike and faster, on all threads; anything else as it is."""
    if not isinstance(model, nn.Module):
        yield model
        return
    with crafting(model), on_replicas(folded(model, x[:EXAMPLES]), x) as quick:
        yield quick


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
