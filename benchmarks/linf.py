"""Attacks in the maximum norm for the benchmarks, FGSM and PGD, on networks that take pixels in [0, 1].

Goodfellow, Shlens and Szegedy 2015, equation in section 4; Madry et al. 2018, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def fgsm(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """One step of eps along the sign of the gradient: images (N, C, H, W) in [0, 1]."""
    return _project(x + eps * _gradient(network, x, y).sign(), x, eps)


def pgd(  # noqa: PLR0913
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    step: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Steps along the sign of the gradient, each projected onto the ball, from a random point in it.

    Args:
        network: pixels (N, C, H, W) -> logits, in eval mode. x: float32 in [0, 1]. y: int64 (N,).
        eps, step: in pixels. generator: draws the start.
    """
    found = _project(x + eps * (2 * torch.rand(x.shape, generator=generator) - 1), x, eps)
    for _ in range(steps):
        found = _project(found + step * _gradient(network, found, y).sign(), x, eps)
    return found


def right(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """bool (N,): which images get their label."""
    with torch.no_grad():
        return network(x).argmax(1) == y


def _gradient(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    loss = functional.cross_entropy(network(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def _project(found: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(found, x - eps), x + eps).clamp(0, 1)
