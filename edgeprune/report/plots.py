"""What the plots of report.html draw, worked out; the templates write it down as inline SVG.

Positions across are percentages of the width and lengths down are pixels, so a plot fits a phone without shrinking
its labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.quantities import show
from edgeprune.records import Report
from edgeprune.report import per_device
from edgeprune.report.history import Curve, Plot
from edgeprune.report.rows import LedgerRow, number_in, provenance, quantity

# The lines of a plot that have names, and colors in style.css. Four are dashed: no two differ by their color alone.
SERIES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
LONGEST_S = 1e6
CURVE_POINTS = 400
LEAST_BAR = 0.5
# Pixels, and from one number of the upright axis to the next at least.
DISTRIBUTION_HEIGHT, CURVES_HEIGHT, SMALL_HEIGHT, TICK_HEIGHT = 220, 200, 130, 25
# Up to so many points each has a dot of its own, with its number.
MOST_DOTS = 40
MOST_COLUMNS = 12


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


@dataclass(frozen=True)
class Bar:
    """A layer's number before and after, in base units, and both as text."""

    name: str
    before: float | None
    after: float | None
    text: str


@dataclass(frozen=True)
class LayerPlot:
    """A number of each layer, in network order. heading: of the column of the texts."""

    what: str
    heading: str
    unit: str
    bars: tuple[Bar, ...]

    @property
    def largest(self) -> float:
        """The number at the end of the axis."""
        return max((v for bar in self.bars for v in (bar.before, bar.after) if v is not None), default=0.0)

    def width(self, value: float) -> str:
        """The length of a bar in percent; what is there at all stays visible beside a much larger one."""
        return fixed(max(100 * value / self.largest, LEAST_BAR)) if value > 0 else "0"


def layer_plot(report: Report, column: str, what: str, unit: str = "") -> LayerPlot:
    """A column of the layers' rows, without the layers that have no such number."""
    suffix = "_s" if unit == "s" else ""
    bars = []
    for row in report.layers:
        before, after = number_in(row, f"{column}_before{suffix}"), number_in(row, f"{column}_after{suffix}")
        if before is not None or after is not None:
            bars.append(Bar(str(row.get("layer") or "-"), before, after, _bar_text(before, after, unit)))
    return LayerPlot(what, column if unit else "kept", unit, tuple(bars))


def _bar_text(before: float | None, after: float | None, unit: str) -> str:
    if unit:
        return " to ".join("?" if v is None else quantity(v, unit) for v in (before, after))
    return " of ".join("?" if v is None else f"{v:.0f}" for v in (after, before))


@dataclass(frozen=True)
class LedgerPlot:
    """Accuracies after the stages on one axis, whose ends are low and high."""

    title: str
    how: str
    rows: tuple[LedgerRow, ...]
    low: float
    high: float

    @property
    def ends(self) -> list[str]:
        """The ends of the axis as text."""
        return [quantity(end, self.rows[0].unit) for end in (self.low, self.high)]

    def place(self, value: float) -> str:
        """Percent from the left."""
        return fixed(100 * (value - self.low) / (self.high - self.low))


def ledger_plots(rows: Sequence[LedgerRow]) -> list[LedgerPlot]:
    """One plot for each metric, and for what was measured on other images: side by side it would look like a change."""
    kinds = sorted(dict.fromkeys((row.metric, row.n) for row in rows), key=lambda kind: kind[0])
    several = {metric for metric, _ in kinds if sum(other == metric for other, _ in kinds) > 1}
    made = []
    for metric, images in kinds:
        mine = tuple(row for row in rows if (row.metric, row.n) == (metric, images))
        edges = [v for row in mine for v in (row.value, row.low, row.high) if v is not None] or [0.0, 1.0]
        low, high = widen(min(edges), max(edges), 0.08)
        if mine[0].unit == "fraction" and min(edges) >= 0 and max(edges) <= 1:
            low, high = max(low, 0.0), min(high, 1.0)
        title = f"{metric}, {images} images" if metric in several else metric
        how = "; ".join(dict.fromkeys(row.how for row in mine if row.value is not None))
        made.append(LedgerPlot(title, how, mine, low, high))
    return made


