"""why: what every layer costs, how much of it looks superfluous, and for each that can't be pruned the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import UnsupportedModel
from edgeprune.models import layer_costs, normalized_example, total_macs
from edgeprune.records import Bundle
from edgeprune.structure import Graph, find_groups, pqi, provable_groups

ABOUT_PQI = (
    "PQI: the PQ index (p = 0.5, q = 1) of a layer's weights, the share of them that SAP would prune first. An "
    "estimate of how compressible the layer is, from its weights alone: nothing was trained or measured for it."
)


@dataclass(frozen=True)
class LayerReason:
    """One layer: counts for one image, shares of the whole, and why its outputs stay ("" when they can go).

    time_share is measured (None when the layer could not be timed). pqi: the PQ index of the layer's weights, in
    [0, 1), see ABOUT_PQI. The other numbers are counted.
    """

    layer: str
    op: str
    channels: int
    params: int
    macs: int
    macs_share: float
    time_share: float | None
    pqi: float
    group: str
    why_not: str


def explain_layers(
    bundle: Bundle, times: Mapping[str, float], skip: tuple[str, ...] = ()
) -> tuple[LayerReason, ...]:
    """One row for every layer, in the order of definition."""
    example = normalized_example(bundle.input, 0)
    graph = _graph(bundle, example, skip)
    makers = {
        m.tensor.rsplit(".", 1)[0]: g.name
        for g in graph.groups
        for m in g.members
        if m.role in ("producer", "norm")
    }
    rows = layer_costs(bundle.module, example)
    macs, seconds = total_macs(bundle.module, example) or 1, sum(times.values())
    return tuple(
        LayerReason(
            layer=r.name, op=r.op, channels=r.channels, params=r.params, macs=r.macs, macs_share=r.macs / macs,
            time_share=times[r.name] / seconds if r.name in times and seconds > 0 else None,
            pqi=pqi(bundle.module.get_parameter(f"{r.name}.weight".lstrip("."))),
            group=makers.get(r.name, ""), why_not="" if r.name in makers else _reason(r.name, graph),
        )
        for r in rows
    )  # fmt: skip


def _graph(bundle: Bundle, example: Any, skip: tuple[str, ...]) -> Graph:
    try:
        found = find_groups(bundle.module, example, skip)
    except UnsupportedModel as error:
        return Graph((), {"": error.message})
    try:
        return provable_groups(bundle.module, found, example, 0)
    except UnsupportedModel:
        return Graph((), dict(found.left_out) or {"": "no cut of this network could be proven right"})


def _reason(layer: str, graph: Graph) -> str:
    if layer in graph.left_out:
        return graph.left_out[layer]
    if "" in graph.left_out:
        return graph.left_out[""]
    return "its channels are tied to those of another layer that can't be cut"
