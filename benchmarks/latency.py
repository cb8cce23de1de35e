"""Latency budgets on this machine: five networks at 75 % and 50 % of their dense time, ours beside torch-pruning.

    python benchmarks/latency.py [NETWORK ...] [-o DIR] [--weights FILE --data PATH [--epochs 2]]

Prints: the measured median over the budget; predicted over measured time of ten cuts of each network that the latency
table had not seen; and the realized share, (latency cut) / (multiply-accumulates cut), ours beside torch-pruning's
uniform pruner with and without round_to at the same multiply-accumulates, all timed in one process. With WEIGHTS (a
state dict for examples/resnet20_cifar10.py) and DATA also the accuracy of a ResNet-20 at one measured latency: by the
table, uniform, and by multiply-accumulates, each tuned in the same way. What is in DIR is not done again. Needs an
otherwise idle machine to be exact; with one thread the thread's CPU time is what counts where it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import latency_networks
import torch
import torch_pruning
from torch import Tensor, nn

from edgeprune import bundled
from edgeprune.devices import device_from_url
from edgeprune.nn import costs, data, surgery
from edgeprune.nn.allocate import levels
from edgeprune.nn.bundle import deployed, from_module
from edgeprune.nn.graph import find_groups, provable_groups
from edgeprune.nn.latency_survey import Bench, Subject, subject, survey
from edgeprune.nn.latency_table import Predictor
from edgeprune.quantities import limit
from edgeprune.recipe import DataTable, ExportTable, MeasureTable, PruneTable, TuneTable
from edgeprune.records import Budget, Bundle, Group
from edgeprune.stages import cut, evaluate, export, measure, prune, tune

BUDGETS = (0.75, 0.5)
UNIFORM = (0.9, 0.8, 0.7, 0.6)
DEVICE = device_from_url("local")
QUICK, THOROUGH = MeasureTable(iterations=60, seconds=3.0), MeasureTable(iterations=300, seconds=10.0)
MULTIPLE = bundled.target("local").multiple_of["fp32"]
SEEDS = 2
WAYS = ("by the table", "uniform", "by multiply-accumulates")


@dataclass(frozen=True)
class Case:
    """A network with its file, its groups, the layers that can't be cut and what predicts its time."""

    name: str
    bundle: Bundle
    image: Tensor
    folder: Path
    groups: tuple[Group, ...]
    whole: tuple[str, ...]
    network: Subject
    clock: Predictor


def seconds(files: Mapping[str, Path], table: MeasureTable) -> dict[str, float]:
    """The median of one image of each file, by the clock to be believed: CPU time with one thread."""
    timed = measure.latency(files, DEVICE, table)
    rows = {
        name: next(r for r in found if r.metric == "latency_p50") for name, found in timed.readings.items()
    }
    cpu = all(r.conditions.get("cpu_p50") for r in rows.values())
    return {name: float(r.conditions["cpu_p50"] if cpu else r.value or 0.0) for name, r in rows.items()}


def bench(folder: Path) -> Bench:
    """This machine, one thread."""
    about = DEVICE.facts()
    place = f"{DEVICE.where()}, {about.get('cpu', '')}, 1 thread, fp32"
    return Bench(
        lambda files: seconds(files, QUICK),
        lambda file: [(n.name, n.seconds) for n in measure.node_times(file, DEVICE, QUICK)],
        place, folder / "tables",
    )  # fmt: skip


def write(module: nn.Module, like: Bundle, path: Path) -> Path:
    """A network as the file that would ship."""
    bundle = replace(like, module=module)
    export.run(deployed(bundle), bundle.input, path, opset=20, table=ExportTable(), meta={}, real=None)
    return path


