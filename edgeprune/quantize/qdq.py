"""Writing a plan for 8 bits into an ONNX model: Q/DQ nodes, int8 weights, int32 biases, in few bytes."""

from __future__ import annotations

import itertools
import string
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.onnx_graph import attributes, value_names
from edgeprune.quantities import suggest
from edgeprune.quantize import placement
from edgeprune.quantize.calibrators import Range, grid
from edgeprune.quantize.fusion import block_sum_fusion, entry, shifted_bias
from edgeprune.quantize.placement import Graph, Plan, data_inputs

Array = npt.NDArray[Any]
# Biases are int32, and a sum of products goes on top of them.
_MOST_BIAS = 2.0**30
_SMALLEST_SCALE = 2.0**-100
# The attributes that say what the standard says when they are absent.
_WINDOW = {"auto_pad": b"NOTSET", "dilations": 1, "strides": 1, "pads": 0}
_POOL = {**_WINDOW, "ceil_mode": 0, "storage_order": 0, "count_include_pad": 0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {**_WINDOW, "group": 1},
    "MaxPool": _POOL,
    "AveragePool": _POOL,
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
}


def write(model: ModelProto, plan: Plan, ranges: Mapping[str, Range], *, symmetric: bool) -> ModelProto:
    """The model with a plan carried out.

    Args:
        ranges: of every value in `plan.pairs` that shares no other's.
        symmetric: signed with zero point 0 and float biases; else unsigned with int32 biases.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    writer = _Writer(copy, plan, ranges, symmetric)
    writer.run()
    return copy


class _Writer:
    def __init__(self, model: ModelProto, plan: Plan, ranges: Mapping[str, Range], symmetric: bool) -> None:
        self.model, self.plan, self.ranges, self.symmetric = model, plan, ranges, symmetric
        self.view = Graph(model.graph)
        self.short = _short_names(value_names(model.graph) | {node.name for node in model.graph.node})
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        # Value -> the name under which its 8-bit form is read as float.
        self.read_as: dict[str, str] = {}
        # Value -> its 8-bit form itself.
        self.held_as: dict[str, str] = {}
        self.weights: dict[tuple[str, bytes], str] = {}
        # TensorRT wants a zero point of 0 and one scale.
        self.entry = None if symmetric else entry(self.view, plan, ranges)

    def run(self) -> None:
        """Rewrite the graph."""
        graph = self.model.graph
        for value in graph.input:
            self._pair(value.name, value.name)
        gone = set(self.plan.gone)
        if self.entry is not None:
            gone |= self.entry.gone
            self._enter()
        for node in self.view.graph.node:
            if node.name not in gone:
                self._node(node)
        self._drop_unread()
        kept = {name for node in self.nodes for name in node.input}
        originals = [
            item for item in graph.initializer if item.name in kept and item.name not in self.constants
        ]
        fresh = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*originals, *fresh])

    def _drop_unread(self) -> None:
        """Take out Q and DQ nodes that nobody needs: where the 8-bit form itself is read, or nothing is read."""
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            read = {name for node in self.nodes for name in node.input} | self.view.outputs
            self.nodes = [n for n in self.nodes if n.op_type != kind or n.output[0] in read]

    def _node(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        inside = node.name in self.plan.nodes
        for place, name in enumerate(node.input):
            if name in self.read_as and (name in self.plan.made or (inside and name in data_inputs(node))):
                new.input[place] = self.read_as[name]
        if inside and node.op_type == "Pad" and not self.symmetric:
            self._pad(node, new)
            return
        if inside and self._is_weighted(node):
            self._weigh(node, new)
        _drop_defaults(new)
        self.nodes.append(new)
        fused = self._activation(node)
        for place, name in enumerate(node.output):
            value = fused or name
            if value in self.plan.pairs:
                # The model's output keeps its name, so what computes it gets another.
                raw = next(self.short) if value in self.view.outputs and value in self.plan.made else value
                new.output[place] = raw
                self._pair(value, raw)

    def _is_weighted(self, node: NodeProto) -> bool:
        return len(node.input) > 1 and node.op_type in ("Conv", "Gemm", "MatMul")

    def _activation(self, node: NodeProto) -> str:
        after = self.view.only_reader(node.output[0]) if node.output else None
        return self.plan.gone.get(after.name, "") if after is not None else ""

    def _pad(self, node: NodeProto, new: NodeProto) -> None:
        """Pad the 8-bit form itself: ONNX Runtime does not fuse a Pad between DQ and Q, it would compute in float."""
        source, value = node.input[0], node.output[0]
        scale, zero = self._grid(value)
        kept = self._zero_point(zero)
        settings = [*new.input[1:2], kept[0], *new.input[3:]]
        if attributes(node).get("mode", b"constant") != b"constant":
            settings[1] = ""
        new.input[:] = [self.held_as[source], *settings]
        held = new.output[0] = next(self.short)
        read = value if value in self.view.outputs else next(self.short)
        step = self._store(np.float32(scale))
        back = helper.make_node("DequantizeLinear", [held, step, *kept], [read], read)
        self.nodes.extend([new, back])
        self.held_as[value], self.read_as[value] = held, read

    def _pair(self, value: str, raw: str) -> None:
        """Append Q and DQ for a value that is called `raw` before them."""
        if value not in self.plan.pairs:
            return
        scale, zero = self._grid(value)
        settings = [self._store(np.float32(scale)), *self._zero_point(zero)]
        stored = next(self.short)
        read = value if raw != value else next(self.short)
        self.nodes.append(helper.make_node("QuantizeLinear", [raw, *settings], [stored], stored))
        self.nodes.append(helper.make_node("DequantizeLinear", [stored, *settings], [read], read))
        self.held_as[value], self.read_as[value] = stored, read

    def _enter(self) -> None:
        assert self.entry is not None
        at, stored, held, read = self.entry, next(self.short), next(self.short), next(self.short)
        source = self.view.graph.input[0].name
        outer = [self._store(at.scales), self._store(at.zeros)]
        inner = [self._store(np.float32(at.scale)), self._store(np.uint8(at.zero))]
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *outer], [stored], stored))
        # The two are no pair, which Q and DQ side by side are taken for; runtimes take an Identity out.
        self.nodes.append(helper.make_node("Identity", [stored], [held], held))
        self.nodes.append(helper.make_node("DequantizeLinear", [held, *inner], [read], read))
        self.held_as[at.value], self.read_as[at.value] = held, read

    def _grid(self, value: str) -> tuple[float, int]:
        root = self.plan.pairs[value]
        if self.entry is not None and root == self.entry.value:
            return self.entry.scale, self.entry.zero
        if root not in self.ranges:
            raise UnsupportedModel(f"the range of {root} is not known: it was not observed")
        scale, zero = grid(*self.ranges[root], symmetric=self.symmetric)
        return float(np.float32(scale)), zero

    def _zero_point(self, zero: int) -> list[str]:
        # What QuantizeLinear gives without one is unsigned.
        return [self._store(np.int8(0) if self.symmetric else np.uint8(zero))]

    def _weigh(self, node: NodeProto, new: NodeProto) -> None:
        """Give a node its int8 weight and its bias."""
        weight, axis = self._weight(node)
        entry, _ = self._grid(node.input[0])
        scales = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) / 127
        bias = self._bias(node, weight)
        if bias is not None:
            scales = np.maximum(scales, np.abs(np.broadcast_to(bias, scales.shape)) / (entry * _MOST_BIAS))
        # A channel of zeros without a bias may have any scale that float32 can hold.
        scales = np.where(scales > _SMALLEST_SCALE, scales, max(scales.max(initial=0.0), 2.0**-20)).astype(
            np.float32
        )
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        rounded = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(np.int8)
        new.input[1] = self._dequantized(node.input[1], rounded, scales, axis)
        if bias is not None and not self.symmetric:
            steps = scales * np.float32(entry)
            whole = np.rint(np.broadcast_to(bias, scales.shape) / steps.astype(np.float64)).astype(np.int32)
            new.input[2] = self._dequantized(node.input[2], whole, steps, 0)

    def _weight(self, node: NodeProto) -> tuple[Array, int]:
        name = node.input[1]
        weight = self.view.constants[name]
        _check_finite(name, weight)
        by_row = node.op_type == "Conv" or attributes(node).get("transB", 0)
        return weight.astype(np.float64), 0 if by_row else 1

    def _bias(self, node: NodeProto, weight: Array) -> Array | None:
        if len(node.input) < 3 or not node.input[2]:
            return None
        bias = self.view.constants[node.input[2]]
        _check_finite(node.input[2], bias)
        if self.entry is None or node.op_type != "Conv" or node.input[0] != self.entry.value:
            return bias
        groups = int(attributes(node).get("group", 1))
        return shifted_bias(bias.astype(np.float64), weight, groups, self.entry.shifts)

    def _dequantized(self, name: str, value: Array, scales: Array, axis: int) -> str:
        """The name of a float value that is `value` times `scales` along an axis."""
        key = (name, value.tobytes() + scales.tobytes())
        if key not in self.weights:
            # Whoever else reads it, perhaps as float, must not find something else under its name.
            stored = name if len(self.view.readers[name]) == 1 else next(self.short)
            self.constants[stored] = value
            self.weights[key] = next(self.short)
            settings = [self._store(scales)]
            if value.dtype == np.int8:
                # All are zero and could be left away, but then ONNX Runtime makes no QGemm of a Gemm.
                settings.append(self._store(np.zeros(scales.shape, np.int8)))
            read = self.weights[key]
            node = helper.make_node("DequantizeLinear", [stored, *settings], [read], read)
            if axis != 1:
                node.attribute.append(helper.make_attribute("axis", axis))
            self.nodes.append(node)
        return self.weights[key]

    def _store(self, value: Any) -> str:
        """The name of a constant; equal ones are stored once."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.stored:
            self.stored[key] = next(self.short)
            self.constants[self.stored[key]] = array
        return self.stored[key]


