"""What further devices measured, put so that it can stand in one report with what the first one did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeprune import abreast
from edgeprune.context import Beside, Context, Site, stage
from edgeprune.places import ON
from edgeprune.records import Reading

# Of their own kind, these are counted once and not read on a device.
NOT_READ = ("counted", "computed", "estimated")
# How notes begin that are of one device, and don't say which.
OF_THE_TIMES = ("The median time", "Times are", "Other work")


@dataclass(frozen=True)
class Joined:
    """The further part of a report.

    measured: `stages.measure_run.Measured` with the readings and the samples of the further devices, and the notes of
    all. environment: what the report's environment has besides; empty where there is one device.
    """

    measured: Any
    environment: Mapping[str, Any]


def joined(run: Context, measured: Any, beside: Beside) -> Joined:
    """Put what the further devices measured beside what the first one did.

    Args:
        measured: of the device that decides.
    """
    first = run.device.where() if beside.found else ""
    asked = [(run.recipe.measure.device, first), *((site.url, site.where) for site, _ in beside.found)]
    named = [
        _named(site, found, name)
        for (site, found), name in zip(beside.found, abreast.names(asked)[1:], strict=True)
    ]
    parts = [part for _, part in named]
    build = stage("report_build")
    rows = [
        *({"url": site.url, "where": site.where, **build.machine(site.facts)} for site, _ in named),
        *({"url": url, "why": error.message} for url, error in beside.failed.items()),
    ]
    notes = [*_first_notes(measured.notes, first, beside), *_missing(beside)]
    for site, part in named:
        notes += [_said(note, site.where) for note in part.notes if note not in measured.notes]
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


def _named(site: Site, measured: Any, name: str) -> tuple[Site, Any]:
    """A device under a name that no other one of the run has, and what was read there alone."""

    def moved(readings: tuple[Reading, ...]) -> tuple[Reading, ...]:
        here = [r for r in readings if not r.where.startswith(NOT_READ)]
        return tuple(replace(r, where=name) if r.where == site.where else r for r in here)

    notes = tuple(note.replace(site.where, name) for note in measured.notes if not _elsewhere(note))
    changed = replace(measured, before=moved(measured.before), after=moved(measured.after), notes=notes)
    return replace(site, where=name), changed


def _first_notes(notes: tuple[str, ...], first: str, beside: Beside) -> list[str]:
    """The notes of the device that decides, among those of others: what is said of times says of which.

    The note that the target was not measured is left out where a device that is not this machine gave readings.
    """
    if not beside.found:
        return list(notes)
    far = any(not site.url.startswith(("local", "fake")) for site, _ in beside.found)
    kept = [note for note in notes if not (far and _elsewhere(note))]
    return [_said(note, first) if note.startswith(OF_THE_TIMES) else note for note in kept]


def _elsewhere(note: str) -> bool:
    return note.startswith(stage("measure_run").NOT_THERE)


def _missing(beside: Beside) -> list[str]:
    return [f"Without readings: {abreast.said(url, error)}." for url, error in beside.failed.items()]


def _said(note: str, where: str) -> str:
    return note if where in note else f"On {where}: {note}"
