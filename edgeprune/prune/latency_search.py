"""Latency budgets by a table: allocate by predicted time, time the whole network, correct, repeat until it holds.

The table is right within some per cent, and for a network and its neighbours the error is nearly the same: what one
cut took over what was predicted corrects the next. A cut is taken when its measured time is just below the budget.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.errors import InfeasibleBudget
from edgeprune.latency import TIME, Predictor, TimedCosts, allocate_timed, refine
from edgeprune.methods import PruneTask, Survey
from edgeprune.quantities import show
from edgeprune.records import METRICS
from edgeprune.structure import Rules, levels

LATENCIES = ("latency_p50", "latency_p90", "latency_p99")
ROUNDS = 8
# Of the budget: what is aimed at, and between what a measured cut is taken. Two sessions of one file differ by up to
# 2 %, and a cut that takes more than 5 % less than it may has lost accuracy for nothing.
AIM, LOW, HIGH = 0.975, 0.96, 0.99
# How often counts are refined by what they cost together.
REFINED = 3
# How much tighter to ask when the same cut comes again.
NUDGE = 1.01
NUDGES = 12


@dataclass(frozen=True)
class LatencyLimits:
    """A measured metric of the dense network, and the most that is allowed."""

    dense: float
    target: float


@dataclass(frozen=True)
class Found:
    """Counts that keep the limits. record: predicted and measured seconds of every cut that was tried, in order."""

    kept: Mapping[str, int]
    notes: tuple[str, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Trial:
    """A cut that was built and measured. predicted: seconds. worst: the metric nearest to its limit, and the share."""

    kept: Mapping[str, int]
    predicted: float
    readings: Mapping[str, float]
    worst: tuple[str, float]


@dataclass
class _Search:
    """What is known while searching. correction: measured over predicted. params: a limit that stands for the size."""

    task: PruneTask
    survey: Survey
    model: Predictor
    wanted: Mapping[str, LatencyLimits]
    read: Callable[[Mapping[str, int]], Mapping[str, float]]
    correction: float = 1.0
    params: float = float("inf")
    trials: list[_Trial] = field(default_factory=list)

    def propose(self) -> dict[str, int] | None:
        """Counts that are predicted to hold and were not tried; None when there are none."""
        before = self.correction
        for nudge in self._nudges():
            self.correction = before * nudge
            kept = self._allocated()
            if not any(t.kept == kept for t in self.trials):
                return kept
            if self.trials[-1].worst[1] > HIGH and kept == self._floors():
                break
        self.correction = before
        return None

    def _nudges(self) -> list[float]:
        """How much tighter to ask where the same cut comes again: one way when it is too slow, else both ways."""
        tighter = [NUDGE**k for k in range(NUDGES + 1)]
        if not self.trials or self.trials[-1].worst[1] > HIGH:
            return tighter
        return [1.0, *(n for k in range(1, NUDGES // 2 + 1) for n in (NUDGE**-k, NUDGE**k))]

    def refined(self) -> dict[str, int]:
        """Counts that are predicted to be just within the limits, and were measured to cost little together."""
        survey = self.survey
        assert survey.together is not None, "it was asked"
        problem = survey.losses, TimedCosts(self.task.costs, self.model), self._rules()
        start = self._allocated()
        if not all(problem[1].cost(start)[m] <= limit for m, limit in problem[2].limits.items()):
            return start
        return refine(start, problem, survey.together, survey.tries)

    def dense_fits(self) -> bool:
        """Whether all channels were tried last, and that is within the budget."""
        last = self.trials[-1]
        whole = all(last.kept[g] == c for g, c in self.model.channels.items() if g in last.kept)
        return whole and last.worst[1] <= 1.0

    def lost(self, kept: Mapping[str, int]) -> float:
        """What counts cost: together where that is measured, or the sum of what they cost alone."""
        if self.survey.together is not None:
            return self.survey.together(kept)
        return sum(float(self.survey.losses[g][k]) for g, k in kept.items() if g in self.survey.losses)

    def _rules(self) -> Rules:
        rules = self.task.rules
        limits = {**rules.limits, TIME: AIM * self._tightest() * self.model.dense / self.correction}
        if self.params < float("inf"):
            limits["params"] = min(self.params, limits.get("params", float("inf")))
        return Rules(limits, rules.multiple_of, rules.floor, rules.cuts)

    def _allocated(self) -> dict[str, int]:
        try:
            costs = TimedCosts(self.task.costs, self.model)
            return allocate_timed(self.survey.losses, costs, self._rules()).kept
        except InfeasibleBudget:
            # The prediction may err; whether the least that is allowed is fast enough is for the device to say.
            return self._floors()

    def _floors(self) -> dict[str, int]:
        """The least counts: of those with and without multiples the ones that are predicted to be faster."""
        rules, channels = self.task.rules, self.task.costs.channels
        least = [
            {g: levels(c, multiple, rules.floor)[-1] for g, c in channels.items()}
            for multiple in {1, max(1, rules.multiple_of // 2), max(1, rules.multiple_of)}
        ]
        return min(least, key=self.model.seconds)

    def attempt(self, kept: Mapping[str, int]) -> _Trial:
        """Build and measure a cut, and learn from it.

        One that seems right is measured again, and the mean counts: of several cuts a lucky reading is soon among them.
        """
        readings = dict(self.read(kept))
        if LOW <= max(readings[m] / w.target for m, w in self.wanted.items()) <= HIGH:
            again = self.read(kept)
            readings = {m: (value + again[m]) / 2 for m, value in readings.items()}
        fills = {m: readings[m] / w.target for m, w in self.wanted.items()}
        worst = max(fills, key=lambda m: fills[m])
        predicted = self.model.seconds(kept)
        trial = _Trial(dict(kept), predicted, readings, (worst, fills[worst]))
        self.trials.append(trial)
        slowest = max(
            readings[m] / self.wanted[m].target * self._tightest() for m in self.wanted if m in LATENCIES
        )
        self.correction = slowest * self.model.dense / predicted
        for metric, fill in fills.items():
            if metric not in LATENCIES and fill > HIGH:
                params = self.task.costs.cost(kept)["params"]
                self.params = min(self.params, params * AIM / fill)
        return trial

    def _tightest(self) -> float:
        return min(w.target / w.dense for m, w in self.wanted.items() if m in LATENCIES)


def search(
    task: PruneTask,
    survey: Survey,
    model: Predictor,
    wanted: Mapping[str, LatencyLimits],
    read: Callable[[Mapping[str, int]], Mapping[str, float]],
) -> Found:
    """The counts that lose the least importance and whose built file keeps every limit.

    Args:
        survey: what counts cost. wanted: metric -> what was measured and what is allowed;
            at least one latency, others are metrics that shrink with the parameters. read: counts -> each of these
            metrics of the cut network, measured.
    """
    state = _Search(task, survey, model, wanted, read, correction=model.of_dense)
    for _ in range(ROUNDS):
        kept = state.propose()
        if kept is None:
            break
        trial = state.attempt(kept)
        if LOW <= trial.worst[1] <= HIGH or state.dense_fits():
            break
    if survey.together is not None and survey.tries and not state.dense_fits():
        _refine(state)
    fitting = [t for t in state.trials if t.worst[1] <= 1.0]
    if not fitting:
        nearest = min(state.trials, key=lambda t: t.worst[1])
        raise infeasible(nearest.readings, {m: w.target for m, w in wanted.items()})
    safe = [t for t in fitting if t.worst[1] <= HIGH]
    best = min(safe or fitting, key=lambda t: state.lost(t.kept))
    return Found(best.kept, _notes(best, state), _record(state))


def _refine(state: _Search) -> None:
    for _ in range(REFINED):
        if all(t.worst[1] > HIGH for t in state.trials):
            return
        kept = state.refined()
        if any(t.kept == kept for t in state.trials) or state.attempt(kept).worst[1] <= HIGH:
            return


def infeasible(closest: Mapping[str, float], targets: Mapping[str, float]) -> InfeasibleBudget:
    """The error that says how near the nearest cut came."""
    got = ", ".join(
        f"{shown(m, closest.get(m))} (asked for {show(target, METRICS[m].unit)})"
        for m, target in targets.items()
    )
    return InfeasibleBudget(
        f"the budget can't be met on this machine: the closest got to {got}",
        "raise the budget, lower --set prune.floor, or give a smaller network",
    )


def shown(metric: str, value: float | None) -> str:
    """A reading in words: "latency_p50 3.1 ms"."""
    return f"{metric} {show(value, METRICS[metric].unit)}"


def _notes(best: _Trial, state: _Search) -> tuple[str, ...]:
    said = [about(state.model)]
    for metric, wanted in state.wanted.items():
        words = f"{shown(metric, best.readings[metric])} measured"
        if metric in LATENCIES:
            words += f", {show(_predicted(best, state, metric), 's')} predicted"
        limit = show(wanted.target, METRICS[metric].unit)
        said.append(f"{words}, at most {limit} asked for, after {_times(len(state.trials))}.")
    if best.worst[1] < LOW and not state.dense_fits():
        said.append(
            f"The cut takes {100 * best.worst[1]:.0f} % of what the budget allows: between this one and the next "
            "step of the device no other was found."
        )
    return tuple(said)


def about(model: Predictor) -> str:
    """What a table is made of and how well it predicted what it had not seen, in a sentence."""
    errors = [abs(e) for e in model.errors()]
    text = f"Channels were shared out by a latency table: {len(model.wholes)} cuts timed on {model.place}"
    if not errors:
        return text + "."
    within = sum(e <= 0.1 for e in errors)
    return (
        f"{text}; predicted before they were timed, {within} of {len(errors)} were within 10 %, "
        f"half of them within {100 * statistics.median(errors):.1f} %."
    )


def _predicted(trial: _Trial, state: _Search, metric: str) -> float:
    return trial.predicted / state.model.dense * state.model.of_dense * state.wanted[metric].dense


def _record(state: _Search) -> dict[str, Any]:
    metric = next(m for m in LATENCIES if m in state.wanted)
    trials: Sequence[_Trial] = state.trials
    return {
        "iterations": list(range(1, len(trials) + 1)),
        "predicted": [_predicted(t, state, metric) for t in trials],
        "measured": [t.readings[metric] for t in trials],
        "metric": metric,
        "budget": state.wanted[metric].target,
        "table": state.model.path,
    }


def _times(count: int) -> str:
    return "one trial" if count == 1 else f"{count} trials"
