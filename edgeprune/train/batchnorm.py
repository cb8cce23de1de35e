"""Recalibration of batch-norm statistics on images without labels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune.errors import ModelError, UsageError
from edgeprune.models import logits, modes, temporary_hooks
from edgeprune.progress import bar


def recalibrate_bn(module: nn.Module, images: Tensor, batch: int = 256) -> int:
    """Set the statistics of each batch-norm to mean and variance of its input over all images, in place.

    Earlier layers normalize batch by batch meanwhile; everything but batch-norm is in evaluation mode. Returns the
    number of batch-norm layers that were set.
    """
    layers = {name: layer for name, layer in module.named_modules() if _has_statistics(layer)}
    if not layers:
        return 0
    if len(images) < 2:
        raise UsageError(f"{len(images)} calibration image, batch-norm statistics need at least 2")
    sums = {name: _Moments() for name in layers}
    hooks = [layer.register_forward_pre_hook(sums[name].add) for name, layer in layers.items()]
    with temporary_hooks(hooks), modes(None, module), torch.no_grad():
        for layer in layers.values():
            layer.train()
        with bar(len(images), "batch-norm") as advance:
            for chunk in torch.tensor_split(images, math.ceil(len(images) / batch)):
                logits(module, chunk)
                advance(len(chunk))
    used = {name: moments for name, moments in sums.items() if moments.count}
    for name, moments in used.items():
        _set_statistics(name, layers[name], moments)
    return len(used)


@dataclass
class _Moments:
    """Count, mean and sum of squared differences of each channel over all batches (Chan et al. 1983)."""

    count: int = 0
    batches: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook: add one batch (N, C, ...)."""
        x = inputs[0].detach()
        variance, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        added, mean = x.numel() // x.shape[1], mean.double()
        total = self.count + added
        shift = mean - self.mean
        self.squares = self.squares + variance.double() * added + shift**2 * (self.count * added / total)
        self.mean = self.mean + shift * (added / total)
        self.count, self.batches = total, self.batches + 1


def normalizers(module: nn.Module) -> list[nn.Module]:
    """The batch-norm layers that have running statistics."""
    return [layer for layer in module.modules() if _has_statistics(layer)]


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None


def _set_statistics(name: str, layer: nn.Module, moments: _Moments) -> None:
    mean, variance = (
        torch.as_tensor(moments.mean),
        torch.as_tensor(moments.squares) / max(1, moments.count - 1),
    )
    if not (mean.isfinite().all() and variance.isfinite().all()):
        raise ModelError(
            f"the input of {name} is not finite on the calibration images", "look at its weights"
        )
    layer.get_buffer("running_mean").copy_(mean)
    layer.get_buffer("running_var").copy_(variance)
    layer.get_buffer("num_batches_tracked").fill_(moments.batches)
