"""Write a run's report as JSON, Markdown and HTML, show it in a terminal, and read report.json back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune import serialization
from edgeprune.errors import UsageError
from edgeprune.quantities import show
from edgeprune.records import REPORT_SCHEMA, Report
from edgeprune.report import per_device
from edgeprune.report.assembly import SPARSE_NOTE
from edgeprune.report.page import document, page
from edgeprune.report.rows import Row, find, leading, provenance, value_of
from edgeprune.report.unlabelled import sentences
from edgeprune.speedup import UNDECIDED, verdict_on

RESULT_VERSION = 1
# What a note of the run says with its reason is not said a second time.
SPEED_NOTE = "Speed:"
ACCURACY_NOTE = "No accuracy was measured"


def run(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into a folder; each is whole or absent, never half."""
    sentences = _sentences(report)
    shown = replace(report, notes=_others(report, sentences))
    _write(folder / "report.md", document(shown, sentences))
    _write(folder / "report.html", page(shown, sentences))
    serialization.write(folder / "report.json", report)


def summary_lines(report: Report) -> list[str]:
    """The outcome in plain words: smaller, faster, still right; then every note of the report."""
    sentences = _sentences(report)
    return [*sentences, *_others(report, sentences)]


def load(path: Path) -> Report:
    """Read the report of a run directory, or a report.json."""
    file = _locate(path)
    data = _json(file)
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, str):
        raise UsageError(
            f"{file} is not a report of edgeprune: it has no schema", f"its schema must be {REPORT_SCHEMA!r}"
        )
    if schema != REPORT_SCHEMA:
        hint = "make the report again with this version, or use the version of edgeprune that wrote it"
        raise UsageError(
            f"{file} has the schema {schema!r:.80}; this edgeprune reads {REPORT_SCHEMA!r}", hint
        )
    try:
        report = serialization.from_json(Report, data, "report")
        _verify(report)
    except UsageError as error:
        raise UsageError(f"{file} is not a whole report: {error}", _again()) from error
    return report


def _locate(path: Path) -> Path:
    try:
        folder = path.is_dir()
        file = path / "report.json" if folder else path
        found = file.is_file()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    if folder and not found:
        hint = "the run has not finished: give `edgeprune compress` the same command again to resume it"
        raise UsageError(f"{path} has no report.json", hint)
    if not found:
        raise UsageError(
            f"no such run directory or report: {path}", "edgeprune compress MODEL --target NAME writes one"
        )
    return file


def _json(file: Path) -> Any:
    try:
        return serialization.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not a readable report: {error}", _again()) from error


def _verify(report: Report) -> None:
    for view in per_device.views(report):
        for side, artifact in (("before", "dense"), ("after", "compressed")):
            seen: set[tuple[str, bool]] = set()
            for reading in getattr(view, side):
                named = f"report.{side} has a reading of {reading.metric} ({reading.where})"
                if reading.artifact != artifact:
                    raise UsageError(
                        f"{named} of {reading.artifact!r:.80}, and may only have those of {artifact!r}"
                    )
                if (reading.metric, reading.measured) in seen:
                    raise UsageError(f"{named}, and another one of the same file and the same device")
                seen.add((reading.metric, reading.measured))
    for name, values in report.samples.items():
        if any(v < 0 for v in values):
            raise UsageError(f"report.samples.{name} holds a negative time, {min(values)}")


def _again() -> str:
    return (
        "give a report.json as edgeprune wrote it; `edgeprune compress` with the same command writes it again"
    )


def _write(path: Path, text: str) -> None:
    with serialization.replace_file(path) as file:
        file.write(text.encode(errors="replace"))


def _sentences(report: Report) -> list[str]:
    rows = leading(report)
    zeros = [note for note in report.notes if note.startswith(SPARSE_NOTE)]
    found = [
        *_smaller(rows, sparse=bool(zeros)), *zeros, *_faster(report, rows), *_accuracies(report, rows),
        *sentences(report),
    ]  # fmt: skip
    # Smaller and not faster: who reads one line only must read this one.
    slow = [note for note in report.notes if note.startswith(f"{SPEED_NOTE} NOT")]
    return [*slow, *found]


def _others(report: Report, sentences: list[str]) -> tuple[str, ...]:
    return tuple(note for note in report.notes if note not in sentences)


def _smaller(rows: dict[str, Row], *, sparse: bool) -> Iterator[str]:
    names = {"macs": "multiply-accumulates", "params": "parameters", "size": "file size"}
    if sparse:
        names["compressed_size"] = "compressed file size"
    changes = [
        f"{name} {rows[metric].change}"
        for metric, name in names.items()
        if metric in rows and rows[metric].change != "-"
    ]
    if changes:
        yield f"Compared with the dense model: {', '.join(changes)}."


def _faster(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    if any(note.startswith(SPEED_NOTE) for note in report.notes):
        return
    row = rows.get("latency_p50")
    after = find(report.after, "latency_p50")
    if row is None or after is None or value_of(after) is None:
        yield "Speed is unknown: no latency was measured."
        return
    if row.change == "-":
        yield f"Median time of one image {row.compressed} ({provenance(after)}); nothing to compare it with."
        return
    times = f"median {row.dense} before, {row.compressed} after, {row.how}"
    if after.conditions.get("contended") is True:
        times += " while other work ran on it"
    if "faster" in row.change:
        yield f"{row.change[:1].upper()}{row.change[1:]}: {times}."
    elif "uncertain" in row.change:
        yield f"Not known to be faster ({row.change}: there is no 95 % interval): {times}."
    elif row.change == "not comparable":
        yield f"Dense and compressed were timed in different ways and can't be compared: {times}."
    elif row.before is not None and verdict_on(row.before, after) == UNDECIDED:
        yield f"NOT shown to be faster ({row.change}): {times}."
    else:
        yield f"NOT faster ({row.change}): {times}."


def _accuracies(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    for metric, name in (("clean_accuracy", "Clean accuracy"), ("robust_accuracy", "Accuracy under attack")):
        row, after = rows.get(metric), find(report.after, metric)
        if row and after and value_of(after) is not None:
            images = f" of {after.n} held-out images" if after.n else ""
            was = f", dense {row.dense} ({row.change})" if row.change != "-" else ""
            yield f"{name} {show(value_of(after), 'fraction')}{images}{was}."
    noted = any(note.startswith(ACCURACY_NOTE) for note in report.notes)
    if not noted and value_of(find(report.after, "clean_accuracy")) is None:
        yield "Accuracy is unknown: the compressed model was not tried on labeled images."
