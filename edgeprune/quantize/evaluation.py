"""The float model that every candidate is made from, the images it is judged on, and a cache of results."""

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

from edgeprune.confidence import mcnemar
from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.onnx_graph import ONNX_ERRORS, batch_of, freed, inputs_of, open_onnx
from edgeprune.quantities import suggest
from edgeprune.quantize import observers
from edgeprune.quantize.job import CalibrationSet, Job, Judgement
from edgeprune.quantize.observers import Activations
from edgeprune.quantize.placement import quantizable
from edgeprune.quantize.prepare import prepare
from edgeprune.serialization import replace_file

METADATA = "edgeprune."
# The most images that a candidate is judged on, and the share of them that no range is taken from.
MOST, SHARE = 512, 4
# With fewer than this every image serves for both.
FEW = 1024
# Ranges are taken from at most so many values of input: more take long and change nothing.
MOST_VALUES = 2**26
# The most images of a batch, and the most values, so that its activations fit into memory.
BATCH, BATCH_VALUES = 64, 2**22
# How far the logits with a free batch may be from those without, relative to the largest.
SAME = 1e-4
# Below this p-value one candidate is better than another; otherwise the output error decides.
LEVEL = 0.05
# Of a loss: 1 - 0.99 must not be above a tolerance of 0.01.
_DIGITS = 12

Logits = npt.NDArray[np.float32]


