"""report.md: the report as GitHub shows it, with long tables folded away."""

import json
import re
from collections.abc import Sequence

from edgeprune.errors import visible
from edgeprune.records import Report
from edgeprune.report import rows as rows_module
from edgeprune.report.history import TITLE as HISTORY
from edgeprune.report.history import chapters, summary_rows
from edgeprune.report.html import reading_cells
from edgeprune.report.rows import (
    candidates,
    comparison,
    facts,
    heading,
    layer_table,
    ledger,
)
from edgeprune.report.unlabelled import HEAD, INTRODUCTION, TITLE, without_labels

# An underscore inside a word is no emphasis, and metrics have many.
_SPECIAL = re.compile(r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^>|^[#+-](?=[#\s]))")


def document(report: Report, sentences: Sequence[str]) -> str:
    """The report as Markdown; `sentences` is the summary in plain words that opens it."""
    model, target = heading(report)
    blocks = [f"# {plain(model)} for {plain(target)}", *[plain(s) for s in sentences]]
    if report.notes:
        blocks += ["## Read this first", "\n".join(f"- {plain(note)}" for note in report.notes)]
    blocks += ["## Before and after", _comparison(report)]
    if unlabelled := without_labels(report):
        rows = [[r.metric, r.text, r.mark, r.about, str(r.n or "-"), r.how] for r in unlabelled]
        blocks += [f"## {TITLE}", INTRODUCTION, table(HEAD, rows, numbers=(1,))]
    if report.ledger:
        rows = [[r.stage, r.metric, r.text, str(r.n), r.how] for r in ledger(report)]
        blocks += [
            "## Accuracy after each stage",
            table(["after", "metric", "value (95 % interval)", "images", "how and where"], rows),
        ]
    head, tried = candidates(report)
    if tried:
        numbers = range(1, len(head) - 1)
        blocks += [
            f"## {rows_module.TITLE}",
            rows_module.INTRODUCTION,
            table(head, tried, numbers=tuple(numbers)),
        ]
    blocks += _history(report)
    blocks += _folds(report)
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Text that shows as itself: no markup, no HTML, one line."""
    text = _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A GitHub table; the columns in `numbers` are aligned to the right."""
    marks = ["---:" if i in numbers else "---" for i in range(len(head))]
    lines = [[plain(cell) or " " for cell in row] for row in (head, *rows)]
    lines.insert(1, marks)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _comparison(report: Report) -> str:
    rows = [[r.metric, r.dense, r.compressed, r.change, r.how] for r in comparison(report)]
    if not rows:
        return "This report has no readings."
    return table(["metric", "dense", "compressed", "change", "how and where"], rows, numbers=(1, 2, 3))


def _history(report: Report) -> list[str]:
    """Of each curve where it began, how far it went, and where it ended; all numbers are in the other two files."""
    blocks: list[str] = []
    for chapter in chapters(report):
        head = f"### {plain(chapter.title)}"
        said = [f"- {plain(name)}: {plain(text)}" for name, text in chapter.facts]
        rows = summary_rows(chapter)
        columns = ["what", "of", "first", "least", "most", "last"]
        folded = _fold(f"Curves ({len(rows)})", table(columns, rows, numbers=(2, 3, 4, 5))) if rows else []
        blocks += [head, *(["\n".join(said)] if said else []), *folded]
    return [f"## {HISTORY}", *blocks] if blocks else []


def _folds(report: Report) -> list[str]:
    columns, layers = layer_table(report.layers)
    left = list(report.left_out.items())
    readings = [reading_cells(r) for r in (*report.before, *report.after)]
    full = table(
        ["metric", "of", "value", "95 % interval", "n", "how and where", "conditions"], readings, numbers=(2,)
    )
    return [
        *(_fold(f"Layers ({len(layers)})", table(columns, layers)) if layers else []),
        *(_fold(f"Groups that were not pruned ({len(left)})", table(["group", "why"], left)) if left else []),
        *(_fold("How each number was obtained", full) if readings else []),
        *_fold("Environment", table(["name", "value"], facts(report.environment))),
        *_fold("Recipe", _code(json.dumps(report.recipe, indent=1, default=str))),
    ]


def _fold(title: str, content: str) -> list[str]:
    # GitHub reads Markdown inside details only after an empty line.
    return [f"<details><summary>{title}</summary>", content, "</details>"]


def _code(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}json\n{text}\n{fence}"
