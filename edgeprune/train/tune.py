"""tune: batch-norm recalibration and fine-tuning of a pruned network, and the accuracy after each step."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import models
from edgeprune.data import Data, calibration_images, calibration_indices, divide
from edgeprune.models import unfreeze
from edgeprune.recipe import TuneTable
from edgeprune.records import Bundle, Reading
from edgeprune.train import batchnorm, evaluation, job, loop
from edgeprune.train.job import Hooks

TUNE_VERSION = 3


def masking_hooks(network: nn.Module, masks: Mapping[str, Tensor]) -> Hooks:
    """Hooks that keep entries of a network at zero while it trains.

    Gradients are masked before they are clipped: those of pruned weights would shrink the step of the others.

    Args:
        masks: parameter -> bool of its shape; False is zero and stays zero.
    """

    def masked() -> list[tuple[Tensor, Tensor]]:
        named = models.tensors(network)
        return [(named[name], keep.to(named[name].device)) for name, keep in masks.items()]

    def mask_gradients() -> None:
        for parameter, keep in masked():
            if parameter.grad is not None:
                parameter.grad.mul_(keep)

    def mask_weights(optimizer: torch.optim.Optimizer, lr: float) -> None:
        with torch.no_grad():
            for parameter, keep in masked():
                parameter.mul_(keep)
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.mul_(keep)

    return Hooks(before_step=mask_gradients, after_step=mask_weights)


def run(  # noqa: PLR0913
    bundle: Bundle,
    data: Data,
    table: TuneTable,
    *,
    calibration: str,
    teacher: Bundle | None,
    seed: int,
    scratch: Path,
    measured: bool = False,
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[Bundle, tuple[Reading, ...]]:
    """Tune a copy of a network: recalibrate batch-norm, fine-tune, and measure the accuracy before and after each.

    Without training images only the accuracy before is measured.

    Args:
        calibration: the recipe of `calibration/` whose images set the batch-norm statistics.
        scratch: a folder for checkpoints, from which an interrupted run resumes.
        measured: an earlier stage has measured the accuracy of `bundle`.
    """
    copy = replace(bundle, module=deepcopy(bundle.module))
    network = models.deployed(copy)
    readings = [] if measured else [evaluation.reading(network, data.held_out, "pruned", {})]
    if data.train is None:
        return copy, tuple(readings)
    if table.recalibrate and (used := _recalibrate(network, data, data.train.labels, calibration)):
        readings.append(evaluation.reading(network, data.held_out, "bn recalibrated", used))
    if table.epochs:
        unfreeze(copy.module)
        dense = models.deployed(teacher) if teacher is not None and table.distill > 0 else None
        split, validation = data.train, None
        if table.keep == "best":
            split, validation = divide(data.train, table.val_share, seed)
        training = job.TrainingJob(split, table, seed, scratch, dense, validation)
        history = loop.fit(network, training, masking_hooks(copy.module, masks or {}))
        used = {
            "epochs": table.epochs, "training images": len(split), "loss": history.losses[-1],
            "objective": table.objective,
        }  # fmt: skip
        readings.append(evaluation.reading(network, data.held_out, "tuned", used))
    return copy, tuple(readings)


def _recalibrate(network: nn.Module, data: Data, labels: Tensor, calibration: str) -> dict[str, Any]:
    """Set new statistics where they lower the loss on the calibration images; the conditions, {} without batch-norm.

    A network that lost little may have been trained on images with other statistics (such as black borders).
    """
    images = calibration_images(data, calibration)
    chosen = labels[calibration_indices(labels, calibration)]
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    old_loss = evaluation.mean_loss(network, images, chosen)
    layers = batchnorm.recalibrate_bn(network, images)
    if not layers:
        return {}
    new_loss = evaluation.mean_loss(network, images, chosen)
    worse = new_loss > old_loss
    if worse:
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    return {
        "statistics": "old ones kept" if worse else "new",
        "layers": layers,
        "calibration images": len(images),
        "loss with old": old_loss,
        "loss with new": new_loss,
    }
