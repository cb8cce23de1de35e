"""What the command line shows in a terminal, as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from edgeprune import report
from edgeprune.quantities import show
from edgeprune.records import METRICS, Reading, Report
from edgeprune.report import comparison, heading, views

if TYPE_CHECKING:
    from edgeprune.pipeline import Result

OUTCOMES = {"pass": "met", "fail": "MISSED", "missing": "not read", "inconclusive": "can't be told"}


def report_table(report: Report) -> Table:
    """The before/after table."""
    model, target = heading(report)
    table = Table(title=Text(f"{model} for {target}"), title_justify="left", box=SIMPLE_HEAD)
    for name in ("metric", "dense", "compressed", "change"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    table.add_column("how and where", style="dim", overflow="fold")
    for row in comparison(report):
        style = "" if row.better is None else ("green" if row.better else "red")
        # Text, not str: a name in square brackets is no color.
        table.add_row(row.metric, row.dense, row.compressed, Text(row.change, style=style), Text(row.how))
    return table


def summary(result: Result) -> list[str]:
    """Plain words below the table: the outcome, the budget, and where everything lies."""
    lines = list(report.summary_lines(result.report))
    several = len(views(result.report)) > 1
    for check in result.verdict.checks:
        unit = METRICS[check.metric].unit
        outcome = OUTCOMES[check.status]
        device = f"; {check.detail}" if several and check.detail else ""
        lines.append(
            f"Budget {check.metric} {check.limit}: {outcome} "
            f"({show(check.value, unit)}, limit {show(check.threshold, unit)}{device})."
        )
    lines.append(f"Report: {result.folder / 'report.html'}")
    lines.append(f"Ship:   {result.folder / 'model.onnx'}")
    return lines


def readings_table(readings: Sequence[Reading]) -> Table:
    """Readings of one file."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("metric", "value", "95 % interval", "where"):
        table.add_column(name, justify="right" if name in ("value", "95 % interval") else "left")
    for r in readings:
        low_high = f"{show(r.spread[0], r.unit)} - {show(r.spread[1], r.unit)}" if r.spread else ""
        value = show(r.value, r.unit) if r.value is not None else f"- ({r.conditions.get('why', 'not read')})"
        table.add_row(r.metric, value, low_high, Text(r.where))
    return table


def latency_table(found: Any) -> Table:
    """The rows of `latency.layer_table.LatencyTable`: each layer over its channel counts."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("layer", "channels", "in its place", "timed", "alone"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    last = ""
    for r in found.rows:
        alone = show(r.alone, "s") if r.alone else "-"
        table.add_row(
            r.layer if r.layer != last else "",
            f"{r.reads} -> {r.makes}",
            show(r.seconds, "s"),
            str(r.n),
            alone,
        )
        last = r.layer
    return table


def latency_lines(found: Any) -> list[str]:
    """What the table says of whole networks, and where its timings are kept."""
    lines = [f"The whole network takes {show(found.dense, 's')} on {found.place}."]
    for whole in found.wholes:
        lines.append(f"{100 * whole.share:3.0f} % of the channels: {show(whole.seconds, 's')} predicted.")
    for cut in found.measured:
        error = 100 * (cut.predicted / cut.seconds - 1)
        lines.append(
            f"timed whole: {show(cut.seconds, 's')}, predicted {show(cut.predicted, 's')} ({error:+.1f} %)."
        )
    return [*lines, f"The timings are kept in {found.path}."]


def why_table(rows: Sequence[Any]) -> Table:
    """Layers and their costs; the reasons go below (`reasons`), where they have room."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("layer", "op", "channels", "params", "MACs", "MACs %", "time %", "PQI", "can go"):
        table.add_column(
            name, justify="left" if name in ("layer", "op", "can go") else "right", overflow="fold"
        )
    for r in rows:
        time = f"{100 * r.time_share:.1f}" if r.time_share is not None else "-"
        counts = (str(r.channels), show(r.params, ""), show(r.macs, ""), f"{100 * r.macs_share:.1f}")
        table.add_row(Text(r.layer), r.op, *counts, time, f"{r.pqi:.2f}", "no" if r.why_not else "yes")
    return table


def reasons(rows: Sequence[Any]) -> list[str]:
    """Why layers can't be pruned: one line for each reason, with the layers that it holds for."""
    found: dict[str, list[str]] = {}
    for r in rows:
        if r.why_not:
            found.setdefault(r.why_not, []).append(r.layer)
    return [f"Stays whole: {', '.join(layers)}: {reason}." for reason, layers in found.items()]


def doctor_table(rows: Sequence[Any]) -> Table:
    """What works, what is missing, and the line that installs it."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "what", "found", "what to do"):
        # Commands are there to be copied: whole ones, however narrow the terminal is.
        table.add_column(name, overflow="fold")
    for r in rows:
        style = {"ok": "green", "missing": "red", "warning": "yellow"}.get(r.status, "dim")
        table.add_row(Text(r.status, style=style), Text(r.name), Text(r.found), Text(r.fix))
    return table
