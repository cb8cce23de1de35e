"""A report of several devices taken apart: what each of them alone would have reported."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgeprune.records import Reading, Report

# Between the side and the place in the names of the samples of a further device.
ON = " on "


def views(report: Report) -> tuple[Report, ...]:
    """The report without the further devices, and for each of these one that has only the readings of that place.

    The second and later ones have an `environment.device` and samples of their own, and say nothing of layers.
    """
    further = {str(row["where"]): row for row in _rows(report) if row.get("where")}
    if not further:
        return (report,)
    first = replace(
        report,
        before=_readings(report.before, lambda where: where not in further),
        after=_readings(report.after, lambda where: where not in further),
        samples={name: values for name, values in report.samples.items() if ON not in name},
    )
    return (first, *(_view(report, where, facts) for where, facts in further.items()))


def where_of(view: Report) -> str:
    """The place of a view of a further device, "" of the first one."""
    return str(view.environment.get("place") or "")


def unread(report: Report) -> dict[str, str]:
    """The further devices that gave no readings: URL -> why."""
    rows = [row for row in _rows(report) if not row.get("where")]
    return {str(row.get("url") or "?"): str(row.get("why") or "no reason was recorded") for row in rows}


def _rows(report: Report) -> list[Mapping[str, Any]]:
    rows = report.environment.get("devices")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, (list, tuple)) else []


def _view(report: Report, where: str, facts: Mapping[str, Any]) -> Report:
    tail = f"{ON}{where}"
    samples = {name: values for name, values in report.samples.items() if name.endswith(tail)}
    return replace(
        report,
        environment={**report.environment, "device": facts, "place": where},
        before=_readings(report.before, lambda found: found == where),
        after=_readings(report.after, lambda found: found == where),
        samples={name[: -len(tail)]: values for name, values in samples.items()},
        layers=(),
    )


def _readings(readings: tuple[Reading, ...], taken: Any) -> tuple[Reading, ...]:
    return tuple(reading for reading in readings if taken(reading.where))
