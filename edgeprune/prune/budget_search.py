"""Budgets on metrics that need a built file: cuts are tried until one keeps every measured limit.

Where a latency table predicts the time of a cut, the table proposes cuts (`latency_search`); otherwise the share of the
multiply-accumulates is found by bisection.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from edgeprune import models
from edgeprune.errors import InfeasibleBudget, NoLayerTimes, UnsupportedModel, UsageError
from edgeprune.latency import Predictor
from edgeprune.methods import (
    Method,
    PruneTask,
    Survey,
    SurveyMethod,
    TrainingMethod,
    counts,
    group_shares,
    verify,
)
from edgeprune.models import CostModel
from edgeprune.prune import latency_search
from edgeprune.records import METRICS, Budget, Group, Masks

COUNTED = ("macs", "params")
# Metrics that zeroed weights do not change.
AS_DENSE = ("macs", "size", "latency_p50", "latency_p90", "latency_p99", "peak_memory", "energy")
PROBES = 8
# Of a latency limit: a timing at the limit itself would exceed it in half of the repetitions.
TIMING_MARGIN = 0.97

LatencyModel = Callable[[CostModel], Predictor]


@dataclass(frozen=True)
class Probe:
    """A metric that needs a built file: the reading of the dense network, and a function that measures a cut one."""

    dense: float
    read: Callable[[nn.Module], float]


def search(
    network: nn.Module,
    method: Method,
    task: PruneTask,
    budget: Budget,
    *,
    probes: Mapping[str, Probe],
    latency_model: LatencyModel | None,
) -> tuple[Masks, tuple[str, ...]]:
    """The choice of a method that keeps every limit of a budget, and notes on the search."""
    targets = _targets(budget, task, probes)
    survey = None
    if isinstance(method, SurveyMethod) and task.weights is None:
        survey = method.survey(network, task)
    kept, notes, best = None, (), task.rules.limits
    read = partial(_read, network, task.groups, {m: probes[m] for m in targets})
    if (
        survey is not None
        and latency_model is not None
        and not targets.keys().isdisjoint(latency_search.LATENCIES)
    ):
        limits = {m: latency_search.MeasuredLimit(probes[m].dense, target) for m, target in targets.items()}
        kept, notes = _by_table(task, survey, latency_model, limits, read)
    if targets and kept is None:
        best, more = _bisect(task, _chooser(network, method, task, survey), targets, read)
        notes = (*notes, *more)
    final = replace(task, rules=replace(task.rules, limits=dict(best)))
    if survey is None or not isinstance(method, SurveyMethod):
        masks = method(network, final)
    else:
        masks = method.choose(network, final, survey, kept or counts(survey, final))
        verify(type(method).__name__, masks, final)
    return masks, (*notes, *dict.fromkeys(task.notes))


def _targets(budget: Budget, task: PruneTask, probes: Mapping[str, Probe]) -> dict[str, float]:
    measured = {
        m: limit for m, limit in budget.limits.items() if m not in COUNTED and METRICS[m].less_is_better
    }
    unknown = sorted(set(measured) - set(probes))
    unchanged = [m for m in budget.limits if m in AS_DENSE] if task.weights is not None else []
    if unchanged:
        raise UsageError(
            f"zeroing single weights does not change {unchanged[0]}: the file's kernels are dense",
            'give params, as in --budget "params=20 %", or prune channels (--granularity channel)',
        )
    if unknown:
        raise UsageError(
            f"the budget's {unknown[0]} can't be measured while pruning here",
            "prune for macs, params, size or latency, and hold the rest with `edgeprune gate`",
        )
    return {m: limit.threshold(probes[m].dense) for m, limit in measured.items()}


def _by_table(
    task: PruneTask,
    survey: Survey,
    latency_model: LatencyModel,
    limits: Mapping[str, latency_search.MeasuredLimit],
    read: Callable[[Masks], dict[str, float]],
) -> tuple[Mapping[str, int] | None, tuple[str, ...]]:
    """Counts by a latency table, or None with the reason why there is no table."""
    try:
        model = latency_model(task.costs)
    except (UnsupportedModel, NoLayerTimes) as error:
        return None, (f"No latency table ({error.message}): searched by trying shares.",)
    return latency_search.search(task, survey, model, limits, lambda kept: read(_first(task.groups, kept)))


def _chooser(
    network: nn.Module, method: Method, task: PruneTask, survey: Survey | None
) -> Callable[[Mapping[str, float]], Masks]:
    """The choice within limits; of a surveying method only the counts, on which alone readings depend."""

    def choose(limits: Mapping[str, float]) -> Masks:
        tighter = replace(task, rules=replace(task.rules, limits=dict(limits)))
        if isinstance(method, TrainingMethod):
            # Training once is enough: limits are tried with the largest channels, then the method gets them.
            squares = {g: norms**2 for g, norms in tighter.units.norms(network).items()}
            return tighter.units.masks(tighter.keep(group_shares(squares)))
        if survey is None:
            return method(deepcopy(network), tighter)
        return _first(task.groups, counts(survey, tighter))

    return choose


def _first(groups: Sequence[Group], kept: Mapping[str, int]) -> Masks:
    """Masks that keep the first channels of each group: readings depend only on their number."""
    return Masks(channels={g.name: torch.arange(g.channels) < kept.get(g.name, g.channels) for g in groups})


def _bisect(
    task: PruneTask,
    choose: Callable[[Mapping[str, float]], Masks],
    targets: Mapping[str, float],
    read: Callable[[Masks], dict[str, float]],
) -> tuple[Mapping[str, float], tuple[str, ...]]:
    """The largest share of the parameters (for size alone) or MACs whose built file keeps every measured limit."""
    counted, name = ("params", "parameters") if set(targets) == {"size"} else ("macs", "MACs")
    dense = task.costs.cost({})[counted]
    low, high, share, best = 0.0, 1.0, 1.0, None
    closest: dict[str, float] = {}
    tried: list[str] = []
    for _ in range(PROBES):
        limits = {**task.rules.limits, counted: min(task.rules.limits.get(counted, dense), share * dense)}
        try:
            masks = choose(limits)
        except InfeasibleBudget:
            if not closest and share <= 1 / 2**PROBES:
                raise
            low = share
            share = (low + high) / 2
            continue
        readings = read(masks)
        built = task.costs.cost({g: int(keep.sum()) for g, keep in masks.channels.items()})[counted]
        found = ", ".join(latency_search.describe(m, v) for m, v in readings.items())
        tried.append(f"{100 * built / dense:.0f} % of the {name}: {found}")
        if not closest or all(readings[m] <= closest[m] for m in readings):
            closest = readings
        if all(
            v <= targets[m] * (TIMING_MARGIN if m.startswith("latency") else 1) for m, v in readings.items()
        ):
            low, best = share, limits
            if share == 1.0:
                break
        else:
            high = share
        share = (low + high) / 2
    if best is None:
        raise latency_search.infeasible(closest, targets)
    return best, ("Searched by building the file at " + "; ".join(tried) + ".",)


def _read(
    network: nn.Module, groups: Sequence[Group], probes: Mapping[str, Probe], masks: Masks
) -> dict[str, float]:
    small = deepcopy(network)
    models.cut(small, models.removed_positions(groups, masks.channels))
    return {metric: probe.read(small) for metric, probe in probes.items()}
