"""Run in a fresh process: rebuild a compressed network from what a run leaves behind, and answer images.

The program reads a request from stdin and writes its answer to a file; `export/stage.py` starts it. It
proves that the files are enough: nothing of the process that made them is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edgeprune import serialization
from edgeprune.errors import EdgepruneError, ModelError, NoRoom, told_shortage
from edgeprune.models import deployed, load_bundle, load_tensors, rebuild, save_tensors
from edgeprune.recipe import ModelTable
from edgeprune.records import Bundle, InputSpec, Plan, Source

PLAN, WEIGHTS, PROGRAM = "plan.json", "weights.safetensors", "model.pt2"


@dataclass(frozen=True)
class PlanFile:
    """`plan.json`: all that a pruned network needs besides its weights.

    edgeprune: the version that wrote it. source: where the original network came from. input: what it eats.
    plans: the cuts, to be replayed on the original in this order. labels: names of the classes.
    """

    edgeprune: str
    source: Source
    input: InputSpec
    plans: tuple[Plan, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What to rebuild and ask.

    folder: where the run's files are. pixels: a safetensors file with `pixels` (M, C, H, W). out: where to
    answer. ways: "plan" (original architecture, plan and weights), "program" (model.pt2 alone).
    """

    folder: str
    pixels: str
    out: str
    ways: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Answer:
    """What went wrong: way -> (message, hint). The others' logits (M, K) are in the file `out`."""

    errors: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def main() -> int:
    """Serve one request; 0 when an answer was written."""
    request = serialization.from_json(Request, json.load(sys.stdin))
    # Importing a user's architecture may print; nobody reads it here.
    try:
        with redirect_stdout(sys.stderr), told_shortage():
            serialization.write(Path(request.out + ".json"), _serve(request))
    except NoRoom as error:
        sys.stderr.write(" ".join(error.message.split()) + "\n")
        return NoRoom.exit_code
    return 0


def _serve(request: Request) -> Answer:
    torch.set_num_threads(request.threads)
    pixels = load_tensors(Path(request.pixels))["pixels"]
    logits: dict[str, Tensor] = {}
    errors: dict[str, tuple[str, str]] = {}
    for way in request.ways:
        try:
            logits[way] = _answer(_WAYS[way](Path(request.folder)), pixels)
        except NoRoom:
            raise
        except EdgepruneError as error:
            errors[way] = (error.message, error.hint)
    save_tensors(logits, Path(request.out))
    return Answer(errors)


def _from_plan(folder: Path) -> Bundle:
    known = serialization.read(PlanFile, folder / PLAN, ModelError)
    return rebuild(known.source, known.input, known.plans, folder / WEIGHTS)


def _from_program(folder: Path) -> Bundle:
    return load_bundle(ModelTable(path=str(folder / PROGRAM)))


_WAYS: Mapping[str, Callable[[Path], Bundle]] = {"plan": _from_plan, "program": _from_program}


def _answer(bundle: Bundle, pixels: Tensor) -> Tensor:
    network = deployed(bundle).eval()
    with torch.no_grad():
        return torch.cat([network(image[None]) for image in pixels])


if __name__ == "__main__":
    sys.exit(main())
