"""Latency budgets on this machine: five networks at 75 % and 50 % of their dense time, ours beside torch-pruning.

    python benchmarks/latency.py [NETWORK ...] [-o DIR] [--weights FILE --data PATH [--budget 0.75] [--epochs 2]]

Prints: the measured median over the budget; predicted over measured time of ten cuts of each network that the latency
table had not seen; and the realized share, (latency cut) / (multiply-accumulates cut), ours beside torch-pruning's
uniform pruner with and without round_to at the same multiply-accumulates, all timed in one process. With WEIGHTS (a
state dict for examples/resnet20_cifar10.py) and DATA, and no NETWORK, the accuracy of a ResNet-20 at one latency:
uniform, by the table, and by multiply-accumulates, each tuned in the same way. What is in DIR is not done again. Needs
an otherwise idle machine to be exact; with one thread the thread's CPU time is what counts where it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import latency_networks
import torch
import torch_pruning
from latency_accuracy import accuracies
from latency_cases import MULTIPLE, THOROUGH, Case, case, material, ours, seconds, write
from torch import nn

from edgeprune.models import costs, surgery
from edgeprune.models.bundle import from_module
from edgeprune.recipe.schema import PruneTable
from edgeprune.structure.allocation import levels

BUDGETS = (0.75, 0.5)
UNIFORM = (0.9, 0.8, 0.7, 0.6)
SEEDS = 2


def peer(it: Case, macs: float, round_to: int | None) -> nn.Module:
    """The network as torch-pruning's uniform pruner leaves it at about so many multiply-accumulates.

    What can't be cut is left alone: of ResNet-20's padded shortcuts it would make a network that does not run.
    """
    low, high, best = 0.0, 0.95, it.bundle.module
    rounded: Any = round_to
    heads = [n for n, m in best.named_modules() if isinstance(m, nn.Linear) or n in it.whole]
    for _ in range(12):
        ratio = (low + high) / 2
        small = deepcopy(it.bundle.module)
        ends = [small.get_submodule(n) for n in heads]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_pruning.pruner.BasePruner(
                small, it.image, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio, ignored_layers=ends, round_to=rounded,
            ).step()  # fmt: skip
        if costs.total_macs(small, it.image) <= macs:
            high, best = ratio, small
        else:
            low = ratio
    return best


def uniform(it: Case, share: float) -> nn.Module:
    """Every group at the multiple nearest to a share of its channels."""
    kept = {
        g.name: min(levels(g.channels, MULTIPLE, 0.1), key=lambda k, s=share * g.channels: abs(k - s))
        for g in it.groups
    }
    small = deepcopy(it.bundle.module)
    masks = {g.name: torch.arange(g.channels) < kept[g.name] for g in it.groups}
    surgery.cut(small, surgery.removed_positions(it.groups, masks))
    return small


def predicted(it: Case, small: nn.Module) -> float | None:
    """What the table says of a cut network; None where it was cut in groups that the table does not know."""
    kept, before = {}, dict(it.bundle.module.named_modules())
    for group in it.groups:
        layer: Any = small.get_submodule(group.name)
        old: Any = before[group.name]
        widths = [
            getattr(m, a) for m in (layer, old) for a in ("out_channels", "out_features") if a in vars(m)
        ]
        kept[group.name] = round(group.channels * widths[0] / widths[1])
    expected = it.network.resizer.costs.cost(kept)["macs"]
    return it.clock.seconds(kept) if abs(expected / costs.total_macs(small, it.image) - 1) < 0.01 else None


def measured(it: Case) -> dict[str, Any]:
    """All numbers of one network."""
    networks: dict[str, nn.Module] = {}
    for share in BUDGETS:
        text, small = f"{100 * share:.0f} %", ours(it, share, PruneTable(method="magnitude"), material(it))
        macs = costs.total_macs(small, it.image)
        networks[f"ours {text}"] = small
        networks[f"torch-pruning {text}"] = peer(it, macs, None)
        networks[f"torch-pruning, round_to {text}"] = peer(it, macs, MULTIPLE)
    networks.update({f"uniform {share}": uniform(it, share) for share in UNIFORM})
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: write(m, it.bundle, Path(folder, f"{i}.onnx"))
            for i, (name, m) in enumerate(networks.items())
        }
        times = seconds({"dense": it.network.file, **files}, THOROUGH)
    dense = costs.total_macs(it.bundle.module, it.image)
    rows = {
        name: {
            "time": times[name] / times["dense"], "macs": costs.total_macs(module, it.image) / dense,
            "predicted": (predicted(it, module) or 0.0) / it.clock.dense,
        }
        for name, module in networks.items()
    }  # fmt: skip
    return {"dense": times["dense"], "rows": rows, "table": len(it.clock.wholes), "errors": it.clock.errors()}


def lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """The rows of one network."""
    out = []
    for share in BUDGETS:
        text = f"{100 * share:.0f} %"
        for kind in ("ours", "torch-pruning", "torch-pruning, round_to"):
            row = found["rows"][f"{kind} {text}"]
            gone = 1 - row["macs"]
            realized = f"{(1 - row['time']) / gone:.2f}" if gone > 0.001 else "-"
            budget = f"{row['time'] / share:.3f}" if kind == "ours" else ""
            head = (
                f"| {name}, {1e3 * found['dense']:.2f} ms" if kind == "ours" and share == BUDGETS[0] else "|"
            )
            cells = (text, kind, f"{100 * row['time']:.1f} %", budget, f"{100 * row['macs']:.1f} %", realized)
            out.append(" | ".join((head, *cells)) + " |")
    return out


def errors(found: Mapping[str, Any]) -> list[float]:
    """Predicted over measured - 1 of the cuts that the table had not seen."""
    return [r["predicted"] / r["time"] - 1 for r in found["rows"].values() if r["predicted"] > 0]


def kept(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in a file, or what the work gives, which is then put there."""
    if not path.exists():
        path.write_text(json.dumps(work()))
    return json.loads(path.read_text())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help="the beginnings of their names; all without")
    parser.add_argument("-o", "--output", default=None)
    parser.add_argument("--weights", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for training")
    parser.add_argument(
        "--budget", type=float, default=0.6, help="for the accuracies, a share of the dense time"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(given.output or tempfile.mkdtemp(prefix="edgeprune-latency-"))
    folder.mkdir(parents=True, exist_ok=True)
    table = ["| network | budget | tool | time of dense | of the budget | multiply-accumulates | realized |"]
    table += ["|---|---|---|---|---|---|---|"]
    guesses = ["| network | cuts | within 10 % | median error | largest |", "|---|---|---|---|---|"]
    for name in latency_networks.NETWORKS:
        asked = any(name.startswith(start) for start in given.networks)
        if not asked and (given.networks or given.weights):
            continue
        network, image = latency_networks.build(name)
        bundle = from_module(network, image)
        found = kept(
            folder / f"{name.partition(',')[0]}.json",
            lambda n=name, b=bundle, i=image: measured(case(n, b, i, folder)),
        )
        off = sorted(abs(e) for e in errors(found))
        table += lines(name, found)
        within = sum(e <= 0.1 for e in off)
        guesses.append(
            f"| {name} | {len(off)} | {within} | {100 * statistics.median(off):.1f} % | {100 * off[-1]:.1f} % |"
        )
        print("\n".join(lines(name, found)), flush=True)
    if len(guesses) > 2:
        print("\n".join(["", *table, "", "Predicted before it was measured:", "", *guesses]))
    if given.weights:
        print("\n".join(accuracies(given, folder)))


if __name__ == "__main__":
    main()
