"""The parts of a file that are timed as one: a layer with what runtimes fuse into it, and how wide each part is.

A part begins at a convolution, a product, a pooling, a concatenation; what follows it and works entry by entry
(activation, residual sum) belongs to it, whether or not the runtime fuses the two. Parts of the same signature (kind,
kernel, stride, image size, what follows) cost the same at the same widths, in this network and in any other one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, helper

from edgeprune.errors import UnsupportedModel
from edgeprune.latency.resized_graph import CHANNEL, WEIGHTED, Resizer, Shape

# What works entry by entry, so that it can be done where its input is made.
ENTRYWISE = frozenset(
    (
        "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish",
        "Tanh", "Softplus", "Mish", "Add", "Sub", "Mul", "Div", "Min", "Max", "Exp", "Sqrt", "Erf", "Pow", "Neg",
        "Abs", "Cast", "Identity", "BatchNormalization",
    )
)  # fmt: skip
# Attributes that say how much work an operator is, in the order in which they are written.
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
    """A count of channels that follows what groups keep: constant + the sum of per[g] for each channel kept of g."""

    constant: float
    per: Mapping[str, float]

    def at(self, kept: Mapping[str, int]) -> int:
        """The count; `kept` names every group."""
        return round(self.constant + sum(rate * kept[group] for group, rate in self.per.items()))


@dataclass(frozen=True, eq=False)
class Segment:
    """One thing that is timed. layer: the node it begins with. nodes: all of them. reads, makes: its channels."""

    signature: str
    layer: str
    nodes: tuple[str, ...]
    reads: Width
    makes: Width

    def widths(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Channels that it reads and that it makes."""
        return self.reads.at(kept), self.makes.at(kept)

    @property
    def groups(self) -> frozenset[str]:
        """The groups on whose counts its time depends."""
        return frozenset((*self.reads.per, *self.makes.per))


def parts(source: Resizer) -> tuple[Segment, ...]:
    """The parts of a file in the order of its nodes."""
    clusters = _clusters(source)
    channels = dict(source.costs.channels)
    dense = _widths(source, clusters, {})
    slopes: list[tuple[dict[str, float], dict[str, float]]] = [({}, {}) for _ in clusters]
    for group, count in channels.items():
        fewer = count // 2
        for slope, before, after in zip(
            slopes, dense, _widths(source, clusters, {group: fewer}), strict=True
        ):
            for side in (0, 1):
                if before[side] != after[side]:
                    slope[side][group] = (before[side] - after[side]) / (count - fewer)
    found = []
    for cluster, slope, widths in zip(clusters, slopes, dense, strict=True):
        reads, makes = (
            Width(widths[i] - sum(rate * channels[g] for g, rate in slope[i].items()), slope[i])
            for i in (0, 1)
        )
        found.append(
            Segment(
                _signature(source, cluster), cluster[0].name, tuple(n.name for n in cluster), reads, makes
            )
        )
    _check(source, clusters, tuple(found))
    return tuple(found)


def network_key(found: Sequence[Segment], channels: Mapping[str, int]) -> str:
    """The same for networks whose timings are the same: their parts and the groups on which these depend."""
    text = repr(sorted(channels.items())) + repr(
        [(p.signature, p.reads.constant, sorted(p.reads.per.items()), p.makes.constant, sorted(p.makes.per.items()))
         for p in found]
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def attribute_times(found: Sequence[Segment], nodes: Iterable[tuple[str, float]]) -> list[float]:
    """Seconds of each part from those of the nodes that ran.

    Args:
        nodes: name and seconds in the order in which they ran. What the runtime put in by itself, to change the
            layout in memory, goes to the part that comes after it.
    """
    owner = {name: i for i, part in enumerate(found) for name in part.nodes}
    seconds = [0.0] * len(found)
    waiting, last = 0.0, 0
    for name, spent in nodes:
        # Runtimes add words to the names of nodes that they rewrote: "norm_bn_nchwc".
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
        # Of a residual sum, the branch that ends last is the one that it can be fused into.
        homes = [home[name] for name in node.input if name in home and readers[name] == 1]
        if node.op_type in ENTRYWISE and homes:
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
            words.append(f"{name}={_text(value)}")
    words += [_image(source.shapes[name]) for name in (*_data(source, first), cluster[-1].output[0])]
    return " ".join([*words, *(node.op_type for node in cluster[1:])])


def _image(shape: Shape) -> str:
    """The size without the channels."""
    return "x".join(str(s) for i, s in enumerate(shape) if i > CHANNEL) or "vector"


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def _check(source: Resizer, clusters: Sequence[Sequence[NodeProto]], found: Sequence[Segment]) -> None:
    draw = random.Random(_SEED)
    kept = {group: draw.randint(1, count) for group, count in source.costs.channels.items()}
    for part, widths in zip(found, _widths(source, clusters, kept), strict=True):
        if part.widths(kept) != widths:
            raise UnsupportedModel(
                f"{part.layer} is {widths} channels wide where {part.widths(kept)} were expected, so its time can't "
                "be told from the counts of the groups"
            )
