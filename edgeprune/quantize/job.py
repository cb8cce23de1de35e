"""The records of the quantize stage: its job, its result, and one precision that was built."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import Tensor

from edgeprune.recipe import QuantizeTable
from edgeprune.records import Limit, Reading

Timer = Callable[[Mapping[str, Path]], Mapping[str, Reading]]


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """The images that ranges are taken from and choices are made on.

    images: float32 (N, C, H, W). labels: int64 (N,), or None where they are unknown. kind: "calibration" (of the
    training part) or "synthesized" (from the network itself). adversarial: float32 (M, C, H, W), the first M images
    attacked on the float network, where robust accuracy matters.
    """

    images: Tensor
    labels: Tensor | None
    kind: str
    adversarial: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What to quantize for.

    precision: auto, fp32, fp16 or int8. precisions, scheme: what the target takes. scratch: of results that are kept
    until the stage is done. timer: times files alternately on the target's device, name -> its latency_p50; None where
    that device is not there. limits: the run's budget. dense: the unpruned file, for relative limits.
    """

    table: QuantizeTable
    precision: str
    precisions: tuple[str, ...]
    scheme: str
    calibration: CalibrationSet | None
    scratch: Path
    log: Callable[[str], None]
    timer: Timer | None = None
    limits: Mapping[str, Limit] = field(default_factory=dict)
    dense: Path | None = None


@dataclass(frozen=True)
class Quantized:
    """The result; `quantized.json` is this record (docs/precision.md documents each field).

    precision: of what ships. file: its name in the stage's folder; empty when the exported one ships. choice: how it
    was made; empty for fp32. candidates: every one that was built, and why it does not ship.
    """

    precision: str
    file: str
    choice: Mapping[str, Any]
    candidates: tuple[Mapping[str, Any], ...]
    readings: tuple[Reading, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """The quality of a file on the evaluation set.

    clean_accuracy, robust_accuracy: None without labels, or without attacked images. agreement: share of the images
    classified as by the float file. sqnr_db: signal-to-quantization-noise ratio of the logits. loss: accuracy lost,
    clean or under attack, whichever is more; without labels 1 - agreement. right: for each image, with labels: whether
    it is classified right; for an attacked one, right as by the float file.
    """

    clean_accuracy: float | None
    robust_accuracy: float | None
    agreement: float
    sqnr_db: float
    loss: float
    right: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class Built:
    """One precision, built as well as it could be.

    name: for people ("int8 entropy, equalized"). floats: the float model it was made from, with the same node names.
    fallback: layer that went back to float -> its measured output error. kept: node that stays float for another reason
    -> the reason. tried: rows of the other candidates.
    """

    precision: str
    name: str
    model: ModelProto
    floats: ModelProto
    judgement: Judgement
    options: Mapping[str, Any]
    fallback: Mapping[str, float]
    kept: Mapping[str, str]
    tried: tuple[Mapping[str, Any], ...] = ()


def row(
    precision: str,
    name: str,
    judgement: Judgement | None,
    *,
    why_not: str,
    options: Mapping[str, Any],
    fallback: Sequence[str] = (),
) -> dict[str, Any]:
    """A candidate in `Quantized.candidates`, neither written nor timed yet."""
    qualities = ("clean_accuracy", "robust_accuracy", "agreement", "sqnr_db", "loss")
    judged: dict[str, float | None] = {key: getattr(judgement, key, None) for key in qualities}
    if not math.isfinite(judged["sqnr_db"] or 0.0):
        judged["sqnr_db"] = None
    return {
        "precision": precision,
        "name": name,
        "calibrator": options.get("calibrator"),
        "equalized": bool(options.get("equalized")),
        "corrected": bool(options.get("corrected")),
        "fallback": list(fallback),
        **judged,
        "size_bytes": None,
        "latency_s": None,
        "chosen": False,
        "why_not": why_not,
    }
