"""prune: decide which channels go, so that every limit of the budget that can be known now holds."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import plugins, serialization
from edgeprune.data import Split, divide
from edgeprune.errors import InfeasibleBudget, UnsupportedModel, WorkdirError
from edgeprune.latency import Predictor
from edgeprune.methods import Method, PruneTask, Training, TrainingMethod
from edgeprune.models import (
    CostModel,
    cost_model,
    deployed,
    load_tensors,
    masks_to_tensors,
    normalized_example,
    save_tensors,
    total_params,
    unfreeze,
)
from edgeprune.prune.budget_search import AS_DENSE, COUNTED, Probe, Tools, absolute, search
from edgeprune.recipe import PruneTable, TuneTable
from edgeprune.records import Budget, Bundle, Group, Limit, Masks
from edgeprune.structure import (
    Rules,
    Units,
    find_groups,
    keep_shares,
    of_channels,
    of_weights,
    provable_groups,
    shared_counts,
)

RESULT_VERSION = 9
# A budget with one of these says itself how small or fast it is to become.
SMALL = frozenset((*AS_DENSE, "params")) - {"macs"}


@dataclass(frozen=True)
class Chosen:
    """What prune hands on: the groups that can be cut, what to keep of them, what was left out and why, and notes.

    edited: state-dict name -> the tensor that the method put there (merged or trained units); usually empty.
    record: the method's curves, for the report.
    """

    groups: tuple[Group, ...]
    masks: Masks
    left_out: dict[str, str]
    notes: tuple[str, ...]
    edited: dict[str, Tensor] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PruningInputs:
    """What a method may look at, and what can be tried out while searching.

    images: float32 (N, C, H, W) in [0, 1], labels: int64 (N,), or None. probes: metric -> Probe.
    unlabelled: float32 (N, C, H, W), what the cut network will be repaired on, or None. train: what may be learned
    from, for methods that train by `table`; scratch: where they keep what lets them go on after a kill. clock: from the
    costs of the network what predicts the time of its cuts (a latency table, filled first where it must be); or None.
    file_share: see PruneTable.int8_file, 0 where it does not count; `probes` know the size where it does.
    """

    images: Tensor | None
    labels: Tensor | None
    probes: Mapping[str, Probe]
    multiple_of: int
    seed: int
    unlabelled: Tensor | None = None
    train: Split | None = None
    table: TuneTable = field(default_factory=TuneTable)
    scratch: Path = Path()
    latency_model: Callable[[CostModel], Predictor] | None = None
    file_share: float = 0.0


def method_name(table: PruneTable, has_data: bool) -> str:
    """The method that "auto" stands for: taylor when there are training images, data-free otherwise."""
    if table.method != "auto":
        return table.method
    return "taylor" if has_data else "data-free"


def trains(table: PruneTable, name: str) -> bool:
    """Whether a method trains the network while it chooses."""
    return isinstance(plugins.build("methods", name, table.options), TrainingMethod)


def run(bundle: Bundle, table: PruneTable, budget: Budget, material: PruningInputs) -> Chosen:
    """Find what can be cut, and choose within it."""
    method: Method = plugins.build("methods", method_name(table, material.images is not None), table.options)
    network = deepcopy(bundle.module)
    task, left_out = _task(bundle, network, (table, budget), material)
    if isinstance(method, TrainingMethod):
        unfreeze(network)
    masks, notes = _search(network, method, task, (budget, _light(budget, task, material)), material)
    if all(bool(keep.all()) for keep in (*masks.channels.values(), *masks.weights.values())):
        notes = (*notes, "The network meets the budget with all of its channels: nothing was removed.")
    if task.costs.uncounted:
        what = ", ".join(task.costs.uncounted)
        notes = (*notes, f"Multiply-accumulates of {what} are not known and not in any count.")
    notes = (*notes, *_unaligned(masks, material.multiple_of, "latency" in task.record))
    if task.weights is not None:
        task.weights.apply(network, {name: keep.flatten() for name, keep in masks.weights.items()})
    return Chosen(task.groups, masks, left_out, notes, _edited(bundle.module, network), task.record)


def minds_macs(budget: Budget) -> bool:
    """Whether a budget limits the multiply-accumulates and does not say itself how small or fast it is to become."""
    return "macs" in budget.limits and SMALL.isdisjoint(budget.limits)


def _light(budget: Budget, task: PruneTask, material: PruningInputs) -> Budget | None:
    """The budget with a limit on the file, where `file_share` counts."""
    if not material.file_share or not minds_macs(budget):
        return None
    macs = task.costs.cost({})["macs"]
    share = material.file_share * absolute(budget.limits["macs"], macs) / macs
    limit = Limit("size", "share", share, f"{share:.1%}")
    return replace(budget, limits={**budget.limits, "size": limit})


def _search(
    network: nn.Module,
    method: Method,
    task: PruneTask,
    budgets: tuple[Budget, Budget | None],
    material: PruningInputs,
) -> tuple[Masks, tuple[str, ...]]:
    """The choice that keeps the second budget, where there is one and it can be kept; else the first."""
    given, light = budgets
    tools = Tools(material.probes, material.latency_model)
    if light is None:
        return search(network, method, task, given, tools)
    limit = light.limits["size"].text
    off = "--set prune.int8_file=0 prunes for the multiply-accumulates alone, which keeps more parameters"
    try:
        masks, notes = search(network, method, task, light, tools)
    except InfeasibleBudget:
        masks, notes = search(network, method, task, given, tools)
        return masks, (
            *notes,
            f"An int8 file of {limit} of the dense one can't be had by pruning: not held to it.",
        )
    return masks, (f"The int8 file is held to {limit} of the dense file as well; {off}.", *notes)


def _task(
    bundle: Bundle, network: nn.Module, wishes: tuple[PruneTable, Budget], material: PruningInputs
) -> tuple[PruneTask, dict[str, str]]:
    table, budget = wishes
    example = normalized_example(bundle.input, material.seed)
    if table.granularity == "channel":
        graph = provable_groups(network, find_groups(network, example, table.skip), example, material.seed)
        groups, left_out, weights = graph.groups, graph.left_out, None
        units = of_channels(groups)
    else:
        weights = units = of_weights(network, table.granularity, table.skip)
        groups, left_out = (), dict(weights.left_out)
    costs = cost_model(network, groups, example)
    cuts = _cuts(table.allocation, units, network)
    rules = Rules(counted_limits(budget, network, costs), material.multiple_of, table.floor, cuts)

    def logits(pruned: nn.Module, x: Tensor) -> Tensor:
        return deployed(replace(bundle, module=pruned))(x)

    task = PruneTask(
        groups, costs, rules, logits, material.images, material.labels, material.seed, bundle.input,
        material.unlabelled, weights=weights, training=_training(bundle, material),
    )  # fmt: skip
    if table.granularity == "weight" and cuts is not None and not task.free:
        task = replace(task, counts=shared_counts(units.sizes, cuts, task.quota(), task.floors()))
    return task, left_out


def _cuts(allocation: str, units: Units, network: nn.Module) -> dict[str, float] | None:
    if allocation == "uniform":
        return {}
    if allocation == "pqi":
        return {name: 1.0 - share for name, share in keep_shares(units.norms(network)).items()}
    return None


def _training(bundle: Bundle, material: PruningInputs) -> Training | None:
    if material.train is None or not material.table.epochs:
        return None
    split, validation = divide(material.train, material.table.val_share, material.seed)
    return Training(
        split, validation, material.table, material.scratch, material.seed, deployed(bundle).eval(),
        lambda network: deployed(replace(bundle, module=network)),
    )  # fmt: skip


def _edited(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    old = before.state_dict()
    return {k: v.detach() for k, v in after.state_dict().items() if not torch.equal(v, old[k])}


def _unaligned(masks: Masks, multiple_of: int, timed: bool) -> tuple[str, ...]:
    cut = {g: int(keep.sum()) for g, keep in masks.channels.items() if not bool(keep.all())}
    off = {g: kept for g, kept in cut.items() if kept % multiple_of}
    if not off:
        return ()
    name, kept = next(iter(off.items()))
    why = (
        "where the latency table says what it saves"
        if timed
        else "because they are too narrow for it or the budget could not be met otherwise"
    )
    return (
        f"{len(off)} of {len(cut)} cut groups keep a count that is not a multiple of {multiple_of} ({name}: {kept}), "
        f"{why}.",
    )


def counted_limits(budget: Budget, network: nn.Module, costs: CostModel) -> dict[str, float]:
    """The limits on what is counted (macs, params), in numbers."""
    if "macs" in budget.limits and costs.uncounted:
        raise UnsupportedModel(
            f"a budget of macs can't be held: multiply-accumulates of {', '.join(costs.uncounted)} are not known",
            "set a budget on what can be told: params, size or latency_p50",
        )
    # `params` counts what is not zero; the cost model counts every entry, so it errs on the side of the budget.
    dense = {"macs": costs.cost({})["macs"], "params": float(total_params(network))}
    return {m: absolute(limit, dense[m]) for m, limit in budget.limits.items() if m in COUNTED}


def write(chosen: Chosen, folder: Path) -> None:
    """Leave the choice in a folder: masks.safetensors and chosen.json."""
    save_tensors(masks_to_tensors(dict(chosen.masks.channels)), folder / "masks.safetensors")
    save_tensors(masks_to_tensors(dict(chosen.masks.weights)), folder / "weights.safetensors")
    save_tensors(dict(chosen.edited), folder / "edited.safetensors")
    rest = _Rest(chosen.groups, chosen.left_out, chosen.notes, chosen.record)
    serialization.write(folder / "chosen.json", rest)


def read(folder: Path) -> Chosen:
    """The choice that `write` left."""
    rest = serialization.read(_Rest, folder / "chosen.json", WorkdirError)
    channels, weights = (
        {k: v.bool() for k, v in load_tensors(folder / f"{name}.safetensors").items()}
        for name in ("masks", "weights")
    )
    edited = load_tensors(folder / "edited.safetensors")
    return Chosen(rest.groups, Masks(channels, weights), dict(rest.left_out), rest.notes, edited, rest.record)


@dataclass(frozen=True)
class _Rest:
    groups: tuple[Group, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
