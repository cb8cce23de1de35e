"""The plots of report.html: inline SVG whose text keeps its size at every width, and tables that are plots.

Positions across are percentages of the width and lengths down are pixels, so a plot fits a phone without shrinking
its labels. Every mark has a title that says its numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from edgeprune.quantities import show
from edgeprune.records import Report
from edgeprune.report.history import TITLE, Chapter, Curve, Plot, chapters
from edgeprune.report.markup import LONG_TABLE, element, join, templates
from edgeprune.report.rows import LedgerRow, quantity

# The lines of a plot that have names; their colors are in report.css.
SERIES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def widen(low: float, high: float, share: float) -> tuple[float, float]:
    """The ends of an axis, a share of its length beyond the values on both sides."""
    # One value alone, or values that hardly differ, still get an axis that can be read.
    span = max(high - low, abs(high) * 0.01, 1e-9)
    return low - share * span, high + share * span


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers from low to high; low < high."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def fixed(value: float) -> str:
    """A number for an attribute: three decimals at most, no exponent."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


PLOT_HEIGHT = 220
CURVE_POINTS = 400
LEAST_BAR = 0.5
WIDEST_NUMBER = 28


@dataclass(frozen=True)
class Bar:
    """A layer's number before and after, in base units, and both as text."""

    name: str
    before: float | None
    after: float | None
    text: str


def paired_bars(caption: str, bars: Sequence[Bar], number: str, unit: str) -> Markup:
    """A table with two bars a row, dense over compressed, all to one scale. number: the last column's heading."""
    top = max((v for b in bars for v in (b.before, b.after) if v is not None), default=0.0)
    rows = [
        element(
            "tr",
            element("th", element("bdi", bar.name), scope="row", title=bar.name),
            element("td", _pair(bar, top), class_="plot"),
            element("td", bar.text, class_="number"),
        )
        for bar in bars
    ]
    widest = max((len(bar.text) for bar in bars), default=0)
    return _plot_table(caption, ("layer", ("0", quantity(top, unit)), number), rows, widest=widest)


def skyline(bars: Sequence[Bar], what: str) -> Markup:
    """Every layer of the network as one column, in order: the outline is the dense network, the filled part is kept."""
    top = max((v for b in bars for v in (b.before, b.after) if v is not None), default=0.0) or 1.0
    columns = []
    for i, bar in enumerate(bars):
        marks = [
            element(
                "rect",
                x=i,
                y=fixed(100 * (1 - value / top)),
                width=0.86,
                height=fixed(100 * value / top),
                class_=mark,
            )
            for mark, value in (("dense", bar.before), ("compressed", bar.after))
            if value is not None
        ]
        columns.append(element("g", element("title", f"{bar.name}: {bar.text}"), marks))
    # The width is in layers and the height in percent, so the box is stretched in both directions.
    box = {"viewBox": f"0 0 {len(bars)} 100", "preserveAspectRatio": "none"}
    words = f"{what} of each of {len(bars)} layers, in network order"
    return element(
        "svg", element("title", words), columns, class_="skyline", role="img", aria_label=words, **box
    )


def distribution(samples: dict[str, Sequence[float]]) -> Markup:
    """The share of images answered within a time, for "dense" and "compressed" latencies in seconds (each sorted).

    The axis ends where the long tail begins; how many times lie beyond is said below the plot.
    """
    low = min(values[0] for values in samples.values())
    high = max(
        min(values[_rank(values, 0.99)], 1.5 * values[_rank(values, 0.9)]) for values in samples.values()
    )
    low, high = widen(low, high, 0.05)
    curves, marks = [], []
    for name, values in samples.items():
        curves.append(element("polyline", points=_curve(values, low, high), class_=f"{name} curve"))
        middle = values[_rank(values, 0.5)]
        across = f"{fixed(100 * (middle - low) / (high - low))}%"
        marks.append(element("line", x1=across, x2=across, y1="50%", y2="100%", class_=f"{name} guide"))
        title = element("title", f"{name}: half of the images within {show(middle, 's')}")
        marks.append(element("circle", title, cx=across, cy="50%", r=4.5, class_=f"{name} dot"))
    box = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none"}
    inner = element("svg", curves, width="100%", height="100%", class_="clip", **box)
    words = "; ".join(
        f"{n}: median {show(v[_rank(v, 0.5)], 's')} of {len(v)} times" for n, v in samples.items()
    )
    label = f"Share of images answered within a time. {words}"
    attributes = {
        "role": "img",
        "aria_label": label,
        "width": "100%",
        "height": PLOT_HEIGHT,
        "class_": "chart",
    }
    drawing = element("svg", element("title", label), _grid(low, high), inner, marks, **attributes)
    beyond = {name: sum(v > high for v in values) for name, values in samples.items()}
    said = [f"{count} of {len(samples[name])} {name} times" for name, count in beyond.items() if count]
    tail = (
        element("p", f"Longer than {show(high, 's')} and not drawn: {', '.join(said)}.", class_="fine")
        if said
        else ""
    )
    return join(drawing, tail)


