"""Images made from the model itself: noise, moved until batch-norm sees what it saw in training.

Haroush et al., "The Knowledge Within" (2020), and Cai et al., "ZeroQ" (2020), match the statistics that batch-norm
layers keep of their inputs. A network without batch-norm gives only its classes: each image is moved towards one. They
are no photographs, and no accuracy is measured on them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune import models, serialization
from edgeprune.errors import ModelError, WorkdirError
from edgeprune.models import deployed, load_tensors, logits, save_tensors, temporary_hooks, total_macs
from edgeprune.progress import bar
from edgeprune.recipe import SynthesizeTable
from edgeprune.records import Bundle, InputSpec

# Multiply-accumulates that the synthesis may take in all: a few minutes on two cores.
WORK = 4e12
# A step runs the network forward and, for the gradient of the pixels, backward: about three times its cost.
PASSES = 3
MOST_IMAGES, LEAST_IMAGES = 256, 16
MOST_STEPS, LEAST_STEPS = 100, 20
# Batch-norm statistics are matched over a batch; more images at a time say nothing more of a channel.
BATCH = 256
SAVES = 5
# Noise to start from, in logits of a pixel: white, and smooth over so many pixels. Its smoothness stays.
FINE, COARSE = 0.1, ((4, 0.7), (8, 1.0))
# Adam moves a pixel by about its learning rate a step: so far in all, and no faster than this, in logits of a pixel.
PATH, FASTEST = 5.0, 0.15


@dataclass(frozen=True)
class Synthesis:
    """images: float32 (N, C, H, W) in [low, high]. notes: what a reader must know. facts: how they came to be."""

    images: Tensor
    notes: tuple[str, ...]
    facts: dict[str, float | int | str]


def amount(macs: float, images: int, steps: int) -> tuple[int, int]:
    """How many images, and steps for each: as asked for; where 0, what WORK allows for a network of that cost."""
    wanted = images or int(min(MOST_IMAGES, max(LEAST_IMAGES, WORK / (PASSES * macs * 60))))
    each = steps or int(min(MOST_STEPS, max(LEAST_STEPS, WORK / (PASSES * macs * wanted))))
    return wanted, each


def synthesize(
    network: nn.Module, spec: InputSpec, *, images: int, steps: int, seed: int, scratch: Path | None
) -> Synthesis:
    """Make images on which the network's batch-norm inputs have the means and deviations that it remembers."""
    frozen = deepcopy(network).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    count, each = amount(total_macs(frozen, torch.zeros(1, *spec.shape)), images, steps)
    remembered = [m for m in frozen.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    done, first, last = [], 0.0, 0.0
    starts = range(0, count, BATCH)
    with bar(len(starts) * each, "synthesize images") as advance:
        for index, start in enumerate(starts):
            task = _Task(frozen, spec, remembered, (seed + index) % 2**63, each)
            file = scratch / f"batch-{index}.pt" if scratch else None
            pixels, before, after = task.run(min(BATCH, count - start), file, advance)
            done.append(pixels)
            first, last = first + before / len(starts), last + after / len(starts)
    facts: dict[str, float | int | str] = {
        "images": count, "steps": each, "batch-norm layers": len(remembered), "seed": seed,
        "distance before": first, "distance after": last,
    }  # fmt: skip
    return Synthesis(torch.cat(done), _notes(count, each, remembered, (first, last)), facts)


def _notes(
    count: int, steps: int, remembered: Sequence[nn.Module], distance: tuple[float, float]
) -> tuple[str, ...]:
    made = f"{count} images were synthesized from the model in {steps} steps"
    if not remembered:
        return (
            f"{made}; it has no batch-norm that remembers its training data, so they only spread over the classes: "
            "what is repaired with them fits the training data less.",
        )
    return (
        f"{made}, to match what its {len(remembered)} batch-norm layers remember of the training data "
        f"(mean distance {distance[0]:.2f} to {distance[1]:.2f} standard deviations).",
    )


@dataclass(frozen=True)
class _Task:
    """One batch: the frozen network, its input, its batch-norm layers, a seed and a number of steps."""

    network: nn.Module
    spec: InputSpec
    remembered: Sequence[nn.Module]
    seed: int
    steps: int

    def run(self, count: int, file: Path | None, advance: Callable[..., None]) -> tuple[Tensor, float, float]:
        """The images, and the mean distance of the statistics at the first and at the last step."""
        generator = torch.Generator().manual_seed(self.seed)
        free = nn.Parameter(_noise((count, *self.spec.shape), generator))
        classes = torch.arange(count) % self.spec.classes
        top = min(FASTEST, PATH / self.steps)
        optimizer = torch.optim.Adam([free], lr=top, betas=(0.9, 0.99))
        settings = f"{self.steps} {count} {self.seed} {self.spec}"
        key = models.key(settings, [self.network], {})
        distances: list[float] = []
        before = models.load_state(file, key, alone=True) if file else None
        if before is not None:
            optimizer.load_state_dict(before["optimizer"])
            free.data.copy_(before["free"])
            distances = before["distances"]
        advance(len(distances))
        while len(distances) < self.steps:
            optimizer.param_groups[0]["lr"] = top * (1 + math.cos(math.pi * len(distances) / self.steps)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss, distance = self._loss(free, classes)
            if loss.requires_grad:
                loss.backward()
            _check_gradient(free)
            optimizer.step()
            distances.append(distance)
            advance()
            if file and len(distances) % max(1, self.steps // SAVES) == 0:
                state = {"free": free.detach(), "optimizer": optimizer.state_dict(), "distances": distances}
                models.save_state(file, key, state, alone=True)
        return self._pixels(free.detach()), distances[0], distances[-1]

    def _pixels(self, free: Tensor) -> Tensor:
        return self.spec.low + (self.spec.high - self.spec.low) * torch.sigmoid(free)

    def _loss(self, free: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        seen: list[tuple[Tensor, Tensor]] = []

        def compare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
            deviation = (layer.get_buffer("running_var") + layer.eps).sqrt()  # type: ignore[operator]
            seen.append(
                (
                    (mean - layer.get_buffer("running_mean")) / deviation,
                    (variance + 1e-8).sqrt() / deviation - 1,
                )
            )

        with temporary_hooks(layer.register_forward_pre_hook(compare) for layer in self.remembered):
            outputs = logits(self.network, self._pixels(free))
        terms = [shift.pow(2).mean() + stretch.pow(2).mean() for shift, stretch in seen]
        distance = sum(float(shift.detach().abs().mean()) for shift, _ in seen) / max(1, len(seen))
        # Classes only where nothing else is known: they make images that are surer than any photograph, and layers
        # that are solved on those classify photographs worse (ResNet-20 at half of the work: 72.0 % against 73.4 %).
        return sum(terms) if terms else functional.cross_entropy(outputs, classes), distance  # type: ignore[return-value]


def _check_gradient(free: Tensor) -> None:
    if free.grad is None or not bool(torch.isfinite(free.grad).all()):
        raise ModelError(
            "the network gives no finite gradient for its input, so no images can be synthesized from it",
            "run with --set prune.repair=none",
        )


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Coarse noise of two scales with a little white noise: like photographs, most power is in low frequencies."""
    noise = FINE * torch.randn(shape, generator=generator)
    for factor, weight in COARSE:
        size = (max(1, shape[2] // factor), max(1, shape[3] // factor))
        coarse = torch.randn(*shape[:2], *size, generator=generator)
        noise += weight * functional.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=False)
    return noise


SYNTHESIS_VERSION = 1

IMAGES, RECORD = "images.safetensors", "synthesis.json"


def run(bundle: Bundle, table: SynthesizeTable, seed: int, scratch: Path) -> Synthesis:
    """Make the images."""
    scratch.mkdir(parents=True, exist_ok=True)
    made = synthesize(
        deployed(bundle), bundle.input, images=table.images, steps=table.steps, seed=seed, scratch=scratch
    )
    _check(made.images, bundle.input)
    return made


def write(made: Synthesis, folder: Path) -> None:
    """Leave the images in a folder, and beside them how they were made."""
    save_tensors({"images": made.images}, folder / IMAGES)
    serialization.write(folder / RECORD, _Record(made.notes, made.facts))


def read(folder: Path) -> Synthesis:
    """The images that `write` left."""
    record = serialization.read(_Record, folder / RECORD, WorkdirError)
    return Synthesis(load_tensors(folder / IMAGES)["images"], record.notes, dict(record.facts))


@dataclass(frozen=True)
class _Record:
    notes: tuple[str, ...]
    facts: Mapping[str, Any]


def _check(images: Tensor, spec: InputSpec) -> None:
    """What everything after this relies on: the type, the shape, the range."""
    if images.dtype != torch.float32 or images.shape[1:] != spec.shape or not len(images):
        raise ModelError(
            f"the synthesized images are {images.dtype} {tuple(images.shape)}; the network takes float32 (N, "
            f"{', '.join(map(str, spec.shape))})"
        )
    low, high = float(images.min()), float(images.max())
    if not spec.low <= low <= high <= spec.high:  # also when one of them is no number
        raise ModelError(
            f"the synthesized images have values from {low:g} to {high:g}; the input's are from {spec.low:g} to "
            f"{spec.high:g}",
            "does the network compute NaN? prune without images: --set prune.repair=none",
        )
