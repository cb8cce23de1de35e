"""Judging candidates on images: their logits in ONNX Runtime, and what these say against the float file's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import Tensor

from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.intervals import mcnemar
from edgeprune.nn import parity
from edgeprune.nn.onnx_batch import batch_of, freed
from edgeprune.stages.quantize_job import Judgement, Material

# The most images that a candidate is judged on, and the share of them that no range is taken from.
MOST, SHARE = 512, 4
# With fewer than this every image serves for both.
FEW = 1024
# Of a batch, so that its activations fit into memory.
BATCH, BATCH_VALUES = 64, 2**22
# How far the model with a free batch may be from the one without, relative to the largest logit.
SAME = 1e-4
# Below this the paired test says that one candidate is better than another; else the output error decides.
LEVEL = 0.05

Logits = npt.NDArray[np.float32]


def judged(images: int) -> int:
    """How many of so many images are judged on: the first ones. Ranges are taken from the others, where there are."""
    return min(MOST, images // SHARE) if images >= FEW else min(MOST, images)


def for_ranges(images: Tensor) -> Tensor:
    """The images that ranges are taken from: those that are not judged on, or all where they are few."""
    return images[judged(len(images)) :] if len(images) >= FEW else images


@dataclass(frozen=True, eq=False)
class Panel:
    """Images to judge on, and what the float file answers.

    pixels: float32 (N, C, H, W), the clean ones first; labels: int64 (N,), or None. clean: how many are clean.
    logits: float32 (N, K) of the float file. free: whether its batch could be freed.
    """

    pixels: Tensor
    labels: npt.NDArray[np.int64] | None
    clean: int
    logits: Logits
    free: bool

    def answers(self, model: ModelProto) -> Logits:
        """The logits (N, K) of another model of the same network.

        Raises:
            UnsupportedModel: ONNX Runtime refuses it.
        """
        return answers(model, self.pixels, free=self.free)

    def judge(self, logits: Logits) -> Judgement:
        """What logits (N, K) say against the float file's."""
        same = _classes(logits) == _classes(self.logits)
        agreement = float(same[: self.clean].mean())
        error = sqnr_db(self.logits, logits)
        if self.labels is None:
            return Judgement(None, None, agreement, error, _exact(1.0 - agreement))
        right, wanted = _classes(logits) == self.labels, _classes(self.logits) == self.labels
        clean, attacked = right[: self.clean], right[self.clean :]
        loss = float(wanted[: self.clean].mean() - clean.mean())
        robust = None
        if len(attacked):
            robust = float(attacked.mean())
            loss = max(loss, float(wanted[self.clean :].mean()) - robust)
        # The attacked images were made for the float network: that another one resists what broke that is no merit.
        held = np.concatenate([clean, attacked & wanted[self.clean :]])
        return Judgement(float(clean.mean()), robust, agreement, error, _exact(loss), tuple(map(bool, held)))


def panel(material: Material, floats: ModelProto) -> Panel:
    """What is judged on.

    Raises:
        UsageError: labels or attacked images that don't go with the images.
        ModelError: the float file answers with NaN or infinity.
    """
    count = judged(len(material.images))
    pixels, labels = material.images[:count], None
    if material.labels is not None:
        labels = material.labels[:count]
    if material.adversarial is not None:
        attacked = material.adversarial[:count]
        if labels is None or attacked.shape[1:] != pixels.shape[1:]:
            raise UsageError(
                f"attacked images {tuple(attacked.shape)} don't go with images {tuple(pixels.shape)} and "
                f"{'no' if labels is None else len(labels)} labels"
            )
        pixels, labels = torch.cat([pixels, attacked]), torch.cat([labels, labels[: len(attacked)]])
    if labels is not None and len(labels) != len(pixels):
        raise UsageError(f"{len(pixels)} images have {len(labels)} labels")
    free = frees(floats, pixels)
    logits = answers(floats, pixels, free=free)
    if not np.isfinite(logits).all():
        raise ModelError(
            "the exported file answers images with NaN or infinity",
            "look at the weights: training may have diverged",
        )
    return Panel(pixels, None if labels is None else labels.numpy(), count, logits, free)


def best(judgements: Sequence[Judgement], tolerance: float) -> int:
    """Which candidate is best.

    With labels: the most images right; candidates that an exact paired test (McNemar's) can't tell from that one are
    as good, and the smaller output error decides between them. Without: the smallest output error.
    """
    within = [i for i, j in enumerate(judgements) if j.loss <= tolerance] or range(len(judgements))
    top = max(within, key=lambda i: (sum(judgements[i].right), judgements[i].sqnr_db))
    equal = [i for i in within if i == top or not worse(judgements[i], judgements[top])]
    return max(equal, key=lambda i: judgements[i].sqnr_db)


def worse(one: Judgement, other: Judgement) -> bool:
    """Whether a candidate gets fewer images right than another, and more so than chance would have it."""
    lost = sum(b and not a for a, b in zip(one.right, other.right, strict=True))
    gained = sum(a and not b for a, b in zip(one.right, other.right, strict=True))
    return lost > gained and mcnemar(gained, lost) < LEVEL


def sqnr_db(wanted: Logits, got: Logits) -> float:
    """10 log10 of the power of the logits over that of their error, in dB; infinite for equal ones."""
    noise = float(np.square(got.astype(np.float64) - wanted).sum())
    signal = float(np.square(wanted.astype(np.float64)).sum())
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def answers(model: ModelProto, pixels: Tensor, *, free: bool) -> Logits:
    """The logits (N, K) of a model for pixels (N, C, H, W); free: whether its batch may be freed for that.

    Raises:
        UnsupportedModel: ONNX Runtime refuses the model.
    """
    if not free:
        network = parity.open_onnx(model)
        size = len(pixels) if batch_of(model) is None else 1
        return _batches(network, pixels, size)
    return _batches(parity.open_onnx(freed(model)), pixels, len(pixels))


def frees(model: ModelProto, pixels: Tensor) -> bool:
    """Whether a model with a fixed batch of one answers alike when its batch is freed."""
    if batch_of(model) != 1:
        return False
    few = pixels[:3]
    try:
        many = answers(model, few, free=True)
    except UnsupportedModel:
        return False
    one = answers(model, few, free=False)
    scale = float(np.abs(one).max()) or 1.0
    return many.shape == one.shape and float(np.abs(many - one).max()) <= SAME * scale


def _batches(network: parity.Network, pixels: Tensor, size: int) -> Logits:
    values = max(1, pixels[0].numel())
    step = min(size, BATCH, max(1, BATCH_VALUES // values))
    return np.concatenate([network(part).numpy() for part in pixels.split(step)])


def _exact(loss: float) -> float:
    """A difference of shares without its rounding: 1 - 0.99 is not above a tolerance of 0.01."""
    return round(loss, 12)


def _classes(logits: Logits) -> npt.NDArray[np.int64]:
    """The class of each image; -1 where an answer is no number."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