def judged(images: int) -> int:
    """How many of so many images are judged on: the first ones. Ranges are taken from the others, where there are."""
    return min(MOST, images // SHARE) if images >= FEW else min(MOST, images)


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Images to judge candidates on.

    images: float32 (N, C, H, W), the clean ones first. clean: how many are clean. logits: float32 (N, K) of the float
    file. free: whether it can run with any batch size.
    """

    images: Tensor
    labels: npt.NDArray[np.int64] | None
    clean: int
    logits: Logits
    free: bool

    @property
    def own(self) -> Judgement:
        """The judgement of the float file itself."""
        return self.judge(self.logits)

    def judge(self, logits: Logits) -> Judgement:
        """Compare logits (N, K) with the float file's."""
        classes, reference = _classes(logits), _classes(self.logits)
        agreement = float((classes == reference)[: self.clean].mean())
        error = sqnr_db(self.logits, logits)
        if self.labels is None:
            return Judgement(None, None, agreement, error, round(1.0 - agreement, _DIGITS))
        right, expected = classes == self.labels, reference == self.labels
        clean, attacked = right[: self.clean], right[self.clean :]
        loss = float(expected[: self.clean].mean() - clean.mean())
        robust = None
        if len(attacked):
            robust = float(attacked.mean())
            loss = max(loss, float(expected[self.clean :].mean()) - robust)
        # The attacked images were made for the float network: that another one resists what broke that is no merit.
        held = np.concatenate([clean, attacked & expected[self.clean :]])
        return Judgement(
            float(clean.mean()), robust, agreement, error, round(loss, _DIGITS), tuple(map(bool, held))
        )


def evaluation_set(calibration: CalibrationSet, floats: ModelProto) -> EvaluationSet:
    """The images of a calibration set that candidates are judged on, and the logits of the float file."""
    count = judged(len(calibration.images))
    images = calibration.images[:count]
    labels = None if calibration.labels is None else calibration.labels[:count]
    if calibration.adversarial is not None:
        attacked = calibration.adversarial[:count]
        if labels is None or attacked.shape[1:] != images.shape[1:]:
            raise UsageError(
                f"attacked images {tuple(attacked.shape)} don't go with images {tuple(images.shape)} and "
                f"{'no' if labels is None else len(labels)} labels"
            )
        images, labels = torch.cat([images, attacked]), torch.cat([labels, labels[: len(attacked)]])
    free = can_free_batch(floats, images)
    logits = logits_of(floats, images, free=free)
    if not np.isfinite(logits).all():
        raise ModelError(
            "the logits of the exported file are NaN or infinite",
            "look at the weights: training may have diverged",
        )
    return EvaluationSet(images, None if labels is None else labels.numpy(), count, logits, free)


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
    """Whether a candidate classifies significantly fewer images right than another."""
    lost = sum(b and not a for a, b in zip(one.right, other.right, strict=True))
    gained = sum(a and not b for a, b in zip(one.right, other.right, strict=True))
    return lost > gained and mcnemar(gained, lost) < LEVEL


def sqnr_db(reference: npt.NDArray[np.floating], logits: npt.NDArray[np.floating]) -> float:
    """10 log10 of the power of the reference over that of the error, in dB; infinite for equal ones."""
    noise = float(np.square(logits.astype(np.float64) - reference).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def logits_of(model: ModelProto, images: Tensor, *, free: bool = False) -> Logits:
    """The logits (N, K) of a model for images (N, C, H, W), by ONNX Runtime on this CPU.

    Args:
        free: whether to run a model with a fixed batch with any batch.
    """
    model = freed(model) if free else model
    network, fixed = open_onnx(model), batch_of(model)
    size = fixed or min(BATCH, max(1, BATCH_VALUES // max(1, images[0].numel())))
    logits = []
    for batch in images.split(size):
        missing = size - len(batch) if fixed else 0
        full = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch
        logits.append(network(full).numpy()[: len(batch)])
    return np.concatenate(logits)


def can_free_batch(model: ModelProto, images: Tensor) -> bool:
    """Whether a model with a fixed batch of one gives the same logits when its batch is freed."""
    if batch_of(model) != 1:
        return False
    few = images[:3]
    try:
        together = logits_of(model, few, free=True)
    except UnsupportedModel:
        return False
    alone = logits_of(model, few)
    scale = float(np.abs(alone).max()) or 1.0
    return together.shape == alone.shape and float(np.abs(together - alone).max()) <= SAME * scale


def _classes(logits: Logits) -> npt.NDArray[np.int64]:
    """The class of each image; -1 where a logit is no number."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


@dataclass(frozen=True)
class ResultCache:
    """A folder of computed results, so that a run that was killed goes on."""

    folder: Path

    def array(self, name: str, compute: Callable[[], npt.NDArray[np.floating]]) -> npt.NDArray[np.floating]:
        """The result of `compute`, computed once."""
        path = self._path(name, ".npy")
        if not path.exists():
            with replace_file(path) as file:
                np.save(file, compute())
        return np.load(path, allow_pickle=False)

    def activations(self, name: str, observe: Callable[[], Activations]) -> Activations:
        """The result of `observe`, computed once."""
        path = self._path(name, ".npz")
        if not path.exists():
            observers.save(observe(), path)
        return observers.load(path)

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + ending)


@dataclass(frozen=True, eq=False)
class FloatBaseline:
    """The exported file and what is derived from it.

    sha256: of the exported file. model: prepared. layers: the nodes of it that can be quantized, without those in
    `skipped`, which the recipe skips. images: float32 (N, C, H, W), what ranges are taken from.
    """

    exported: ModelProto
    sha256: str
    model: ModelProto
    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    images: Tensor
    evaluation: EvaluationSet
    calibration: CalibrationSet
    cache: ResultCache

    def seen(self, model: ModelProto, name: str) -> Activations:
        """The activations of a float model on the images."""
        label, free = f"quantize: activations of {name}", self.evaluation.free
        return self.cache.activations(
            name, lambda: observers.observe(model, self.images, free=free, label=label)
        )

    def judge(self, name: str, skip: Sequence[str], build: Callable[[], ModelProto]) -> Judgement:
        """Judge a candidate, which is built only where its logits are not in the cache."""
        evaluation = self.evaluation
        logits = self.cache.array(
            json.dumps([name, sorted(skip)]),
            lambda: logits_of(build(), evaluation.images, free=evaluation.free),
        )
        return evaluation.judge(logits.astype(np.float32, copy=False))


def load(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of an ONNX file, and the model."""
    try:
        data = path.read_bytes()
        return data, ModelProto.FromString(data)
    except ONNX_ERRORS as error:
        raise ModelError(
            f"{path} is not a readable ONNX file: {error}", "export the network again"
        ) from error


def float_baseline(path: Path, job: Job) -> FloatBaseline:
    """Make an exported file ready for building candidates."""
    data, exported = load(path)
    calibration = job.calibration or CalibrationSet(patterns(exported), None, "patterns")
    images, labels = calibration.images, calibration.labels
    observers.check_images(exported, images)
    if labels is not None and len(labels) != len(images):
        raise UsageError(f"{len(images)} calibration images have {len(labels)} labels")
    model = prepare(exported)
    layers = quantizable(model)
    skipped = _skipped(layers, job.table.skip)
    for_ranges = images[judged(len(images)) :] if len(images) >= FEW else images
    return FloatBaseline(
        exported, hashlib.sha256(data).hexdigest(), model, tuple(n for n in layers if n not in skipped), skipped,
        for_ranges[: max(1, MOST_VALUES // images[0].numel())], evaluation_set(calibration, exported), calibration,
        ResultCache(job.scratch / _digest(data, calibration)),
    )  # fmt: skip


def check_skipped(path: Path, patterns: Sequence[str]) -> None:
    """Refuse a pattern of `quantize.skip` that names no layer of an exported file."""
    if patterns:
        _skipped(quantizable(prepare(load(path)[1])), patterns)


def metadata_of(exported: ModelProto) -> dict[str, str]:
    """The metadata that edgeprune wrote into a file."""
    return {entry.key: entry.value for entry in exported.metadata_props if entry.key.startswith(METADATA)}


def patterns(exported: ModelProto) -> Tensor:
    """Test patterns (16, C, H, W) in the range of the input: flat ones, ramps, stripes and checkerboards."""
    pixels: Mapping[str, float] = json.loads(metadata_of(exported).get(f"{METADATA}input", "{}"))
    low, high = float(pixels.get("low", 0.0)), float(pixels.get("high", 1.0))
    dims = inputs_of(exported)[0].type.tensor_type.shape.dim
    channels, height, width = (d.dim_value for d in dims[1:])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = x / max(1, width - 1), y / max(1, height - 1)
    flat = [torch.full((height, width), level) for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    ramps = [across, 1.0 - across, down, 1.0 - down, (across + down) / 2.0]
    boards = [((x // size + y // size) % 2).float() for size in (1, 4, 16)]
    stripes = [(x % 2).float(), (y % 2).float(), ((x + y) // 8 % 2).float()]
    every = torch.stack([*flat, *ramps, *boards, *stripes]).to(torch.float32)
    return low + (high - low) * every[:, None].expand(-1, channels, -1, -1).contiguous()


def _skipped(layers: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise UsageError(
                f"quantize.skip names {pattern!r}, which is no layer that could be quantized",
                suggest(pattern, layers),
            )
    return tuple(layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns))


def _digest(data: bytes, calibration: CalibrationSet) -> str:
    """What all cached results depend on: another file or other images start anew."""
    hasher = hashlib.sha256(data)
    for part in (calibration.images, calibration.labels, calibration.adversarial):
        hasher.update(b"-" if part is None else part.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
