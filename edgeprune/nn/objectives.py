"""What training makes small: the loss on the labels, and the distance to a teacher's answers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import UsageError
from edgeprune.nn.calling import logits
from edgeprune.recipe import OBJECTIVES

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def natural(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the labels.

    Args:
        module: pixels in [0, 1] to logits (N, K).
        x: float32 (N, C, H, W).
        y: int64 (N,), class numbers.

    Raises:
        ModelError: the network fails on the batch.
    """
    return functional.cross_entropy(logits(module, x), y)


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, y: Tensor, weight: float, temperature: float
) -> Tensor:
    """(1 - weight) CE(student, y) + weight T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Means over the images. Hinton et al. 2015; T^2 keeps the gradient's size the same at every temperature.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K), no gradient flows into them.
        y: int64 (N,), class numbers.
        weight: share of the teacher, in [0, 1].
        temperature: T > 0.
    """
    divergence = functional.kl_div(
        functional.log_softmax(student_logits / temperature, dim=1),
        functional.log_softmax(teacher_logits.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * functional.cross_entropy(student_logits, y) + weight * temperature**2 * divergence


def objective(name: str) -> Objective:
    """The loss of a recipe's `tune.objective`.

    Raises:
        UsageError: no such objective, or not in this version.
    """
    if name == "natural":
        return natural
    found = "is not in this version" if name in OBJECTIVES else "is not an objective"
    raise UsageError(f"tune.objective = {name!r} {found}; accepted: natural", "leave --objective out")