def intervals(metric: str, rows: Sequence[LedgerRow]) -> Markup:
    """A table with a dot and its 95 % interval a row, all on one axis that is zoomed to them."""
    edges = [v for r in rows for v in (r.value, r.low, r.high) if v is not None] or [0.0, 1.0]
    low, high = widen(min(edges), max(edges), 0.08)
    if rows[0].unit == "fraction" and min(edges) >= 0 and max(edges) <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    body = [
        element(
            "tr",
            element("th", element("bdi", row.stage), scope="row", title=row.stage),
            element("td", _interval(row, low, high), class_="plot"),
            element("td", row.text, class_="number"),
        )
        for row in rows
    ]
    ends = (quantity(low, rows[0].unit), quantity(high, rows[0].unit))
    widest = max(len(row.text) for row in rows)
    return _plot_table(metric, ("after", ends, "value (95 %)"), body, widest=widest)


def _plot_table(
    caption: str, headings: tuple[str, tuple[str, str], str], rows: list[Markup], *, widest: int
) -> Markup:
    """Headings: of the names, the two ends of the axis, of the numbers; widest: characters of the longest number."""
    first, ends, last = headings
    axis = element("div", [element("span", end) for end in ends], class_="ends")
    cells = [element("th", first, scope="col"), element("th", axis, scope="col", class_="plot")]
    head = element("tr", cells, element("th", last, scope="col", class_="number"))
    parts = (element("caption", caption), element("thead", head), element("tbody", rows))
    width = f"--numbers:{min(max(widest, len(last)), WIDEST_NUMBER) + 1}ch"
    table = element("table", *parts, class_="plots", style=width)
    size = "scroll long" if len(rows) > LONG_TABLE else "scroll"
    return element("div", table, class_=size, tabindex="0", role="region", aria_label=caption)


def _pair(bar: Bar, top: float) -> Markup:
    words = f"{bar.name}: {bar.text}"
    marks = [
        element("rect", x=0, y=y, height=6, width=_width(value, top), class_=mark)
        for mark, value, y in (("dense", bar.before, 1), ("compressed", bar.after, 8))
        if value is not None
    ]
    return element(
        "svg", element("title", words), marks, width="100%", height=15, role="img", aria_label=words
    )


def _interval(row: LedgerRow, low: float, high: float) -> Markup:
    if row.value is None:
        return Markup("")
    place = [
        f"{fixed(100 * (v - low) / (high - low))}%"
        for v in (row.value, _or(row.low, row.value), _or(row.high, row.value))
    ]
    words = f"{row.stage}: {row.text}"
    whisker = element("line", x1=place[1], x2=place[2], y1=8, y2=8, class_="whisker")
    ends = [
        element("line", x1=x, x2=x, y1=4, y2=12, class_="whisker") for x in place[1:] if row.low is not None
    ]
    dot = element("circle", cx=place[0], cy=8, r=4.5, class_="compressed dot")
    rule = element("line", x1="0", x2="100%", y1=8, y2=8, class_="rule")
    return element(
        "svg",
        element("title", words),
        rule,
        whisker,
        ends,
        dot,
        width="100%",
        height=16,
        role="img",
        aria_label=words,
    )


def _grid(low: float, high: float) -> list[Markup]:
    lines = []
    for share in (0, 25, 50, 75, 100):
        y = f"{100 - share}%"
        lines.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="rule"))
        lines.append(element("text", f"{share} %", x="-8", y=y, dy="0.32em", text_anchor="end"))
    marks, unit, scale = _ticks(low, high)
    for tick in marks:
        x = f"{fixed(100 * (tick * scale - low) / (high - low))}%"
        lines.append(element("line", x1=x, x2=x, y1=PLOT_HEIGHT, y2=PLOT_HEIGHT + 4, class_="rule"))
        lines.append(element("text", f"{tick:.10g} {unit}", x=x, y=PLOT_HEIGHT + 18, text_anchor="middle"))
    return lines


def _ticks(low: float, high: float) -> tuple[list[float], str, float]:
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if high >= s), ("us", 1e-6))
    return ticks(low / scale, high / scale), unit, scale


