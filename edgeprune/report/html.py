"""report.html: the whole report as one page that needs no network, no script and no font of its own."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from edgeprune.records import Reading, Report
from edgeprune.report import per_device, plots, unlabelled
from edgeprune.report import rows as tables
from edgeprune.report.assembly import SPARSE_NOTE
from edgeprune.report.markup import LONG_TABLE, element, join, templates
from edgeprune.report.rows import (
    NONZERO,
    Row,
    facts,
    how_had,
    interval_of,
    number_in,
    quantity,
    text_of,
    unit_of,
)

LONGEST_S = 1e6
HEADLINES = ("macs", "size", "latency_p50", "clean_accuracy")
# Of a network whose single weights were set to zero: what changed.
SPARSE_HEADLINES = ("params", "compressed_size", "latency_p50", "clean_accuracy")
TEXTS = {
    "unlabelled": unlabelled.TITLE,
    "about_unlabelled": unlabelled.INTRODUCTION,
    "precision": tables.TITLE,
    "about_precision": tables.INTRODUCTION,
}


def page(report: Report, sentences: Sequence[str]) -> str:
    """The page as text; `sentences` is the summary in plain words that opens it."""
    model, target = tables.heading(report)
    rows, views = tables.comparison(report), per_device.views(report)
    made = templates()
    made.filters.update(
        code=_with_code, breakable=_breakable, tone=_tone, interval=interval_text, exact=_exact
    )
    return made.get_template("page.html").render(
        model=model,
        target=target,
        report=report,
        texts=TEXTS,
        style=Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
        settings=_settings(report),
        sentences=sentences,
        rows=rows,
        headlines=_headlines(rows, sparse=any(s.startswith(SPARSE_NOTE) for s in sentences)),
        unlabelled=unlabelled.without_labels(report),
        ledger=list(_ledger(report)),
        times=list(_times(views)),
        candidates=tables.candidates(report),
        history=plots.history(report),
        layers=_layers(report),
        first_place=_place(views[0]) if len(views) > 1 else "",
        folds=list(_folds(report)),
        recipe=json.dumps(report.recipe, indent=1, ensure_ascii=False, default=str),
    )


def _settings(report: Report) -> list[tuple[str, str]]:
    recipe = dict(facts(report.recipe))
    shown = {
        "method": recipe.get("prune.method"),
        "granularity": recipe.get("prune.granularity"),
        "seed": recipe.get("seed"),
        "edgeprune": dict(facts(report.environment)).get("versions.edgeprune"),
    }
    return [(name, value) for name, value in shown.items() if value]


def _headlines(rows: Sequence[Row], *, sparse: bool) -> list[Row]:
    names = SPARSE_HEADLINES if sparse else HEADLINES
    found = [row for name in names for row in rows if row.metric == name and row.before and row.after]
    return [row for row in found if row.change != "-"]


def _times(views: Sequence[Report]) -> Iterator[tuple[str, str, list[tuple[str, str]], Markup | None]]:
    """Of each device: its place (where there are several), where the times are of, the legend, and the plot."""
    for view in views:
        samples: dict[str, Sequence[float]] = {}
        for name in ("dense", "compressed"):
            good = sorted(v for v in view.samples.get(name, ()) if math.isfinite(v) and 0 <= v < LONGEST_S)
            if good:
                samples[name] = good
        after = next((r for r in view.after if r.metric.startswith("latency")), None)
        middles = {name: values[(len(values) - 1) // 2] for name, values in samples.items()}
        key = [(n, f"{n}, median {quantity(m, 's')}, {len(samples[n])} times") for n, m in middles.items()]
        drawn = plots.distribution(samples) if samples else None
        if len(views) == 1:
            yield "", f" ({how_had(after)})" if after else "", key, drawn
        elif view.samples or not view.layers:
            yield _place(view), f" ({how_had(after)})" if after else "", key, drawn


def _place(view: Report) -> str:
    return next((r.where for r in view.after if r.metric.startswith("latency")), "elsewhere")


def _ledger(report: Report) -> Iterator[tuple[str, str, Markup]]:
    """Title, how it was measured, and the plot, of each metric; other images are no change, so they stand apart."""
    rows = tables.ledger(report)
    kinds = sorted(dict.fromkeys((row.metric, row.n) for row in rows), key=lambda kind: kind[0])
    for metric, images in kinds:
        several = sum(other == metric for other, _ in kinds) > 1
        title = f"{metric}, {images} images" if several else metric
        some = [row for row in rows if (row.metric, row.n) == (metric, images)]
        how = "; ".join(dict.fromkeys(row.how for row in some if row.value is not None))
        yield title, how, plots.intervals(title, some)


def _layers(report: Report) -> dict[str, Markup | None]:
    sparse = any(number_in(row, key) is not None for row in report.layers for key in NONZERO[1:3])
    return {
        "channels": _layer_plot(report, "channels", "channels", ""),
        "nonzero": _layer_plot(report, "nonzero", "non-zero weights", "") if sparse else None,
        "time": _layer_plot(report, "time", "time", "s"),
        "size": _layer_plot(report, "size", "size of the weights", "B"),
    }


def _layer_plot(report: Report, column: str, what: str, unit: str) -> Markup | None:
    suffix = "_s" if unit == "s" else ""
    bars: list[plots.Bar] = []
    for row in report.layers:
        before, after = number_in(row, f"{column}_before{suffix}"), number_in(row, f"{column}_after{suffix}")
        if before is None and after is None:
            continue
        sides = [None if v is None else quantity(v, unit) if unit else f"{v:.0f}" for v in (before, after)]
        old, new = (side or "?" for side in sides)
        bars.append(
            plots.Bar(
                str(row.get("layer") or "-"), before, after, f"{old} to {new}" if unit else f"{new} of {old}"
            )
        )
    if not bars:
        return None
    overview = plots.skyline(bars, what) if len(bars) > LONG_TABLE else Markup("")
    return join(overview, plots.paired_bars(what, bars, column if unit else "kept", unit))


def _folds(report: Report) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    columns, layers = tables.layer_table(report.layers)
    readings = [*report.before, *report.after]
    if layers:
        yield f"Layers ({len(layers)})", columns, layers
    if report.left_out:
        yield (
            f"Groups that were not pruned ({len(report.left_out)})",
            ("group", "why"),
            list(report.left_out.items()),
        )
    yield (
        f"How each number was obtained ({len(readings)})",
        ("metric", "of", "value", "95 % interval", "n", "how and where", "conditions"),
        [reading_cells(r) for r in readings],
    )
    yield "Environment", ("name", "value"), facts(report.environment)


def reading_cells(reading: Reading) -> list[str]:
    """All of a reading as text: metric, artifact, value, interval, n, how and where, conditions."""
    conditions = "; ".join(f"{key} {value}" for key, value in facts(reading.conditions) if key != "why")
    interval = interval_text(reading)
    return [
        reading.metric,
        reading.artifact,
        text_of(reading),
        interval,
        str(reading.n),
        how_had(reading),
        conditions,
    ]


def interval_text(reading: Reading | None) -> str:
    """The 95 % interval as people read it; "" without one."""
    interval = interval_of(reading)
    if not interval or reading is None:
        return ""
    return f"{quantity(interval[0], unit_of(reading))} to {quantity(interval[1], unit_of(reading))}"


def _exact(reading: Reading | None) -> str:
    if reading is None or reading.value is None:
        return ""
    return f"{reading.value:.9g} {unit_of(reading)}".strip()


def _with_code(text: str) -> Any:
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return text
    return join([element("code", part) if i % 2 else part for i, part in enumerate(parts)])


def _breakable(name: str) -> Markup:
    return join(*[part for word in name.split("_") for part in (word, Markup("_<wbr>"))][:-1])


def _tone(row: Row) -> str:
    return "" if row.better is None else ("good" if row.better else "bad")
