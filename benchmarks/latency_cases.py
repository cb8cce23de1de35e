"""What the latency benchmarks share: a network with its latency table, cutting it to a budget, and timing files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgeprune import targets
from edgeprune.devices._base import device_from_url
from edgeprune.export import stage
from edgeprune.latency.sampling import ProfiledNetwork, TimingBackend, subject, survey
from edgeprune.latency.table import Predictor
from edgeprune.measure import latency, layer_times
from edgeprune.models import costs
from edgeprune.models.bundle import deployed
from edgeprune.pipeline.latency_tables import medians
from edgeprune.prune import budget_search, cut
from edgeprune.prune import stage as stage_module
from edgeprune.prune.stage import PruningInputs
from edgeprune.quantities import limit
from edgeprune.recipe.schema import ExportTable, MeasureTable, PruneTable
from edgeprune.records import Budget, Bundle, Group
from edgeprune.structure.groups import find_groups, provable_groups

DEVICE = device_from_url("local")
QUICK, THOROUGH = MeasureTable(iterations=60, seconds=3.0), MeasureTable(iterations=300, seconds=10.0)
MULTIPLE = targets.target("local").multiple_of["fp32"]


@dataclass(frozen=True)
class Case:
    """A network with its file, its groups, the layers that can't be cut and what predicts its time."""

    name: str
    bundle: Bundle
    image: Tensor
    folder: Path
    groups: tuple[Group, ...]
    whole: tuple[str, ...]
    network: ProfiledNetwork
    clock: Predictor


def seconds(files: Mapping[str, Path], table: MeasureTable) -> dict[str, float]:
    """The median of one image of each file, by the clock to be believed: CPU time with one thread."""
    return medians(latency.latency(files, DEVICE, table))


def bench(folder: Path) -> TimingBackend:
    """This machine, one thread."""
    about = DEVICE.facts()
    place = f"{DEVICE.where()}, {about.get('cpu', '')}, 1 thread, fp32"
    return TimingBackend(
        lambda files: seconds(files, QUICK),
        lambda file: [(n.name, n.seconds) for n in layer_times.node_times(file, DEVICE, QUICK)],
        place, folder / "tables",
    )  # fmt: skip


def write(module: nn.Module, like: Bundle, path: Path) -> Path:
    """A network as the file that would ship."""
    bundle = replace(like, module=module)
    stage.run(deployed(bundle), bundle.input, path, opset=20, table=ExportTable(), meta={}, real=None)
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


def material(it: Case, seed: int = 0, **more: Any) -> PruningInputs:
    """What prune is given: the device, and the table unless `latency_model` is None."""
    dense = seconds({"dense": it.network.file}, THOROUGH)["dense"]

    def read(module: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = write(module, it.bundle, Path(folder, "cut.onnx"))
            timed = latency.latency({"dense": it.network.file, "compressed": path}, DEVICE, THOROUGH)
        found = latency.latency_ratio(timed)
        assert found is not None
        return dense / found[1].value

    probes = {"latency_p50": budget_search.Probe(dense, read)}
    given: dict[str, Any] = {"latency_model": lambda _costs: it.clock, **more}
    images, labels = given.pop("images", None), given.pop("labels", None)
    return PruningInputs(images, labels, probes, MULTIPLE, seed, **given)


def ours(it: Case, share: float, table: PruneTable, given: PruningInputs) -> nn.Module:
    """The network cut to a share of its time."""
    wanted = Budget({"latency_p50": limit("latency_p50", f"{100 * share:g} %")})
    chosen = stage_module.run(it.bundle, table, wanted, given)
    print("\n".join(f"    {note}" for note in chosen.notes), flush=True)
    _, small = cut.run_cut(
        it.bundle, chosen.groups, chosen.masks, chosen.left_out, it.image, edited=chosen.edited
    )
    return small.module
