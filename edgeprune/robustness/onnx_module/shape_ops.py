"""ONNX operators in torch that move values or read shapes: reshaping, slicing, joining, types."""

from collections.abc import Mapping

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from edgeprune.robustness.onnx_module.fake_quantize import Inputs, Node, Operator, ints, need, number, refuse

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def _reshape(node: Node, x: Inputs) -> Tensor:
    whole, shape = need(x, 0), ints(node, x, 1, "shape") or []
    if not node.get("allowzero", 0):
        shape = [size or whole.shape[place] for place, size in enumerate(shape)]
    return whole.reshape(shape)


def _flatten(node: Node, x: Inputs) -> Tensor:
    whole = need(x, 0)
    axis = node.get("axis", 1)
    axis += whole.ndim if axis < 0 else 0
    rows = 1
    for size in whole.shape[:axis]:
        rows *= size
    return whole.reshape(rows, -1)


def _transpose(node: Node, x: Inputs) -> Tensor:
    whole = need(x, 0)
    return whole.permute(node.get("perm", list(range(whole.ndim))[::-1]))


def _concat(node: Node, x: Inputs) -> Tensor:
    given, axis = [t for t in x if t is not None], node.options["axis"]
    rows = max(t.shape[0] for t in given)
    if axis % given[0].ndim:
        # A token that the file holds for its one image, for each image of a larger batch.
        given = [t.expand(rows, *t.shape[1:]) if t.shape[0] == 1 else t for t in given]
    return torch.cat(given, axis)


def _pad(node: Node, x: Inputs) -> Tensor:
    whole, pads = need(x, 0), ints(node, x, 1, "pads") or []
    value, mode = number(node, x, 2), node.get("mode", b"constant").decode()
    axes = ints(node, x, 3, "axes") or list(range(whole.ndim))
    sides = [(0, 0)] * whole.ndim
    for place, axis in enumerate(axes):
        sides[axis % whole.ndim] = (pads[place], pads[place + len(axes)])
    first = next((axis for axis, side in enumerate(sides) if any(side)), whole.ndim)
    flat = [size for side in reversed(sides[first:]) for size in side]
    if not flat:
        return whole
    if mode == "constant":
        fill = node.get("value", 0.0) if value is None else float(value)
        return functional.pad(whole, flat, value=fill)
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names or whole.ndim not in (3, 4, 5) or first < 2:
        raise refuse(node, f"mode {mode} along axis {first} of {whole.ndim}")
    # torch wants all axes but the batch and the channels.
    return functional.pad(whole, flat + [0, 0] * (first - 2), mode=names[mode])


def _slice(node: Node, x: Inputs) -> Tensor:
    whole = need(x, 0)
    starts, ends = (ints(node, x, 1 + i, option) or [] for i, option in enumerate(("starts", "ends")))
    axes = ints(node, x, 3, "axes") or list(range(len(starts)))
    steps = ints(node, x, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Python's own rules for negative and too large limits are ONNX's.
        rows = range(*slice(start, _end(end, step), step).indices(whole.shape[axis]))
        if step == 1:
            whole = whole.narrow(axis, rows.start, len(rows))
        else:
            whole = whole.index_select(axis, torch.tensor(list(rows), dtype=torch.int64, device=whole.device))
    return whole


def _end(end: int, step: int) -> int | None:
    """Counting down to before the first entry is written as a very small number, which in Python is None."""
    return None if step < 0 and end < -(2**30) else end


def _split(node: Node, x: Inputs) -> tuple[Tensor, ...]:
    whole, axis = need(x, 0), node.get("axis", 0)
    sizes = ints(node, x, 1, "split")
    if sizes:
        return whole.split(sizes, axis)
    parts = node.get("num_outputs", node.outputs)
    return whole.split(-(-whole.shape[axis] // parts), axis)


def _gather(node: Node, x: Inputs) -> Tensor:
    whole, axis = need(x, 0), node.get("axis", 0) % need(x, 0).ndim
    index = need(x, 1).to(whole.device).long()
    index = torch.where(index < 0, index + whole.shape[axis], index)
    found = whole.index_select(axis, index.reshape(-1))
    return found.reshape((*whole.shape[:axis], *index.shape, *whole.shape[axis + 1 :]))


def _squeeze(node: Node, x: Inputs) -> Tensor:
    whole, axes = need(x, 0), ints(node, x, 1, "axes")
    return whole.squeeze(axes) if axes else whole.squeeze()


def _unsqueeze(node: Node, x: Inputs) -> Tensor:
    whole, axes = need(x, 0), ints(node, x, 1, "axes") or []
    for axis in sorted(axis % (whole.ndim + len(axes)) for axis in axes):
        whole = whole.unsqueeze(axis)
    return whole


def _expand(node: Node, x: Inputs) -> Tensor:
    whole, shape = need(x, 0), ints(node, x, 1, "shape") or []
    return whole.expand(torch.broadcast_shapes(whole.shape, tuple(shape)))


def _shape(node: Node, x: Inputs) -> Tensor:
    return torch.tensor(need(x, 0).shape[node.get("start", 0) : node.get("end", None)], dtype=torch.int64)


def _filled(node: Node, x: Inputs) -> Tensor:
    value = node.get("value", torch.zeros(1))
    return value.expand(1).expand(ints(node, x, 0, "shape") or []).clone()


def _range(node: Node, x: Inputs) -> Tensor:
    start, limit, step = (number(node, x, place) for place in range(3))
    return torch.arange(start, limit, step, dtype=need(x, 0).dtype)


def _cast(node: Node, x: Inputs) -> Tensor:
    to, whole = node.options["to"], need(x, 0)
    if to in FLOATS:
        return whole if whole.is_floating_point() else whole.to(torch.float32)
    return whole.to(torch.bool if to == TensorProto.BOOL else torch.int64)


def _depth_to_space(node: Node, x: Inputs) -> Tensor:
    whole, block = need(x, 0), node.options["blocksize"]
    if node.get("mode", b"DCR") == b"CRD":
        return functional.pixel_shuffle(whole, block)
    n, c, h, w = whole.shape
    depth = c // block**2
    parts = whole.reshape(n, block, block, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, depth, h * block, w * block)


def _space_to_depth(node: Node, x: Inputs) -> Tensor:
    n, c, h, w = (whole := need(x, 0)).shape
    block = node.options["blocksize"]
    parts = whole.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


def _one_hot(node: Node, x: Inputs) -> Tensor:
    index, depth, values = need(x, 0).long(), int(number(node, x, 1)), need(x, 2)
    hot = functional.one_hot(index % depth, depth).to(torch.bool)
    found = torch.where(hot, values[1].to(index.device), values[0].to(index.device))
    axis = node.get("axis", -1)
    return found if axis == -1 else found.movedim(-1, axis)


def _same(node: Node, x: Inputs) -> Tensor:
    return need(x, 0)


VIEWS: Mapping[str, Operator] = {
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "DepthToSpace": _depth_to_space,
    "Dropout": _same,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _same,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda node, x: torch.tensor(need(x, 0).numel()),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda node, x: need(x, 0).repeat(ints(node, x, 1, "repeats") or []),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