@dataclass(frozen=True)
class Times:
    """The sorted times of one file in seconds, and how its curve is drawn. median_at: percent from the left."""

    name: str
    values: Sequence[float]
    median: float
    median_at: str
    points: str


@dataclass(frozen=True)
class Distribution:
    """The share of images that took at most a time. ticks: (percent from the left, text).

    place: of the device. how: how it was measured. beyond: what is longer than `high` and not drawn.
    """

    place: str
    how: str
    curves: tuple[Times, ...] = ()
    ticks: tuple[tuple[str, str], ...] = ()
    high: float = 0.0
    beyond: str = ""
    height: int = DISTRIBUTION_HEIGHT


def distributions(report: Report) -> list[Distribution]:
    """The distribution of the times on each device; without curves where it has no times."""
    views = per_device.views(report)
    drawn = views if len(views) == 1 else [view for view in views if view.samples or not view.layers]
    return [_distribution(view) for view in drawn]


def place_of(view: Report) -> str:
    """The name of the device of a view."""
    return next((r.where for r in view.after if r.metric.startswith("latency")), "elsewhere")


def _distribution(view: Report) -> Distribution:
    samples = {
        name: sorted(v for v in view.samples.get(name, ()) if math.isfinite(v) and 0 <= v < LONGEST_S)
        for name in ("dense", "compressed")
    }
    samples = {name: values for name, values in samples.items() if values}
    after = next((r for r in view.after if r.metric.startswith("latency")), None)
    how = f" ({provenance(after)})" if after else ""
    if not samples:
        return Distribution(place_of(view), how)
    # The axis ends where the long tail begins.
    high = max(min(_at(values, 0.99), 1.5 * _at(values, 0.9)) for values in samples.values())
    low, high = widen(min(values[0] for values in samples.values()), high, 0.05)
    curves = tuple(_times(name, values, low, high) for name, values in samples.items())
    counts = {name: sum(v > high for v in values) for name, values in samples.items()}
    beyond = [f"{count} of {len(samples[name])} {name} times" for name, count in counts.items() if count]
    return Distribution(place_of(view), how, curves, tuple(_time_ticks(low, high)), high, ", ".join(beyond))


def _times(name: str, values: Sequence[float], low: float, high: float) -> Times:
    median = _at(values, 0.5)
    return Times(
        name,
        values,
        median,
        fixed(100 * (median - low) / (high - low)),
        _distribution_curve(values, low, high),
    )


def _time_ticks(low: float, high: float) -> list[tuple[str, str]]:
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if high >= s), ("us", 1e-6))
    return [
        (fixed(100 * (tick * scale - low) / (high - low)), f"{tick:.10g} {unit}")
        for tick in ticks(low / scale, high / scale)
    ]


def _distribution_curve(values: Sequence[float], low: float, high: float) -> str:
    stride = math.ceil(len(values) / CURVE_POINTS)
    points, share = ["0,100"], 0.0
    for rank in [*range(stride - 1, len(values), stride), len(values) - 1]:
        across = fixed(100 * (min(values[rank], high * 2) - low) / (high - low))
        points.append(f"{across},{fixed(100 - share)}")
        share = 100 * (rank + 1) / len(values)
        points.append(f"{across},{fixed(100 - share)}")
    return " ".join([*points, "100,0"] if values[-1] < high else points)


def _at(values: Sequence[float], quantile: float) -> float:
    return values[min(len(values) - 1, max(0, math.ceil(quantile * len(values)) - 1))]


@dataclass(frozen=True)
class Line:
    """A curve as drawn. runs: the points of what lies between two gaps. dots: (x, y, title)."""

    color: str
    title: str
    runs: tuple[str, ...]
    dots: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Drawing:
    """The curves of a plot; legend: (name, color). rows, columns: ticks, (percent from the top or left, text)."""

    label: str
    height: int
    legend: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    rows: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]


