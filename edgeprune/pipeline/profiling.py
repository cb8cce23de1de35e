"""profile: what a file costs on one device or on several at once, and the latency table of a model's layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edgeprune import concurrency, devices, export, latency, measure, models, targets
from edgeprune.data import Split
from edgeprune.devices import Device
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.latency import LatencyTable
from edgeprune.measure import Judged, OnnxFile
from edgeprune.pipeline import evaluation
from edgeprune.pipeline.context import Log, load
from edgeprune.pipeline.latency_tables import bench
from edgeprune.recipe import Recipe
from edgeprune.records import InputSpec, Reading
from edgeprune.serialization import scratch_folder

# A profile that finds somebody else measuring is refused at once.
PATIENCE_S = 0.0


@dataclass(frozen=True)
class Profiled:
    """The readings of all devices, in their order; trouble: the error where some of several gave none, or None."""

    readings: tuple[Reading, ...]
    trouble: EdgepruneError | None = None


def profile(
    recipe: Recipe, *, limit: int | None, log: Log, output: str = "", trust_run: bool = False
) -> Profiled:
    """Time an ONNX file, and read its memory, size and, with data, its accuracy, on each of the recipe's devices.

    Args:
        recipe: `model.path` is the file or a run directory; `[attack]` with the name "auto" is none. Several devices
            are measured side by side, and what they read is kept when one of them fails.
    """
    path = evaluation.onnx_of(Path(recipe.model.path))
    attacked = recipe.attack.name not in ("none", "auto")
    if attacked:
        evaluation.check_attack(recipe)
    with scratch_folder() as folder:
        file = measure.look(path, folder, recipe.model.input)
        job = _job(recipe, file, (limit, output), log)
        found = _measured(recipe, job)
    noted = (
        evaluation.with_notes(r, job.notes) if r.metric == "clean_accuracy" else r for r in found.readings
    )
    found = replace(found, readings=tuple(noted))
    if not attacked:
        return found
    rows = evaluation.evaluate(recipe, limit=limit, log=log, output=output, trust_run=trust_run)
    return replace(found, readings=(*found.readings, *(r for r in rows if r.metric != "clean_accuracy")))


def _job(recipe: Recipe, file: OnnxFile, options: tuple[int | None, str], log: Log) -> _Job:
    (limit, output), spec = options, file.spec(options[1])
    log(f"profile: outputs of {file.path.name}: {file.listed}")
    if not recipe.data.path:
        return _Job(recipe, file.timed, spec, log, whole=file.alone)
    found, images = evaluation.images(recipe, spec, limit or 0)
    judged = file.judged(images, len(found.labels), wanted=output)
    for note in judged.notes:
        log(f"profile: {note}")
    return _Job(
        recipe, file.timed, judged.spec, log, whole=judged.path, images=images, judged=judged, notes=found.notes
    )  # fmt: skip


def _measured(recipe: Recipe, job: _Job) -> Profiled:
    setup = targets.target(recipe.target).setup
    urls = (recipe.measure.device, *recipe.measure.beside)
    there = {devices.redacted(url): devices.device_from_url(url, setup) for url in urls}
    if len(there) == 1:
        return Profiled(job.on(*there.values())[1])
    futures = concurrency.start({url: partial(job.on, device) for url, device in there.items()})
    done, failed = concurrency.results(futures)
    if not done:
        raise concurrency.combined_error(failed, len(there))
    names = concurrency.names([(url, where) for url, (where, _) in done.items()])
    readings = tuple(
        replace(reading, where=name) if reading.where == where else reading
        for name, (where, rows) in zip(names, done.values(), strict=True)
        for reading in rows
    )
    return Profiled(readings, concurrency.combined_error(failed, len(there)) if failed else None)


def table(recipe: Recipe, *, log: Log) -> LatencyTable:
    """Time the layers of a model over their channel counts on the recipe's device."""
    surplus = {
        "a second --device": bool(recipe.measure.beside),
        "--data": bool(recipe.data.path),
        "--attack": recipe.attack.name not in ("none", "auto"),
    }
    named = [what for what, given in surplus.items() if given]
    if named:
        raise UsageError(
            f"profile --table times the layers of a model on one device, but {' and '.join(named)} was given",
            "make the table of each device by itself, and leave out --data and --attack",
        )
    log(f"load: {recipe.model.path}")
    bundle, target = load(recipe.model), targets.target(recipe.target)
    device = devices.device_from_url(recipe.measure.device, target.setup)
    # The device is held from the first file to the last: layers of one table are timed by one who is alone.
    trials = measure.Trials(device, target, log, None)
    there = bench(trials, recipe.measure, log)
    prune = recipe.prune
    options = latency.SurveyOptions(
        prune.multiple_of or target.multiple_of["fp32"], prune.floor, prune.skip, recipe.seed
    )
    with scratch_folder() as folder:
        file = folder / "dense.onnx"
        export.run(
            models.deployed(bundle), bundle.input, file, opset=recipe.export.opset or target.opset,
            table=recipe.export, meta={}, real=None,
        )  # fmt: skip
        with device.exclusively(wait_s=PATIENCE_S, log=log):
            return latency.run(bundle, file, there, options)


@dataclass(frozen=True)
class _Job:
    """What is measured on every device alike: the file `path`.

    whole: the file for accuracies and engines, None for the same. images, judged: held-out images and
    what is judged on them. notes: what a reader must know of the images.
    """

    recipe: Recipe
    path: Path
    spec: InputSpec
    log: Log
    whole: Path | None
    images: Split | None = None
    judged: Judged | None = None
    notes: tuple[str, ...] = ()

    def on(self, device: Device) -> tuple[str, tuple[Reading, ...]]:
        """Where a device is, as its readings name the place, and what it read."""
        where = device.where()
        self.log(f"profile: {self.path} on {where}")
        target = targets.target(self.recipe.target)
        wanted = measure.MeasureRequest(
            self.spec, device, self.recipe.measure, target, self.images, self.log, wait_s=PATIENCE_S,
            judged=self.whole,
        )  # fmt: skip
        measured = measure.run(wanted, {self.path.stem: self.path}, None)
        for reading in measured.after:
            if self.judged is not None and self.images is not None and reading.metric == "clean_accuracy":
                measure.check(reading, self.judged, self.images)
        for note in measured.notes:
            self.log(note)
        return where, measured.after
