"""Building: a network from the folders of its run, its file, and readings that are only had by building a trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeprune.context import Context, stage, torch_part
from edgeprune.records import Bundle, Reading

PARITY_IMAGES = 8
# The stages that leave weights of the smaller network; the last one that took place has the newest.
WEIGHTS = ("tune", "repair", "cut")


def smaller(run: Context, folders: Mapping[str, Path]) -> Bundle:
    """The cut network with the newest weights that a stage of this run has left."""
    store = torch_part("store")
    newest = next(folders[name] for name in WEIGHTS if name in folders)
    plan = store.load_plan(folders["cut"] / "plan.json")
    return store.restore(run.bundle, (plan,), newest / "weights.safetensors")


def export_onnx(run: Context, bundle: Bundle, out: Path, *, parent: str) -> tuple[Any, tuple[Reading, ...]]:
    """Write a network as ONNX for the run's target, and prove it; gives the artifact and the parity readings."""
    labels = list(bundle.labels or (run.data.labels if run.data else ()))
    meta = {"labels": json.dumps(labels)} if labels else {}
    if parent:
        meta["parent"] = parent
    real = next(iter(run.data.held_out.batches(PARITY_IMAGES)))[0] if run.data else None
    artifact, parity, notes = stage("export").run(
        torch_part("bundle").deployed(bundle), bundle.input, out,
        opset=run.recipe.export.opset or run.target.opset, table=run.recipe.export, meta=meta, real=real,
    )  # fmt: skip
    for note in notes:
        run.say(f"export: {note}")
    return artifact, parity


def probes(run: Context, dense: Path) -> dict[str, Any]:
    """Readings that are only had by building the file: its size, and its time on the device."""
    found, measure, probe = {}, stage("measure"), stage("prune").Probe
    if "size" in run.budget.limits:
        found["size"] = probe(
            float((dense / "dense.onnx").stat().st_size), lambda net: float(_built_size(run, net))
        )
    for metric in ("latency_p50", "latency_p90", "latency_p99"):
        if metric in run.budget.limits:
            first = measure.latency({"dense": dense / "dense.onnx"}, run.device, run.recipe.measure)
            reference = next(r.value for r in first.readings["dense"] if r.metric == metric)

            def read(net: Any, metric: str = metric, reference: float = reference) -> float:
                return _built_time(run, net, dense, metric) * reference

            found[metric] = probe(reference, read)
    return found


def _built_size(run: Context, network: Any) -> int:
    with TemporaryDirectory(prefix="edgeprune-") as folder:
        artifact, _ = export_onnx(
            run, replace(run.bundle, module=network), Path(folder, "probe.onnx"), parent=""
        )
        return artifact.size_bytes


def _built_time(run: Context, network: Any, dense: Path, metric: str) -> float:
    """The time of a cut network as a share of the dense one's, timed alternately."""
    with TemporaryDirectory(prefix="edgeprune-") as folder:
        path = Path(folder, "probe.onnx")
        export_onnx(run, replace(run.bundle, module=network), path, parent="")
        timed = stage("measure").latency(
            {"dense": dense / "dense.onnx", "compressed": path}, run.device, run.recipe.measure
        )
    found = stage("measure").speedup(timed)
    if metric == "latency_p50" and found is not None:
        share = 1.0 / found[1].value
    else:
        value = {
            name: next(r.value for r in rows if r.metric == metric) for name, rows in timed.readings.items()
        }
        share = value["compressed"] / value["dense"]
    run.say(f"prune: tried a cut that takes {100 * share:.0f} % of the dense model's time")
    return share
