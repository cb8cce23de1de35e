"""Building: a network from the folders of its run, its file, and readings that are only had by building a trial."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from edgeprune import (
    data,
    devices,
    distributed,
    export,
    measure,
    models,
    plugins,
    progress,
    quantize,
    recipe,
    robustness,
    serialization,
    train,
)
from edgeprune.errors import UsageError
from edgeprune.export import check_for_tensorrt
from edgeprune.measure import Trials, precision_of
from edgeprune.models import deployed
from edgeprune.pipeline.context import Context
from edgeprune.prune import Probe
from edgeprune.quantities import show
from edgeprune.quantize import CalibrationSet
from edgeprune.records import Artifact, Bundle, Reading
from edgeprune.robustness import ModelUnderAttack

PARITY_IMAGES = 8
# How long a run waits for somebody else who measures on the device.
WAIT_S = 3600.0
# Seconds for each file while the precision is chosen; what ships is timed again.
CHOICE_S = 5.0
# The stages that leave weights of the smaller network; the last one that took place has the newest.
WEIGHTS = ("tune", "repair", "cut")


def current_bundle(run: Context, folders: Mapping[str, Path]) -> Bundle:
    """The cut network with the newest weights that a stage of this run has left; not to be changed."""
    newest = next(folders[name] for name in WEIGHTS if name in folders)
    return run.cut.at(run.bundle, folders["cut"] / "plan.json", newest / "weights.safetensors")


def shipped(folders: Mapping[str, Path]) -> Path:
    """The file that ships: as it was quantized, or else as it was exported."""
    exported = folders["export"] / "model.onnx"
    return quantize.shipped(exported, folders["quantize"]) if "quantize" in folders else exported


def quantize_job(run: Context, folders: Mapping[str, Path], scratch: Path) -> quantize.Job:
    """What the quantize stage is given: images, a way to time files where the target is at hand, and limits."""
    return quantize.Job(
        table=run.recipe.quantize, precision=run.recipe.export.precision, precisions=run.target.precisions,
        scheme=run.target.int8, calibration=_calibration(run, folders), scratch=scratch, log=run.log,
        timer=choice_timer(run), limits=run.budget.limits,
        dense=folders["dense"] / "dense.onnx",
    )  # fmt: skip


def timing_trials(run: Context) -> Trials:
    """How files are timed while the run decides."""
    sparse = run.recipe.prune.granularity == "2:4"
    return Trials(run.device, run.target, run.log, WAIT_S, sparse)


def choice_timer(run: Context) -> Callable[[Mapping[str, Path]], dict[str, Reading]] | None:
    """What times files to choose among them; None where the target is not at hand or only emulated."""
    if not run.decisions.on_target:
        return None
    there = timing_trials(run)
    if there.emulated:
        return None

    def times(files: Mapping[str, Path]) -> dict[str, Reading]:
        table = run.recipe.measure
        found = there.latency(files, replace(table, seconds=min(CHOICE_S, table.seconds)))
        return {
            name: next(r for r in rows if r.metric == "latency_p50") for name, rows in found.readings.items()
        }

    return times


def _calibration(run: Context, folders: Mapping[str, Path]) -> CalibrationSet | None:
    """The images that ranges are taken from; where accuracy under attack matters, attacked ones too."""
    if run.data is None or run.data.train is None:
        if "synthesize" not in folders:
            return None
        return CalibrationSet(data.read(folders["synthesize"]).images, None, "synthesized")
    images, labels = data.calibration_set(run.data, run.recipe.data.calibration)
    adversarial = _crafted(run, folders, images, labels) if run.decisions.minds_attacks else None
    return CalibrationSet(images, labels, "calibration", adversarial)


def _crafted(run: Context, folders: Mapping[str, Path], images: Tensor, labels: Tensor) -> Tensor:
    table = replace(recipe.attack(run.recipe), name="pgd")
    count = quantize.judged(len(images))
    run.log(f"quantize: attack {count} calibration images, to judge by")
    job = robustness.attack_job(table, seed=run.recipe.seed, data="")
    network = models.deployed(current_bundle(run, folders))
    generator = train.seeded_generator(run.recipe.seed, "quantize")
    pgd = job.attacks["pgd"]
    with progress.bar(count, "attack calibration images") as advance:
        parts = [
            pgd(network, x, y, job.ball, generator, advance).images
            for x, y in zip(images[:count].split(128), labels[:count].split(128), strict=True)
        ]
    return torch.cat(parts)


def estimates(run: Context, files: Mapping[str, Path]) -> tuple[dict[str, Reading], tuple[str, ...]]:
    """Estimated latencies on a target that is not at hand, by a roofline of its facts, and a sentence about it."""
    if run.decisions.on_target:
        return {}, ()
    run.log(f"measure: estimate the time on {run.target.title}")
    fit, unheld = measure.validated({"dense": files["dense"]}, run.device, run.recipe.measure)
    found = {
        name: replace(
            measure.estimate(path, run.target, precision_of(path), validation=fit, unheld=unheld),
            artifact=name,
        )
        for name, path in files.items()
    }
    if any(reading.value is None for reading in found.values()):
        return {}, ()
    times = ", ".join(f"{name} {show(reading.value, 's')}" for name, reading in found.items())
    off = f"; not validated: {unheld}"
    if fit is not None:
        off = f"; the same formula was off by {100 * fit.error:.0f} % for a typical layer here"
    return found, (f"Estimated, not measured, on {run.target.title}: {times} (roofline of its facts{off}).",)


def victims(run: Context, folders: Mapping[str, Path], scratch: Path) -> dict[str, ModelUnderAttack]:
    """What is attacked, in the order of the stages: the dense network, what each stage left, and the file.

    Adversarial images of the dense network are tried on all of them.
    """
    dense = deployed(run.bundle)
    # A file like the other one: what differs then is the network.
    original = folders["dense"] / "dense.onnx"
    found = {"dense": _file_victim(run, original, scratch, dense, {})}
    last = "tuned" if run.decisions.tuning.epochs else "bn recalibrated"
    for name, label in (("cut", "pruned"), ("repair", "repaired"), ("tune", last)):
        if name in folders and (
            name != "tune" or run.decisions.tuning.epochs or run.decisions.tuning.recalibrate
        ):
            weights = folders[name] / "weights.safetensors"
            module = deployed(run.cut.at(run.bundle, folders["cut"] / "plan.json", weights))
            found[label] = robustness.of_network(
                label, module, serialization.sha256(weights), others={"dense": dense}
            )
    twin = deployed(current_bundle(run, folders))
    exported = folders["export"] / "model.onnx"
    for name, path in (("exported", exported), ("quantized", shipped(folders))):
        if name == "exported" or path != exported:
            found[name] = _file_victim(run, path, scratch, twin, {"dense": dense})
    return found


def _file_victim(
    run: Context, path: Path, scratch: Path, twin: nn.Module, others: Mapping[str, nn.Module]
) -> ModelUnderAttack:
    local = devices.device_from_url("local")
    victim = robustness.of_file(path.name, path, scratch, local.where(), twin=twin, others=others)
    if not robustness.elsewhere(run.device):
        return victim
    there = robustness.OnDevice(run.device, run.target, scratch, run.log, WAIT_S)
    return robustness.on_device(victim, path, run.bundle.input, there)


def export_onnx(
    run: Context,
    bundle: Bundle,
    out: Path,
    *,
    parent: str,
    pattern: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Artifact, tuple[Reading, ...]]:
    """Write a network as ONNX for the run's target, and prove it; gives the artifact and the parity readings."""
    labels = list(bundle.labels or (run.data.labels if run.data else ()))
    meta = {"labels": json.dumps(labels)} if labels else {}
    if parent:
        meta["parent"] = parent
    real = next(iter(run.data.held_out.batches(PARITY_IMAGES)))[0] if run.data else None
    artifact, parity, notes = export.run(
        models.deployed(bundle), bundle.input, out,
        opset=run.recipe.export.opset or run.target.opset, table=run.recipe.export, meta=meta, real=real,
        pattern=pattern,
    )  # fmt: skip
    for note in notes:
        run.log(f"export: {note}")
    return artifact, parity


