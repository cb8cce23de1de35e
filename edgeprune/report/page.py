"""report.html and report.md: the templates of this package, filled from one set of rows.

Whatever a template writes goes through `escape_html` or `escape_markdown`, so no text of a report becomes markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgeprune.errors import visible
from edgeprune.records import Report
from edgeprune.report import history, per_device, plots, rows, unlabelled
from edgeprune.report.assembly import SPARSE_NOTE

if TYPE_CHECKING:
    from jinja2 import Template

HEADLINES = ("macs", "size", "latency_p50", "clean_accuracy")
# Of a network whose single weights were set to zero: what changed.
SPARSE_HEADLINES = ("params", "compressed_size", "latency_p50", "clean_accuracy")
ABOUT = {"method": "prune.method", "granularity": "prune.granularity", "seed": "seed"}
FILTERS: dict[str, Any] = {
    "curve_table": plots.curve_table,
    "drawing": plots.drawing,
    "exact": rows.exact_text,
    "fixed": plots.fixed,
    "interval": rows.interval_text,
    "quantity": rows.quantity,
    "summary_rows": history.summary_rows,
}
# Characters that no HTML document may hold, besides those that `visible` writes as escapes.
_FORBIDDEN = re.compile("[\ufdd0-\ufdef\ufffe\uffff]")
# An underscore inside a word is no emphasis, and metrics have many.
_SPECIAL = re.compile(r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^>|^[#+-](?=[#\s]))")


def page(report: Report, sentences: Sequence[str]) -> str:
    """report.html; `sentences` is the summary that opens it."""
    made = rows.comparison(report)
    first, *others = per_device.views(report)
    about = {name: dict(rows.facts(report.recipe)).get(key) for name, key in ABOUT.items()}
    about["edgeprune"] = dict(rows.facts(report.environment)).get("versions.edgeprune")
    names = SPARSE_HEADLINES if any(s.startswith(SPARSE_NOTE) for s in sentences) else HEADLINES
    layer_plots = {
        "channels": plots.layer_plot(report, "channels", "channels"),
        "nonzero": plots.layer_plot(report, "nonzero", "non-zero weights"),
        "time": plots.layer_plot(report, "time", "time", "s"),
        "size": plots.layer_plot(report, "size", "size of the weights", "B"),
    }
    return _template("page.html", escape_html).render(
        _shared(report, sentences),
        about=[(name, value) for name, value in about.items() if value],
        headlines=[
            row for name in names for row in made
            if row.metric == name and row.before and row.after and row.change != "-"
        ],
        ledger_plots=plots.ledger_plots(rows.ledger(report)),
        distributions=plots.distributions(report),
        layer_plots=layer_plots,
        several=bool(others),
        first_place=plots.place_of(first),
        recipe=json.dumps(report.recipe, indent=1, ensure_ascii=False, default=str),
    )  # fmt: skip


def document(report: Report, sentences: Sequence[str]) -> str:
    """report.md; `sentences` is the summary that opens it."""
    from markupsafe import Markup

    recipe = json.dumps(report.recipe, indent=1, default=str)
    longest = max(map(len, re.findall("`+", recipe)), default=0)
    return _template("document.md", escape_markdown).render(
        _shared(report, sentences),
        ledger=rows.ledger(report),
        recipe=Markup(recipe),
        fence=Markup("`" * max(3, longest + 1)),
    )


def escape_html(text: str) -> str:
    """Text that shows as itself in HTML, in SVG and inside a quoted attribute."""
    return html.escape(_FORBIDDEN.sub("\ufffd", visible(text)))


def escape_markdown(text: str) -> str:
    """Text that shows as itself in Markdown: no markup, no HTML, one line."""
    text = _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _shared(report: Report, sentences: Sequence[str]) -> dict[str, Any]:
    model, target = rows.heading(report)
    tried, candidates = rows.candidates(report)
    columns, layers = rows.layer_table(report.layers)
    return {
        "report": report,
        "sentences": sentences,
        "model": model,
        "target": target,
        "comparison": rows.comparison(report),
        "unlabelled": {
            "title": unlabelled.TITLE,
            "introduction": unlabelled.INTRODUCTION,
            "head": unlabelled.HEAD,
            "rows": unlabelled.without_labels(report),
        },
        "precision": {
            "title": rows.TITLE,
            "introduction": rows.INTRODUCTION,
            "head": tried,
            "rows": candidates,
            "numbers": range(1, len(tried) - 1),
        },
        "history_title": history.TITLE,
        "chapters": history.chapters(report),
        "layers": {"head": columns, "rows": layers},
        "readings": {"head": rows.READING_COLUMNS, "rows": rows.reading_table(report)},
        "environment": rows.facts(report.environment),
    }


def _template(name: str, escape: Callable[[str], str]) -> Template:
    # Imported here, since `edgeprune gate` reads reports and writes none.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("edgeprune.report"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escape(str(value))),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(name)
