"""The measure stage of a run: the device that decides, and the others side by side with it.

The readings of each further device lie in a folder of their own, so that one that fails costs the others nothing and
a second start measures only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeprune import abreast, codec
from edgeprune.building import estimates, shipped, smaller
from edgeprune.context import Beside, Context, Ledger, Site, Step, stage, torch_part
from edgeprune.errors import DeviceError, EdgepruneError, WorkdirError
from edgeprune.keys import beside_key
from edgeprune.nn import team
from edgeprune.records import Bundle, Reading

MEASURED, SITE = "measured.json", "device.json"


def measure(step: Step) -> None:
    """Measure the dense and the shipped file on the device that decides."""
    run, small, files = step.run, smaller(step.run, step.folders), _files(step.folders)
    run.say(f"measure: dense and compressed in turn on {run.device.where()}")
    networks = {"dense": run.bundle.module, "compressed": small.module}
    counted = stage("measure_densities").densities(networks)
    measured = stage("measure_run").run(
        _wanted(run, run.device, step.out), files, small.plans[-1], counted=counted
    )
    guessed, said = estimates(run, files)
    measured = replace(
        measured,
        before=(*measured.before, *(r for name, r in guessed.items() if name == "dense")),
        after=(
            *measured.after,
            *_without_labels(step, small, files),
            *(r for name, r in guessed.items() if name != "dense"),
        ),
        notes=(*measured.notes, *said),
    )
    codec.write(step.out / MEASURED, measured)


def look_ahead(run: Context, keys: Mapping[str, str]) -> None:
    """Say at once, and not after hours, that a further device which is still to measure does not answer now.

    Raises:
        UsageError: the URL of one names what is not there.
    """
    if not run.work.leads:
        return
    asked = {
        url: device.where
        for url, device in _further(run).items()
        if not run.work.is_done("measure", beside_key(run, keys, url))
    }
    for url, future in abreast.start(asked).items():
        try:
            future.result()
        except DeviceError as error:
            run.say(
                f"measure: {url} does not answer now, and is asked again when it is its turn: {error.message}"
            )


def side_by_side(
    run: Context, keys: Mapping[str, str], folders: Mapping[str, Path], first: Callable[[], Path]
) -> tuple[Path, Beside]:
    """Measure on all devices at the same time; those that have done so before are not asked again.

    Args:
        keys: of `keys.stage_keys`. folders: of the stages before. first: measures on the device that decides.

    Returns:
        what `first` gives, and what the further devices came to.

    Raises:
        EdgepruneError: the device that decides has failed; what the others read is kept.
    """
    devices = _further(run) if run.work.leads else {}
    jobs = {
        url: partial(_on, run, beside_key(run, keys, url), dict(folders), (url, device))
        for url, device in devices.items()
    }
    futures = abreast.start(jobs)
    try:
        folder = first()
    except EdgepruneError:
        abreast.results(futures)
        raise
    done, failed = abreast.results(futures)
    return folder, team.tell(Beside(tuple(done.values()), failed))


def _further(run: Context) -> dict[str, Any]:
    """URL, without a password -> `devices.Device` of each device but the first."""
    devices = import_module("edgeprune.devices")
    return {
        devices.redacted(url): devices.device_from_url(url, run.target.setup)
        for url in run.recipe.measure.beside
    }


def _on(run: Context, key: str, folders: Mapping[str, Path], there: tuple[str, Any]) -> tuple[Site, Any]:
    """The readings of one further device, taken now if need be. there: its URL, and the device."""

    def work(out: Path) -> None:
        url, device = there
        site = Site(url, device.where(), device.facts())
        run.say(f"measure: dense and compressed in turn on {site.where}")
        plan = torch_part("store").load_plan(folders["cut"] / "plan.json")

        def say(text: str) -> None:
            run.say(f"measure: {site.where}: {text.removeprefix('measure: ')}")

        wanted = replace(_wanted(run, device, out), say=say)
        codec.write(out / MEASURED, stage("measure_run").run(wanted, _files(folders), plan))
        codec.write(out / SITE, site)

    folder = run.work.alone("measure", key, work)
    site = codec.read(Site, folder / SITE, WorkdirError)
    return site, codec.read(stage("measure_run").Measured, folder / MEASURED, WorkdirError)


def _files(folders: Mapping[str, Path]) -> dict[str, Path]:
    return {"dense": folders["dense"] / "dense.onnx", "compressed": shipped(folders)}


def _wanted(run: Context, device: Any, out: Path) -> Any:
    """What is to be read on a device (`stages.measure_run.Wanted`). out: where its engines are kept."""
    return stage("measure_run").Wanted(
        run.bundle.input, device, run.recipe.measure, run.target, run.data.held_out if run.data else None, run.say,
        engines=out, sparse=run.recipe.prune.granularity == "2:4",
    )  # fmt: skip


def _without_labels(step: Step, small: Bundle, files: Mapping[str, Path]) -> tuple[Reading, ...]:
    """What can be said without data: where images were synthesized, and where there is nothing else to be said."""
    run, synthetic = step.run, stage("measure_synthetic")
    pictures = None
    if "synthesize" in step.folders:
        made = stage("synthesize").read(step.folders["synthesize"])
        facts = {"synthesis": made.facts}
        if "repair" in step.folders:
            facts["repair"] = codec.read(Ledger, step.folders["repair"] / "ledger.json", WorkdirError).facts
        pictures = synthetic.Pictures(made.images, facts, fitted="repair" in step.folders)
    elif run.data is not None:
        return ()
    return synthetic.run((run.bundle, small), files, pictures, run.device, run.say)
