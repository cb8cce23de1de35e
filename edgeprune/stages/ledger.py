"""The ledger of a run: the accuracy of the network in torch after each step, a part that several stages share."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from torch import nn

from edgeprune.intervals import binomial
from edgeprune.nn import train
from edgeprune.nn.data import Split
from edgeprune.records import Reading


def reading(network: nn.Module, split: Split, stage: str, used: Mapping[str, Any]) -> Reading:
    """The accuracy of a network on held-out images, with its exact binomial 95 % interval.

    Args:
        network: pixels in [0, 1] to logits. stage: the step that it was measured after. used: what the step used.
    """
    correct, total = train.accuracy(network, split)
    return Reading(
        metric="clean_accuracy",
        value=correct / total,
        unit="fraction",
        n=total,
        spread=binomial(correct, total),
        where=f"local {platform.machine()} torch",
        artifact="compressed",
        conditions={"stage": stage, "images": total, **used},
    )
