"""The accuracy of a trained ResNet-20 at one measured latency, whichever way its channels were shared out.

The uniform cut comes first, because it knows few steps. The two others have one budget: what it takes and a bit more,
as a budget is not to be passed and they end below it. Each is tuned in the same way, and at the end the files that
would ship are timed in turn in one session.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import latency_networks
import torch
from latency_cases import THOROUGH, Case, case, material, ours, seconds, write
from torch import Tensor

from edgeprune.data import collection
from edgeprune.measure import evaluate
from edgeprune.models import costs
from edgeprune.models.bundle import deployed, from_module
from edgeprune.prune.latency_search import AIM
from edgeprune.recipe.schema import DataTable, PruneTable, TuneTable
from edgeprune.records import Bundle
from edgeprune.train import tune

UNIFORM, TABLE, MACS = "uniform", "by the table", "by multiply-accumulates"
WAYS = {
    UNIFORM: PruneTable(method="taylor", allocation="uniform"),
    TABLE: PruneTable(method="taylor"),
    MACS: PruneTable(method="taylor"),
}


def share_right(network: Bundle, images: Tensor, labels: Tensor) -> float:
    """The share of images that a network gets right."""
    module = deployed(network).eval()
    with torch.no_grad():
        answers = torch.cat([module(x) for x in images.split(256)])
    return float((answers.argmax(1) == labels).double().mean())


def trained(given: argparse.Namespace, folder: Path) -> tuple[Case, collection.Data]:
    """The trained network with its latency table, and its images."""
    network = latency_networks.resnet20()
    network.load_state_dict(torch.load(given.weights, weights_only=True))
    bundle = from_module(network.eval(), torch.rand(1, 3, 32, 32))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    bundle = replace(bundle, input=replace(bundle.input, mean=mean, std=std))
    images = collection.open_data(DataTable(path=given.data), bundle.input, 0)
    return case("ResNet-20, trained", bundle, costs.normalized_example(bundle.input, 0), folder), images


def row(
    given: argparse.Namespace, trained: tuple[Case, collection.Data], how: tuple[str, float, int], file: Path
) -> None:
    """Cut to a share of the time, tune, read; the network goes to the file and what was read into one beside it."""
    (it, images), (way, share, seed) = trained, how
    assert images.train is not None
    seen = collection.calibration_images(images, "default")
    labels = images.train.labels[collection.calibration_indices(images.train.labels, "default")]
    more: dict[str, Any] = {"images": seen, "labels": labels}
    if way == MACS:
        more["latency_model"] = None
    small = ours(it, share, WAYS[way], material(it, seed, **more))
    time = seconds({"dense": it.network.file, "cut": write(small, it.bundle, file)}, THOROUGH)
    torch.set_num_threads(given.threads)
    tuned, _ = tune.run(
        replace(it.bundle, module=small), images, TuneTable(epochs=given.epochs), calibration="default",
        teacher=it.bundle, seed=seed, scratch=file.with_suffix(".tune"),
    )  # fmt: skip
    reading = evaluate.of_network(tuned, images.held_out, way)
    torch.set_num_threads(1)
    write(tuned.module, it.bundle, file)
    found = {
        "time": time["cut"] / time["dense"],
        "macs": costs.total_macs(small, it.image) / costs.total_macs(it.bundle.module, it.image),
        "accuracy": reading.value,
        "calibration": share_right(tuned, seen, labels),
    }
    file.with_suffix(".json").write_text(json.dumps(found))


def accuracies(given: argparse.Namespace, folder: Path) -> list[str]:
    """The rows of a table; what is in the folder is not done again."""
    here = trained(given, folder)
    files: dict[tuple[str, int], Path] = {}
    for seed in range(given.seeds):
        share = given.budget
        for way in WAYS:
            file = folder / f"accuracy-{given.budget:g}-{given.epochs}-{seed}-{way.replace(' ', '-')}.onnx"
            if not file.with_suffix(".json").exists():
                row(given, here, (way, share, seed), file)
            files[way, seed] = file
            if way == UNIFORM:
                share = json.loads(file.with_suffix(".json").read_text())["time"] / AIM
    named = {f"{way} {seed}": file for (way, seed), file in files.items()}
    times = seconds({"dense": here[0].network.file, **named}, THOROUGH)
    out = [
        "",
        "| channels shared out | time of dense | multiply-accumulates | accuracy | of calibration images |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        rows = [json.loads(files[way, s].with_suffix(".json").read_text()) for s in range(given.seeds)]
        columns = [[100 * r[c] for r in rows] for c in ("macs", "accuracy", "calibration")]
        columns.insert(0, [100 * times[f"{way} {s}"] / times["dense"] for s in range(given.seeds)])
        out.append(" | ".join((f"| {way}", *(_cell(c, i) for i, c in enumerate(columns)))) + " |")
    return out


def _cell(values: list[float], place: int) -> str:
    """The mean and, of more than one, each."""
    digits = 1 if place < 2 else 2
    each = ", ".join(f"{v:.{digits}f}" for v in values)
    return f"{statistics.mean(values):.{digits}f} %" + (f" ({each})" if len(values) > 1 else "")