def engine_script(run: Context, artifact: Artifact, out: Path) -> None:
    """Write build_engine.sh for a target that runs TensorRT, which must take the file."""
    if "tensorrt" not in run.target.setup:
        return
    check_for_tensorrt(onnx.load(artifact.path), str(run.target.setup["tensorrt"]))
    script = plugins.build("runtimes", "tensorrt", {}).engine_script(
        run.target, artifact, dynamic_batch=run.recipe.export.dynamic_batch,
        sparse=run.recipe.prune.granularity == "2:4",
    )  # fmt: skip
    with serialization.replace_file(out / "build_engine.sh") as file:
        file.write(script.encode())
    (out / "build_engine.sh").chmod(0o755)


def measured_limits(run: Context, dense: Path) -> dict[str, Probe]:
    """Readings that are only had by building the file: its size, and its time on the device."""
    found: dict[str, Probe] = {}
    if "size" in run.budget.limits or run.decisions.file_share:
        found["size"] = Probe(
            float((dense / "dense.onnx").stat().st_size), lambda net: float(_built_size(run, net))
        )
    timed = [
        metric for metric in ("latency_p50", "latency_p90", "latency_p99") if metric in run.budget.limits
    ]
    there = timing_trials(run)
    if timed and there.emulated:
        raise UsageError(
            f"a budget on {timed[0]} can't be held on {run.device.where()}: its processor is emulated, and times there "
            "follow the number of instructions",
            "give a budget on macs, params or size, or the device itself as --device",
        )
    for metric in timed:
        first = there.latency({"dense": dense / "dense.onnx"}, run.recipe.measure)
        reference = seconds_of(first.readings["dense"], metric)

        found[metric] = Probe(reference, partial(_built_time, run, there, dense, metric, reference))
    return found


