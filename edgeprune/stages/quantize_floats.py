"""What every candidate is made from: the float model made ready, the images, and what is kept of work that was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto
from torch import Tensor

from edgeprune.codec import replace_file
from edgeprune.errors import ModelError, UsageError
from edgeprune.nn import activations
from edgeprune.nn.activations import Activations
from edgeprune.nn.onnx_prepare import prepare
from edgeprune.nn.onnx_quantize import quantizable
from edgeprune.quantities import suggest
from edgeprune.stages.quantize_job import Job, Judgement, Material
from edgeprune.stages.quantize_judge import Logits, Panel, for_ranges, panel

# Ranges are taken from at most so many values of input: the activations of more take long and change nothing.
MOST_VALUES = 2**26
METADATA = "edgeprune."


@dataclass(frozen=True)
class Kept:
    """A folder that remembers what was computed, so that a run that was killed goes on."""

    folder: Path

    def logits(self, name: str, work: Callable[[], Logits]) -> Logits:
        """What `work` gives, computed once."""
        path = self._path(name, ".npy")
        if not path.exists():
            with replace_file(path) as file:
                np.save(file, work())
        return np.load(path, allow_pickle=False)

    def seen(self, name: str, work: Callable[[], dict[str, activations.Seen]]) -> Activations:
        """What `work` observes, observed once."""
        path = self._path(name, ".npz")
        if not path.exists():
            activations.save(work(), path)
        return activations.load(path)

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
class Floats:
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
    panel: Panel
    material: Material
    kept: Kept

    def seen(self, model: ModelProto, name: str) -> Activations:
        """What the activations of a float model are on the images: one pass, kept."""
        label = f"quantize: activations of {name}"
        return self.kept.seen(name, lambda: activations.observe(model, self.images, label=label))

    def judge(self, name: str, skip: Sequence[str], build: Callable[[], ModelProto]) -> Judgement:
        """How a candidate answers the judged images. It is not built again where its answers are kept."""
        key = json.dumps([name, sorted(skip)])
        return self.panel.judge(self.kept.logits(key, lambda: self.panel.answers(build())))


def load(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of an ONNX file, and the model.

    Raises:
        ModelError: it is not readable as ONNX.
    """
    try:
        data = path.read_bytes()
        return data, ModelProto.FromString(data)
    except (OSError, DecodeError) as error:
        raise ModelError(
            f"{path} is not a readable ONNX file: {error}", "export the network again"
        ) from error


def floats(path: Path, job: Job) -> Floats:
    """Make an exported file ready for building candidates.

    Raises:
        UsageError: there are no images, they don't go with their labels, or a layer to skip is none.
        UnsupportedModel, ModelError: the file can't be prepared, or answers images with NaN or infinity.
    """
    data, exported = load(path)
    material = job.material or Material(patterns(exported), None, "patterns")
    _check(material, _input_shape(exported))
    model = prepare(exported)
    layers = quantizable(model)
    skipped = _skipped(layers, job.table.skip)
    images = for_ranges(material.images)
    images = images[: max(1, MOST_VALUES // images[0].numel())]
    return Floats(
        exported, hashlib.sha256(data).hexdigest(), model, tuple(n for n in layers if n not in skipped), skipped,
        images, panel(material, exported), material, Kept(job.scratch / _digest(data, material)),
    )  # fmt: skip


def check_skipped(path: Path, patterns: Sequence[str]) -> None:
    """See before anything takes long that every pattern of `quantize.skip` is about a layer of an exported file.

    Raises:
        UsageError: one is not. UnsupportedModel, ModelError: the file can't be read or prepared.
    """
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


def _check(material: Material, shape: tuple[int, ...]) -> None:
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


def _digest(data: bytes, material: Material) -> str:
    """What everything that is kept depends on: another file or other images start anew."""
    hasher = hashlib.sha256(data)
    for part in (material.images, material.labels, material.adversarial):
        hasher.update(b"-" if part is None else part.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