def _curve(values: Sequence[float], low: float, high: float) -> str:
    """Points of the empirical distribution in a 100 x 100 box, thinned to about CURVE_POINTS steps."""
    stride = math.ceil(len(values) / CURVE_POINTS)
    points, share = ["0,100"], 0.0
    for rank in [*range(stride - 1, len(values), stride), len(values) - 1]:
        across = fixed(100 * (min(values[rank], high * 2) - low) / (high - low))
        points.append(f"{across},{fixed(100 - share)}")
        share = 100 * (rank + 1) / len(values)
        points.append(f"{across},{fixed(100 - share)}")
    return " ".join([*points, "100,0"] if values[-1] < high else points)


def _rank(values: Sequence[float], quantile: float) -> int:
    return min(len(values) - 1, max(0, math.ceil(quantile * len(values)) - 1))


def _width(value: float, top: float) -> str:
    # What is there at all stays visible beside a much larger one.
    return f"{fixed(max(100 * value / top, LEAST_BAR)) if value > 0 else 0}%"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


HEIGHT = 200
SMALL_HEIGHT = 130
# Pixels from one number of the upright axis to the next, at least.
TICK_HEIGHT = 25
# Up to so many points each has a dot of its own, with its number.
MOST_DOTS = 40
# So many columns of numbers a table has at most.
MOST_COLUMNS = 12


def history(report: Report) -> Markup:
    """The section, empty when the run recorded nothing."""
    found = chapters(report)
    if not found:
        return Markup("")
    return element("section", element("h2", TITLE), [_chapter(chapter) for chapter in found])


def lines(plot: Plot, height: int = HEIGHT) -> Markup:
    """One drawing: a line for each curve, those that change most above the others."""
    low, high = _range(plot)
    first, last = _across(plot)
    named = highlighted(plot.curves)
    order = sorted(plot.curves, key=lambda curve: curve.name in named)
    drawn = [_line(plot, curve, named, (low, high, first, last)) for curve in order]
    box = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none"}
    inner = element("svg", drawn, width="100%", height="100%", **box)
    dotted = [c for c in order if c.name in named and len(c.values) <= MOST_DOTS]
    dots = [dot for c in dotted for dot in _dots(plot, c, named[c.name], (low, high, first, last))]
    said = "; ".join(
        f"{c.name} from {plot.text(c.known[0])} to {plot.text(c.known[-1])}"
        for c in plot.curves
        if c.name in named
    )
    label = f"{plot.title} over the {plot.axis}s {first:g} to {last:g}: {said}"
    ruled = _report_lines_grid(plot, (low, high, first, last), height)
    attributes = {"role": "img", "aria_label": label, "width": "100%", "height": height}
    return element("svg", element("title", label), ruled, inner, dots, class_="chart", **attributes)


def highlighted(curves: Sequence[Curve]) -> dict[str, str]:
    """The curves that are drawn in colors, by name: those that change most, in their order, and the color of each."""
    ranked = sorted(curves, key=lambda c: min(c.known) - max(c.known))[: len(SERIES)]
    names = {curve.name for curve in ranked}
    shown = [curve.name for curve in curves if curve.name in names][: len(SERIES)]
    return dict(zip(shown, SERIES, strict=False))


def _chapter(chapter: Chapter) -> Markup:
    words = [element("p", f"{name}: {text}", class_="fine") for name, text in chapter.facts]
    many = [p for p in chapter.plots if not p.single]
    single = [p for p in chapter.plots if p.single]
    panels = [join(_heading(p), _drawing(p), _numbers(p.title, [p])) for p in many]
    if single:
        grid = element("div", [element("div", _heading(p), _drawing(p)) for p in single], class_="panels")
        panels.append(join(grid, _numbers(", ".join(p.title for p in single), single)))
    return join(element("h3", chapter.title), words, panels)


def _heading(plot: Plot) -> Markup:
    about = element("p", plot.about, class_="fine") if plot.about else ""
    return join(element("h4", plot.title), about)


def _drawing(plot: Plot) -> Markup:
    drawn = element("div", lines(plot, SMALL_HEIGHT if plot.single else HEIGHT), class_="axes lines")
    return drawn if plot.single else join(_legend(plot), drawn)


def _legend(plot: Plot) -> Markup:
    named = highlighted(plot.curves)
    keys = [(name, color) for name, color in named.items()]
    others = len(plot.curves) - len(named)
    if others:
        keys.append((f"{others} other{'s' if others > 1 else ''}, which change less", "other"))
    return element("p", [element("span", _swatch(color), name) for name, color in keys], class_="legend")