def seconds_of(readings: Sequence[Reading], metric: str) -> float:
    """The time of a file that was timed for real."""
    value = next(r.value for r in readings if r.metric == metric)
    assert value is not None, "what was timed alternately has a time"
    return value


def shared_probes(run: Context, dense: Path) -> dict[str, Probe]:
    """The same for all processes of a group: the first one reads and broadcasts."""
    own = measured_limits(run, dense) if run.work.leads else {}

    def reader(metric: str) -> Callable[[nn.Module], float]:
        return lambda net: distributed.broadcast_object(own[metric].read(net) if metric in own else 0.0)

    references = distributed.broadcast_object({metric: found.dense for metric, found in own.items()})
    return {metric: Probe(value, reader(metric)) for metric, value in references.items()}


def _built_size(run: Context, network: nn.Module) -> int:
    with serialization.scratch_folder() as folder:
        path = folder / "probe.onnx"
        artifact, _ = export_onnx(run, replace(run.bundle, module=network), path, parent="")
        if run.recipe.export.precision in ("int8", "fp16"):
            return quantize.size_of(path, run.recipe.export.precision, run.target.int8)
        return artifact.size_bytes


def _built_time(
    run: Context, there: Trials, dense: Path, metric: str, reference: float, network: nn.Module
) -> float:
    with serialization.scratch_folder() as folder:
        path = folder / "probe.onnx"
        export_onnx(run, replace(run.bundle, module=network), path, parent="")
        precision = run.recipe.export.precision
        if precision in ("int8", "fp16"):
            model = quantize.rough(path, precision, run.target.int8)
            path.write_bytes(model.SerializeToString())
        timed = there.latency({"dense": dense / "dense.onnx", "compressed": path}, run.recipe.measure)
    found = measure.latency_ratio(timed)
    if metric == "latency_p50" and found is not None:
        share = 1.0 / found[1].value
    else:
        value = {name: seconds_of(rows, metric) for name, rows in timed.readings.items()}
        share = value["compressed"] / value["dense"]
    run.log(f"prune: tried a cut that takes {100 * share:.0f} % of the dense model's time")
    return share * reference
