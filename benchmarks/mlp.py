"""The claim of the paper behind the method data-free, on multilayer perceptrons: do bounds choose better than saliency?

    python benchmarks/mlp.py [--widths 64,32] [--size 8] [--activation relu] [--seeds 5] [--shares 40,50,60]

Networks are trained here on scikit-learn's 8x8 digits (--size 28: scaled up to 28x28) with 500 images held out; the
same share of the units of each hidden layer goes, through the stages prune and cut, without repair and without data.
Robust is what keeps its label under FGSM, and under PGD-20 (step eps / 8, random start), in the maximum norm on pixels
in [0, 1]. Each seed trains another network and anneals otherwise. Printed: the median of the seeds, least and greatest
behind it; the last two columns are the mean over the seeds of the difference to saliency in the same steps on the same
network, with its standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from linf import fgsm, pgd, right
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.models.bundle import deployed, from_module
from edgeprune.models.costs import cost_model, normalized_example
from edgeprune.prune import cut, stage
from edgeprune.recipe.schema import PruneTable
from edgeprune.records import Budget, Bundle, Limit
from edgeprune.structure.groups import find_groups

sys.path.insert(0, str(Path(__file__).resolve().parent))

HELD_OUT, EPOCHS, BATCH, RATE = 500, 60, 64, 1e-3
EPS = (0.05, 0.1)
STEPS = 20
CLASSES = 10
SALIENCY = "saliency"
# The published baseline ranks the pairs of the trained network once; here that is one step, and merges of equal weight.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "saliency, in one step, unscaled": ("data-free", {"mode": "baseline", "step": 1.0, "scaled": False}),
    "saliency, in one step": ("data-free", {"mode": "baseline", "step": 1.0}),
    "saliency, unscaled": ("data-free", {"mode": "baseline", "scaled": False}),
    SALIENCY: ("data-free", {"mode": "baseline"}),
    "greedy": ("data-free", {"mode": "greedy"}),
    "greedy, margin": ("data-free", {"mode": "greedy", "score": "margin"}),
    "stochastic, unscaled": ("data-free", {"mode": "stochastic", "scaled": False}),
    "stochastic": ("data-free", {"mode": "stochastic"}),
    "stochastic, margin": ("data-free", {"mode": "stochastic", "score": "margin"}),
    "magnitude": ("magnitude", {}),
    "random": ("uniform-random", {}),
}
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
COLUMNS = ("accuracy", *(f"{attack} {eps:g}" for eps in EPS for attack in ("FGSM", "PGD-20")))


@dataclass(frozen=True)
class Images:
    """x: float32 (N, 1, S, S) in [0, 1]. y: int64 (N,)."""

    x: Tensor
    y: Tensor


def main() -> None:
    """Train, prune, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default="64,32")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--activation", default="relu", choices=ACTIVATIONS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shares", default="40,50,60")
    given = parser.parse_args()
    torch.set_num_threads(1)
    widths = tuple(int(w) for w in given.widths.split(","))
    shares = [int(s) / 100 for s in given.shares.split(",")]
    learn, test = digits(given.size)
    found: dict[tuple[float, str], list[Mapping[str, float]]] = {}
    for seed in range(given.seeds):
        network = trained(learn, widths, ACTIVATIONS[given.activation], seed)
        dense = from_module(network, torch.zeros(1, *learn.x.shape[1:]))
        found.setdefault((0.0, "dense"), []).append(measured(dense, test))
        for share in shares:
            for name, (method, options) in ROWS.items():
                small = pruned(dense, share, PruneTable(method=method, options=options), seed)
                found.setdefault((share, name), []).append(measured(small, test))
        print(f"seed {seed} is done", file=sys.stderr)
    table(found, f"{given.size**2}-{'-'.join(map(str, widths))}-{CLASSES}, {given.activation}")


def digits(size: int) -> tuple[Images, Images]:
    """The images to learn from and those held out, the same ones always."""
    flat, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(flat).float().view(-1, 1, 8, 8) / 16
    if size != x.shape[-1]:
        x = functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    hold, learn = order[:HELD_OUT], order[HELD_OUT:]
    return Images(x[learn], y[learn]), Images(x[hold], y[hold])


def trained(learn: Images, widths: Sequence[int], activation: type[nn.Module], seed: int) -> nn.Module:
    """A perceptron with hidden layers of these widths, trained with Adam."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise((learn.x[0].numel(), *widths)):
            layers += [nn.Linear(inputs, outputs), activation()]
        network = nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(learn.x)).split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(network(learn.x[part]), learn.y[part]).backward()
                optimizer.step()
    return network.eval()


def pruned(dense: Bundle, share: float, table: PruneTable, seed: int) -> Bundle:
    """The network without a share of the units of each hidden layer."""
    example = normalized_example(dense.input, seed)
    groups = find_groups(dense.module, example).groups
    kept = {g.name: g.channels - round(share * g.channels) for g in groups}
    macs = cost_model(dense.module, groups, example).cost(kept)["macs"]
    budget = Budget({"macs": Limit("macs", "absolute", macs, f"{macs:.0f}")})
    uniform = PruneTable(method=table.method, options=table.options, allocation="uniform", repair="none")
    chosen = stage.run(dense, uniform, budget, stage.PruningInputs(None, None, {}, 1, seed))
    if {g: int(keep.sum()) for g, keep in chosen.masks.channels.items()} != kept:
        raise SystemExit(f"{table.method} kept other counts than {kept}")
    return cut.run_cut(dense, chosen.groups, chosen.masks, chosen.left_out, example, edited=chosen.edited)[1]


def measured(bundle: Bundle, test: Images) -> dict[str, float]:
    """Column -> share of the held-out images that get their label, as they are and attacked."""
    network = deployed(bundle).eval()
    clean = right(network, test.x, test.y)
    found = {"accuracy": float(clean.double().mean())}
    for eps in EPS:
        generator = torch.Generator().manual_seed(0)
        attacked = {
            "FGSM": fgsm(network, test.x, test.y, eps),
            "PGD-20": pgd(network, test.x, test.y, eps, step=eps / 8, steps=STEPS, generator=generator),
        }
        for name, x in attacked.items():
            found[f"{name} {eps:g}"] = float((clean & right(network, x, test.y)).double().mean())
    return found


def table(found: Mapping[tuple[float, str], Sequence[Mapping[str, float]]], title: str) -> None:
    """Print medians, ranges and paired differences."""
    seeds = len(found[0.0, "dense"])
    print(f"{title}: {seeds} networks, {HELD_OUT} test images\n")
    compared = ("accuracy", f"PGD-20 {EPS[0]:g}")
    print(
        f"| units gone | choice | {' | '.join(COLUMNS)} | {' | '.join(f'{c}, difference' for c in compared)} |"
    )
    print("|" + "---|" * (len(COLUMNS) + 4))
    for (share, name), runs in found.items():
        cells = [_spread([run[column] for run in runs]) for column in COLUMNS]
        for column in compared:
            others = found.get((share, SALIENCY), runs)
            gain = [100 * (run[column] - other[column]) for run, other in zip(runs, others, strict=True)]
            error = statistics.stdev(gain) / seeds**0.5 if seeds > 1 else 0.0
            cells.append("" if others is runs else f"{statistics.mean(gain):+.1f} ± {error:.1f}")
        print(f"| {share:.0%} | {name} | {' | '.join(cells)} |")


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (100 * v for v in (min(values), statistics.median(values), max(values)))
    return f"{middle:.1f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    main()
