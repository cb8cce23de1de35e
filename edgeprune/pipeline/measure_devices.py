"""The measure stage of a run: the device that decides, and the others side by side with it.

The readings of each further device lie in a folder of their own, so that one that fails costs the others nothing and
a second start measures only what is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgeprune import concurrency, data, devices, distributed, report, serialization
from edgeprune import measure as measure_stage
from edgeprune.devices import Device
from edgeprune.errors import DeviceError, EdgepruneError, WorkdirError
from edgeprune.measure import NOT_THERE, Measured, MeasureRequest, Pictures, densities, measure_unlabelled
from edgeprune.pipeline.context import Context, DeviceResult, Ledger, OtherDevices, Step, beside_key
from edgeprune.pipeline.intermediates import current_bundle, estimates, shipped
from edgeprune.records import Bundle, Plan, Reading
from edgeprune.report import ON

MEASURED, SITE = "measured.json", "device.json"


def measure(step: Step) -> None:
    """Measure the dense and the shipped file on the device that decides."""
    run, small, files = step.run, current_bundle(step.run, step.folders), _files(step.folders)
    run.log(f"measure: dense and compressed in turn on {run.device.where()}")
    networks = {"dense": run.bundle.module, "compressed": small.module}
    counted = densities(networks)
    measured = measure_stage.run(_wanted(run, run.device, step.out), files, small.plans[-1], counted=counted)
    guessed, about = estimates(run, files)
    measured = replace(
        measured,
        before=(*measured.before, *(r for name, r in guessed.items() if name == "dense")),
        after=(
            *measured.after,
            *_without_labels(step, small, files),
            *(r for name, r in guessed.items() if name != "dense"),
        ),
        notes=(*measured.notes, *about),
    )
    serialization.write(step.out / MEASURED, measured)


def look_ahead(run: Context, keys: Mapping[str, str]) -> None:
    """Log at once, and not after hours, which of the further devices still to measure can't be reached now."""
    if not run.work.leads:
        return
    checks = {
        url: device.where
        for url, device in _further(run).items()
        if not run.work.is_done("measure", beside_key(run, keys, url))
    }
    for url, future in concurrency.start(checks).items():
        try:
            future.result()
        except DeviceError as error:
            run.log(
                f"measure: {url} can't be reached now, and is tried again when it is its turn: {error.message}"
            )


def side_by_side(
    run: Context, keys: Mapping[str, str], folders: Mapping[str, Path], first: Callable[[], Path]
) -> tuple[Path, OtherDevices]:
    """Measure on all devices at the same time; those that have done so before do not measure again."""
    devices = _further(run) if run.work.leads else {}
    jobs = {
        url: partial(_on, run, beside_key(run, keys, url), dict(folders), (url, device))
        for url, device in devices.items()
    }
    futures = concurrency.start(jobs)
    try:
        folder = first()
    except EdgepruneError:
        concurrency.results(futures)
        raise
    done, failed = concurrency.results(futures)
    return folder, distributed.broadcast_object(OtherDevices(tuple(done.values()), failed))


def _further(run: Context) -> dict[str, Device]:
    return {
        devices.redacted(url): devices.device_from_url(url, run.target.setup)
        for url in run.recipe.measure.beside
    }


def _on(
    run: Context, key: str, folders: Mapping[str, Path], there: tuple[str, Device]
) -> tuple[DeviceResult, Measured]:
    """The readings of one further device, taken now if need be. there: its URL, and the device."""

    def work(out: Path) -> None:
        url, device = there
        site = DeviceResult(url, device.where(), device.facts())
        run.log(f"measure: dense and compressed in turn on {site.where}")
        plan = serialization.read(Plan, folders["cut"] / "plan.json", WorkdirError)

        def log(text: str) -> None:
            run.log(f"measure: {site.where}: {text.removeprefix('measure: ')}")

        wanted = replace(_wanted(run, device, out), log=log)
        serialization.write(out / MEASURED, measure_stage.run(wanted, _files(folders), plan))
        serialization.write(out / SITE, site)

    folder = run.work.alone("measure", key, work)
    site = serialization.read(DeviceResult, folder / SITE, WorkdirError)
    return site, serialization.read(Measured, folder / MEASURED, WorkdirError)


