"""What the latency benchmarks share: a network with its latency table, cutting it to a budget, and timing files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgeprune import bundled
from edgeprune.devices import device_from_url
from edgeprune.nn import costs
from edgeprune.nn.bundle import deployed
from edgeprune.nn.graph import find_groups, provable_groups
from edgeprune.nn.latency_survey import Bench, Subject, subject, survey
from edgeprune.nn.latency_table import Predictor
from edgeprune.quantities import limit
from edgeprune.recipe import ExportTable, MeasureTable, PruneTable
from edgeprune.records import Budget, Bundle, Group
from edgeprune.stages import cut, export, measure, prune
from edgeprune.tabling import medians

DEVICE = device_from_url("local")
QUICK, THOROUGH = MeasureTable(iterations=60, seconds=3.0), MeasureTable(iterations=300, seconds=10.0)
MULTIPLE = bundled.target("local").multiple_of["fp32"]


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
    return medians(measure.latency(files, DEVICE, table))


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
