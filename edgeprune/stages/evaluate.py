"""evaluate: the held-out images of a limit, and the clean accuracy of a network in torch on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, numpy_helper

from edgeprune import intervals
from edgeprune.errors import ParityError, UsageError
from edgeprune.nn import train
from edgeprune.nn.bundle import deployed
from edgeprune.nn.data import Split, spread
from edgeprune.nn.images import Chosen
from edgeprune.nn.onnx_open import HINT
from edgeprune.nn.onnx_view import View, operand
from edgeprune.records import Bundle, Reading


def balanced(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` images, the same share of each class, the same ones for the same seed.

    Raises:
        UsageError: the limit is not at least 1.
    """
    if limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    chosen = spread(split.labels, limit, seed).sort().values
    return Split(split.name, split.labels[chosen], Chosen(split.pixels, chosen))


def of_network(bundle: Bundle, split: Split, name: str) -> Reading:
    """The accuracy of a network in torch, with its exact binomial 95 % interval."""
    right, total = train.accuracy(deployed(bundle), split)
    interval = intervals.binomial(right, total)
    where = f"local torch {torch.__version__}"
    return Reading(
        "clean_accuracy", right / total, "fraction", total, interval, where, name, {"part": split.name}
    )


def check_scales(path: Path, model: ModelProto) -> None:
    """A scale of 0, NaN or infinity answers something, and nothing of what the network was.

    Raises:
        ParityError: names the node. UsageError: a scale can't be read.
    """
    view = View(model)
    for node in view.graph.node:
        scale = view.initializers.get(operand(node, 1))
        if scale is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        try:
            values = numpy_helper.to_array(scale)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is not a readable ONNX file: {scale.name!r}: {error}", HINT) from error
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            raise ParityError(
                f"{path}: the scale of {node.op_type} {node.name!r} is {wrong.flat[0]}; accepted: finite and above 0",
                "the file was damaged: make it again with edgeprune compress",
            )
