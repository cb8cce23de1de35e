"""Cut and export beside torch-pruning's own pruner: same model, same budget, same run.

    python benchmarks/peer.py [--macs 0.5] [--threads 1] [MODEL ...]

MODEL is timm:NAME, torchvision:NAME or resnet20 (random weights: only structure and speed are compared). The peer is
used as its README says: group magnitude importance, the classifier ignored, `round_to` the same multiple, `step()`
until the budget of multiply-accumulates is met. Dense, ours and the peer's file are timed alternately in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from copy import deepcopy
from pathlib import Path

import torch
import torch_pruning
from torch import Tensor, nn

from edgeprune import plugins, targets
from edgeprune.devices._base import device_from_url
from edgeprune.export import stage
from edgeprune.measure import latency
from edgeprune.methods._base import PruneTask
from edgeprune.models import architectures, costs, surgery
from edgeprune.models.bundle import from_module
from edgeprune.recipe.schema import ExportTable, MeasureTable
from edgeprune.structure import groups
from edgeprune.structure.allocation import Rules

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

MODELS = (
    "resnet20",
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "timm:convnext_atto",
)


def network(spec: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and an example input."""
    torch.manual_seed(0)
    if spec == "resnet20":
        import resnet20_cifar10

        return resnet20_cifar10.resnet20().eval(), torch.rand(1, 3, 32, 32)
    return architectures.architecture(spec).eval(), torch.rand(1, 3, 224, 224)


def ours(dense: nn.Module, x: Tensor, share: float, multiple_of: int) -> tuple[nn.Module, float]:
    """The network as edgeprune cuts it (group magnitude, proof included), and the seconds that it took."""
    start = time.perf_counter()
    found = groups.provable_groups(dense, groups.find_groups(dense, x), x, 0)
    model = costs.cost_model(dense, found.groups, x)
    rules = Rules({"macs": share * model.cost({})["macs"]}, multiple_of)
    task = PruneTask(found.groups, model, rules, lambda net, pixels: net(pixels))
    masks = plugins.build("methods", "magnitude", {})(dense, task)
    failure = surgery.proof_failure(dense, found.groups, masks.channels, x)
    if failure:
        raise SystemExit(f"the proof failed: {failure}")
    small = deepcopy(dense)
    surgery.cut(small, surgery.removed_positions(found.groups, masks.channels))
    return small, time.perf_counter() - start


def peer(dense: nn.Module, x: Tensor, share: float, multiple_of: int) -> tuple[nn.Module, float]:
    """The network as torch-pruning's pruner cuts it, and the seconds that it took."""
    start = time.perf_counter()
    small = deepcopy(dense)
    limit = share * costs.total_macs(dense, x)
    heads = [m for m in small.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 1000)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            small, x, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), iterative_steps=50,
            pruning_ratio=0.9, global_pruning=True, ignored_layers=heads, round_to=multiple_of,
        )  # fmt: skip
        for _ in range(50):
            pruner.step()
            if costs.total_macs(small, x) <= limit:
                break
    return small, time.perf_counter() - start


def row(spec: str, share: float, threads: int, folder: Path) -> str:
    """One line of the table."""
    dense, x = network(spec)
    multiple_of = targets.target("local").multiple_of["fp32"]
    files, cells = {}, {}
    for name, cut in (("dense", None), ("ours", ours), ("peer", peer)):
        try:
            small, seconds = cut(dense, x, share, multiple_of) if cut else (dense, 0.0)
            start = time.perf_counter()
            path = folder / f"{name}.onnx"
            bundle = from_module(small, x)
            stage.run(small.eval(), bundle.input, path, opset=20, table=ExportTable(), meta={}, real=None)
        except Exception as error:
            cells[name] = f"FAILS: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
            continue
        files[name] = path
        macs = costs.total_macs(small, x) / costs.total_macs(dense, x)
        cells[name] = f"{100 * macs:5.1f} % | {seconds:6.1f} s | {time.perf_counter() - start:5.1f} s"
    timed = latency.latency(files, device_from_url("local"), MeasureTable(threads=threads))
    p50 = {n: next(r.value for r in rows if r.metric == "latency_p50") for n, rows in timed.readings.items()}
    lines = [f"| {spec} | dense | 100.0 % | | | {1e3 * p50['dense']:.2f} ms | 1.00x |"]
    for name in ("ours", "peer"):
        speed = f"{1e3 * p50[name]:.2f} ms | {p50['dense'] / p50[name]:.2f}x" if name in p50 else "- | -"
        cell = cells[name] if name in p50 else f"{cells[name]} | - | -"
        lines.append(f"| | {'edgeprune' if name == 'ours' else 'torch-pruning'} | {cell} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(f"budget: macs = {given.macs:.0%} of dense; {given.threads} thread(s); median of alternating runs")
    print(
        "| model | tool | MACs left | surgery | export | latency p50 | speed-up |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for spec in given.models:
            print(row(spec, given.macs, given.threads, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
