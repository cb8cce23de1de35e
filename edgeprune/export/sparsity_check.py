"""Which weights of an ONNX file hold the 2:4 pattern: of every four inputs in a row, at most two are not zero.

What counts is what a sparse kernel sees: blocks of four along the input channels, for each output and each position
of the kernel by itself, as TensorRT asks for it. A weight is followed from where it is stored to the node that applies
it, through transposes, reshapes and casts, so that it does not matter how an exporter or a simplifier laid it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from edgeprune.errors import ModelError, ParityError
from edgeprune.onnx_graph import ONNX_ERRORS

KEPT, BLOCK = 2, 4
HINT = "please report this: the masks of the pattern and the file disagree"

Array = npt.NDArray[Any]
# What a constant value is made from: the name of the initializer, and the entries.
_Origin = tuple[str, Array]


@dataclass(frozen=True)
class Weight:
    """One weight as one kind of node applies it.

    name: of the initializer. op: of the node. shape: as the node gets it. inputs: products in one sum, of one group
    and one position of the kernel. blocks: how many blocks of four there are along them; what is left over at the end
    belongs to none. broken: how many of the blocks have more than two entries that are not zero. first: where the
    first of those is.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    inputs: int
    blocks: int
    broken: int
    first: str = ""

    @property
    def eligible(self) -> bool:
        """Whether sparse kernels may take it: its inputs are a multiple of four."""
        return self.blocks > 0 and self.inputs % BLOCK == 0

    @property
    def holds(self) -> bool:
        """Whether it has blocks and none of them is broken."""
        return self.blocks > 0 and self.broken == 0


@dataclass(frozen=True)
class PatternShare:
    """Every weight of a file that a convolution or a matrix product applies, in the order of the file."""

    weights: tuple[Weight, ...]

    @property
    def holding(self) -> tuple[Weight, ...]:
        """Those that a sparse kernel may take and that hold the pattern."""
        return tuple(w for w in self.weights if w.eligible and w.holds)

    @property
    def eligible(self) -> tuple[Weight, ...]:
        """Those that a sparse kernel may take if they hold the pattern."""
        return tuple(w for w in self.weights if w.eligible)


def pattern_share(model: ModelProto | Path) -> PatternShare:
    """Look at the weight of every Conv, ConvTranspose, Gemm and MatMul of a model, those in branches included."""
    found = _load(model) if isinstance(model, Path) else model
    weights: dict[Weight, None] = {}
    for node, constants in _applied(found.graph, {}):
        for name, array, axis in _operands(node, constants):
            groups = _attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
            weights[_look(name, node.op_type, array, (axis, groups))] = None
    return PatternShare(tuple(weights))


def check_pattern(share: PatternShare, promised: Mapping[str, tuple[int, ...]], file: str) -> str:
    """Hold a file against what a method promised.

    A parameter is looked for under its name, which exporting keeps. One that an exporter renamed is looked for by its
    number of entries: then as many other weights of this size must hold the pattern as were renamed.

    Args:
        promised: parameter -> its shape, for every parameter whose mask holds the pattern.

    Returns:
        One sentence: how many weights hold the pattern, of how many that a sparse kernel might take.
    """
    named = [w for w in share.weights if w.name in promised]
    broken = [w for w in named if not w.holds]
    if broken:
        raise ParityError(_complaint(broken, len(promised), file), HINT)
    renamed: dict[int, list[str]] = {}
    for name in sorted(set(promised) - {w.name for w in named}):
        renamed.setdefault(prod(promised[name]), []).append(name)
    for size, names in renamed.items():
        others = [w for w in share.weights if w.name not in promised and prod(w.shape) == size]
        if sum(w.holds for w in others) < len(names):
            raise ParityError(_missing(names, others, size, file), HINT)
    blocks = sum(w.blocks for w in share.holding)
    rest = len(share.eligible) - len(share.holding)
    others = f"; {rest} that could hold it do{'es' if rest == 1 else ''} not" if rest else ""
    return (
        f"{file} holds the 2:4 pattern in {len(share.holding)} of {len(share.weights)} weights, "
        f"all {blocks} blocks of them{others}."
    )


def _load(path: Path) -> ModelProto:
    try:
        return onnx.load(path)
    except ONNX_ERRORS as error:
        raise ModelError(f"{path} is not a readable ONNX model: {error}") from error


def _complaint(broken: Sequence[Weight], promised: int, file: str) -> str:
    worst = broken[0]
    what = (
        f"{worst.broken} of {worst.blocks} blocks of {worst.name} {worst.shape} have more than {KEPT} entries that are "
        f"not zero, the first at {worst.first}"
        if worst.blocks
        else f"{worst.name} {worst.shape} has {worst.inputs} inputs, too few for a block of {BLOCK}"
    )
    return f"{file} breaks the 2:4 pattern in {len(broken)} of the {promised} promised weights: {what}"


