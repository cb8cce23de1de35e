"""Queries of a classifier: its logits, whether they are wrong, and the gradient of a loss by the pixels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models import inference
from edgeprune.models.inference import full
from edgeprune.models.replicas import Replicas

# On the processor so many images at a time go through an attempt: their activations stay in its caches.
ROWS = 32

Logits = Callable[[Tensor], Tensor]
Advance = Callable[[int], None]
# Attempts get the rows of the images that still stand.
Attempt = Callable[[Tensor], "AttackResult"]


@dataclass(frozen=True)
class AttackResult:
    """The result of an attempt.

    images: float (N, C, H, W), the best it found. broken: bool (N,). queries: int64 (N,), images that were queried.
    """

    images: Tensor
    broken: Tensor
    queries: Tensor


def as_logits(model: nn.Module | Logits) -> Logits:
    """The classifier as a function whose output is (N, K) and at least float32; gradients pass where they did."""

    def query(x: Tensor) -> Tensor:
        if isinstance(model, nn.Module):
            return full(inference.logits(model, x))
        output = model(x)
        if output.ndim != 2 or len(output) != len(x):
            raise ModelError(
                f"the output of the model for a batch {tuple(x.shape)} is {tuple(output.shape)}, not logits (N, K)"
            )
        return full(output)

    return query


def wrong(output: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is another class's: bool (N,). Logits with NaN are wrong.

    Of equal logits the first counts, as in every accuracy.
    """
    return (output.argmax(1) != y) | output.isnan().any(1)


def loss_and_gradient(
    query: Logits, at: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, the losses and their gradients by the images.

    A network that is cut off from its input has the gradient 0: an evaluation goes on and says so, where training
    against such an attack has to stop.
    """
    # An evaluation may run where gradients are switched off; a clone of what was made in inference mode can have them.
    with torch.inference_mode(False), torch.enable_grad():
        point = (at.clone() if at.is_inference() else at.detach()).requires_grad_()
        output = query(point)
        losses = loss(output)
        found = None
        if losses.requires_grad:
            found = torch.autograd.grad(losses.sum(), point, allow_unused=True)[0]
    return output.detach(), losses.detach(), torch.zeros_like(at) if found is None else found


def sequentially(x: Tensor, attempts: Iterable[Attempt], advance: Advance) -> tuple[Tensor, Tensor]:
    """One attempt after another, each on the images that still stand."""
    images = x.clone()
    queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    standing = torch.arange(len(x), device=x.device)
    for attempt in attempts:
        if not len(standing):
            break
        tried = attempt(standing)
        images[standing] = tried.images
        queries[standing] += tried.queries
        advance(int(tried.broken.sum()))
        standing = standing[~tried.broken]
    advance(len(standing))
    return images, queries


def in_parallel(
    model: nn.Module | Logits, rows: Tensor, attempt: Callable[[nn.Module | Logits, Tensor], AttackResult]
) -> AttackResult:
    """An attempt in which no image depends on another one and no chance is drawn, on every replica of a network.

    Each replica works on its images to the end, some at a time, without waiting for another.
    """
    if not isinstance(model, Replicas) or model.count(len(rows)) < 2:
        return attempt(model, rows)
    count = model.count(len(rows))
    # Neighbours are often of one class and alike hard: they are dealt out.
    places = [torch.arange(start, len(rows), count, device=rows.device) for start in range(count)]

    def some_at_a_time(one: nn.Module, mine: Tensor) -> AttackResult:
        return _joined([attempt(one, part) for part in mine.tensor_split(-(-len(mine) // ROWS))])

    found = _joined(model.each([rows[place] for place in places], some_at_a_time))
    back = torch.cat(places).argsort()
    return AttackResult(found.images[back], found.broken[back], found.queries[back])


def _joined(tried: Sequence[AttackResult]) -> AttackResult:
    return AttackResult(
        torch.cat([one.images for one in tried]),
        torch.cat([one.broken for one in tried]),
        torch.cat([one.queries for one in tried]),
    )


def by_image(numbers: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1), to be multiplied with `like`."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def lengths(change: Tensor, norm: str) -> Tensor:
    """How long each image's change is in "Linf" or "L2": (N,)."""
    dims = tuple(range(1, change.ndim))
    return change.abs().amax(dims) if norm == "Linf" else torch.linalg.vector_norm(change, dim=dims)
