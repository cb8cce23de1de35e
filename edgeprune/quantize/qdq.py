"""A float ONNX model as a Q/DQ model: QuantizeLinear and DequantizeLinear nodes, int8 weights, int32 biases, small."""

import itertools
import string
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.onnx_graph import Array, View, attribute, copied, operand, opset_of, unused, value_names
from edgeprune.quantize import placement
from edgeprune.quantize.bias_correction import mean_correction
from edgeprune.quantize.calibrators import Range, grid
from edgeprune.quantize.fusion import block_sum_fusion, input_quantizer, shifted_bias
from edgeprune.quantize.placement import Plan, data_inputs

# The first with scales for each channel.
_OLDEST_OPSET = 13
# Biases are int32, and a sum of products is added to them.
_MAX_BIAS = 2.0**30
_SMALLEST_SCALE = 2.0**-100
# Attributes with the value that the standard gives them when they are absent.
_WINDOW = {"auto_pad": b"NOTSET", "dilations": 1, "strides": 1, "pads": 0}
_POOL = {**_WINDOW, "ceil_mode": 0, "storage_order": 0, "count_include_pad": 0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {**_WINDOW, "group": 1},
    "MaxPool": _POOL,
    "AveragePool": _POOL,
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
}


def quantized(
    model: ModelProto,
    ranges: Mapping[str, Range],
    scheme: str,
    *,
    skip: Collection[str] = (),
    means: Mapping[str, Array] | None = None,
) -> ModelProto:
    """A prepared model as a Q/DQ model that computes on 8 bits.

    Args:
        ranges: value -> (low, high), of those that 8-bit nodes read and make.
        scheme: "u8": unsigned activations, int32 biases; "s8": signed with zero point 0, float biases.
        skip: names of nodes that stay float.
        means: value -> (C,) of its channels, for bias correction; None for no correction.

    Returns:
        The model; nodes, weights and biases keep their names. Other values get short ones. What computes in float,
        because of `skip` or because there is no 8-bit form, is unchanged.
    """
    _check(model, skip)
    made, symmetric = copied(model), scheme == "s8"
    plan = placement.signed(model, skip) if symmetric else placement.unsigned(model, ranges, skip)
    _Writer(made, plan, ranges, means or {}, symmetric=symmetric).run()
    if not symmetric:
        block_sum_fusion(made, model)
    return made


def _check(model: ModelProto, skip: Collection[str]) -> None:
    if opset_of(model) < _OLDEST_OPSET:
        raise UnsupportedModel(
            f"int8 with scales for each channel needs opset {_OLDEST_OPSET}, the model has {opset_of(model)}",
            f"--set export.opset={_OLDEST_OPSET}, or more",
        )
    if not set(placement.quantizable(model)) - set(skip):
        raise UnsupportedModel(
            "no node can be int8: that takes a Conv, Gemm or MatMul with constant weights that is not skipped"
        )