def _missing(names: Sequence[str], others: Sequence[Weight], size: int, file: str) -> str:
    seen = ", ".join(f"{w.name} ({w.broken} of {w.blocks} blocks broken)" for w in others) or "none"
    return (
        f"{file} does not hold the 2:4 pattern that was promised for {', '.join(names)}: no weight has that name, and "
        f"of other weights with {size} entries there are {seen}"
    )


def _applied(graph: GraphProto, outer: Mapping[str, _Origin]) -> Iterator[tuple[NodeProto, _Constants]]:
    constants = _Constants(graph, outer)
    for node in graph.node:
        if node.op_type in _ROLES:
            yield node, constants
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _applied(body, constants.origins)


class _Constants:
    """Values that no input of the model changes. origins: value -> (the initializer it comes from, its entries)."""

    def __init__(self, graph: GraphProto, outer: Mapping[str, _Origin]) -> None:
        arrays = ((item.name, numpy_helper.to_array(item)) for item in graph.initializer)
        self.origins: dict[str, _Origin] = {**outer, **{name: (name, array) for name, array in arrays}}
        for node in graph.node:
            made = self._of(node)
            if made is not None:
                self.origins[node.output[0]] = made

    def _of(self, node: NodeProto) -> _Origin | None:
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            return None if value is None else (node.output[0], numpy_helper.to_array(value))
        data = [self.origins.get(name) for name in node.input]
        if node.op_type not in _PASSING or not data or any(origin is None for origin in data):
            return None
        (name, array), *rest = [origin for origin in data if origin is not None]
        return name, _passed(node, array, [extra for _, extra in rest])


def _passed(node: NodeProto, array: Array, rest: Sequence[Array]) -> Array:
    if node.op_type == "Transpose":
        return np.transpose(array, _attribute(node, "perm", None))
    if node.op_type == "Reshape":
        wanted = [int(size) for size in rest[0]]
        kept = [array.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
        return array.reshape(wanted if _attribute(node, "allowzero", 0) else kept)
    if node.op_type == "Cast":
        # It may round a small number to zero, and never makes a number of a zero.
        return array.astype(helper.tensor_dtype_to_np_dtype(_attribute(node, "to", None)))
    return array


_PASSING = ("Transpose", "Reshape", "Identity", "Cast")
# Which operands may be weights, and the axis along which they are summed: a number, or how to find it.
_ROLES: Mapping[str, Sequence[int]] = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


def _operands(node: NodeProto, constants: _Constants) -> Iterator[tuple[str, Array, int]]:
    """The weights of a node: (the initializer, what the node gets, the axis that it sums over)."""
    for position in _ROLES[node.op_type]:
        origin = constants.origins.get(node.input[position])
        if origin is not None and origin[1].ndim > 1:
            yield *origin, _axis(node, position)


def _axis(node: NodeProto, position: int) -> int:
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0
    turned = bool(_attribute(node, ("transA", "transB")[position], 0))
    # A (M, K) times B (K, N), with what batches them in front.
    return (-2 if turned else -1) if position == 0 else (-1 if turned else -2)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _look(name: str, op: str, array: Array, summed: tuple[int, int]) -> Weight:
    axis, groups = summed
    filled = np.moveaxis(array != 0, axis, -1)
    inputs = filled.shape[-1] // groups
    # Of a grouped ConvTranspose the inputs of all groups lie along the axis, and no block reaches into the next.
    filled = filled.reshape(*filled.shape[:-1], groups, inputs)
    blocks = inputs // BLOCK
    counts = filled[..., : blocks * BLOCK].reshape(*filled.shape[:-1], blocks, BLOCK).sum(-1)
    broken = np.argwhere(counts > KEPT)
    return Weight(
        name,
        op,
        tuple(array.shape),
        inputs,
        counts.size,
        len(broken),
        _place(broken, op) if len(broken) else "",
    )


def _place(broken: Array, op: str) -> str:
    """Where the first broken block is: which output, which inputs, which position of the kernel."""
    *index, group, block = (int(i) for i in broken[0])
    kernel = f", kernel position {tuple(index[1:])}" if op.startswith("Conv") and index[1:] else ""
    batch = f", matrix {tuple(index[:-1])}" if op in ("Gemm", "MatMul") and index[:-1] else ""
    output = index[-1] if batch or op in ("Gemm", "MatMul") else index[0]
    of_group = f" of group {group}" if op == "ConvTranspose" and group else ""
    return f"output {output}, inputs {BLOCK * block} to {BLOCK * block + BLOCK - 1}{of_group}{kernel}{batch}"
