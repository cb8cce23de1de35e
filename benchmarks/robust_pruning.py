"""Pruning while training, robustly: SAP, DNR and Deadwooding beside the baselines, at the same budget and epochs.

    python benchmarks/robust_pruning.py DATA [-o DIR] [--seeds 3] [--size small|resnet18|vgg16] [--parts NAMES]

DATA are images in class folders (or a tar of them) with train/ and test/. For each seed a dense network is trained
from scratch with the objective; every row starts from it and gets the same epochs with the same objective (rows that
say "scratch" start from random weights and get the epochs of both). It prints the tables of BENCHMARKS.md, mean and
standard deviation over the seeds: accuracy on the test images, and on --attack of them under FGSM and PGD-20 (8/255 in
the maximum norm, step 2/255, random start). Finished rows are found again in DIR; two run at a time, a thread each
(--jobs). --print shows what is there already, --phases how the PQ index goes. Size small is for two cores and two
hours; resnet18 and vgg16 with --images 0 --epochs 100 --objective pgd are the papers' setting and want a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cifar_networks import NETWORKS
from linf import fgsm, pgd, right
from robust_rows import Row, rows

from edgeprune.data.collection import Data, divide, in_memory, open_data
from edgeprune.models.bundle import deployed, from_module
from edgeprune.models.costs import normalized_example, total_params
from edgeprune.models.storage import load_tensors, save_network
from edgeprune.prune import cut, stage
from edgeprune.quantities import limit
from edgeprune.recipe.schema import DataTable, PruneTable, TuneTable
from edgeprune.records import Budget, Bundle, InputSpec
from edgeprune.train import evaluation, job, loop, tune

sys.path.insert(0, str(Path(__file__).resolve().parent))

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
SPEC = InputSpec((3, 32, 32), 10, MEAN, STD)
EPS, STEP, STEPS = 8 / 255, 2 / 255, 20
CALIBRATION = "small"


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    data: str
    size: str
    images: int
    epochs: int
    objective: str
    lr: float
    attack: int
    folder: str
    mixed: str


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("-o", "--output", default="runs/robust-pruning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="small", choices=sorted(NETWORKS))
    parser.add_argument("--images", type=int, default=20000, help="training images; 0 is all")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--objective", default="fgsm", choices=("natural", "fgsm", "pgd", "trades"))
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--attack", type=int, default=1000)
    parser.add_argument("--mixed", default="bf16", choices=("auto", "fp32", "bf16"), help="of training alone")
    parser.add_argument("--parts", default="", help="only parts with this in their names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="only the tables of what is finished in DIR")
    parser.add_argument(
        "--phases", action="store_true", help="only the PQ index of one SAP run without a budget"
    )
    given = parser.parse_args()
    setting = Setting(
        given.data, given.size, given.images, given.epochs, given.objective, given.lr, given.attack, given.output,
        given.mixed,
    )  # fmt: skip
    Path(given.output).mkdir(parents=True, exist_ok=True)
    if given.phases:
        phases(setting)
        return
    wanted = [row for row in rows() if given.parts in row.part]
    seeds = range(given.seeds)
    if given.print:
        tables(setting, wanted, seeds)
        return
    images(setting)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        finish([pool.submit(dense, setting, seed, on) for seed in seeds for on in (False, True)])
        finish([pool.submit(one, setting, row, seed) for seed in seeds for row in wanted])
    tables(setting, wanted, seeds)


def finish(futures: Sequence[Any]) -> None:
    """Wait, saying how far it is."""
    for done, future in enumerate(as_completed(futures), 1):
        print(f"{done} of {len(futures)}: {future.result()}", file=sys.stderr, flush=True)


def dense(setting: Setting, seed: int, trained_on: bool) -> str:
    """The dense network of a seed, and the one that is trained for as long again."""
    torch.set_num_threads(1)
    name = f"dense{'-on' if trained_on else ''}-{seed}"
    weights, result = (Path(setting.folder, f"{name}.{kind}") for kind in ("safetensors", "json"))
    if result.exists():
        return name
    bundle, data = start(setting, seed), images(setting)
    table = replace(lesson(setting), epochs=setting.epochs * (2 if trained_on else 1))
    assert data.train is not None
    with tempfile.TemporaryDirectory() as scratch:
        loop.fit(deployed(bundle), job.TrainingJob(data.train, table, seed, Path(scratch)))
    save_network(bundle.module, weights)
    result.write_text(json.dumps(measured(setting, bundle, data)))
    return name


def one(setting: Setting, row: Row, seed: int) -> str:
    """One row for one seed, from its file when it is finished."""
    torch.set_num_threads(1)
    file = Path(setting.folder, f"{named(row)}-{seed}.json")
    if file.exists():
        return file.stem
    bundle, data = start(setting, seed), images(setting)
    bundle.module.load_state_dict(load_tensors(Path(setting.folder, f"dense-{seed}.safetensors")))
    budget = Budget({"params": limit("params", str(wanted_params(bundle, row)))})
    objective = "natural" if row.natural else setting.objective
    table = replace(lesson(setting), epochs=setting.epochs * row.share, objective=objective)
    # What tells tables apart is the choice: no alignment to a machine.
    choice = PruneTable(method=row.method, granularity=row.granularity, multiple_of=1, options=row.options)
    assert data.train is not None
    # A scratch folder that stays, so that a killed run goes on where it was.
    scratch = file.with_suffix("")
    indices = torch.arange(min(1024, len(data.train)))
    seen, labels = data.train.take(indices), data.train.labels[indices]
    material = stage.PruningInputs(
        seen, labels, {}, 1, seed, train=data.train, table=table, scratch=scratch / "prune"
    )
    chosen = stage.run(bundle, choice, budget, material)
    example = normalized_example(SPEC, seed + 1)
    _, small = cut.run_cut(
        bundle, chosen.groups, chosen.masks, chosen.left_out, example, edited=chosen.edited
    )
    if row.tuned:
        small, _ = tune.run(
            small, replace(data, held_out=divide(data.held_out, 0.02, 0)[1]), table, calibration=CALIBRATION,
            teacher=bundle, seed=seed, scratch=scratch / "tune", masks=chosen.masks.weights,
        )  # fmt: skip
    result = measured(setting, small, data)
    result["density"] = density(bundle, small, row)
    result["record"], result["row"] = dict(chosen.record), asdict(row)
    file.write_text(json.dumps(result))
    return file.stem


def start(setting: Setting, seed: int) -> Bundle:
    """A network with random weights."""
    torch.manual_seed(seed)
    return from_module(NETWORKS[setting.size](), torch.zeros(1, 3, 32, 32), mean=MEAN, std=STD)


def images(setting: Setting) -> Data:
    """Training images, as many of each class, and the test images; decoded once, and kept in the folder."""
    file = Path(setting.folder, f"images-{setting.images}.pt")
    if not file.exists():
        data = open_data(DataTable(path=setting.data), SPEC, 0)
        assert data.train is not None
        train_part = data.train
        if 0 < setting.images < len(train_part):
            _, train_part = divide(train_part, setting.images / len(train_part), seed=0)
        kept = {}
        for name, part in (("train", train_part), ("test", data.held_out)):
            kept[name] = (part.pixels.take(torch.arange(len(part))), part.labels)
        torch.save(kept, file)
    parts = {n: in_memory(n, x, y) for n, (x, y) in torch.load(file, weights_only=True).items()}
    return Data(parts["train"], parts["test"], (), (), "")


def lesson(setting: Setting) -> TuneTable:
    """How everything is trained."""
    return TuneTable(
        epochs=setting.epochs, objective=setting.objective, lr=setting.lr, distill=0.0, mixed=setting.mixed
    )


def wanted_params(bundle: Bundle, row: Row) -> int:
    """The budget: a share of the prunable weights and all that isn't prunable, or a share of all parameters."""
    total = sum(p.numel() for p in bundle.module.parameters())
    if row.granularity == "channel":
        return int(row.density * total)
    weights = sum(p.numel() for p in bundle.module.parameters() if p.ndim > 1)
    return total - weights + round(row.density * weights)


