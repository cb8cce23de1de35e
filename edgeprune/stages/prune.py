"""prune: decide which channels go, so that every limit of the budget that can be known now holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeprune import codec, plugins
from edgeprune.errors import InfeasibleBudget, UsageError, WorkdirError
from edgeprune.methods import Method, PruneTask, SurveyMethod, counts, verify
from edgeprune.nn import surgery
from edgeprune.nn.allocate import Rules
from edgeprune.nn.bundle import deployed
from edgeprune.nn.costs import CostModel, cost_model, normalized_example, total_params
from edgeprune.nn.graph import find_groups, provable_groups
from edgeprune.nn.store import load_tensors, masks_to_tensors, save_tensors
from edgeprune.quantities import show
from edgeprune.recipe import PruneTable
from edgeprune.records import METRICS, Budget, Bundle, Group, Limit, Masks

RESULT_VERSION = 2
COUNTED = ("macs", "params")
PROBES = 8
# A timing that just fits would miss half of the time when it is repeated.
TIMING_MARGIN = 0.97


@dataclass(frozen=True)
class Chosen:
    """What prune hands on: the groups that can be cut, what to keep of them, what was left out and why, and notes.

    edited: state-dict name -> the tensor that the method put there (merged units); usually empty.
    """

    groups: tuple[Group, ...]
    masks: Masks
    left_out: dict[str, str]
    notes: tuple[str, ...]
    edited: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A metric that is only known by building the file: the dense reading, and a reading of a cut network."""

    dense: float
    read: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Material:
    """What a method may look at, and what can be tried out while searching.

    images: float32 (N, C, H, W) in [0, 1], labels: int64 (N,), or None. probes: metric -> Probe.
    unlabelled: float32 (N, C, H, W), what the cut network will be repaired on, or None.
    """

    images: Tensor | None
    labels: Tensor | None
    probes: Mapping[str, Probe]
    multiple_of: int
    seed: int
    unlabelled: Tensor | None = None


def method_name(table: PruneTable, has_data: bool) -> str:
    """The method that "auto" stands for: taylor when there are training images, data-free otherwise."""
    if table.method != "auto":
        return table.method
    return "taylor" if has_data else "data-free"


def run(bundle: Bundle, table: PruneTable, budget: Budget, material: Material) -> Chosen:
    """Find what can be cut, and choose within it.

    Raises:
        UsageError: a granularity or a metric that can't be pruned for. UnsupportedModel: nothing can be cut.
        InfeasibleBudget: no choice meets the budget; says how far it got.
    """
    if table.granularity != "channel":
        raise UsageError(f"granularity {table.granularity!r} is not in this version", "accepted: channel")
    method: Method = plugins.build("methods", method_name(table, material.images is not None), table.options)
    network = deepcopy(bundle.module)
    example = normalized_example(bundle.input, material.seed)
    graph = provable_groups(network, find_groups(network, example, table.skip), example, material.seed)
    costs = cost_model(network, graph.groups, example)
    rules = Rules(
        limits=counted_limits(budget, network, costs), multiple_of=material.multiple_of, floor=table.floor,
        uniform=table.allocation == "uniform",
    )  # fmt: skip

    def logits(pruned: nn.Module, x: Tensor) -> Tensor:
        return deployed(replace(bundle, module=pruned))(x)

    task = PruneTask(
        graph.groups, costs, rules, logits, material.images, material.labels, material.seed, bundle.input,
        material.unlabelled,
    )  # fmt: skip
    masks, notes = _search(network, method, task, (budget, material.probes))
    if all(bool(keep.all()) for keep in masks.channels.values()):
        notes = (*notes, "The dense model already meets the budget: nothing was removed.")
    notes = (*notes, *_unaligned(masks, material.multiple_of))
    return Chosen(graph.groups, masks, graph.left_out, notes, _edited(bundle.module, network))