def _check_finite(name: str, value: Array) -> None:
    bad = int((~np.isfinite(value)).sum())
    if bad:
        raise UnsupportedModel(
            f"{name} has {bad} values that are NaN or infinite, of {value.size}",
            "look at the weights: training may have diverged",
        )


def _drop_defaults(node: NodeProto) -> None:
    usual = _DEFAULTS.get(node.op_type, {})
    kept = [
        item for item in node.attribute if not _is(helper.get_attribute_value(item), usual.get(item.name))
    ]
    del node.attribute[:]
    node.attribute.extend(kept)


def _is(value: Any, usual: Any) -> bool:
    if isinstance(value, list):
        return usual is not None and all(item == usual for item in value)
    return value == usual


def _short_names(taken: set[str]) -> Iterator[str]:
    letters: Iterable[str] = string.ascii_letters
    for length in itertools.count(1):
        for name in map("".join, itertools.product(letters, repeat=length)):
            if name not in taken:
                yield name


SCHEMES = ("u8", "s8")
# The first with scales for each channel.
_OLDEST_OPSET = 13


def quantizable(model: ModelProto) -> tuple[str, ...]:
    """The names of the nodes whose weights can be int8, in order: Conv, Gemm and MatMul with constant weights."""
    return placement.quantizable(model)