def density(dense_bundle: Bundle, small: Bundle, row: Row) -> float:
    """What is really left: of the prunable weights, or of all parameters."""
    if row.granularity == "channel":
        return total_params(small.module) / total_params(dense_bundle.module)
    left = sum(int(torch.count_nonzero(p)) for p in small.module.parameters() if p.ndim > 1)
    return left / sum(p.numel() for p in dense_bundle.module.parameters() if p.ndim > 1)


def measured(setting: Setting, bundle: Bundle, data: Data) -> dict[str, Any]:
    """Accuracy on all test images; under attack on the first --attack of a fixed order."""
    network = deployed(bundle).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    correct, count = evaluation.accuracy(network, data.held_out)
    chosen = torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(0))[: setting.attack]
    survived = {"fgsm": 0, "pgd": 0}
    generator = torch.Generator().manual_seed(0)
    for part in chosen.split(250):
        x, y = data.held_out.take(part), data.held_out.labels[part]
        survived["fgsm"] += int(right(network, fgsm(network, x, y, EPS), y).sum())
        found = pgd(network, x, y, EPS, step=STEP, steps=STEPS, generator=generator)
        survived["pgd"] += int(right(network, found, y).sum())
    return {"clean": correct / count, **{name: n / len(chosen) for name, n in survived.items()}}


