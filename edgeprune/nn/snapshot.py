"""What a method knows between two trainings, in one file that is whole or absent."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgeprune.codec import replace_file
from edgeprune.nn import team
from edgeprune.nn.checkpoint import BROKEN


def save(path: Path, key: str, state: Mapping[str, Any], *, alone: bool = False) -> None:
    """Write a state over the one before; a process that is killed meanwhile leaves the one before.

    Args:
        key: tells to which work it belongs. state: tensors, numbers, texts, and lists and dicts of them.
        alone: of a team only this process is at work, the others don't call this.

    Raises:
        WorkdirError: the file can't be written.
    """
    if alone or team.rank() == 0:
        with replace_file(path) as file:
            torch.save({"key": key, "state": dict(state)}, file)
    if not alone:
        team.wait()


def load(path: Path, key: str, *, alone: bool = False) -> dict[str, Any] | None:
    """What `save` left for the same key; None when there is none, or it is broken. Of a team, process 0 reads."""
    content = b""
    if (alone or team.rank() == 0) and path.is_file():
        content = path.read_bytes()
    content = content if alone else team.tell(content)
    try:
        found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        return found["state"] if found["key"] == key else None
    except BROKEN:
        # The work starts again then, and ends the same.
        return None
