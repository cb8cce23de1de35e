"""report.html: the whole report as one page that needs no network, no script and no font of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from edgeprune.records import Reading, Report
from edgeprune.report import per_device, plots
from edgeprune.report import rows as rows_module
from edgeprune.report.assembly import SPARSE_NOTE
from edgeprune.report.css import CSS
from edgeprune.report.markup import LONG_TABLE, Markup, cells, element, fold, join, table
from edgeprune.report.plots import history
from edgeprune.report.rows import (
    NONZERO,
    LedgerRow,
    Row,
    candidates,
    comparison,
    facts,
    heading,
    how_had,
    interval_of,
    layer_table,
    ledger,
    number_in,
    quantity,
    text_of,
    unit_of,
)
from edgeprune.report.unlabelled import HEAD, INTRODUCTION, TITLE, without_labels

LONGEST_S = 1e6


def distributions(report: Report) -> Markup:
    """The distribution of the times on each device; a sentence where there are none."""
    views = per_device.views(report)
    if len(views) == 1:
        return _distribution(report)
    drawn = [
        join(element("h3", _place(view)), _distribution(view))
        for view in views
        if view.samples or not view.layers
    ]
    return join(drawn)


def _place(view: Report) -> str:
    return next((r.where for r in view.after if r.metric.startswith("latency")), "elsewhere")


def _distribution(report: Report) -> Markup:
    samples: dict[str, Sequence[float]] = {}
    for name in ("dense", "compressed"):
        good = sorted(v for v in report.samples.get(name, ()) if math.isfinite(v) and 0 <= v < LONGEST_S)
        if good:
            samples[name] = good
    if not samples:
        return element(
            "p", "This report holds no single times, so there is no distribution to draw.", class_="absent"
        )
    after = next((r for r in report.after if r.metric.startswith("latency")), None)
    where = f" ({how_had(after)})" if after else ""
    said = element(
        "p", f"Share of images answered within a time{where}; the dots are the medians.", class_="fine"
    )
    middles = {name: values[(len(values) - 1) // 2] for name, values in samples.items()}
    key = plots.legend(
        *[(n, f"{n}, median {quantity(m, 's')}, {len(samples[n])} times") for n, m in middles.items()]
    )
    return join(said, key, element("div", plots.distribution(samples), class_="axes"))


def on_which(report: Report) -> str:
    """Words for what was read on the first of several devices alone: ", PLACE"; empty where there is one."""
    first, *others = per_device.views(report)
    return f", {_place(first)}" if others else ""


HEADLINES = ("macs", "size", "latency_p50", "clean_accuracy")
# Of a network whose single weights were set to zero: what changed.
SPARSE_HEADLINES = ("params", "compressed_size", "latency_p50", "clean_accuracy")
MANY_LAYERS = LONG_TABLE
DENSE_AND_COMPRESSED = plots.legend(("dense", "dense"), ("compressed", "compressed"))


def page(report: Report, sentences: Sequence[str]) -> str:
    """The page as text; `sentences` is the summary in plain words that opens it."""
    model, target = heading(report)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", f"{model} for {target} - edgeprune report"),
        element("style", Markup(CSS)),
    )
    body = element("body", _header(report, model, target), element("main", _sections(report, sentences)))
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def _header(report: Report, model: str, target: str) -> Markup:
    prune = dict(facts(report.recipe))
    parts = [
        ("method", prune.get("prune.method")),
        ("granularity", prune.get("prune.granularity")),
        ("seed", prune.get("seed")),
        ("edgeprune", dict(facts(report.environment)).get("versions.edgeprune")),
    ]
    words = [element("span", f"{name} {value}") for name, value in parts if value]
    return element(
        "header",
        element("p", "edgeprune report", class_="eyebrow"),
        element("h1", model, element("small", f" for {target}")),
        element("p", words, class_="facts") if words else "",
    )


def _sections(report: Report, sentences: Sequence[str]) -> list[Markup]:
    rows = comparison(report)
    notes = [element("li", _with_code(note)) for note in report.notes]
    layers = [
        _section("Channels kept in each layer", _layer_plot(report, "channels", "channels", "")),
        _nonzero(report),
        element(
            "div",
            _section(f"Time of each layer{on_which(report)}", _layer_plot(report, "time", "time", "s")),
            _section("Size of each layer", _layer_plot(report, "size", "size of the weights", "B")),
            class_="two",
        ),
    ]
    return [
        element(
            "section",
            _headlines(rows, sparse=any(s.startswith(SPARSE_NOTE) for s in sentences)),
            element("div", [element("p", s) for s in sentences], class_="summary"),
        ),
        _section("Read this first", element("ul", notes, class_="notes")) if notes else Markup(""),
        _section("Before and after", _comparison_table(rows)),
        _unlabelled(report),
        _section("Accuracy after each stage", _ledger(report)),
        _section("Time of one image", distributions(report)),
        _precision(report),
        history(report),
        *(layers if report.layers else []),
        _section("In full", _details(report)),
    ]


def _precision(report: Report) -> Markup:
    head, rows = candidates(report)
    if not rows:
        return Markup("")
    numbers = range(1, len(head) - 1)
    columns = [(name, "number" if i in numbers else "") for i, name in enumerate(head)]
    made = table("What was built and what became of it", columns, [cells(row, numbers) for row in rows])
    return _section(rows_module.TITLE, element("p", rows_module.INTRODUCTION, class_="fine"), made)


def _section(title: str, *children: str | Iterable[str]) -> Markup:
    return element("section", element("h2", title), *children)


def _headlines(rows: Sequence[Row], *, sparse: bool) -> Markup:
    names = SPARSE_HEADLINES if sparse else HEADLINES
    found = [row for name in names for row in rows if row.metric == name and row.before and row.after]
    tiles = [
        element(
            "div",
            element("dt", row.metric),
            element("dd", row.change, class_=f"big {_tone(row)}"),
            element("dd", f"{row.dense} to {row.compressed}", class_="fine"),
            element("dd", row.how, class_="fine"),
        )
        for row in found
        if row.change != "-"
    ]
    return element("dl", tiles, class_="tiles") if tiles else Markup("")


def _comparison_table(rows: Sequence[Row]) -> Markup:
    if not rows:
        return _absent("This report has no readings.")
    head = [
        ("metric", ""),
        ("dense", "number"),
        ("compressed", "number"),
        ("change", "number"),
        ("how and where", ""),
    ]
    body = [
        element(
            "tr",
            element("th", _breakable(row.metric), element("span", row.about, class_="fine"), scope="row"),
            element("td", row.dense, _spread(row.before), class_="number", title=_exact(row.before)),
            element("td", row.compressed, _spread(row.after), class_="number", title=_exact(row.after)),
            element("td", row.change, class_=f"number {_tone(row)}"),
            element("td", row.how, class_="how"),
        )
        for row in rows
    ]
    return table("Before and after, with 95 % intervals", head, body, kind="compare")


def _unlabelled(report: Report) -> Markup:
    """What was read without labels, each marked for what it is not."""
    body = [
        element(
            "tr",
            element("th", _breakable(row.metric), scope="row"),
            element("td", row.text, class_="number"),
            element("td", element("strong", row.mark)),
            element("td", row.about),
            element("td", str(row.n or "-"), class_="number"),
            element("td", row.how, class_="how"),
        )
        for row in without_labels(report)
    ]
    if not body:
        return Markup("")
    head = [(name, "number" if name in ("value", "images") else "") for name in HEAD]
    return _section(TITLE, element("p", INTRODUCTION, class_="fine"), table(TITLE, head, body))


def _ledger(report: Report) -> Markup:
    rows = ledger(report)
    if not rows:
        return _absent("No accuracies were taken after the stages of this run.")
    # What was read on other images is drawn apart: side by side it would look like a change.
    kinds = sorted(dict.fromkeys((row.metric, row.n) for row in rows), key=lambda kind: kind[0])
    return join([_ledger_of(kind, [r for r in rows if (r.metric, r.n) == kind], kinds) for kind in kinds])


def _ledger_of(kind: tuple[str, int], rows: Sequence[LedgerRow], kinds: Sequence[tuple[str, int]]) -> Markup:
    metric, images = kind
    several = sum(other == metric for other, _ in kinds) > 1
    title = f"{metric}, {images} images" if several else metric
    how = "; ".join(dict.fromkeys(row.how for row in rows if row.value is not None))
    return join(element("h3", title), element("p", how, class_="fine"), plots.intervals(title, rows))


def _layer_plot(report: Report, column: str, what: str, unit: str) -> Markup:
    suffix = "_s" if unit == "s" else ""
    bars = []
    for row in report.layers:
        before, after = number_in(row, f"{column}_before{suffix}"), number_in(row, f"{column}_after{suffix}")
        if before is not None or after is not None:
            text = (
                " of ".join("?" if v is None else f"{v:.0f}" for v in (after, before))
                if not unit
                else _pair(before, after, unit)
            )
            bars.append(plots.Bar(str(row.get("layer") or "-"), before, after, text))
    if not bars:
        return _absent(f"This report has no {what} of single layers.")
    overview = plots.skyline(bars, what) if len(bars) > MANY_LAYERS else Markup("")
    number = column if unit else "kept"
    return join(DENSE_AND_COMPRESSED, overview, plots.paired_bars(what, bars, number, unit))


def _nonzero(report: Report) -> Markup:
    """Where single weights were pruned: how many of each layer are not zero."""
    if not any(number_in(row, key) is not None for row in report.layers for key in NONZERO[1:3]):
        return Markup("")
    return _section(
        "Weights that are not zero in each layer", _layer_plot(report, "nonzero", "non-zero weights", "")
    )


def _pair(before: float | None, after: float | None, unit: str) -> str:
    return " to ".join("?" if v is None else quantity(v, unit) for v in (before, after))


def _details(report: Report) -> list[Markup]:
    readings = [*report.before, *report.after]
    columns, texts = layer_table(report.layers)
    layers = [cells(row) for row in texts]
    left = [cells([name, why]) for name, why in report.left_out.items()]
    return [
        fold(f"Layers ({len(layers)})", table("Layers", [(c, "") for c in columns], layers))
        if layers
        else Markup(""),
        fold(
            f"Groups that were not pruned ({len(left)})",
            table("Not pruned", [("group", ""), ("why", "")], left),
        )
        if left
        else Markup(""),
        fold(f"How each number was had ({len(readings)})", _readings(readings)),
        fold("Environment", _facts_table("Environment", facts(report.environment))),
        fold(
            "Recipe",
            element(
                "pre", json.dumps(report.recipe, indent=1, ensure_ascii=False, default=str), tabindex="0"
            ),
        ),
    ]


def _readings(readings: Sequence[Reading]) -> Markup:
    head = [(c, "") for c in ("metric", "of", "value", "95 % interval", "n", "how and where", "conditions")]
    body = [
        cells([r.metric, r.artifact, text_of(r), _interval(r), str(r.n), how_had(r), _conditions(r)])
        for r in readings
    ]
    return table("Readings", head, body)


def _conditions(reading: Reading) -> str:
    return "; ".join(f"{key} {value}" for key, value in facts(reading.conditions) if key != "why")


def _facts_table(caption: str, pairs: Sequence[tuple[str, str]]) -> Markup:
    return table(caption, [("name", ""), ("value", "")], [cells([k, v]) for k, v in pairs])


def _absent(sentence: str) -> Markup:
    return element("p", sentence, class_="absent")


def _with_code(text: str) -> Markup:
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return join(text)
    return join([element("code", part) if i % 2 else part for i, part in enumerate(parts)])


def _breakable(name: str) -> Markup:
    """A name that may be broken after an underscore, and nowhere else."""
    words = name.split("_")
    return join([join(word, "_", element("wbr")) for word in words[:-1]], words[-1])


def _tone(row: Row) -> str:
    return "" if row.better is None else ("good" if row.better else "bad")


def _spread(reading: Reading | None) -> Markup:
    text = _interval(reading)
    return element("span", text, class_="fine") if text else Markup("")


def _interval(reading: Reading | None) -> str:
    interval = interval_of(reading)
    if not interval or reading is None:
        return ""
    return f"{quantity(interval[0], unit_of(reading))} to {quantity(interval[1], unit_of(reading))}"


def _exact(reading: Reading | None) -> str | None:
    return (
        None
        if reading is None or reading.value is None
        else f"{reading.value:.9g} {unit_of(reading)}".strip()
    )