def phases(setting: Setting) -> None:
    """Print the PQ index (orders 1 and 2) while SAP goes on: nine trainings of three epochs, rewinding, global."""
    torch.set_num_threads(1)
    bundle, data = start(setting, 0), images(setting)
    table = replace(lesson(setting), epochs=27, objective="natural")
    assert data.train is not None
    print("| gamma | weights left | PQ index | validation accuracy |\n|---|---|---|---|")
    for gamma in (1.0, 2.0):
        options = {"variant": "paper", "start": "scratch", "p": 1.0, "q": 2.0, "scope": "global", "iterations": 8,
                   "gamma": gamma}  # fmt: skip
        choice = PruneTable(method="sap", granularity="weight", multiple_of=1, options=options)
        seen = data.train.take(torch.arange(2))
        material = stage.PruningInputs(
            seen, data.train.labels[:2], {}, 1, 0, train=data.train, table=table,
            scratch=Path(setting.folder, f"phases-{gamma:g}"),
        )  # fmt: skip
        record = stage.run(bundle, choice, Budget({}), material).record["pqi"]
        left = [sum(counts) for counts in zip(*record["kept"].values(), strict=True)]
        for kept, index, accuracy in zip(left, record["mean"], record["accuracy"], strict=True):
            print(f"| {gamma:g} | {kept / left[0]:.1%} | {index:.3f} | {accuracy:.1%} |")
        print(f"stopped: {record['stopped']}", file=sys.stderr)


def tables(setting: Setting, wanted: Sequence[Row], seeds: Sequence[int]) -> None:
    """Print a line for each row of which a seed is finished, under its part."""
    print(f"{asdict(setting)}\n")
    print("| rows | left | clean | FGSM | PGD-20 | seeds |\n|---|---|---|---|---|---|")
    line(f"dense, {setting.epochs} epochs: the start of the rows below", read(setting, "dense", seeds))
    line(f"dense, {2 * setting.epochs} epochs", read(setting, "dense-on", seeds))
    part = ""
    for row in wanted:
        if row.part != part:
            part = row.part
            print(f"| **{part}** | | | | | |")
        line(row.name, read(setting, named(row), seeds))


def named(row: Row) -> str:
    """The row as part of a file's name."""
    return f"{row.part}-{row.name}".replace(" ", "_").replace("/", "_")


def read(setting: Setting, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What is finished of a row."""
    files = [Path(setting.folder, f"{name}-{seed}.json") for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def line(name: str, runs: Sequence[dict[str, Any]]) -> None:
    """Mean and standard deviation, in percent."""
    cells = [name]
    for key in ("density", "clean", "fgsm", "pgd"):
        values = [100 * run[key] for run in runs if key in run]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and key != "density" else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
    print(f"| {' | '.join(cells)} | {len(runs)} |")


if __name__ == "__main__":
    main()
