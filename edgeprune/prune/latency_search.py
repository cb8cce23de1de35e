"""Latency budgets by a table: allocate by predicted time, time the whole network, correct, repeat until it holds.

The error of the prediction is some per cent and nearly the same for similar cuts, so measured over predicted time of
one cut corrects the next. A cut is accepted when its measured time is just below the budget.
"""

import statistics
from collections.abc import Callable, Mapping
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
# Shares of the budget: the target, and the range in which a measured cut is accepted. Two sessions of one file differ
# by up to 2 %, and a cut more than 5 % below the budget has lost accuracy for nothing.
AIM, LOW, HIGH = 0.975, 0.96, 0.99
# Rounds of exchanges by measured joint loss.
REFINED = 3
# The factor on the target when an allocation repeats, and how often it is applied.
NUDGE = 1.01
NUDGES = 12


@dataclass(frozen=True)
class MeasuredLimit:
    """A metric of the dense network, and its limit."""

    dense: float
    target: float


@dataclass(frozen=True)
class _Trial:
    """A cut that was built and measured. predicted: seconds. load: the largest share of a limit that it takes."""

    kept: Mapping[str, int]
    predicted: float
    readings: Mapping[str, float]
    load: float


@dataclass
class _Search:
    """The state of a search. correction: measured over predicted time. params: a limit that stands for the size."""

    task: PruneTask
    survey: Survey
    model: Predictor
    limits: Mapping[str, MeasuredLimit]
    read: Callable[[Mapping[str, int]], Mapping[str, float]]
    correction: float = 1.0
    params: float = float("inf")
    trials: list[_Trial] = field(default_factory=list)

    def propose(self) -> dict[str, int] | None:
        """Counts that are predicted to keep the limits and were not tried; None when there are none."""
        before = self.correction
        for nudge in self._nudges():
            self.correction = before * nudge
            kept = self._allocated()
            if not self._tried(kept):
                return kept
            if self.trials[-1].load > HIGH and kept == self._floors():
                break
        self.correction = before
        return None

    def _tried(self, kept: Mapping[str, int]) -> bool:
        return any(trial.kept == kept for trial in self.trials)

    def _nudges(self) -> list[float]:
        """Factors on the correction: only tighter ones after a cut that is too slow, else both."""
        tighter = [NUDGE**k for k in range(NUDGES + 1)]
        if not self.trials or self.trials[-1].load > HIGH:
            return tighter
        return [1.0, *(n for k in range(1, NUDGES // 2 + 1) for n in (NUDGE**-k, NUDGE**k))]

    def refine(self) -> None:
        """Try counts with less measured joint loss, until one keeps the limits."""
        for _ in range(REFINED):
            if all(trial.load > HIGH for trial in self.trials):
                return
            kept = self._exchanged()
            if self._tried(kept) or self.measure(kept).load <= HIGH:
                return

    def _exchanged(self) -> dict[str, int]:
        survey = self.survey
        assert survey.together is not None, "refine is called for surveys with it"
        costs, rules = TimedCosts(self.task.costs, self.model), self._rules()
        start = self._allocated()
        cost = costs.cost(start)
        if any(cost[metric] > limit for metric, limit in rules.limits.items()):
            return start
        return refine(start, (survey.losses, costs, rules), survey.together, survey.tries)

    def dense_fits(self) -> bool:
        """Whether the last trial kept all channels and is within the budget."""
        last = self.trials[-1]
        whole = all(last.kept[g] == c for g, c in self.model.channels.items() if g in last.kept)
        return whole and last.load <= 1.0

    def loss(self, trial: _Trial) -> float:
        """The joint loss where it is measured, else the sum of the losses of all groups."""
        if self.survey.together is not None:
            return self.survey.together(trial.kept)
        losses = self.survey.losses
        return sum(float(losses[g][k]) for g, k in trial.kept.items() if g in losses)

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
            # The prediction may err, so the least counts are measured.
            return self._floors()

    def _floors(self) -> dict[str, int]:
        """The least counts, with or without multiples: whichever is predicted to be faster."""
        rules, channels = self.task.rules, self.task.costs.channels
        least = [
            {g: levels(c, multiple, rules.floor)[-1] for g, c in channels.items()}
            for multiple in {1, max(1, rules.multiple_of // 2), max(1, rules.multiple_of)}
        ]
        return min(least, key=self.model.seconds)

    def measure(self, kept: Mapping[str, int]) -> _Trial:
        """Build and measure a cut, and correct the prediction by it.

        A cut in the accepted range is measured twice: the best of several single readings is too optimistic.
        """
        readings = dict(self.read(kept))
        if LOW <= max(readings[m] / limit.target for m, limit in self.limits.items()) <= HIGH:
            again = self.read(kept)
            readings = {m: (value + again[m]) / 2 for m, value in readings.items()}
        loads = {m: readings[m] / limit.target for m, limit in self.limits.items()}
        predicted = self.model.seconds(kept)
        trial = _Trial(dict(kept), predicted, readings, max(loads.values()))
        self.trials.append(trial)
        slowest = max(load for m, load in loads.items() if m in LATENCIES) * self._tightest()
        self.correction = slowest * self.model.dense / predicted
        for metric, load in loads.items():
            if metric not in LATENCIES and load > HIGH:
                self.params = min(self.params, self.task.costs.cost(kept)["params"] * AIM / load)
        return trial

    def _tightest(self) -> float:
        return min(limit.target / limit.dense for m, limit in self.limits.items() if m in LATENCIES)

    def predicted(self, trial: _Trial, metric: str) -> float:
        """Seconds of the file that the limit is on."""
        return trial.predicted / self.model.dense * self.model.of_dense * self.limits[metric].dense


def search(
    task: PruneTask,
    survey: Survey,
    model: Predictor,
    limits: Mapping[str, MeasuredLimit],
    read: Callable[[Mapping[str, int]], Mapping[str, float]],
) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """The counts with the least loss whose built file keeps every limit, and notes; `task.record` gets the trials.

    Args:
        limits: at least one latency; other metrics shrink with the parameters.
        read: counts -> each metric of `limits`, measured on the cut network.
    """
    state = _Search(task, survey, model, limits, read, correction=model.of_dense)
    for _ in range(ROUNDS):
        kept = state.propose()
        if kept is None:
            break
        if LOW <= state.measure(kept).load <= HIGH or state.dense_fits():
            break
    if survey.together is not None and survey.tries and not state.dense_fits():
        state.refine()
    fitting = [trial for trial in state.trials if trial.load <= 1.0]
    if not fitting:
        nearest = min(state.trials, key=lambda trial: trial.load)
        raise infeasible(nearest.readings, {m: limit.target for m, limit in limits.items()})
    safe = [trial for trial in fitting if trial.load <= HIGH]
    best = min(safe or fitting, key=state.loss)
    task.record["latency"] = _record(state)
    return best.kept, _notes(best, state)


def infeasible(closest: Mapping[str, float], targets: Mapping[str, float]) -> InfeasibleBudget:
    """The error with the readings of the closest cut."""
    got = ", ".join(
        f"{describe(m, closest.get(m))} (limit {show(target, METRICS[m].unit)})"
        for m, target in targets.items()
    )
    return InfeasibleBudget(
        f"the budget can't be met on this machine: the closest cut has {got}",
        "raise the budget, lower --set prune.floor, or give a smaller network",
    )


def describe(metric: str, value: float | None) -> str:
    """For example "latency_p50 3.1 ms"."""
    return f"{metric} {show(value, METRICS[metric].unit)}"


def _notes(best: _Trial, state: _Search) -> tuple[str, ...]:
    notes = [_describe_table(state.model)]
    count = len(state.trials)
    for metric, limit in state.limits.items():
        text = f"{describe(metric, best.readings[metric])} measured"
        if metric in LATENCIES:
            text += f", {show(state.predicted(best, metric), 's')} predicted"
        target = show(limit.target, METRICS[metric].unit)
        notes.append(f"{text}; the limit is {target}; {count} trial{'s' * (count > 1)}.")
    if best.load < LOW and not state.dense_fits():
        notes.append(
            f"The cut takes {100 * best.load:.0f} % of the budget: no cut was found between this one and the next "
            "step of the device."
        )
    return tuple(notes)


def _describe_table(model: Predictor) -> str:
    errors = [abs(e) for e in model.errors()]
    text = f"Channels were allocated by a latency table: {len(model.wholes)} cuts timed on {model.place}"
    if not errors:
        return text + "."
    within = sum(e <= 0.1 for e in errors)
    return (
        f"{text}; {within} of {len(errors)} predictions of new cuts were within 10 % of the measured time, with a "
        f"median error of {100 * statistics.median(errors):.1f} %."
    )


def _record(state: _Search) -> dict[str, Any]:
    metric = next(m for m in LATENCIES if m in state.limits)
    return {
        "iterations": list(range(1, len(state.trials) + 1)),
        "predicted": [state.predicted(trial, metric) for trial in state.trials],
        "measured": [trial.readings[metric] for trial in state.trials],
        "metric": metric,
        "budget": state.limits[metric].target,
        "table": state.model.path,
    }