class _Writer:
    """Carries out a plan on a model, in place.

    int8: value -> its 8-bit form. restored: value -> the name under which its 8-bit form is read as float.
    """

    def __init__(
        self,
        model: ModelProto,
        plan: Plan,
        ranges: Mapping[str, Range],
        means: Mapping[str, Array],
        *,
        symmetric: bool,
    ) -> None:
        self.model, self.plan, self.symmetric = model, plan, symmetric
        self.ranges, self.means = ranges, means
        self.view = View(model)
        self.fresh = _short_names(value_names(model.graph) | {node.name for node in model.graph.node})
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.weights: dict[tuple[str, bytes], str] = {}
        self.int8: dict[str, str] = {}
        self.restored: dict[str, str] = {}
        # TensorRT wants a zero point of 0 and one scale.
        self.entry = None if symmetric else input_quantizer(self.view, plan, ranges)

    def run(self) -> None:
        graph = self.model.graph
        for value in graph.input:
            self._append_pair(value.name, value.name)
        removed = set(self.plan.fused)
        if self.entry is not None:
            removed |= self.entry.removed
            self._quantize_input()
        for node in graph.node:
            if node.name not in removed:
                self._append(node)
        # Where the 8-bit form itself is read, or nothing is, its Q or DQ is not needed.
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            read = {name for node in self.nodes for name in node.input} | set(self.view.outputs)
            self.nodes = [n for n in self.nodes if n.op_type != kind or n.output[0] in read]
        read = {name for node in self.nodes for name in node.input}
        kept = [item for item in graph.initializer if item.name in read and item.name not in self.constants]
        new = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*kept, *new])

    def _append(self, original: NodeProto) -> None:
        node = NodeProto()
        node.CopyFrom(original)
        is_int8 = node.name in self.plan.nodes
        for position, name in enumerate(node.input):
            if name in self.restored and (
                name in self.plan.made or (is_int8 and name in data_inputs(original))
            ):
                node.input[position] = self.restored[name]
        if is_int8 and node.op_type == "Pad" and not self.symmetric:
            self._append_int8_pad(original, node)
            return
        if is_int8 and node.op_type in placement.WEIGHTED:
            self._quantize_weight(original, node)
        usual = _DEFAULTS.get(node.op_type, {})
        stated = [item for item in node.attribute if not _is_default(item, usual.get(item.name))]
        del node.attribute[:]
        node.attribute.extend(stated)
        self.nodes.append(node)
        after = self.view.only_reader(original.output[0])
        fused = self.plan.fused.get(after.name, "") if after is not None else ""
        for position, name in enumerate(original.output):
            value = fused or name
            if value in self.plan.pairs:
                # The model's output keeps its name, so what computes it gets another.
                is_output = value in self.view.outputs and value in self.plan.made
                node.output[position] = next(self.fresh) if is_output else value
                self._append_pair(value, node.output[position])

    def _append_int8_pad(self, original: NodeProto, node: NodeProto) -> None:
        """Pad the 8-bit form itself: ONNX Runtime does not fuse a Pad between DQ and Q, it would compute in float."""
        source, value = original.input[0], original.output[0]
        scale, zero = self._grid_constants(value)
        settings = [*node.input[1:2], zero, *node.input[3:]]
        if attribute(node, "mode", b"constant") != b"constant":
            settings[1] = ""
        node.input[:] = [self.int8[source], *settings]
        node.output[0] = self.int8[value] = next(self.fresh)
        self.restored[value] = value if value in self.view.outputs else next(self.fresh)
        self.nodes.append(node)
        self._append_qdq("DequantizeLinear", [self.int8[value], scale, zero], self.restored[value])

    def _append_pair(self, value: str, raw: str) -> None:
        """Append Q and DQ for a value of the plan that is called `raw` before them."""
        if value not in self.plan.pairs:
            return
        constants = self._grid_constants(value)
        self.int8[value] = self._append_qdq("QuantizeLinear", [raw, *constants], next(self.fresh))
        read = value if raw != value else next(self.fresh)
        self.restored[value] = self._append_qdq("DequantizeLinear", [self.int8[value], *constants], read)

    def _append_qdq(self, kind: str, inputs: list[str], output: str) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output))
        return output

    def _quantize_input(self) -> None:
        assert self.entry is not None
        entry, source = self.entry, self.view.graph.input[0].name
        outer = [self._store(entry.scales), self._store(entry.zeros)]
        inner = [self._store(np.float32(entry.scale)), self._store(np.uint8(entry.zero))]
        stored = self._append_qdq("QuantizeLinear", [source, *outer], next(self.fresh))
        # Without it runtimes would take the two, whose scales differ, for a pair; they remove an Identity.
        self.int8[entry.value] = self._append_qdq("Identity", [stored], next(self.fresh))
        inputs = [self.int8[entry.value], *inner]
        self.restored[entry.value] = self._append_qdq("DequantizeLinear", inputs, next(self.fresh))

    def _grid(self, value: str) -> tuple[float, int]:
        root = self.plan.pairs[value]
        if self.entry is not None and root == self.entry.value:
            return self.entry.scale, self.entry.zero
        if root not in self.ranges:
            raise UnsupportedModel(f"the range of {root} is not known: it was not observed")
        scale, zero = grid(*self.ranges[root], symmetric=self.symmetric)
        return float(np.float32(scale)), zero

    def _grid_constants(self, value: str) -> tuple[str, str]:
        """The names of a value's scale and zero point, which is stored because it tells the type."""
        scale, zero = self._grid(value)
        return self._store(np.float32(scale)), self._store(np.int8(0) if self.symmetric else np.uint8(zero))

    def _quantize_weight(self, original: NodeProto, node: NodeProto) -> None:
        weight = self._finite(original.input[1]).astype(np.float64)
        axis = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
        input_scale, _ = self._grid(original.input[0])
        scales = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) / 127
        bias = self._bias(original, weight) if operand(original, 2) else None
        if bias is not None:
            least = np.abs(np.broadcast_to(bias, scales.shape)) / (input_scale * _MAX_BIAS)
            scales = np.maximum(scales, least)
        # A channel of zeros without a bias may have any scale that float32 can hold.
        any_scale = max(scales.max(initial=0.0), 2.0**-20)
        scales = np.where(scales > _SMALLEST_SCALE, scales, any_scale).astype(np.float32)
        along = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        rounded = np.clip(np.rint(weight / along), -127, 127).astype(np.int8)
        node.input[1] = self._dequantized(original.input[1], rounded, scales, axis)
        mean, correction = self.means.get(original.input[0]), None
        if mean is not None:
            correction = mean_correction(original, weight - rounded * along.astype(np.float64), mean)
        if correction is not None:
            bias = correction + (0.0 if bias is None else np.broadcast_to(bias, scales.shape))
        name = operand(original, 2) or unused(self.view, f"{node.name}.bias")
        if self.symmetric and correction is not None:
            node.input[2:] = [self._replace(name, np.asarray(bias, np.float32))]
        elif not self.symmetric and bias is not None:
            steps = scales * np.float32(input_scale)
            whole = np.rint(np.broadcast_to(bias, scales.shape) / steps.astype(np.float64)).astype(np.int32)
            node.input[2:] = [self._dequantized(name, whole, steps, 0)]

    def _bias(self, node: NodeProto, weight: Array) -> Array:
        bias = self._finite(node.input[2])
        if self.entry is None or node.op_type != "Conv" or node.input[0] != self.entry.value:
            return bias
        groups = int(attribute(node, "group", 1))
        return shifted_bias(bias.astype(np.float64), weight, groups, self.entry.shifts)

    def _finite(self, name: str) -> Array:
        value = numpy_helper.to_array(self.view.initializers[name])
        bad = int((~np.isfinite(value)).sum())
        if bad:
            raise UnsupportedModel(
                f"{name} has {bad} values that are NaN or infinite, of {value.size}",
                "look at the weights: training may have diverged",
            )
        return value

    def _dequantized(self, name: str, value: Array, scales: Array, axis: int) -> str:
        """The name of a float value that is `value` times `scales` along an axis."""
        key = (name, value.tobytes() + scales.tobytes())
        if key not in self.weights:
            inputs = [self._replace(name, value)]
            self.weights[key] = next(self.fresh)
            inputs.append(self._store(scales))
            if value.dtype == np.int8:
                # All are zero and could be omitted, but then ONNX Runtime makes no QGemm of a Gemm.
                inputs.append(self._store(np.zeros(scales.shape, np.int8)))
            self._append_qdq("DequantizeLinear", inputs, self.weights[key])
            if axis != 1:
                self.nodes[-1].attribute.append(helper.make_attribute("axis", axis))
        return self.weights[key]

    def _replace(self, name: str, value: Array) -> str:
        """The name of what a constant becomes: its own, unless others read it, perhaps as float."""
        stored = name if self.view.uses(name) <= 1 else next(self.fresh)
        self.constants[stored] = value
        return stored

    def _store(self, value: Any) -> str:
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.stored:
            self.stored[key] = next(self.fresh)
            self.constants[self.stored[key]] = array
        return self.stored[key]


def _is_default(item: Any, usual: Any) -> bool:
    value = helper.get_attribute_value(item)
    if isinstance(value, list):
        return usual is not None and all(entry == usual for entry in value)
    return value == usual


def _short_names(taken: set[str]) -> Iterator[str]:
    """Names of as few letters as possible that are not in use."""
    for length in itertools.count(1):
        for name in map("".join, itertools.product(string.ascii_letters, repeat=length)):
            if name not in taken:
                yield name
