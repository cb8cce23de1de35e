"""The rest of a network behind one of its inner values, by ONNX Runtime: for what was computed anew up to there.

A value is such a place when everything behind it depends on nothing before it. Which value of a tape it is shows in
its numbers: the same ones come out of the whole model when that value is made an output of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from onnx import ModelProto, TensorProto, helper
from onnx.utils import Extractor
from torch import Tensor

from edgeprune.attacks._tape import Tape
from edgeprune.errors import UnsupportedModel, not_short
from edgeprune.models import Logits
from edgeprune.onnx_graph import ONNX_ERRORS, open_onnx

# Between a value on the tape and in the model, relative to its largest number; other values differ in their shape or
# in nearly all numbers.
ALIKE = 1e-4
# Of so many images.
IMAGES = 2


def tail_at(model: ModelProto, tape: Tape, slot: int) -> Logits | None:
    """From a value of a tape to the logits; None where the model has no such place.

    Args:
        model: of the network that the tape was written from, its only input open in its first dimension.
        tape: with that network's values on some images. slot: of a value (N, C, H, W) of it.

    Returns:
        float32 (N, C, H, W), for any N, to logits (N, K).
    """
    images, wanted = tape.values[0][:IMAGES], tape.values[slot][:IMAGES]
    for name in _places(model):
        try:
            if _alike(open_onnx(_between(model, model.graph.input[0].name, name))(images), wanted):
                return open_onnx(_between(model, name, model.graph.output[0].name, wanted.shape[1:]))
        except (UnsupportedModel, *ONNX_ERRORS):
            not_short()
            continue
    return None


def _places(model: ModelProto) -> Iterator[str]:
    """Values behind which nothing reads what was before them, in their order; the input and the answer are none."""
    graph = model.graph
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    known = {graph.input[0].name}
    open_until = {graph.input[0].name: last.get(graph.input[0].name, -1)}
    for i, node in enumerate(graph.node):
        if not known.intersection(node.input):
            continue
        for name in node.output:
            known.add(name)
            open_until[name] = last.get(name, -1)
        alive = [name for name, end in open_until.items() if end > i]
        if len(alive) == 1 and alive[0] in node.output:
            yield alive[0]


def _between(model: ModelProto, begin: str, end: str, shape: Sequence[int] = ()) -> ModelProto:
    """The part of a model from one value to another one. shape: of one image's `begin`, where it is not the input."""
    whole = ModelProto()
    whole.CopyFrom(model)
    stated = {info.name for info in (*whole.graph.value_info, *whole.graph.input, *whole.graph.output)}
    for name, dims in ((begin, ["n", *shape]), (end, None)):
        if name not in stated or (name == begin and shape):
            kept = [info for info in whole.graph.value_info if info.name != name]
            del whole.graph.value_info[:]
            whole.graph.value_info.extend(
                [*kept, helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)]
            )
    return Extractor(whole).extract_model([begin], [end])


def _alike(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    scale = float(wanted.abs().max()) or 1.0
    return bool((found - wanted).abs().max() <= ALIKE * scale) and bool(torch.isfinite(found).all())
