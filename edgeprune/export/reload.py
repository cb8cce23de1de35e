"""Run in a fresh process: rebuild a compressed network from the files of a run alone, and compute its logits."""

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edgeprune import serialization
from edgeprune.errors import EdgepruneError, ModelError, NoRoom, translated_os_errors
from edgeprune.models import deployed, load_bundle, load_tensors, rebuild, save_tensors
from edgeprune.recipe import ModelTable
from edgeprune.records import Bundle, InputSpec, Plan, Source

PLAN, WEIGHTS, PROGRAM = "plan.json", "weights.safetensors", "model.pt2"


@dataclass(frozen=True)
class PlanFile:
    """`plan.json`: all that a pruned network needs besides its weights.

    edgeprune: the version that wrote it. source: where the original network came from. plans: the cuts, to be replayed
    on the original in this order.
    """

    edgeprune: str
    source: Source
    input: InputSpec
    plans: tuple[Plan, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What to rebuild and run.

    folder: of the run's files. pixels: a safetensors file with `pixels` (M, C, H, W). out: where the logits go.
    ways: "plan" (original architecture, plan and weights), "program" (model.pt2 alone).
    """

    folder: str
    pixels: str
    out: str
    ways: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Response:
    """Way -> (message, hint) of what failed. The others' logits (M, K) are in the file `out`."""

    errors: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def main() -> int:
    """Serve one request from stdin; 0 when a response was written."""
    request = serialization.from_json(Request, json.load(sys.stdin))
    # Importing a user's architecture may print; nobody reads it here.
    try:
        with redirect_stdout(sys.stderr), translated_os_errors():
            serialization.write(Path(request.out + ".json"), _serve(request))
    except NoRoom as error:
        sys.stderr.write(" ".join(error.message.split()) + "\n")
        return NoRoom.exit_code
    return 0


def _serve(request: Request) -> Response:
    torch.set_num_threads(request.threads)
    pixels = load_tensors(Path(request.pixels))["pixels"]
    logits: dict[str, Tensor] = {}
    errors: dict[str, tuple[str, str]] = {}
    for way in request.ways:
        try:
            network = deployed(_rebuild(way, Path(request.folder))).eval()
            with torch.no_grad():
                logits[way] = torch.cat([network(image[None]) for image in pixels])
        except NoRoom:
            raise
        except EdgepruneError as error:
            errors[way] = (error.message, error.hint)
    save_tensors(logits, Path(request.out))
    return Response(errors)


def _rebuild(way: str, folder: Path) -> Bundle:
    if way == "program":
        return load_bundle(ModelTable(path=str(folder / PROGRAM)))
    known = serialization.read(PlanFile, folder / PLAN, ModelError)
    return rebuild(known.source, known.input, known.plans, folder / WEIGHTS)


if __name__ == "__main__":
    sys.exit(main())
