"""How the choice came about: the curves that a method recorded while it chose, as plots and tables can show them.

A record is a mapping: what was recorded ("pqi") -> curve -> a list of numbers, or name -> list of numbers for one curve
of each layer. Whatever else it holds is shown as words. Nothing is assumed of it: a report may come from elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edgeprune.quantities import show
from edgeprune.records import METRICS, Report
from edgeprune.report.rows import facts, number, quantity

TITLE = "How the choice came about"
# What counts the points of a record, when it says so.
AXES = ("iterations", "epochs")
CHAPTERS = {
    "pqi": ("PQ index (SAP)", "iteration"),
    "dnr": ("Dynamic rewiring (DNR)", "epoch"),
    "deadwooding": ("Dual stages (Deadwooding)", "epoch"),
    "training": ("Training", "epoch"),
    "latency": ("Latency budget", "trial"),
}
# Of what is recorded by the methods here: a title, and what it says.
CURVES = {
    ("pqi", "layers"): (
        "PQ index",
        "Larger is sparser. It falls while pruning regularizes, rises when what is left is needed, and falls when the "
        "network collapses.",
    ),
    ("pqi", "kept"): ("Kept", "The units that each layer had in an iteration."),
    ("pqi", "accuracy"): ("Validation accuracy", ""),
    ("pqi", "mean"): ("Mean PQ index", "Over the layers, each by what it has left."),
    ("pqi", "counts"): ("Counts in each cut", "How often SAP's count was taken, to meet the budget in time."),
    ("dnr", "density"): (
        "Density",
        "What each layer holds of the budget, which is the same after every epoch.",
    ),
    ("dnr", "removed"): ("Removed", "Active units that went, with the smallest norms."),
    ("dnr", "grown"): ("Regrown", "Units that came instead, with the largest momentum."),
    ("dnr", "loss"): ("Training loss", ""),
    ("deadwooding", "lambda"): (
        "Multipliers of sparsity",
        "They rise as long as there is something to push down.",
    ),
    ("deadwooding", "deadwood"): ("Deadwood", "The share of all norms that lies in what would go now."),
    ("deadwooding", "lambda_kd"): ("Multiplier of distillation", ""),
    ("deadwooding", "lambda_adv"): ("Multiplier of robustness", ""),
    ("deadwooding", "kd"): (
        "Distance in distillation",
        "How far from the dense model's outputs, mean of an epoch.",
    ),
    ("deadwooding", "adv"): ("Distance under attack", "The same under attack."),
    ("deadwooding", "violation"): ("Violation of the constraints", "Mean of an epoch."),
    ("deadwooding", "validation"): ("Validation accuracy", "In the second stage."),
    ("latency", "predicted"): ("Predicted", "By the latency table, before the cut was timed."),
    ("latency", "measured"): ("Measured", "The whole network, timed in turn with the dense one."),
    ("training", "losses"): ("Training loss", ""),
    ("training", "validation"): ("Validation accuracy", ""),
}
SHARES = ("accuracy", "validation", "density", "deadwood", "kept")
# Shares are written in percent, and no other number is: an index of 0.3 is not 30 %.


@dataclass(frozen=True)
class Curve:
    """Numbers in the order in which they were taken; at: of which iteration or epoch. None where there is no number."""

    name: str
    at: tuple[float, ...]
    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        """The numbers alone; there is at least one."""
        return [v for v in self.values if v is not None]


@dataclass(frozen=True)
class Plot:
    """One or more curves with one axis. axis: what is counted across. unit: as in METRICS. single: one plain list."""

    title: str
    about: str
    axis: str
    unit: str
    curves: tuple[Curve, ...]
    single: bool

    def text(self, value: float | None) -> str:
        """One of its numbers as people read it."""
        return quantity(value, self.unit)


@dataclass(frozen=True)
class Chapter:
    """All curves of one record, and what else it says, as (name, text) pairs."""

    title: str
    plots: tuple[Plot, ...]
    facts: tuple[tuple[str, str], ...]


def chapters(report: Report) -> list[Chapter]:
    """The records of a report that have something to show, in their order."""
    made = [
        _chapter(topic, record) for topic, record in report.history.items() if isinstance(record, Mapping)
    ]
    return [chapter for chapter in made if chapter.plots or chapter.facts]


def summary_rows(chapter: Chapter) -> list[list[str]]:
    """One row a curve: plot, curve, first, least, most and last number."""
    return [
        [
            plot.title,
            "" if plot.single else curve.name,
            *(plot.text(v) for v in (curve.known[0], min(curve.known), max(curve.known), curve.known[-1])),
        ]
        for plot in chapter.plots
        for curve in plot.curves
    ]


def _chapter(topic: str, record: Mapping[str, Any]) -> Chapter:
    title, axis = CHAPTERS.get(topic, (topic, "step"))
    found = {key: _lists(key, value) for key, value in record.items()}
    counted = next((key for key in AXES if _counts(key, found)), "")
    at = tuple(float(v) for v in record[counted]) if counted else ()
    plots: list[Plot] = []
    for key, lists in found.items():
        if key == counted or (lists and key in AXES) or not lists:
            continue
        name, about = CURVES.get((topic, key), (key, ""))
        curves = tuple(Curve(n, at or tuple(map(float, range(1, len(v) + 1))), v) for n, v in lists.items())
        word = counted.removesuffix("s") if counted else axis
        plots.append(
            Plot(name, about, word, _unit(key, curves), curves, not isinstance(record[key], Mapping))
        )
    rest = {key: record[key] for key, lists in found.items() if key != counted and (not lists or key in AXES)}
    return Chapter(title, tuple(plots), tuple(facts(_with_unit(rest))))


def _with_unit(rest: Mapping[str, Any]) -> dict[str, Any]:
    value, metric = rest.get("budget"), METRICS.get(str(rest.get("metric")))
    limit = number(value)
    return {**rest, "budget": show(limit, metric.unit)} if metric and limit is not None else dict(rest)


def _lists(key: str, value: Any) -> dict[str, tuple[float | None, ...]]:
    """The lists of numbers that a value is or holds, by name; those without any number are left out."""
    named = value if isinstance(value, Mapping) else {key: value}
    found = {str(name): _numbers(numbers) for name, numbers in named.items()}
    return {name: numbers for name, numbers in found.items() if any(n is not None for n in numbers)}


def _counts(key: str, found: Mapping[str, Mapping[str, tuple[float | None, ...]]]) -> bool:
    """Whether a list says what all others belong to: it rises, and they are as long; else it counts something else."""
    known = [n for n in found.get(key, {}).get(key, ()) if n is not None]
    others = {len(v) for name, lists in found.items() if name not in AXES for v in lists.values()}
    return others == {len(known)} == {len(found[key][key])} and all(a < b for a, b in pairwise(known))


def _numbers(value: Any) -> tuple[float | None, ...]:
    """A list of numbers, None for those that are not finite; empty when it is no such list."""
    if not isinstance(value, (list, tuple)):
        return ()
    if not all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in value):
        return ()
    return tuple(number(v) for v in value)


def _unit(key: str, curves: Sequence[Curve]) -> str:
    if key in ("predicted", "measured"):
        return "s"
    shares = key in SHARES and all(0 <= v <= 1 for curve in curves for v in curve.known)
    return "fraction" if shares else ""
