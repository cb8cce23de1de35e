"""What every candidate is made from: the float model made ready, the images, and what is kept of work that was done."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import Tensor

from edgeprune import onnx_graph
from edgeprune.confidence import mcnemar
from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.onnx_graph import ONNX_ERRORS, batch_of, freed
from edgeprune.quantities import suggest
from edgeprune.quantize import observers
from edgeprune.quantize.job import CalibrationSet, Job, Judgement
from edgeprune.quantize.observers import Activations
from edgeprune.quantize.placement import quantizable
from edgeprune.quantize.prepare import prepare
from edgeprune.serialization import replace_file

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
class EvaluationSet:
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
        """The logits (N, K) of another model of the same network."""
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


def panel(material: CalibrationSet, floats: ModelProto) -> EvaluationSet:
    """What is judged on."""
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
    return EvaluationSet(pixels, None if labels is None else labels.numpy(), count, logits, free)


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
    """The logits (N, K) of a model for pixels (N, C, H, W); free: whether its batch may be freed for that."""
    if not free:
        network = onnx_graph.open_onnx(model)
        size = len(pixels) if batch_of(model) is None else 1
        return _batches(network, pixels, size)
    return _batches(onnx_graph.open_onnx(freed(model)), pixels, len(pixels))


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


def _batches(network: onnx_graph.Network, pixels: Tensor, size: int) -> Logits:
    values = max(1, pixels[0].numel())
    step = min(size, BATCH, max(1, BATCH_VALUES // values))
    return np.concatenate([network(part).numpy() for part in pixels.split(step)])


def _exact(loss: float) -> float:
    """A difference of shares without its rounding: 1 - 0.99 is not above a tolerance of 0.01."""
    return round(loss, 12)


def _classes(logits: Logits) -> npt.NDArray[np.int64]:
    """The class of each image; -1 where an answer is no number."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


# Ranges are taken from at most so many values of input: the activations of more take long and change nothing.
MOST_VALUES = 2**26
METADATA = "edgeprune."


@dataclass(frozen=True)
class ResultCache:
    """A folder that remembers what was computed, so that a run that was killed goes on."""

    folder: Path

    def logits(self, name: str, work: Callable[[], Logits]) -> Logits:
        """What `work` gives, computed once."""
        path = self._path(name, ".npy")
        if not path.exists():
            with replace_file(path) as file:
                np.save(file, work())
        return np.load(path, allow_pickle=False)

    def seen(self, name: str, work: Callable[[], dict[str, observers.Seen]]) -> Activations:
        """What `work` observes, observed once."""
        path = self._path(name, ".npz")
        if not path.exists():
            observers.save(work(), path)
        return observers.load(path)

    def number(self, name: str, work: Callable[[], float]) -> float:
        """A number, computed once."""
        path = self._path(name, ".txt")
        if not path.exists():
            with replace_file(path) as file:
                file.write(repr(float(work())).encode())
        return float(path.read_text(encoding="utf-8"))

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + ending)


@dataclass(frozen=True, eq=False)
class FloatBaseline:
    """The exported file and what is derived from it.

    model: prepared. layers: the nodes of it that can be quantized, without those of `skipped`, that the recipe skips.
    images: float32 (N, C, H, W), what ranges are taken from. sha256: of the exported file.
    """

    exported: ModelProto
    sha256: str
    model: ModelProto
    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    images: Tensor
    panel: EvaluationSet
    material: CalibrationSet
    kept: ResultCache

    def seen(self, model: ModelProto, name: str) -> Activations:
        """What the activations of a float model are on the images: one pass, kept."""
        label = f"quantize: activations of {name}"
        return self.kept.seen(name, lambda: observers.observe(model, self.images, label=label))

    def judge(self, name: str, skip: Sequence[str], build: Callable[[], ModelProto]) -> Judgement:
        """How a candidate answers the judged images. It is not built again where its answers are kept."""
        key = json.dumps([name, sorted(skip)])
        return self.panel.judge(self.kept.logits(key, lambda: self.panel.answers(build())))


