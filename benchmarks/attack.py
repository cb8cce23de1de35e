"""The standard evaluation beside the reference's, on the same images: verdicts image by image, and time.

    pip install --no-deps pyautoattack==0.2.0
    python benchmarks/attack.py WEIGHTS DATA [-o DIR] [--images 500] [--batch 125] [--eps 8/255] [--norm Linf]

WEIGHTS is a state dict for examples/resnet20_cifar10.py, DATA images in class folders (or a tar of them). The
reference is AutoAttack's code as pyautoattack packs it, in its standard version; ours is the attack stage with
--attack standard. Both attack one batch of images after another in turn, the one that begins changing, so that what
else the machine does hits both; each in a process of its own, so that neither finds what the other set up. What is
finished stands in DIR and is found again. Verdicts that differ: "lenient" are images that survive ours and not the
reference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.data.collection import Split, in_memory, open_data
from edgeprune.measure.evaluate import balanced
from edgeprune.models.bundle import deployed, load_bundle
from edgeprune.quantities import eps_of
from edgeprune.recipe.schema import AttackTable, DataTable, ModelTable
from edgeprune.records import Bundle
from edgeprune.robustness import models_under_attack, stage
from edgeprune.robustness.job import attack_job

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "resnet20_cifar10.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDES = ("reference", "edgeprune")


@dataclass(frozen=True)
class Setting:
    """What decides the verdicts; results of another setting are not mixed with these."""

    weights: str
    data: str
    images: int
    batch: int
    eps: str
    norm: str
    seed: int
    threads: int


@dataclass(frozen=True)
class Result:
    """What one side found on one batch. by: attack -> images that it broke; times in seconds."""

    rows: list[int]
    clean: list[bool]
    survived: list[bool]
    wall: float
    cpu: float
    by: dict[str, int]
    seconds: dict[str, float]


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights")
    parser.add_argument("data")
    parser.add_argument("-o", "--output", default="runs/attack")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--norm", default="Linf", choices=("Linf", "L2"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--reference", default="", help="a folder that pyautoattack was installed into")
    parser.add_argument("--print", action="store_true", help="only the tables of what is finished in DIR")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    setting = Setting(
        given.weights, given.data, given.images, given.batch, given.eps, given.norm, given.seed, given.threads
    )
    folder = Path(given.output)
    if given.part:
        number, side = given.part.split(",")
        attacked(setting, folder, int(number), side, given.reference)
        return
    if not given.print:
        run(setting, folder)
    tables(folder)


def run(setting: Setting, folder: Path) -> None:
    """Every batch by both sides, one after the other; finished ones are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "setting.json"
    if kept.exists() and json.loads(kept.read_text()) != asdict(setting):
        raise SystemExit(f"{folder} holds results of another setting: {kept.read_text()}; give another -o")
    kept.write_text(json.dumps(asdict(setting)))
    for number in range(batches(setting)):
        for side in SIDES if number % 2 else reversed(SIDES):
            if not (folder / f"{number:03d}-{side}.json").exists():
                subprocess.run([sys.executable, *sys.argv, "--part", f"{number},{side}"], check=True)


def batches(setting: Setting) -> int:
    """How many there are."""
    return max(1, round(setting.images / setting.batch))


def attacked(setting: Setting, folder: Path, number: int, side: str, place: str) -> None:
    """One batch by one side. place: where the reference is installed, or ""."""
    if place:
        sys.path.insert(0, place)
    torch.set_num_threads(setting.threads)
    bundle = load_bundle(ModelTable(setting.weights, f"{EXAMPLE}:resnet20", "3x32x32", MEAN, STD))
    held_out = open_data(DataTable(setting.data, "evaluate"), bundle.input, setting.seed).held_out
    split = balanced(held_out, setting.images, setting.seed)
    count = batches(setting)
    # Dealt out: images stand class by class.
    rows = torch.arange(number, len(split), count)
    pixels = (split.take(rows) * 255).round().to(torch.uint8)
    images = in_memory(f"batch {number}", pixels, split.labels[rows])
    log(f"batch {number + 1} of {count}: {side} attacks {len(images)} images")
    result = reference(bundle, images, setting) if side == "reference" else ours(bundle, images, setting)
    (folder / f"{number:03d}-{side}.json").write_text(json.dumps({**asdict(result), "rows": rows.tolist()}))
    log(f"batch {number + 1} of {count}: {side} leaves {sum(result.survived)}, {result.wall:.0f} s")


def reference(bundle: Bundle, part: Split, setting: Setting) -> Result:
    """The standard version of AutoAttack, on the network as it was loaded."""
    from pyautoattack import AutoAttack

    network = frozen(bundle)
    x, y = everything(part)
    clean = (answers(network, x) == y).tolist()
    wall, cpu = time.perf_counter(), time.process_time()
    judge = AutoAttack(
        network,
        norm=setting.norm,
        eps=eps_of(setting.eps, setting.norm),
        seed=setting.seed,
        version="standard",
    )
    images, found = judge.run_standard_evaluation(x.clone(), y.clone(), batch_size=len(x))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    check(images, x, setting)
    survived = (found == y).tolist()
    return Result([], clean, survived, wall, cpu, {}, {})


