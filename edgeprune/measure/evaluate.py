"""Signs that an accuracy was measured on the wrong images, or on images that were prepared in another way."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from edgeprune import confidence, serialization, train
from edgeprune.data import Chosen, Split, spread
from edgeprune.errors import ParityError, UsageError, WorkdirError
from edgeprune.models import deployed
from edgeprune.onnx_graph import HINT, View, operand
from edgeprune.recipe import ModelTable
from edgeprune.records import Bundle, Reading, Report


def balanced(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` images, the same share of each class, the same ones for the same seed."""
    if limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    chosen = spread(split.labels, limit, seed).sort().values
    return Split(split.name, split.labels[chosen], Chosen(split.pixels, chosen))


def of_network(bundle: Bundle, split: Split, name: str) -> Reading:
    """The accuracy of a network in torch, with its exact binomial 95 % interval."""
    right, total = train.accuracy(deployed(bundle), split)
    interval = confidence.binomial(right, total)
    where = f"local torch {torch.__version__}"
    return Reading(
        "clean_accuracy", right / total, "fraction", total, interval, where, name, {"part": split.name}
    )


def check_scales(path: Path, model: ModelProto) -> None:
    """A scale of 0, NaN or infinity answers something, and nothing of what the network was."""
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


REPORT = "report.json"
FILE_EATS = "an ONNX file gets pixels in [0, 1] and normalizes inside"
# Of what guessing leaves.
HARDLY = 0.1


def guessing(reading: Reading, split: Split, *, attacked: bool = False) -> Reading:
    """A clean_accuracy, with a flag where it is no better, or hardly better, than naming one class for all images."""
    if len(split.labels.unique()) < 2:
        return reading
    right = round((reading.value or 0.0) * reading.n)
    better = beats_guessing(right, split.labels, share=0.0)
    if beats_guessing(right, split.labels) or (attacked and not better):
        return reading
    is_file = reading.artifact.endswith(".onnx")
    return _flagged(
        reading,
        f"{reading.artifact} is right on {_percent(reading)} of {reading.n} images, "
        f"{'hardly' if better else 'no'} better than guessing: look at the normalization "
        f"({FILE_EATS if is_file else '--mean, --std'}) and at the order of the classes.",
    )


def beats_guessing(right: int, labels: Tensor, *, share: float = HARDLY) -> bool:
    """Whether so many are right that naming one class for all is beaten by a share of what that leaves."""
    chance = 1 / max(1, len(labels.unique()))
    return confidence.binomial(right, len(labels))[0] > chance + share * (1 - chance)


def classes(reading: Reading, split: Split, count: int) -> Reading:
    """A clean_accuracy, with a note where some of the model's classes have no images."""
    present = len(split.labels.unique())
    if present == count:
        return reading
    note = f"The images are of {present} of the {count} classes that {reading.artifact} answers."
    return _told(reading, "notes", note)


def noted(reading: Reading, notes: Iterable[str]) -> Reading:
    """A clean_accuracy with notes of how it was had."""
    for note in notes:
        reading = _told(reading, "notes", note)
    return reading


def normalized(reading: Reading, table: ModelTable) -> Reading:
    """A clean_accuracy of a file, with a note where a normalization was given, which files have inside."""
    if not (table.mean or table.std):
        return reading
    return _told(reading, "notes", f"--mean and --std were not used: {FILE_EATS}.")


def reported(reading: Reading, run: Path) -> Reading:
    """A clean_accuracy of a run's file, with a flag where it is far below what the run's own report says.

    Far below: the 95 % intervals do not meet. Nothing is said where there is no report, or none with an accuracy.
    """
    try:
        report = serialization.read(Report, run / REPORT, WorkdirError)
    except WorkdirError:
        return reading
    told = next((r for r in report.after if r.metric == reading.metric and r.value is not None), None)
    if told is None or reading.value is None or reading.spread is None:
        return reading
    low = told.spread[0] if told.spread else told.value
    if low is None or reading.spread[1] >= low:
        return reading
    return _flagged(
        reading,
        f"{reading.artifact} is right on {_percent(reading)} of these {reading.n} images, and {REPORT} says "
        f"{_percent(told)} of {told.n}: these are other images, or prepared in another way, or their classes are in "
        "another order.",
    )


def _percent(reading: Reading) -> str:
    return f"{100 * (reading.value or 0.0):.1f} %"


def _flagged(reading: Reading, flag: str) -> Reading:
    return _told(reading, "flags", flag)


def _told(reading: Reading, kind: str, line: str) -> Reading:
    lines = [*reading.conditions.get(kind, ()), line]
    return replace(reading, conditions={**reading.conditions, kind: lines})
