"""How many images an attack takes at a time: as many as the memory holds, and no more than pay."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.nn.calling import logits

MOST = 256
# What one batch may take of the memory: so much, and a quarter of what is free.
BUDGET_BYTES = 2 * 2**30
SHARE = 0.25
# Beside the layers' outputs, their gradients and what an attack keeps of each image.
TIMES = 3


def batch_size(network: nn.Module | None, x: Tensor) -> int:
    """A power of two from 1 to 256.

    Args:
        network: whose gradients will be had, or None. x: one image (1, C, H, W) on its device.

    Raises:
        ModelError: the network fails on the image.
    """
    if network is None:
        return MOST
    budget = min(BUDGET_BYTES, SHARE * _free_bytes(x.device))
    fits = budget / max(1, TIMES * _outputs_bytes(network, x))
    return 1 << max(0, min(MOST, int(fits)).bit_length() - 1)


def _outputs_bytes(network: nn.Module, x: Tensor) -> int:
    """Of the outputs of all innermost layers for one image."""
    total = x.numel() * x.element_size()

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    hooks = [
        layer.register_forward_hook(count)
        for layer in network.modules()
        if next(layer.children(), None) is None
    ]
    try:
        with torch.no_grad():
            logits(network, x)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # a system that does not say
        return float(BUDGET_BYTES)
