"""synthesize: make images from the network itself, to repair it and to compare it on where there is no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune import codec
from edgeprune.errors import ModelError, WorkdirError
from edgeprune.nn.bundle import deployed
from edgeprune.nn.store import load_tensors, save_tensors
from edgeprune.nn.synthesis import Synthesis, synthesize
from edgeprune.recipe import SynthesizeTable
from edgeprune.records import Bundle, InputSpec

RESULT_VERSION = 1
IMAGES, RECORD = "images.safetensors", "synthesis.json"


def run(bundle: Bundle, table: SynthesizeTable, seed: int, scratch: Path) -> Synthesis:
    """Make the images.

    Args:
        bundle: the dense network; not changed. table: how many images and steps, 0 for as many as its cost allows.
        scratch: a folder for the state on the way; an interrupted run goes on from there.

    Returns:
        Images float32 (N, C, H, W) with values in the range of the network's input, notes, and facts of how.

    Raises:
        ModelError: the network fails, or what came out are no images of its input.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    made = synthesize(
        deployed(bundle), bundle.input, images=table.images, steps=table.steps, seed=seed, scratch=scratch
    )
    _check(made.images, bundle.input)
    return made


def write(made: Synthesis, folder: Path) -> None:
    """Leave the images in a folder, and beside them how they were made."""
    save_tensors({"images": made.images}, folder / IMAGES)
    codec.write(folder / RECORD, _Record(made.notes, made.facts))


def read(folder: Path) -> Synthesis:
    """The images that `write` left.

    Raises:
        WorkdirError: the files are not readable.
    """
    record = codec.read(_Record, folder / RECORD, WorkdirError)
    return Synthesis(load_tensors(folder / IMAGES)["images"], record.notes, dict(record.facts))


@dataclass(frozen=True)
class _Record:
    notes: tuple[str, ...]
    facts: Mapping[str, Any]


def _check(images: Tensor, spec: InputSpec) -> None:
    """What everything after this relies on: the type, the shape, the range.

    Raises:
        ModelError: says which is wrong.
    """
    if images.dtype != torch.float32 or images.shape[1:] != spec.shape or not len(images):
        raise ModelError(
            f"the synthesized images are {images.dtype} {tuple(images.shape)}; the network eats float32 (N, "
            f"{', '.join(map(str, spec.shape))})"
        )
    low, high = float(images.min()), float(images.max())
    if not spec.low <= low <= high <= spec.high:  # also when one of them is no number
        raise ModelError(
            f"the synthesized images have values from {low:g} to {high:g}; the input's are from {spec.low:g} to "
            f"{spec.high:g}",
            "does the network compute NaN? prune without images: --set prune.repair=none",
        )
