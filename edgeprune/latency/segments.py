"""The segments of a file that are timed together: a layer with the operators that runtimes fuse into it.

A segment begins at a convolution, a product, a pooling, a concatenation; elementwise operators after it (activation,
residual sum) belong to it, fused or not. Segments of the same signature (kind, kernel, stride, image size, what
follows) take the same time at the same widths, in any network.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, helper

from edgeprune.errors import UnsupportedModel
from edgeprune.latency.resized_graph import CHANNEL, WEIGHTED, Resizer, Shape

ELEMENTWISE = frozenset(
    (
        "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish",
        "Tanh", "Softplus", "Mish", "Add", "Sub", "Mul", "Div", "Min", "Max", "Exp", "Sqrt", "Erf", "Pow", "Neg",
        "Abs", "Cast", "Identity", "BatchNormalization",
    )
)  # fmt: skip
# Attributes on which an operator's time depends, in the order of a signature.
SHAPING = (
    "kernel_shape",
    "strides",
    "pads",
    "dilations",
    "axis",
    "axes",
    "perm",
    "transA",
    "transB",
    "ceil_mode",
    "mode",
)
_SEED = 7


@dataclass(frozen=True)
class Width:
    """A count of channels: constant + the sum over groups g of per[g] for each channel kept of g."""

    constant: float
    per: Mapping[str, float]

    def at(self, kept: Mapping[str, int]) -> int:
        """The count; `kept` names every group."""
        return round(self.constant + sum(rate * kept[group] for group, rate in self.per.items()))


@dataclass(frozen=True, eq=False)
class Segment:
    """layer: the node that it begins with. nodes: all of them."""

    signature: str
    layer: str
    nodes: tuple[str, ...]
    in_channels: Width
    out_channels: Width

    def widths(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Input and output channels."""
        return self.in_channels.at(kept), self.out_channels.at(kept)

    @property
    def groups(self) -> frozenset[str]:
        """The groups on whose counts its time depends."""
        return frozenset((*self.in_channels.per, *self.out_channels.per))


def segments_of(source: Resizer) -> tuple[Segment, ...]:
    """In the order of the nodes."""
    clusters = _clusters(source)
    channels = dict(source.costs.channels)
    dense = _widths(source, clusters, {})
    slopes: list[tuple[dict[str, float], dict[str, float]]] = [({}, {}) for _ in clusters]
    for group, count in channels.items():
        fewer = count // 2
        halved = _widths(source, clusters, {group: fewer})
        for slope, before, after in zip(slopes, dense, halved, strict=True):
            for side in (0, 1):
                if before[side] != after[side]:
                    slope[side][group] = (before[side] - after[side]) / (count - fewer)
    found = []
    for cluster, slope, widths in zip(clusters, slopes, dense, strict=True):
        inputs, outputs = (
            Width(width - sum(rate * channels[g] for g, rate in per.items()), per)
            for width, per in zip(widths, slope, strict=True)
        )
        names = tuple(node.name for node in cluster)
        found.append(Segment(_signature(source, cluster), names[0], names, inputs, outputs))
    _check(source, clusters, found)
    return tuple(found)


def network_key(found: Sequence[Segment], channels: Mapping[str, int]) -> str:
    """Equal for networks with equal segments and groups, whose timings are the same."""
    rows = [
        (
            segment.signature,
            segment.in_channels.constant,
            sorted(segment.in_channels.per.items()),
            segment.out_channels.constant,
            sorted(segment.out_channels.per.items()),
        )
        for segment in found
    ]
    text = repr(sorted(channels.items())) + repr(rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def attribute_times(found: Sequence[Segment], nodes: Iterable[tuple[str, float]]) -> list[float]:
    """Seconds of each segment.

    Args:
        nodes: name and seconds in order of execution. Nodes that the runtime added, such as changes of the memory
            layout, count for the segment after them.
    """
    owner = {name: i for i, segment in enumerate(found) for name in segment.nodes}
    seconds = [0.0] * len(found)
    waiting, last = 0.0, 0
    for name, spent in nodes:
        # Runtimes append to the names of nodes that they rewrote: "norm_bn_nchwc".
        while name not in owner and "_" in name:
            name = name.rpartition("_")[0]  # noqa: PLW2901
        if name not in owner:
            waiting += spent
            continue
        last = owner[name]
        seconds[last] += spent + waiting
        waiting = 0.0
    if seconds:
        seconds[last] += waiting
    return seconds


def _clusters(source: Resizer) -> list[list[NodeProto]]:
    nodes = [n for n in source.model.graph.node if not set(n.output) & set(source.constants)]
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    home: dict[str, int] = {}
    clusters: list[list[NodeProto]] = []
    for node in nodes:
        # A residual sum can be fused into the branch that ends last.
        homes = [home[name] for name in node.input if name in home and readers[name] == 1]
        if node.op_type in ELEMENTWISE and homes:
            place = max(homes)
            clusters[place].append(node)
        else:
            place = len(clusters)
            clusters.append([node])
        home.update(dict.fromkeys(node.output, place))
    return clusters


def _widths(
    source: Resizer, clusters: Sequence[Sequence[NodeProto]], kept: Mapping[str, int]
) -> list[tuple[int, int]]:
    shapes = source.shaped(kept)
    return [
        (sum(_channels(shapes[i]) for i in _data(source, c[0])), _channels(shapes[c[-1].output[0]]))
        for c in clusters
    ]


def _data(source: Resizer, node: NodeProto) -> list[str]:
    return [name for name in node.input if name and name not in source.constants]


def _channels(shape: Shape) -> int:
    return shape[CHANNEL] if len(shape) > CHANNEL else 1


def _signature(source: Resizer, cluster: Sequence[NodeProto]) -> str:
    first = cluster[0]
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in first.attribute}
    words = [first.op_type]
    if first.op_type in WEIGHTED:
        groups = attributes.get("group", 1)
        reads = _channels(source.shapes[first.input[0]])
        if groups > 1:
            words.append("depthwise" if groups == reads else f"group={groups}")
    for name in SHAPING:
        value = attributes.get(name)
        if value is not None:
            text = value.decode() if isinstance(value, bytes) else value
            words.append(f"{name}={','.join(map(str, text)) if isinstance(text, list) else text}")
    for name in (*_data(source, first), cluster[-1].output[0]):
        words.append("x".join(map(str, source.shapes[name][CHANNEL + 1 :])) or "vector")
    return " ".join([*words, *(node.op_type for node in cluster[1:])])


def _check(source: Resizer, clusters: Sequence[Sequence[NodeProto]], found: Sequence[Segment]) -> None:
    draw = random.Random(_SEED)
    kept = {group: draw.randint(1, count) for group, count in source.costs.channels.items()}
    for segment, widths in zip(found, _widths(source, clusters, kept), strict=True):
        if segment.widths(kept) != widths:
            raise UnsupportedModel(
                f"{segment.layer} is {widths} channels wide where {segment.widths(kept)} were expected, so its time "
                "can't be predicted from the counts of the groups"
            )