def load(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of an ONNX file, and the model."""
    try:
        data = path.read_bytes()
        return data, ModelProto.FromString(data)
    except ONNX_ERRORS as error:
        raise ModelError(
            f"{path} is not a readable ONNX file: {error}", "export the network again"
        ) from error


def floats(path: Path, job: Job) -> FloatBaseline:
    """Make an exported file ready for building candidates."""
    data, exported = load(path)
    material = job.material or CalibrationSet(patterns(exported), None, "patterns")
    _check(material, _input_shape(exported))
    model = prepare(exported)
    layers = quantizable(model)
    skipped = _skipped(layers, job.table.skip)
    images = for_ranges(material.images)
    images = images[: max(1, MOST_VALUES // images[0].numel())]
    return FloatBaseline(
        exported, hashlib.sha256(data).hexdigest(), model, tuple(n for n in layers if n not in skipped), skipped,
        images, panel(material, exported), material, ResultCache(job.scratch / _digest(data, material)),
    )  # fmt: skip


def check_skipped(path: Path, patterns: Sequence[str]) -> None:
    """See before anything takes long that every pattern of `quantize.skip` is about a layer of an exported file."""
    if patterns:
        _skipped(quantizable(prepare(load(path)[1])), patterns)


def about(exported: ModelProto) -> dict[str, str]:
    """What the exported file's metadata says of it."""
    return {entry.key: entry.value for entry in exported.metadata_props if entry.key.startswith(METADATA)}


def patterns(exported: ModelProto) -> Tensor:
    """Test patterns (16, C, H, W) in the range of the input: flat ones, ramps, stripes and checkerboards."""
    pixels: Mapping[str, float] = json.loads(about(exported).get(f"{METADATA}input", "{}"))
    low, high = float(pixels.get("low", 0.0)), float(pixels.get("high", 1.0))
    channels, height, width = _input_shape(exported)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = x / max(1, width - 1), y / max(1, height - 1)
    flat = [torch.full((height, width), level) for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    ramps = [across, 1.0 - across, down, 1.0 - down, (across + down) / 2.0]
    boards = [((x // size + y // size) % 2).float() for size in (1, 4, 16)]
    stripes = [(x % 2).float(), (y % 2).float(), ((x + y) // 8 % 2).float()]
    every = torch.stack([*flat, *ramps, *boards, *stripes]).to(torch.float32)
    return low + (high - low) * every[:, None].expand(-1, channels, -1, -1).contiguous()


def _input_shape(exported: ModelProto) -> tuple[int, ...]:
    """(C, H, W) of the image that a model takes."""
    constants = {tensor.name for tensor in exported.graph.initializer}
    first = next(value for value in exported.graph.input if value.name not in constants)
    return tuple(d.dim_value for d in first.type.tensor_type.shape.dim[1:])


def _check(material: CalibrationSet, shape: tuple[int, ...]) -> None:
    images = material.images
    if not len(images):
        raise UsageError(
            "there are no calibration images", "ask for at least one with --set data.calibration=..."
        )
    if images.dtype != torch.float32 or images.shape[1:] != shape:
        raise UsageError(
            f"calibration images must be float32 (N, {', '.join(map(str, shape))}), got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if material.labels is not None and len(material.labels) != len(images):
        raise UsageError(f"{len(images)} calibration images have {len(material.labels)} labels")
    if not bool(torch.isfinite(images).all()):
        worst = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise UsageError(
            f"calibration image {worst} of {len(images)} has values that are NaN or infinite",
            "look at the data; pixels are numbers in the range of the network's input",
        )


def _skipped(layers: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise UsageError(
                f"quantize.skip names {pattern!r}, which is no layer that could be quantized",
                suggest(pattern, layers),
            )
    return tuple(layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns))


def _digest(data: bytes, material: CalibrationSet) -> str:
    """What everything that is kept depends on: another file or other images start anew."""
    hasher = hashlib.sha256(data)
    for part in (material.images, material.labels, material.adversarial):
        hasher.update(b"-" if part is None else part.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
