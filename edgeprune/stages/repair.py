"""repair: solve the layers after a cut anew so that they answer as the dense ones; unlabelled images, no training."""

from __future__ import annotations

from torch import Tensor

from edgeprune.errors import UsageError
from edgeprune.nn.bundle import deployed
from edgeprune.nn.data import Split
from edgeprune.nn.reconstruct import Repaired, repair
from edgeprune.recipe import PruneTable
from edgeprune.records import Bundle, Reading
from edgeprune.stages import ledger

RESULT_VERSION = 1


def source_of(table: PruneTable, method: str, trainable: bool) -> str:
    """Which images a network is repaired on: "synthetic", "data" or "none".

    "auto" is for the method data-free, which looks at the same images to choose: data where there are training images,
    synthetic otherwise. For other methods it is none.

    Args:
        method: its name, with "auto" decided. trainable: whether there are images that may be learned from.

    Raises:
        UsageError: the recipe wants training images, and there are none.
    """
    if table.repair == "data" and not trainable:
        raise UsageError(
            "prune.repair = 'data' needs images to learn from, and there are none",
            "give --data with a training part (without --data-use evaluate), or --set prune.repair=synthetic",
        )
    if table.granularity != "channel" and table.repair not in ("auto", "none"):
        raise UsageError(
            f"prune.repair = {table.repair!r} is for channels: at granularity {table.granularity!r} no layer is cut",
            "leave it out",
        )
    if table.repair == "auto" and table.granularity != "channel":
        # The images are for choosing alone.
        return "none"
    if table.repair == "auto":
        if method != "data-free":
            return "none"
        return "data" if trainable else "synthetic"
    return table.repair


def run(
    dense: Bundle, small: Bundle, images: Tensor, *, held_out: Split | None, seed: int
) -> tuple[Repaired, tuple[Reading, ...]]:
    """Repair a cut network, and measure how accurate it was before and is after where there are held-out images.

    Args:
        dense: the network before the cut. small: after it; `small.plans[-1]` is the cut. Neither is changed.
        images: float32 (N, C, H, W), to make the layers' outputs equal on.
        held_out: labelled images, to measure on only; or None.

    Returns:
        The repaired network, and the readings "pruned" and "repaired" of the ledger, if any.

    Raises:
        ModelError: the network fails on the images.
    """
    repaired = repair(dense, small, images, seed=seed)
    if held_out is None:
        return repaired, ()
    before = ledger.reading(deployed(small), held_out, "pruned", {})
    after = ledger.reading(deployed(repaired.bundle), held_out, "repaired", {"repair": repaired.facts})
    return repaired, (before, after)