def quantized(
    model: ModelProto, ranges: Mapping[str, Range], scheme: str, *, skip: Collection[str] = ()
) -> ModelProto:
    """A prepared model as a Q/DQ model that computes on 8 bits.

    Args:
        ranges: value name -> (low, high), as `ranges.ranges` gives them; those that 8-bit nodes read and make.
        scheme: "u8" or "s8".

    Returns:
        The model; nodes keep their names, and weights and biases theirs. Other values are renamed shortly. What
        computes in float, because of `skip` or because there is no 8-bit form, is as it was.
    """
    _check(model, scheme, skip)
    if scheme == "u8":
        made = write(model, placement.unsigned(model, ranges, skip), ranges, symmetric=False)
        block_sum_fusion(made, model)
        return made
    return write(model, placement.signed(model, skip), ranges, symmetric=True)


def _check(model: ModelProto, scheme: str, skip: Collection[str]) -> None:
    if scheme not in SCHEMES:
        raise UsageError(
            f"quantize.scheme {scheme!r} is not one of {', '.join(SCHEMES)}", suggest(scheme, SCHEMES)
        )
    names = {node.name for node in model.graph.node}
    for name in skip:
        if name not in names:
            raise UsageError(f"quantize.skip names {name!r}, which is no node", suggest(name, sorted(names)))
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        raise UnsupportedModel(
            f"int8 with scales for each channel needs opset {_OLDEST_OPSET}, the model has {opset}",
            f"--set export.opset={_OLDEST_OPSET}, or more",
        )
    if not set(placement.quantizable(model)) - set(skip):
        raise UnsupportedModel(
            "no node can be int8: that takes a Conv, Gemm or MatMul with constant weights that is not skipped"
        )
