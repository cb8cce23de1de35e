"""Budgets that only a built file can tell: cuts are tried out until one keeps every measured limit.

Where a latency table predicts the time of a cut (`prune_latency`), it is tried what the table says; else the share of
the multiply-accumulates that fits is found by halving.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeprune import models
from edgeprune.errors import InfeasibleBudget, NoLayerTimes, UnsupportedModel, UsageError
from edgeprune.latency import Predictor
from edgeprune.methods import Method, PruneTask, Survey, SurveyMethod, TrainingMethod, counts, verify
from edgeprune.models import CostModel
from edgeprune.prune import latency_search
from edgeprune.records import METRICS, Budget, Group, Limit, Masks

COUNTED = ("macs", "params")
# What zeros leave as it is.
AS_DENSE = ("macs", "size", "latency_p50", "latency_p90", "latency_p99", "peak_memory", "energy")
PROBES = 8
# A timing that just fits would miss half of the time when it is repeated.
TIMING_MARGIN = 0.97


@dataclass(frozen=True)
class Probe:
    """A metric that is only known by building the file: the dense reading, and a reading of a cut network."""

    dense: float
    read: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Tools:
    """What tells what a cut comes to. probes: metric -> Probe. clock: costs -> what predicts its time, or None."""

    probes: Mapping[str, Probe]
    latency_model: Callable[[CostModel], Predictor] | None = None


def absolute(limit: Limit, dense: float) -> float:
    """A limit as a number in the base unit."""
    return {"absolute": limit.value, "share": limit.value * dense, "delta": dense + limit.value}[limit.kind]


def search(
    network: nn.Module, method: Method, task: PruneTask, budget: Budget, tools: Tools
) -> tuple[Masks, tuple[str, ...]]:
    """The choice of a method that keeps every limit of a budget, and what a reader must know of how it was found."""
    targets = _targets(budget, task, tools.probes)
    survey = None
    if isinstance(method, SurveyMethod) and task.weights is None:
        survey = method.survey(network, task)
    kept, notes, best = None, (), task.rules.limits
    if targets and survey is not None and tools.latency_model is not None:
        kept, notes = _by_table(network, task, survey, targets, tools)
    if targets and kept is None:
        best, more = _bisect(network, task, _chooser(network, method, task, survey), (targets, tools.probes))
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
    in_vain = [m for m in budget.limits if m in AS_DENSE] if task.weights is not None else []
    if in_vain:
        raise UsageError(
            f"zeroing single weights leaves {in_vain[0]} as it is: the file's kernels are dense",
            'give params, as in --budget "params=20 %", or prune channels (--granularity channel)',
        )
    if unknown:
        raise UsageError(
            f"the budget's {unknown[0]} can't be read while pruning here",
            "prune for macs, params, size or latency, and hold the rest with `edgeprune gate`",
        )
    return {m: absolute(limit, probes[m].dense) for m, limit in measured.items()}


def _by_table(
    network: nn.Module, task: PruneTask, survey: Survey, targets: Mapping[str, float], tools: Tools
) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """Counts that a latency table led to, or None with the reason where it can't."""
    if tools.latency_model is None or not any(m in latency_search.LATENCIES for m in targets):
        return None, ()
    try:
        model = tools.latency_model(task.costs)
    except UnsupportedModel as error:
        return None, (f"No latency table for this network ({error.message}): searched by trying shares.",)
    except NoLayerTimes as error:
        return None, (f"No latency table ({error.message}): searched by trying shares.",)
    wanted = {m: latency_search.LatencyLimits(tools.probes[m].dense, target) for m, target in targets.items()}

    def read(kept: Mapping[str, int]) -> dict[str, float]:
        return _read(network, task.groups, first(task.groups, kept), tools.probes, targets)

    found = latency_search.search(task, survey, model, wanted, read)
    task.record["latency"] = found.record
    return dict(found.kept), found.notes


def _chooser(
    network: nn.Module, method: Method, task: PruneTask, survey: Survey | None
) -> Callable[[Mapping[str, float]], Masks]:
    """The choice within limits; of a surveying method only its counts, which are all that a probe tells."""

    def choose(limits: Mapping[str, float]) -> Masks:
        tighter = replace(task, rules=replace(task.rules, limits=dict(limits)))
        if isinstance(method, TrainingMethod):
            # One training is enough: what fits is tried out with the largest channels, the method is told the limits.
            return tighter.masks(tighter.keep(_shares_of_norms(tighter, network)))
        if survey is None:
            return method(deepcopy(network), tighter)
        return first(task.groups, counts(survey, tighter))

    return choose


def first(groups: Sequence[Group], kept: Mapping[str, int]) -> Masks:
    """Masks that keep so many channels of each group: the first ones, since only their number matters for a probe."""
    return Masks(channels={g.name: torch.arange(g.channels) < kept.get(g.name, g.channels) for g in groups})


def _shares_of_norms(task: PruneTask, network: nn.Module) -> dict[str, Tensor]:
    squares = {g: norms**2 for g, norms in task.units.norms(network).items()}
    return {g: s / torch.clamp(s.sum(), min=1e-30) for g, s in squares.items()}


def _bisect(
    network: nn.Module,
    task: PruneTask,
    choose: Callable[[Mapping[str, float]], Masks],
    wanted: tuple[dict[str, float], Mapping[str, Probe]],
) -> tuple[Mapping[str, float], tuple[str, ...]]:
    """Halve the share of what counts until the largest one is found whose built file keeps every measured limit.

    A file is as large as its parameters are many; time and memory go with the multiply-accumulates.
    """
    targets, probes = wanted
    counted, words = ("params", "parameters") if set(targets) == {"size"} else ("macs", "MACs")
    dense = task.costs.cost({})[counted]
    low, high, best = 0.0, 1.0, None
    closest: dict[str, float] = {}
    tried: list[str] = []
    share = 1.0
    for _ in range(PROBES):
        limits = {
            **task.rules.limits,
            counted: min(task.rules.limits.get(counted, dense), share * dense),
        }
        try:
            masks = choose(limits)
        except InfeasibleBudget:
            if not closest and share <= 1 / 2**PROBES:
                raise
            low = share
            share = (low + high) / 2
            continue
        readings = _read(network, task.groups, masks, probes, targets)
        built = task.costs.cost({g: int(keep.sum()) for g, keep in masks.channels.items()})[counted]
        tried.append(
            f"{100 * built / dense:.0f} % of the {words}: "
            + ", ".join(latency_search.shown(m, v) for m, v in readings.items())
        )
        fits = all(
            v <= targets[m] * (TIMING_MARGIN if m.startswith("latency") else 1.0) for m, v in readings.items()
        )
        if not closest or all(readings[m] <= closest[m] for m in readings):
            closest = readings
        if fits:
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
    network: nn.Module,
    groups: Sequence[Group],
    masks: Masks,
    probes: Mapping[str, Probe],
    targets: Mapping[str, float],
) -> dict[str, float]:
    small = deepcopy(network)
    models.cut(small, models.removed_positions(groups, masks.channels))
    return {metric: probes[metric].read(small) for metric in targets}
