"""The section of report.html with the single times of one image, for each device that there are some of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgeprune import places
from edgeprune.records import Report
from edgeprune.stages import report_plots as plots
from edgeprune.stages.report_markup import Markup, element, join
from edgeprune.stages.report_rows import how_had, quantity

LONGEST_S = 1e6


def distributions(report: Report) -> Markup:
    """The distribution of the times on each device; a sentence where there are none."""
    views = places.views(report)
    if len(views) == 1:
        return _distribution(report)
    drawn = [
        join(element("h3", _place(view)), _distribution(view))
        for view in views
        if view.samples or not view.layers
    ]
    return join(drawn)


def _place(view: Report) -> str:
    """Where the times of a view were taken."""
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
    first, *others = places.views(report)
    return f", {_place(first)}" if others else ""