def ours(bundle: Bundle, part: Split, setting: Setting) -> Result:
    """The attack stage, as `evaluate --attack standard` runs it."""
    network = frozen(bundle)
    wall, cpu = time.perf_counter(), time.process_time()
    victim = models_under_attack.of_network("dense", network, bundle.source.sha256)
    table = AttackTable("standard", setting.eps, setting.norm, batch=len(part))
    job = attack_job(table, seed=setting.seed, data=part.name)
    with tempfile.TemporaryDirectory() as scratch:
        found = stage.run(victim, part, job, scratch=Path(scratch), log=log)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Result(
        [], list(found.clean_right), list(found.survived), wall, cpu, dict(found.broken), dict(found.seconds)
    )


def frozen(bundle: Bundle) -> nn.Module:
    """A network of its own for each side."""
    return deployed(bundle).eval().requires_grad_(False)


def everything(part: Split) -> tuple[Tensor, Tensor]:
    """The images, as the reference's `view` needs them, and their labels."""
    return part.take(torch.arange(len(part))).contiguous(), part.labels


def answers(network: nn.Module, x: Tensor) -> Tensor:
    """The classes that images get."""
    with torch.no_grad():
        return network(x).argmax(1)


def check(images: Tensor, x: Tensor, setting: Setting) -> None:
    """Fail when the reference left the ball: its verdicts would be worth nothing."""
    change = (images - x).flatten(1)
    far = change.abs().amax() if setting.norm == "Linf" else change.norm(dim=1).amax()
    assert float(far) <= eps_of(setting.eps, setting.norm) + 1e-5, far


def tables(folder: Path) -> None:
    """What stands in BENCHMARKS.md, from the batches that both sides have finished."""
    setting = Setting(**json.loads((folder / "setting.json").read_text()))
    both = [pair for pair in pairs(folder) if len(pair) == len(SIDES)]
    if not both:
        raise SystemExit(f"{folder} has no batch that both sides have finished")
    sides = {side: [pair[side] for pair in both] for side in SIDES}
    totals = {side: summed(results) for side, results in sides.items()}
    theirs, our = totals["reference"], totals["edgeprune"]
    n = len(our["survived"])
    print(
        f"{n} images, {setting.norm} {setting.eps}, batches of {setting.batch}, {setting.threads} threads, "
        f"pyautoattack {installed()}, torch {torch.__version__}\n"
    )
    print("| | reference | edgeprune |\n|---|---|---|")
    line("right without an attack", [f"{sum(t['clean'])}" for t in (theirs, our)])
    line(
        "right under attack", [f"{sum(t['survived'])} ({sum(t['survived']) / n:.1%})" for t in (theirs, our)]
    )
    only = [sum(a and not b for a, b in zip(one, other, strict=True)) for one, other in (
        (theirs["survived"], our["survived"]), (our["survived"], theirs["survived"]))]  # fmt: skip
    line("survive it and not the other (edgeprune: lenient)", [str(count) for count in only])
    line("seconds", [f"{t['wall']:.0f}" for t in (theirs, our)])
    line("processor seconds", [f"{t['cpu']:.0f}" for t in (theirs, our)])
    line("times as fast", ["1", f"{theirs['wall'] / our['wall']:.2f}"])
    line("times as fast by processor seconds", ["1", f"{theirs['cpu'] / our['cpu']:.2f}"])
    print(f"\nVerdicts differ on {sum(only)} of {n} images ({sum(only) / n:.2%}).\n")
    print("| edgeprune | broken | seconds |\n|---|---|---|")
    for name, seconds in our["seconds"].items():
        print(f"| {name} | {our['by'].get(name, '')} | {seconds:.0f} |")


def pairs(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Batch after batch, what each side found."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(folder.glob("[0-9]*-*.json")):
        number, _, side = file.stem.partition("-")
        found.setdefault(number, {})[side] = json.loads(file.read_text())
    return list(found.values())


def summed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All batches of a side as one."""
    total: dict[str, Any] = {"clean": [], "survived": [], "wall": 0.0, "cpu": 0.0, "by": {}, "seconds": {}}
    for result in results:
        for key in ("clean", "survived", "wall", "cpu"):
            total[key] += result[key]
        for key in ("by", "seconds"):
            for name, value in result[key].items():
                total[key][name] = total[key].get(name, 0) + value
    return total


def installed() -> str:
    """The reference's version, where it is installed."""
    try:
        return version("pyautoattack")
    except ModuleNotFoundError:
        return "of an unknown version"


def line(name: str, cells: Sequence[str]) -> None:
    """A row of the table."""
    print(f"| {name} | {' | '.join(cells)} |")


def log(text: str) -> None:
    """To stderr, at once."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
