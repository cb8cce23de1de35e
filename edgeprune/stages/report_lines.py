"""The section of report.html that draws what a method recorded: lines over iterations or epochs, and their numbers.

Text keeps its size at every width, as in report_plots. Of many lines those that change most are drawn in colors of
their own and named; the others stay grey. Every plot has its numbers as a table.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.quantities import show
from edgeprune.records import Report
from edgeprune.stages.report_axis import fixed, ticks, widen
from edgeprune.stages.report_css import SERIES
from edgeprune.stages.report_history import TITLE, Chapter, Curve, Plot, chapters
from edgeprune.stages.report_markup import Markup, cells, element, fold, join, table

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
    ruled = _grid(plot, (low, high, first, last), height)
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
    """Percent from the left and from the top."""
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


def _grid(plot: Plot, frame: _Frame, height: int) -> list[Markup]:
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
    head = [(axis, ""), *((f"{at:g}", "number") for at in places)]
    rows = []
    for plot in plots:
        for curve in plot.curves:
            values = dict(zip(curve.at, curve.values, strict=True))
            texts = [plot.text(values.get(at)) for at in places]
            name = plot.title if plot.single else curve.name
            rows.append(cells([name, *texts], numbers=range(1, len(places) + 1)))
    return fold(f"Numbers: {title}", table(title, head, rows))


def _columns(places: Sequence[float]) -> list[float]:
    if len(places) <= MOST_COLUMNS:
        return list(places)
    steps = MOST_COLUMNS - 1
    return [places[round(i * (len(places) - 1) / steps)] for i in range(MOST_COLUMNS)]