def _files(folders: Mapping[str, Path]) -> dict[str, Path]:
    return {"dense": folders["dense"] / "dense.onnx", "compressed": shipped(folders)}


def _wanted(run: Context, device: Device, out: Path) -> MeasureRequest:
    """What is to be read on a device. out: where its engines are kept."""
    return MeasureRequest(
        run.bundle.input, device, run.recipe.measure, run.target, run.data.held_out if run.data else None, run.log,
        engines=out, sparse=run.recipe.prune.granularity == "2:4",
    )  # fmt: skip


def _without_labels(step: Step, small: Bundle, files: Mapping[str, Path]) -> tuple[Reading, ...]:
    """Readings without data: where images were synthesized, or where there are no other ones."""
    run = step.run
    pictures = None
    if "synthesize" in step.folders:
        made = data.read(step.folders["synthesize"])
        facts: dict[str, Any] = {"synthesis": made.facts}
        if "repair" in step.folders:
            facts["repair"] = serialization.read(
                Ledger, step.folders["repair"] / "ledger.json", WorkdirError
            ).facts
        pictures = Pictures(made.images, facts, fitted="repair" in step.folders)
    elif run.data is not None:
        return ()
    return measure_unlabelled(run.bundle.input, files, pictures, run.device, run.log)


# Of their own kind, these are counted once and not read on a device.
NOT_READ = ("counted", "computed", "estimated")
# How notes begin that are of one device, and don't say which.
OF_THE_TIMES = ("The median time", "Times are", "Other work")


@dataclass(frozen=True)
class Joined:
    """The further part of a report.

    measured: the readings and the samples of the further devices, and the notes of
    all. environment: what the report's environment has besides; empty where there is one device.
    """

    measured: Measured
    environment: Mapping[str, Any]


def joined(run: Context, measured: Measured, beside: OtherDevices) -> Joined:
    """Put what the further devices measured beside what the first one did."""
    first = run.device.where() if beside.found else ""
    places = [(run.recipe.measure.device, first), *((site.url, site.where) for site, _ in beside.found)]
    named = [
        _named(site, found, name)
        for (site, found), name in zip(beside.found, concurrency.names(places)[1:], strict=True)
    ]
    parts = [part for _, part in named]
    rows = [
        *({"url": site.url, "where": site.where, **report.machine(site.facts)} for site, _ in named),
        *({"url": url, "why": error.message} for url, error in beside.failed.items()),
    ]
    notes = _first_notes(measured.notes, first, beside)
    notes += [
        f"Without readings: {concurrency.describe(url, error)}." for url, error in beside.failed.items()
    ]
    for site, part in named:
        notes += [_with_place(note, site.where) for note in part.notes if note not in measured.notes]
    found = replace(
        measured,
        before=tuple(reading for part in parts for reading in part.before),
        after=tuple(reading for part in parts for reading in part.after),
        samples={
            f"{name}{ON}{site.where}": values for site, part in named for name, values in part.samples.items()
        },
        notes=tuple(notes),
    )
    return Joined(found, {"devices": rows} if rows else {})


def _named(site: DeviceResult, measured: Measured, name: str) -> tuple[DeviceResult, Measured]:

    def moved(readings: tuple[Reading, ...]) -> tuple[Reading, ...]:
        here = [r for r in readings if not r.where.startswith(NOT_READ)]
        return tuple(replace(r, where=name) if r.where == site.where else r for r in here)

    notes = tuple(note.replace(site.where, name) for note in measured.notes if not _elsewhere(note))
    changed = replace(measured, before=moved(measured.before), after=moved(measured.after), notes=notes)
    return replace(site, where=name), changed


def _first_notes(notes: tuple[str, ...], first: str, beside: OtherDevices) -> list[str]:
    """The notes of the device that decides, among those of others: notes on times name the device.

    The note that the target was not measured is left out where a device that is not this machine gave readings.
    """
    if not beside.found:
        return list(notes)
    far = any(not site.url.startswith(("local", "fake")) for site, _ in beside.found)
    kept = [note for note in notes if not (far and _elsewhere(note))]
    return [_with_place(note, first) if note.startswith(OF_THE_TIMES) else note for note in kept]


def _elsewhere(note: str) -> bool:
    return note.startswith(NOT_THERE)


def _with_place(note: str, where: str) -> str:
    return note if where in note else f"On {where}: {note}"