def drawing(plot: Plot) -> Drawing:
    """A line for each curve, those that change most above the others."""
    places = [at for curve in plot.curves for at in curve.at]
    frame = _Frame(*_value_range(plot), min(places), max(places))
    named = _highlighted(plot.curves)
    height = SMALL_HEIGHT if plot.single else CURVES_HEIGHT
    order = sorted(plot.curves, key=lambda curve: curve.name in named)
    ends = {c.name: (plot.text(c.known[0]), plot.text(c.known[-1])) for c in plot.curves}
    described = "; ".join(
        f"{c.name} from {' to '.join(ends[c.name])}" for c in plot.curves if c.name in named
    )
    label = f"{plot.title} over the {plot.axis}s {frame.first:g} to {frame.last:g}: {described}"
    others = len(plot.curves) - len(named)
    rest = [(f"{others} other{'s' if others > 1 else ''}, which change less", "other")] if others else []
    rows = [
        (tick, _tick_text(tick, plot.unit)) for tick in ticks(frame.low, frame.high, height // TICK_HEIGHT)
    ]
    # The axis counts: a fraction of an epoch is no place on it.
    whole = (
        [t for t in ticks(frame.first, frame.last) if t == round(t)]
        if frame.first < frame.last
        else [frame.first]
    )
    return Drawing(
        label=label,
        height=height,
        legend=(*named.items(), *rest),
        lines=tuple(_line(plot, curve, named.get(curve.name, "other"), frame) for curve in order),
        rows=tuple((fixed(frame.down(tick)), text) for tick, text in rows),
        columns=tuple((fixed(frame.across(at)), f"{at:g}") for at in whole),
    )


@dataclass(frozen=True)
class _Frame:
    """The ends of the axes: of the values (low, high), and across (first, last)."""

    low: float
    high: float
    first: float
    last: float

    def across(self, at: float) -> float:
        """Percent from the left."""
        return 50.0 if self.first == self.last else 100 * (at - self.first) / (self.last - self.first)

    def down(self, value: float) -> float:
        """Percent from the top."""
        return 100 * (self.high - value) / (self.high - self.low)


def _highlighted(curves: Sequence[Curve]) -> dict[str, str]:
    """The color of each curve among those that change most, by name, in their order."""
    ranked = sorted(curves, key=lambda c: min(c.known) - max(c.known))[: len(SERIES)]
    names = {curve.name for curve in ranked}
    shown = [curve.name for curve in curves if curve.name in names][: len(SERIES)]
    return dict(zip(shown, SERIES, strict=False))


def _value_range(plot: Plot) -> tuple[float, float]:
    values = [v for curve in plot.curves for v in curve.known]
    low, high = min(values), max(values)
    # What can't be negative and starts near nothing is drawn from nothing.
    if 0 <= low < 0.35 * high:
        return 0.0, widen(0.0, high, 0.05)[1]
    return widen(low, high, 0.08)


def _line(plot: Plot, curve: Curve, color: str, frame: _Frame) -> Line:
    runs: list[list[str]] = [[]]
    dots = []
    for at, value in zip(curve.at, curve.values, strict=True):
        if value is None:
            runs.append([])
            continue
        x, y = fixed(frame.across(at)), fixed(frame.down(value))
        runs[-1].append(f"{x},{y}")
        dots.append((x, y, f"{curve.name}, {plot.axis} {at:g}: {plot.text(value)}"))
    dotted = color != "other" and len(curve.values) <= MOST_DOTS
    title = f"{curve.name}: {plot.text(curve.known[0])} to {plot.text(curve.known[-1])}"
    return Line(color, title, tuple(" ".join(run) for run in runs if run), tuple(dots) if dotted else ())


def _tick_text(value: float, unit: str) -> str:
    if unit == "fraction":
        return f"{100 * value:.6g} %"
    return f"{value:.6g}" if abs(value) < 10000 else show(value, unit)


def curve_table(plots: Sequence[Plot]) -> tuple[list[str], list[list[str]]]:
    """The numbers of plots as headings and rows: all curves, and of long ones some columns from first to last."""
    axis = plots[0].axis if len({p.axis for p in plots}) == 1 else "point"
    places = sorted({at for plot in plots for curve in plot.curves for at in curve.at})
    if len(places) > MOST_COLUMNS:
        steps = MOST_COLUMNS - 1
        places = [places[round(i * (len(places) - 1) / steps)] for i in range(MOST_COLUMNS)]
    rows = []
    for plot in plots:
        for curve in plot.curves:
            values: Mapping[float, Any] = dict(zip(curve.at, curve.values, strict=True))
            name = plot.title if plot.single else curve.name
            rows.append([name, *(plot.text(values.get(at)) for at in places)])
    return [axis, *(f"{at:g}" for at in places)], rows
