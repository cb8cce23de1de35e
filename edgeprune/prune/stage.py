"""prune: choose the channels or weights to remove so that every limit that can be measured here holds."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import plugins, serialization
from edgeprune.data import Split, divide
from edgeprune.errors import InfeasibleBudget, UnsupportedModel, WorkdirError
from edgeprune.methods import Method, PruneTask, Training, TrainingMethod
from edgeprune.models import (
    CostModel,
    cost_model,
    deployed,
    load_tensors,
    normalized_example,
    save_tensors,
    total_params,
    unfreeze,
)
from edgeprune.prune.budget_search import AS_DENSE, COUNTED, LatencyModel, Probe, search
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
# Limits on the size or speed of the file itself.
ON_FILE = frozenset((*AS_DENSE, "params")) - {"macs"}


@dataclass(frozen=True)
class Chosen:
    """The groups that can be cut, the masks, and the layers that were left out with the reasons.

    edited: state-dict name -> a tensor that the method changed (merged or trained units); usually empty.
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
    """Inputs of a method and of the search.

    images: float32 (N, C, H, W) in [0, 1], labels: int64 (N,), for calibration. probes: metric -> Probe.
    unlabelled: float32 (N, C, H, W), on which the cut network will be repaired. train, table, scratch: for methods that
    train: images, settings, a folder for checkpoints. latency_model: from the network's costs to a predictor of the
    time of its cuts. file_share: see PruneTable.int8_file, 0 where it does not count; else `probes` has the size.
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
    latency_model: LatencyModel | None = None
    file_share: float = 0.0


def method_name(table: PruneTable, has_data: bool) -> str:
    """The method of a table; "auto" is taylor with training images, data-free without."""
    if table.method != "auto":
        return table.method
    return "taylor" if has_data else "data-free"


def trains(table: PruneTable, name: str) -> bool:
    """Whether a method trains the network while it prunes."""
    return isinstance(plugins.build("methods", name, table.options), TrainingMethod)


def run(bundle: Bundle, table: PruneTable, budget: Budget, inputs: PruningInputs) -> Chosen:
    """Find the groups that can be cut, and choose what to keep of them within the budget."""
    method: Method = plugins.build("methods", method_name(table, inputs.images is not None), table.options)
    network = deepcopy(bundle.module)
    task, left_out = _task(bundle, network, (table, budget), inputs)
    if isinstance(method, TrainingMethod):
        unfreeze(network)
    masks, notes = _search(network, method, task, budget, inputs)
    if all(bool(keep.all()) for keep in (*masks.channels.values(), *masks.weights.values())):
        notes = (*notes, "The network meets the budget with all of its channels: nothing was removed.")
    if task.costs.uncounted:
        what = ", ".join(task.costs.uncounted)
        notes = (*notes, f"Multiply-accumulates of {what} are not known and not in any count.")
    notes = (*notes, *_unaligned(masks, inputs.multiple_of, "latency" in task.record))
    if task.weights is not None:
        task.weights.apply(network, {name: keep.flatten() for name, keep in masks.weights.items()})
    old, new = bundle.module.state_dict(), network.state_dict()
    edited = {name: tensor.detach() for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    return Chosen(task.groups, masks, left_out, notes, edited, task.record)


def limits_only_macs(budget: Budget) -> bool:
    """Whether a budget limits the multiply-accumulates, and neither the size nor the speed of the file."""
    return "macs" in budget.limits and ON_FILE.isdisjoint(budget.limits)


def _search(
    network: nn.Module, method: Method, task: PruneTask, budget: Budget, inputs: PruningInputs
) -> tuple[Masks, tuple[str, ...]]:
    """The choice within the budget, and within a limit on the size of the file where `file_share` counts."""
    within = partial(search, network, method, task, probes=inputs.probes, latency_model=inputs.latency_model)
    if not inputs.file_share or not limits_only_macs(budget):
        return within(budget)
    macs = task.costs.cost({})["macs"]
    share = inputs.file_share * budget.limits["macs"].threshold(macs) / macs
    size = Limit("size", "share", share, f"{share:.1%}")
    try:
        masks, notes = within(replace(budget, limits={**budget.limits, "size": size}))
    except InfeasibleBudget:
        masks, notes = within(budget)
        note = (
            f"Pruning can't reach an int8 file of {size.text} of the dense one, so its size is not limited."
        )
        return masks, (*notes, note)
    off = "--set prune.int8_file=0 prunes for the multiply-accumulates alone, which keeps more parameters"
    return masks, (f"The int8 file is limited to {size.text} of the dense file as well; {off}.", *notes)


def _task(
    bundle: Bundle, network: nn.Module, settings: tuple[PruneTable, Budget], inputs: PruningInputs
) -> tuple[PruneTask, dict[str, str]]:
    table, budget = settings
    example = normalized_example(bundle.input, inputs.seed)
    if table.granularity == "channel":
        graph = provable_groups(network, find_groups(network, example, table.skip), example, inputs.seed)
        groups, left_out, weights = graph.groups, graph.left_out, None
        units = of_channels(groups)
    else:
        weights = units = of_weights(network, table.granularity, table.skip)
        groups, left_out = (), dict(weights.left_out)
    costs = cost_model(network, groups, example)
    cuts = _cuts(table.allocation, units, network)
    rules = Rules(counted_limits(budget, network, costs), inputs.multiple_of, table.floor, cuts)

    def logits(pruned: nn.Module, x: Tensor) -> Tensor:
        return deployed(replace(bundle, module=pruned))(x)

    task = PruneTask(
        groups, costs, rules, logits, inputs.images, inputs.labels, inputs.seed, bundle.input,
        inputs.unlabelled, weights=weights, training=_training(bundle, inputs),
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


def _training(bundle: Bundle, inputs: PruningInputs) -> Training | None:
    if inputs.train is None or not inputs.table.epochs:
        return None
    split, validation = divide(inputs.train, inputs.table.val_share, inputs.seed)
    return Training(
        split, validation, inputs.table, inputs.scratch, inputs.seed, deployed(bundle).eval(),
        lambda network: deployed(replace(bundle, module=network)),
    )  # fmt: skip


def _unaligned(masks: Masks, multiple_of: int, timed: bool) -> tuple[str, ...]:
    cut = {g: int(keep.sum()) for g, keep in masks.channels.items() if not bool(keep.all())}
    off = {g: kept for g, kept in cut.items() if kept % multiple_of}
    if not off:
        return ()
    name, kept = next(iter(off.items()))
    why = "because they are too narrow for it or the budget could not be met otherwise"
    if timed:
        why = "where it saves time by the latency table"
    return (
        f"{len(off)} of {len(cut)} cut groups keep a count that is not a multiple of {multiple_of} ({name}: {kept}), "
        f"{why}.",
    )


def counted_limits(budget: Budget, network: nn.Module, costs: CostModel) -> dict[str, float]:
    """The limits on macs and params, in numbers."""
    if "macs" in budget.limits and costs.uncounted:
        raise UnsupportedModel(
            f"a budget of macs can't be held: multiply-accumulates of {', '.join(costs.uncounted)} are not known",
            "set a budget on params, size or latency_p50",
        )
    # The limit is relative to the nonzero entries; the cost model counts every entry, so it never exceeds the budget.
    dense = {"macs": costs.cost({})["macs"], "params": float(total_params(network))}
    return {m: limit.threshold(dense[m]) for m, limit in budget.limits.items() if m in COUNTED}


def write(chosen: Chosen, folder: Path) -> None:
    """Save the choice in a folder; `read` loads it."""
    for name, masks in (("masks", chosen.masks.channels), ("weights", chosen.masks.weights)):
        # As bytes, which every safetensors reader supports.
        save_tensors({k: keep.to(torch.uint8) for k, keep in masks.items()}, folder / f"{name}.safetensors")
    save_tensors(dict(chosen.edited), folder / "edited.safetensors")
    rest = _Rest(chosen.groups, chosen.left_out, chosen.notes, chosen.record)
    serialization.write(folder / "chosen.json", rest)


def read(folder: Path) -> Chosen:
    """Load the choice that `write` saved."""
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
