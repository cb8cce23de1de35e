"""What stages leave on disk between them: masks, groups, plans and weights; no pickles."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgeprune import codec
from edgeprune.errors import WorkdirError
from edgeprune.nn import surgery
from edgeprune.records import Bundle, Plan


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as safetensors; tensors that share memory are written each."""
    with codec.replace_file(path) as file:
        file.write(save({name: t.detach().clone().contiguous() for name, t in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        WorkdirError: not a readable safetensors file.
    """
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise WorkdirError(
            f"{path} can't be read: {error}", f"delete {path.parent}; it will be made again"
        ) from error


def save_network(network: nn.Module, path: Path) -> None:
    """Write a network's state dict as safetensors."""
    save_tensors(dict(network.state_dict()), path)


def restore(dense: Bundle, plans: tuple[Plan, ...], weights: Path) -> Bundle:
    """The smaller bundle again: the dense network cut as the plans say, with the weights of a file.

    Args:
        dense: not changed. plans: those that were made after `dense` was loaded.
    """
    network = deepcopy(dense.module)
    for plan in plans:
        surgery.replay(network, plan)
    network.load_state_dict(load_tensors(weights), strict=True)
    return replace(dense, module=network.eval(), plans=(*dense.plans, *plans))


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON."""
    codec.write(path, plan)


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        WorkdirError: not a readable plan.
    """
    return codec.read(Plan, path, WorkdirError)


def masks_to_tensors(channels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Boolean masks as bytes, which every safetensors reader knows."""
    return {name: keep.to(torch.uint8) for name, keep in channels.items()}
