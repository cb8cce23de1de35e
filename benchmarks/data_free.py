"""Pruning a ResNet-20 for CIFAR-10 without data: accuracy and robust accuracy against what is left of the work.

    python benchmarks/data_free.py WEIGHTS DATA [-o DIR] [--seeds 3] [--shares 70,50] [--rows NAMES] [--attack 500]

WEIGHTS is a state dict for examples/resnet20_cifar10.py; DATA the images in class folders (or a tar of them), used to
measure only. Every row is a run of `edgeprune compress --data-use evaluate`; finished rows are found again in DIR.
It prints the table of BENCHMARKS.md (median of the seeds, least and greatest behind it) and draws DIR/data_free.svg.
With --attack N, accuracy under PGD-20 (8/255 in the maximum norm, step 2/255, random start) is measured on N of the
held-out images, on the network in torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from linf import pgd, right

from edgeprune import api
from edgeprune.data.collection import open_data
from edgeprune.models.bundle import deployed
from edgeprune.recipe.schema import DataTable
from edgeprune.records import Bundle

sys.path.insert(0, str(Path(__file__).resolve().parent))

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "resnet20_cifar10.py"
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "stochastic": ("--set", "prune.mode=stochastic", "--set", "prune.repair=none"),
    "greedy": ("--set", "prune.mode=greedy", "--set", "prune.repair=none"),
    "baseline": ("--set", "prune.mode=baseline", "--set", "prune.repair=none"),
    "stochastic, repaired": ("--set", "prune.mode=stochastic"),
    "magnitude": ("--method", "magnitude"),
    "magnitude, repaired": ("--method", "magnitude", "--set", "prune.repair=synthetic"),
    "random": ("--method", "uniform-random"),
    "random, repaired": ("--method", "uniform-random", "--set", "prune.repair=synthetic"),
}


def main() -> None:
    """Run what is missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights")
    parser.add_argument("data")
    parser.add_argument("-o", "--output", default="runs/data-free")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", default="70,50")
    parser.add_argument("--rows", default="; ".join(ROWS), help="names with ; between")
    parser.add_argument("--attack", type=int, default=0)
    given = parser.parse_args()
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name.strip() for name in given.rows.split(";") if name.strip()]
    table: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for share in given.shares.split(","):
        for name in names:
            for seed in range(given.seeds):
                table.setdefault((share, name), []).append(one(given, folder, (share, name, seed)))
    lines(table)
    (folder / "data_free.svg").write_text(plot(table), encoding="utf-8")


def one(given: argparse.Namespace, folder: Path, row: tuple[str, str, int]) -> dict[str, Any]:
    """The result of one run, from its file when it is finished."""
    share, name, seed = row
    # Runs of one seed share a folder, so that they share the synthesized images.
    file = folder / f"{share}-{name.replace(', ', '-')}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    run = folder / f"seed-{seed}"
    command = [
        sys.executable, "-m", "edgeprune", "compress", given.weights, "--arch", f"{EXAMPLE}:resnet20", "--input",
        "3x32x32", "--mean", MEAN, "--std", STD, "--data", given.data, "--data-use", "evaluate", "--target", "local",
        "--budget", f"macs={share} %", "--seed", str(seed), "-o", str(run), "--json", *ROWS[name],
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["report"]
    found = {r["metric"]: r["value"] for r in report["after"]}
    dense = {r["metric"]: r["value"] for r in report["before"]}
    result = {
        "macs": found["macs"] / dense["macs"], "accuracy": found["clean_accuracy"], "dense": dense["clean_accuracy"],
        "speedup": dense["latency_p50"] / found["latency_p50"], "agreement": found.get("synthetic_agreement"),
    }  # fmt: skip
    if given.attack:
        result["robust"] = robust(api.load(run), given.data, given.attack)
        reference = folder / f"dense-robust-{given.attack}.json"
        if not reference.exists():
            model = api.load(given.weights, arch=f"{EXAMPLE}:resnet20", input="3x32x32", mean=MEAN, std=STD)
            reference.write_text(json.dumps(robust(model, given.data, given.attack)))
        result["dense_robust"] = json.loads(reference.read_text())
    file.write_text(json.dumps(result))
    return result


def robust(bundle: Bundle, data: str, count: int) -> float:
    """Accuracy under PGD-20 on `count` held-out images, the same ones for every network."""
    held_out = open_data(DataTable(path=data, use="evaluate"), bundle.input, 0).held_out
    chosen = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:count]
    network = deployed(bundle).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    survived = 0
    for part in chosen.split(125):
        x, y = held_out.take(part), held_out.labels[part]
        attacked = pgd(network, x, y, 8 / 255, step=2 / 255, steps=20, generator=generator)
        survived += int(right(network, attacked, y).sum())
    return survived / count


def lines(table: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> None:
    """Print the table."""
    some = next(iter(table.values()))[0]
    print(f"dense: accuracy {some['dense']:.2%}, under PGD-20 {_percent(some.get('dense_robust'))}\n")
    print(
        "| budget | method | MACs | accuracy | PGD-20 | agreement, synthetic | faster |\n|---|---|---|---|---|---|---|"
    )
    for (share, name), runs in table.items():
        print(
            f"| {share} % | {name} | {_median(runs, 'macs')} | {_median(runs, 'accuracy')} | {_median(runs, 'robust')} "
            f"| {_median(runs, 'agreement')} | {statistics.median(r['speedup'] for r in runs):.2f}x |"
        )


def _median(runs: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return ""
    middle = _percent(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({_percent(min(values))} to {_percent(max(values))})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def plot(table: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    """Accuracy (full dots) and robust accuracy (rings) against MACs, a color for each method, as SVG."""
    colors = (
        "#0b6e4f",
        "#c44536",
        "#e29578",
        "#8d99ae",
        "#197278",
        "#5f0f40",
        "#9a031e",
        "#444444",
        "#888888",
    )
    names = list(dict.fromkeys(name for _, name in table))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="640" height="400" fill="white"/>')
    for tick in range(0, 101, 20):
        y = 360 - 3.2 * tick
        parts.append(
            f'<path d="M50 {y}H430" stroke="#ddd"/><text x="44" y="{y + 4}" text-anchor="end">{tick} %</text>'
        )
    for tick in range(40, 101, 10):
        parts.append(f'<text x="{50 + (tick - 40) * 6.3}" y="378" text-anchor="middle">{tick} %</text>')
    parts.append('<text x="240" y="396" text-anchor="middle">MACs left</text>')
    for (_, name), runs in table.items():
        color = colors[names.index(name) % len(colors)]
        for key, fill in (("accuracy", color), ("robust", "none")):
            values = [run[key] for run in runs if run.get(key) is not None]
            if values:
                x = 50 + (100 * statistics.median(r["macs"] for r in runs) - 40) * 6.3
                y = 360 - 320 * statistics.median(values)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{color}"/>')
    for index, name in enumerate(names):
        y = 30 + 20 * index
        parts.append(f'<circle cx="455" cy="{y - 4}" r="4.5" fill="{colors[index % len(colors)]}"/>')
        parts.append(f'<text x="466" y="{y}">{name}</text>')
    parts.append('<text x="455" y="350">dot: accuracy, ring: PGD-20</text></svg>')
    return "\n".join(parts)


if __name__ == "__main__":
    main()
