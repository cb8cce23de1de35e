"""The optimizer of a recipe, its learning rate at every step, and the seeds from which all chance comes."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from edgeprune.choices import OPTIMIZERS
from edgeprune.errors import ModelError, UsageError
from edgeprune.quantities import suggest
from edgeprune.recipe import TuneTable

MOMENTUM = 0.9
WARM_UP_SHARE = 0.05


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def optimizer_of(module: nn.Module, table: TuneTable) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay for kernels and matrices, not for biases and normalization.

    Raises:
        UsageError: another word for `table.optimizer`.
        ModelError: no parameter asks for a gradient.
    """
    decayed = [p for p in trained(module) if p.ndim > 1]
    plain = [p for p in trained(module) if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": table.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if not decayed and not plain:
        raise ModelError(
            "the network has no parameter that can be trained", "set requires_grad on its parameters"
        )
    if table.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=table.lr, momentum=MOMENTUM, nesterov=True)
    if table.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=table.lr)
    found = f"tune.optimizer = {table.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
    raise UsageError(found, suggest(table.optimizer, OPTIMIZERS))


def momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """What an optimizer remembers of a parameter's gradients.

    Returns:
        Like the parameter: SGD's momentum buffer itself, of AdamW m / (sqrt(v) + 1e-8) without correction of the
        bias; zeros before the first step and for a parameter that the optimizer does not train.
    """
    state = optimizer.state.get(parameter, {})
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        return buffer
    if "exp_avg" in state:
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    return torch.zeros_like(parameter)


def share_of_lr(step: int, total: int) -> float:
    """Linear warm-up to 1 over the first steps, then half a cosine down to 0; `step` counts from 0."""
    warm = max(1, round(WARM_UP_SHARE * total))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2


def seed_of(*parts: object) -> int:
    """A seed that depends on every part (whole numbers and words), and on nothing else."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def chance(*parts: object) -> torch.Generator:
    """A generator on the CPU, so that every device gets the same numbers, with `seed_of` the parts."""
    return torch.Generator().manual_seed(seed_of(*parts))
