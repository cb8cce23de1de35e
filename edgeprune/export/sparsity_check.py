"""Which weights of an ONNX file hold the 2:4 pattern: at most two of every four consecutive inputs are not zero.

Blocks of four lie along the input channels, for each output and kernel position, as TensorRT takes them.
A weight is followed through the transposes, reshapes and casts between its initializer and the node that applies it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from edgeprune.errors import ParityError
from edgeprune.onnx_graph import Array, attribute, subgraphs

KEPT, BLOCK = 2, 4
HINT = "please report this: the masks of the pattern and the file disagree"

# The name of the initializer that a constant comes from, and the entries.
_Constant = tuple[str, Array]
_LAYOUT = ("Transpose", "Reshape", "Identity", "Cast")
_WEIGHT_INPUTS: Mapping[str, Sequence[int]] = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One weight as one kind of node applies it.

    shape: as the node reads it. inputs: products in one sum, of one group and one kernel position. blocks: of four
    inputs; a remainder at the end belongs to none. first: where the first broken block is.
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
        return tuple(w for w in self.eligible if w.holds)

    @property
    def eligible(self) -> tuple[Weight, ...]:
        """Those that a sparse kernel may take if they hold the pattern."""
        return tuple(w for w in self.weights if w.eligible)


def pattern_share(model: ModelProto) -> PatternShare:
    """The weight of every Conv, ConvTranspose, Gemm and MatMul of a model, branches included."""
    return PatternShare(tuple(dict.fromkeys(_weights(model.graph, {}))))


def check_pattern(share: PatternShare, promised: Mapping[str, tuple[int, ...]], file: str) -> str:
    """Check that a file holds the pattern in every promised weight.

    Exporting keeps the names of parameters. For those that an exporter renamed, as many other weights with the same
    number of entries must hold the pattern.

    Args:
        promised: parameter -> its shape, for every parameter whose mask holds the pattern.

    Returns:
        One sentence: how many weights hold the pattern, of how many that a sparse kernel may take.
    """
    named = [w for w in share.weights if w.name in promised]
    broken = [w for w in named if not w.holds]
    if broken:
        raise ParityError(_describe_broken(broken, len(promised), file), HINT)
    renamed: dict[int, list[str]] = {}
    for name in sorted(set(promised) - {w.name for w in named}):
        renamed.setdefault(prod(promised[name]), []).append(name)
    for size, names in renamed.items():
        others = [w for w in share.weights if w.name not in promised and prod(w.shape) == size]
        if sum(w.holds for w in others) < len(names):
            found = ", ".join(f"{w.name} ({w.broken} of {w.blocks} blocks broken)" for w in others) or "none"
            raise ParityError(
                f"{file} does not hold the 2:4 pattern that was promised for {', '.join(names)}: no weight has that "
                f"name, and of other weights with {size} entries there are {found}",
                HINT,
            )
    blocks = sum(w.blocks for w in share.holding)
    rest = len(share.eligible) - len(share.holding)
    others = f"; {rest} that could hold it do{'es' if rest == 1 else ''} not" if rest else ""
    return (
        f"{file} holds the 2:4 pattern in {len(share.holding)} of {len(share.weights)} weights, "
        f"all {blocks} blocks of them{others}."
    )


def _describe_broken(broken: Sequence[Weight], promised: int, file: str) -> str:
    worst = broken[0]
    what = (
        f"{worst.broken} of {worst.blocks} blocks of {worst.name} {worst.shape} have more than {KEPT} entries that are "
        f"not zero, the first at {worst.first}"
        if worst.blocks
        else f"{worst.name} {worst.shape} has {worst.inputs} inputs, too few for a block of {BLOCK}"
    )
    return f"{file} breaks the 2:4 pattern in {len(broken)} of the {promised} promised weights: {what}"


def _weights(graph: GraphProto, outer: Mapping[str, _Constant]) -> Iterator[Weight]:
    constants = {**outer, **{t.name: (t.name, numpy_helper.to_array(t)) for t in graph.initializer}}
    for node in graph.node:
        for position in _WEIGHT_INPUTS.get(node.op_type, ()):
            name, array = constants.get(node.input[position], ("", np.zeros(0)))
            if array.ndim > 1:
                yield _weight(name, array, node, position)
        for body in subgraphs(node):
            yield from _weights(body, constants)
        made = _constant(node, constants)
        if made is not None:
            constants[node.output[0]] = made


def _constant(node: NodeProto, known: Mapping[str, _Constant]) -> _Constant | None:
    """What a node makes of constants alone; None for anything else."""
    if node.op_type == "Constant":
        value = attribute(node, "value", None)
        return None if value is None else (node.output[0], numpy_helper.to_array(value))
    inputs = [known[name] for name in node.input if name in known]
    if node.op_type not in _LAYOUT or not inputs or len(inputs) < len(node.input):
        return None
    (name, array), *rest = inputs
    if node.op_type == "Transpose":
        return name, np.transpose(array, attribute(node, "perm", None))
    if node.op_type == "Reshape":
        sizes = [int(size) for size in rest[0][1]]
        copied = [array.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        return name, array.reshape(sizes if attribute(node, "allowzero", 0) else copied)
    if node.op_type == "Cast":
        # It may round a small number to zero, and never makes a number of a zero.
        return name, array.astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to", None)))
    return name, array


def _summed_axis(node: NodeProto, position: int) -> int:
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0
    transposed = bool(attribute(node, ("transA", "transB")[position], 0))
    # A (M, K) times B (K, N), behind batch dimensions.
    return -1 if (position == 0) != transposed else -2


def _weight(name: str, array: Array, node: NodeProto, position: int) -> Weight:
    groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    filled = np.moveaxis(array != 0, _summed_axis(node, position), -1)
    inputs = filled.shape[-1] // groups
    # The axis of a grouped ConvTranspose holds the inputs of all groups, and no block reaches into the next group.
    filled = filled.reshape(*filled.shape[:-1], groups, inputs)
    blocks = inputs // BLOCK
    counts = filled[..., : blocks * BLOCK].reshape(*filled.shape[:-1], blocks, BLOCK).sum(-1)
    broken = np.argwhere(counts > KEPT)
    first = _place(broken, node.op_type) if len(broken) else ""
    return Weight(name, node.op_type, tuple(array.shape), inputs, counts.size, len(broken), first)


def _place(broken: Array, op: str) -> str:
    *index, group, block = (int(i) for i in broken[0])
    kernel = f", kernel position {tuple(index[1:])}" if op.startswith("Conv") and index[1:] else ""
    batch = f", matrix {tuple(index[:-1])}" if op in ("Gemm", "MatMul") and index[:-1] else ""
    output = index[-1] if batch or op in ("Gemm", "MatMul") else index[0]
    of_group = f" of group {group}" if op == "ConvTranspose" and group else ""
    return f"output {output}, inputs {BLOCK * block} to {BLOCK * block + BLOCK - 1}{of_group}{kernel}{batch}"