def _edited(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """What the method changed in the network's tensors."""
    old = before.state_dict()
    return {k: v.detach() for k, v in after.state_dict().items() if not torch.equal(v, old[k])}


def _unaligned(masks: Masks, multiple_of: int) -> tuple[str, ...]:
    cut = {g: int(keep.sum()) for g, keep in masks.channels.items() if not bool(keep.all())}
    off = {g: kept for g, kept in cut.items() if kept % multiple_of}
    if not off:
        return ()
    name, kept = next(iter(off.items()))
    return (
        f"{len(off)} of {len(cut)} cut groups keep a count that is not a multiple of {multiple_of} ({name}: {kept}), "
        "because they are too narrow for it or the budget could not be met otherwise.",
    )


def counted_limits(budget: Budget, network: nn.Module, costs: CostModel) -> dict[str, float]:
    """The limits on what is counted (macs, params), in numbers."""
    # `params` counts what is not zero; the cost model counts every entry, so it errs on the side of the budget.
    dense = {"macs": costs.cost({})["macs"], "params": float(total_params(network))}
    return {m: absolute(limit, dense[m]) for m, limit in budget.limits.items() if m in COUNTED}


def absolute(limit: Limit, dense: float) -> float:
    """A limit as a number in the base unit."""
    return {"absolute": limit.value, "share": limit.value * dense, "delta": dense + limit.value}[limit.kind]


def _search(
    network: nn.Module, method: Method, task: PruneTask, wanted: tuple[Budget, Mapping[str, Probe]]
) -> tuple[Masks, tuple[str, ...]]:
    budget, probes = wanted
    measured = {
        m: limit for m, limit in budget.limits.items() if m not in COUNTED and METRICS[m].less_is_better
    }
    unknown = sorted(set(measured) - set(probes))
    if unknown:
        raise UsageError(
            f"the budget's {unknown[0]} can't be read while pruning here",
            "prune for macs, params, size or latency, and hold the rest with `edgeprune gate`",
        )
    survey = method.survey(network, task) if isinstance(method, SurveyMethod) else None

    def choose(limits: Mapping[str, float]) -> Masks:
        """The choice within limits; of a surveying method only its counts, which are all that a probe tells."""
        tighter = replace(task, rules=replace(task.rules, limits=dict(limits)))
        if survey is None:
            return method(deepcopy(network), tighter)
        kept = counts(survey, tighter)
        return Masks(channels={g.name: torch.arange(g.channels) < kept[g.name] for g in task.groups})

    best, notes = task.rules.limits, ()
    if measured:
        targets = {m: absolute(limit, probes[m].dense) for m, limit in measured.items()}
        best, notes = _bisect(network, task, choose, (targets, probes))
    final = replace(task, rules=replace(task.rules, limits=dict(best)))
    if survey is None or not isinstance(method, SurveyMethod):
        masks = method(network, final)
    else:
        masks = method.choose(network, final, survey, counts(survey, final))
        verify(type(method).__name__, masks, final)
    return masks, (*notes, *dict.fromkeys(task.notes))


def _bisect(
    network: nn.Module,
    task: PruneTask,
    choose: Callable[[Mapping[str, float]], Masks],
    wanted: tuple[dict[str, float], Mapping[str, Probe]],
) -> tuple[Mapping[str, float], tuple[str, ...]]:
    """Halve the share of MACs until the largest one is found whose built file keeps every measured limit."""
    targets, probes = wanted
    dense_macs = task.costs.cost({})["macs"]
    low, high, best = 0.0, 1.0, None
    closest: dict[str, float] = {}
    tried: list[str] = []
    share = 1.0
    for _ in range(PROBES):
        limits = {
            **task.rules.limits,
            "macs": min(task.rules.limits.get("macs", dense_macs), share * dense_macs),
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
        built = task.costs.cost({g: int(keep.sum()) for g, keep in masks.channels.items()})["macs"]
        tried.append(
            f"{100 * built / dense_macs:.0f} % of the MACs: "
            + ", ".join(_shown(m, v) for m, v in readings.items())
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
        got = ", ".join(
            f"{_shown(m, closest.get(m))} (asked for {show(targets[m], METRICS[m].unit)})" for m in targets
        )
        raise InfeasibleBudget(
            f"the budget can't be met on this machine: the closest got to {got}",
            "raise the budget, lower --set prune.floor, or give a smaller network",
        )
    return best, ("Searched by building the file at " + "; ".join(tried) + ".",)


def _read(
    network: nn.Module,
    groups: tuple[Group, ...],
    masks: Masks,
    probes: Mapping[str, Probe],
    targets: Mapping[str, float],
) -> dict[str, float]:
    small = deepcopy(network)
    surgery.cut(small, surgery.removed_positions(groups, masks.channels))
    return {metric: probes[metric].read(small) for metric in targets}


def _shown(metric: str, value: float | None) -> str:
    return f"{metric} {show(value, METRICS[metric].unit)}"


def write(chosen: Chosen, folder: Path) -> None:
    """Leave the choice in a folder: masks.safetensors and chosen.json."""
    save_tensors(masks_to_tensors(dict(chosen.masks.channels)), folder / "masks.safetensors")
    save_tensors(dict(chosen.edited), folder / "edited.safetensors")
    codec.write(
        folder / "chosen.json", {"groups": chosen.groups, "left_out": chosen.left_out, "notes": chosen.notes}
    )


def read(folder: Path) -> Chosen:
    """The choice that `write` left.

    Raises:
        WorkdirError: the files are not readable.
    """
    rest = codec.read(_Rest, folder / "chosen.json", WorkdirError)
    masks = Masks(channels={k: v.bool() for k, v in load_tensors(folder / "masks.safetensors").items()})
    edited = load_tensors(folder / "edited.safetensors")
    return Chosen(rest.groups, masks, dict(rest.left_out), rest.notes, edited)


@dataclass(frozen=True)
class _Rest:
    groups: tuple[Group, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
