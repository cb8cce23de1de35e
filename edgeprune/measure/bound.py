"""How far any logit can change between two networks, whatever the image: a sound bound, and what it certifies."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import UnsupportedModel
from edgeprune.measure.answers import Logits
from edgeprune.methods import bundle_change
from edgeprune.records import Bundle, Reading

METRIC = "certified_logit_change"

WHERE = "computed: interval bounds over the input box"


def bound(dense: Bundle, small: Bundle, answers: Logits | None) -> Reading:
    """A bound of the change of every logit between two networks over the whole input box.

    Args:
        dense, small: before and after the cuts that `small.plans` has beyond those of `dense`; neither is changed.
        answers: the dense network's logits (N, K) for the images to say what the bound certifies; None for none.

    Returns:
        The reading; its value is None, with the reason, where an operator has no bound.
    """
    try:
        change = bundle_change(dense, small, collapsed=True)
    except UnsupportedModel as error:
        about = {"images": "synthetic"} if answers is not None else {}
        return Reading(METRIC, None, "logits", 0, None, WHERE, "compressed", {**about, "why": error.message})
    low, high = (end.reshape(-1).double().numpy() for end in (change.lo, change.hi))
    return certificate(low, high, answers)


def certificate(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], answers: Logits | None
) -> Reading:
    """The reading of a bound, and for which answers it proves that the class stays.

    An answer of class c stays when, for every other class j, the dense margin z_c - z_j is more than the largest
    possible change of that difference, high_j - low_c.

    Args:
        low, high: (K,), the change of each logit lies between them.
        answers: the dense network's logits (N, K), or None.
    """
    value = float(np.maximum(np.abs(low), np.abs(high)).max())
    conditions: dict[str, Any] = {"classes": len(low)}
    if not np.isfinite(value):
        why = "its bound is beyond the largest number"
        return Reading(METRIC, None, "logits", 0, None, WHERE, "compressed", {**conditions, "why": why})
    if answers is None:
        return Reading(METRIC, value, "logits", 0, None, WHERE, "compressed", conditions)
    share, spare = _stays(low, high, answers.astype(np.float64))
    conditions |= {"images": "synthetic", "vacuous": share == 0, "certified_share": share}
    if share == 0:
        conditions["because"] = (
            "for no image is the margin of its class more than the largest change of a difference of two logits"
            + (f"; the nearest is short of it by {abs(spare):.4g}" if np.isfinite(spare) else "")
        )
    return Reading(METRIC, value, "logits", len(answers), None, WHERE, "compressed", conditions)


def _stays(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], answers: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """The share of the answers whose class stays, and the most that any margin is above what it has to be."""
    finite = answers[np.isfinite(answers).all(axis=1)]
    if not len(finite):
        return 0.0, float("-inf")
    rows, own = np.arange(len(finite)), finite.argmax(axis=1)
    left = (finite[rows, own][:, None] - finite) - (high[None, :] - low[own][:, None])
    left[rows, own] = np.inf
    spare = left.min(axis=1)
    return float((spare > 0).sum() / len(answers)), float(spare.max())