def _swatch(color: str) -> Markup:
    stroke = element("line", x1=0, x2=22, y1=4, y2=4, class_=f"{color} line")
    return element("svg", stroke, width=22, height=8, class_="key", role="img", aria_label="line")


def _range(plot: Plot) -> tuple[float, float]:
    values = [v for curve in plot.curves for v in curve.known]
    low, high = min(values), max(values)
    # What can't be negative and starts near nothing is drawn from nothing.
    if 0 <= low < 0.35 * high:
        return 0.0, widen(0.0, high, 0.05)[1]
    return widen(low, high, 0.08)


def _across(plot: Plot) -> tuple[float, float]:
    places = [at for curve in plot.curves for at in curve.at]
    return min(places), max(places)


_Frame = tuple[float, float, float, float]


def _place(at: float, value: float, frame: _Frame) -> tuple[float, float]:
    low, high, first, last = frame
    across = 50.0 if first == last else 100 * (at - first) / (last - first)
    return across, 100 * (high - value) / (high - low)


def _line(plot: Plot, curve: Curve, named: dict[str, str], frame: _Frame) -> Markup:
    words = element("title", f"{curve.name}: {plot.text(curve.known[0])} to {plot.text(curve.known[-1])}")
    runs: list[list[str]] = [[]]
    for at, value in zip(curve.at, curve.values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(",".join(fixed(v) for v in _place(at, value, frame)))
    color = named.get(curve.name, "other")
    drawn = [element("polyline", points=" ".join(run), class_=f"{color} line") for run in runs if run]
    return element("g", words, drawn)


def _dots(plot: Plot, curve: Curve, color: str, frame: _Frame) -> list[Markup]:
    dots = []
    for at, value in zip(curve.at, curve.values, strict=True):
        if value is not None:
            x, y = (f"{fixed(v)}%" for v in _place(at, value, frame))
            words = element("title", f"{curve.name}, {plot.axis} {at:g}: {plot.text(value)}")
            dots.append(element("circle", words, cx=x, cy=y, r=2.5, class_=f"{color} point"))
    return dots


def _report_lines_grid(plot: Plot, frame: _Frame, height: int) -> list[Markup]:
    low, high, first, last = frame
    marks = []
    for tick in ticks(low, high, height // TICK_HEIGHT):
        y = f"{fixed(_place(first, tick, frame)[1])}%"
        marks.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="rule"))
        marks.append(element("text", _tick(tick, plot.unit), x="-8", y=y, dy="0.32em", text_anchor="end"))
    for at in _whole(first, last):
        x = f"{fixed(_place(at, low, frame)[0])}%"
        marks.append(element("line", x1=x, x2=x, y1=height, y2=height + 4, class_="rule"))
        marks.append(element("text", f"{at:g}", x=x, y=height + 18, text_anchor="middle"))
    marks.append(element("text", plot.axis, x="100%", y=height + 34, text_anchor="end"))
    return marks


def _whole(first: float, last: float) -> list[float]:
    """Round places of an axis that counts; a fraction of an epoch is none."""
    if first == last:
        return [first]
    return [t for t in ticks(first, last) if t == round(t)]


def _tick(value: float, unit: str) -> str:
    if unit == "fraction":
        return f"{100 * value:.6g} %"
    return f"{value:.6g}" if abs(value) < 10000 else show(value, unit)


def _numbers(title: str, plots: Sequence[Plot]) -> Markup:
    """The numbers of plots as a table: all curves, and of long ones some columns from the first to the last."""
    axis = plots[0].axis if len({p.axis for p in plots}) == 1 else "point"
    places = _columns(sorted({at for plot in plots for curve in plot.curves for at in curve.at}))
    head = [axis, *(f"{at:g}" for at in places)]
    rows = []
    for plot in plots:
        for curve in plot.curves:
            values = dict(zip(curve.at, curve.values, strict=True))
            texts = [plot.text(values.get(at)) for at in places]
            name = plot.title if plot.single else curve.name
            rows.append([name, *texts])
    tables: Any = templates().get_template("tables.html").module
    made = tables.plain_table(title, head, rows, range(1, len(head)))
    return element("details", element("summary", f"Numbers: {title}"), made)


def _columns(places: Sequence[float]) -> list[float]:
    if len(places) <= MOST_COLUMNS:
        return list(places)
    steps = MOST_COLUMNS - 1
    return [places[round(i * (len(places) - 1) / steps)] for i in range(MOST_COLUMNS)]