def case(name: str, bundle: Bundle, image: Tensor, folder: Path) -> Case:
    """Export the dense network and fill the table."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.partition(',')[0]}.onnx"
    write(bundle.module, bundle, file)
    found = provable_groups(bundle.module, find_groups(bundle.module, image), image, 0)
    network = subject(file, costs.cost_model(bundle.module, found.groups, image))
    clock = survey(network, bench(folder), multiple_of=MULTIPLE)
    return Case(name, bundle, image, folder, found.groups, tuple(found.left_out), network, clock)


def material(it: Case, seed: int = 0, **more: Any) -> prune.Material:
    """What prune is given: the device, and the table unless `clock` is None."""
    dense = seconds({"dense": it.network.file}, THOROUGH)["dense"]

    def read(module: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = write(module, it.bundle, Path(folder, "cut.onnx"))
            timed = measure.latency({"dense": it.network.file, "compressed": path}, DEVICE, THOROUGH)
        found = measure.speedup(timed)
        assert found is not None
        return dense / found[1].value

    probes = {"latency_p50": prune.Probe(dense, read)}
    given: dict[str, Any] = {"clock": lambda _costs: it.clock, **more}
    images, labels = given.pop("images", None), given.pop("labels", None)
    return prune.Material(images, labels, probes, MULTIPLE, seed, **given)


def ours(it: Case, share: float, table: PruneTable, given: prune.Material) -> nn.Module:
    """The network cut to a share of its time."""
    wanted = Budget({"latency_p50": limit("latency_p50", f"{100 * share:g} %")})
    chosen = prune.run(it.bundle, table, wanted, given)
    print("\n".join(f"    {note}" for note in chosen.notes), flush=True)
    _, small = cut.run(
        it.bundle, chosen.groups, chosen.masks, chosen.left_out, it.image, edited=chosen.edited
    )
    return small.module


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


def share_right(network: Bundle, images: Tensor, labels: Tensor) -> float:
    """The share of images that a network gets right."""
    module = deployed(network).eval()
    with torch.no_grad():
        answers = torch.cat([module(x) for x in images.split(256)])
    return float((answers.argmax(1) == labels).double().mean())


def accuracies(given: argparse.Namespace, folder: Path) -> list[str]:
    """The accuracy of a trained ResNet-20 at one measured latency, whichever way its channels were shared out."""
    network = latency_networks.resnet20()
    network.load_state_dict(torch.load(given.weights, weights_only=True))
    bundle = from_module(network.eval(), torch.rand(1, 3, 32, 32))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    bundle = replace(bundle, input=replace(bundle.input, mean=mean, std=std))
    images = data.open_data(DataTable(path=given.data), bundle.input, 0)
    assert images.train is not None
    chosen = data.calibration_indices(images.train.labels, "default")
    it = case("ResNet-20, trained", bundle, costs.normalized_example(bundle.input, 0), folder)
    tables = (
        PruneTable(method="taylor"),
        PruneTable(method="taylor", allocation="uniform"),
        PruneTable(method="taylor"),
    )
    out = [
        "",
        "| channels shared out | time of dense | multiply-accumulates | accuracy | of calibration images |",
        "|---|---|---|---|---|",
    ]
    for way, table in zip(WAYS, tables, strict=True):
        name = f"accuracy-{given.budget:g}-{given.epochs}-{way.replace(' ', '-')}.json"
        path, rows = folder / name, []
        if path.exists():
            rows = json.loads(path.read_text())
        for seed in range(len(rows), given.seeds):
            seen, labels = data.calibration_images(images, "default"), images.train.labels[chosen]
            more: dict[str, Any] = {"images": seen, "labels": labels}
            if way == WAYS[2]:
                more["clock"] = None
            small = ours(it, given.budget, table, material(it, seed, **more))
            time_ = seconds(
                {"dense": it.network.file, "cut": write(small, bundle, folder / "cut.onnx")}, THOROUGH
            )
            torch.set_num_threads(given.threads)
            tuned, _ = tune.run(
                replace(bundle, module=small), images, TuneTable(epochs=given.epochs), calibration="default",
                teacher=bundle, seed=seed, scratch=folder / f"tune-{way}-{seed}",
            )  # fmt: skip
            reading = evaluate.of_network(tuned, images.held_out, way)
            torch.set_num_threads(1)
            macs = costs.total_macs(small, it.image) / costs.total_macs(bundle.module, it.image)
            known = share_right(tuned, seen, labels)
            rows.append([time_["cut"] / time_["dense"], macs, reading.value, known])
            path.write_text(json.dumps(rows))
        time_s, macs = (statistics.mean(r[i] for r in rows) for i in range(2))
        columns = [[100 * r[i] for r in rows] for i in (2, 3)]
        cells = [f"{statistics.mean(c):.2f} % ({', '.join(f'{v:.2f}' for v in c)})" for c in columns]
        out.append(f"| {way} | {100 * time_s:.1f} % | {100 * macs:.1f} % | {cells[0]} | {cells[1]} |")
    return out


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
        if given.networks and not any(name.startswith(start) for start in given.networks):
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
    print("\n".join(["", *table, "", "Predicted before it was measured:", "", *guesses]))
    if given.weights:
        print("\n".join(accuracies(given, folder)))


if __name__ == "__main__":
    main()
