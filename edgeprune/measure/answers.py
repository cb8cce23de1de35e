"""A file's logits on a device, their accuracy on held-out images, and the agreement of two files."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeprune import confidence
from edgeprune.devices import Device
from edgeprune.errors import DeviceError, UsageError
from edgeprune.measure.place import held
from edgeprune.progress import bar
from edgeprune.records import Artifact, Reading
from edgeprune.serialization import replace_file, scratch_folder

RUNTIME = "onnxruntime"
# At most so much goes into one child process; the bar moves after each of them.
CHUNK_BYTES = 128 * 2**20
CHUNK_IMAGES = 2500
BATCH = 250
_TIMEOUT_S = 3600.0

Logits = npt.NDArray[np.float32]


class Images(Protocol):
    """Held-out images; `edgeprune.data.collection.Split` is one."""

    @property
    def name(self) -> str:
        """Name of the part."""
        ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Tensors x float32 (n, C, H, W) in [0, 1] and y int64 (n,), at most `size` at a time, in a fixed order."""
        ...


def accuracy(
    artifact: Artifact, split: Images, device: Device, *, name: str, runtime: str = RUNTIME
) -> tuple[Reading, Logits]:
    """The share of held-out images that the file itself classifies right, and its logits (N, K) in their order.

    An image whose logits are not all finite counts as wrong. The spread is the exact binomial 95 % interval.
    """
    if len(split) == 0:
        raise UsageError(
            f"the part {split.name!r} of the data has no images", "give held-out images with --data"
        )
    seen: list[npt.NDArray[np.int64]] = []
    logits = predict(
        artifact, _pixels(split, seen), device, total=len(split), label=f"accuracy of the {name} model",
        runtime=runtime,
    )  # fmt: skip
    labels = np.concatenate(seen)
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(
            f"the labels go from {labels.min()} to {labels.max()}, the model answers {classes} classes"
        )
    finite = np.isfinite(logits).all(axis=1)
    right = int(((logits.argmax(axis=1) == labels) & finite).sum())
    conditions: dict[str, Any] = {"part": split.name, "right": right, "runtime": runtime}
    if not finite.all():
        conditions["not_finite"] = int((~finite).sum())
    n = len(labels)
    reading = Reading(
        "clean_accuracy",
        right / n,
        "fraction",
        n,
        confidence.binomial(right, n),
        device.where(),
        name,
        conditions,
    )
    return reading, logits


def absent(metric: str, unit: str, device: Device, name: str) -> Reading:
    """A reading of a file's answers on a device that gives none: without a value, and why."""
    return Reading(metric, None, unit, 0, None, device.where(), name, {"why": device.times_alone})


def agreement(dense: Logits, compressed: Logits) -> Reading:
    """The share of images on which both name the same class; logits (N, K) of the same images in the same order."""
    if dense.shape != compressed.shape or dense.ndim != 2 or len(dense) == 0:
        raise UsageError(
            f"agreement needs logits (N, K) of the same images, got {dense.shape} and {compressed.shape}"
        )
    finite = np.isfinite(dense).all(axis=1) & np.isfinite(compressed).all(axis=1)
    same = int(((dense.argmax(axis=1) == compressed.argmax(axis=1)) & finite).sum())
    n = len(dense)
    spread = confidence.binomial(same, n)
    return Reading("agreement", same / n, "fraction", n, spread, "counted", "compressed", {"same": same})


def predict(
    artifact: Artifact,
    batches: Iterable[npt.NDArray[np.float32]],
    device: Device,
    *,
    total: int,
    label: str,
    runtime: str = RUNTIME,
) -> Logits:
    """The file's logits (N, K) for batches of float32 (n, C, H, W), in few processes on the device."""
    if device.times_alone:
        raise UsageError(
            f"{device.name} answers no images: {device.times_alone}", "--device local answers them here"
        )
    parts: list[Logits] = []
    chunk = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (4 * prod(artifact.input.shape))))
    with (
        held(device, {"model": Path(artifact.path)}) as paths,
        scratch_folder() as folder,
        _bar(total, label) as advance,
    ):
        for x in _joined(batches, chunk):
            parts.append(_answers(x, paths["model"], folder, device, runtime))
            advance(len(x))
    if not parts:
        raise UsageError("there are no images to classify")
    if len({part.shape[1] for part in parts}) != 1:
        raise DeviceError(f"{device.name} answered logits of {sorted({p.shape[1] for p in parts})} classes")
    return np.concatenate(parts)


def _bar(total: int, label: str) -> AbstractContextManager[Callable[..., None]]:
    """A bar for the first of several devices alone: two bars at once write over each other."""
    if current_thread() is main_thread():
        return bar(total, label)
    return nullcontext(lambda steps: None)


def _pixels(split: Images, labels: list[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.float32]]:
    for x, y in split.batches(BATCH):
        labels.append(np.asarray(y, dtype=np.int64))
        yield np.asarray(x, dtype=np.float32)


def _joined(batches: Iterable[npt.NDArray[np.float32]], most: int) -> Iterator[npt.NDArray[np.float32]]:
    """Batches put together, or cut, to `most` images each; the last has what is left."""
    waiting: list[npt.NDArray[np.float32]] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        while count >= most:
            whole = np.concatenate(waiting)
            yield whole[:most]
            waiting, count = [whole[most:]], count - most
    if count:
        yield np.concatenate(waiting)


def _answers(x: npt.NDArray[np.float32], model: str, folder: Path, device: Device, runtime: str) -> Logits:
    images, logits = folder / "x.npy", folder / "logits.npy"
    with replace_file(images) as file:
        np.save(file, x)
    there = f"{model}.x.npy", f"{model}.logits.npy"
    device.put(images, there[0])
    device.ask(
        {"op": "predict", "runtime": runtime, "model": model, "x": there[0], "out": there[1]},
        timeout_s=_TIMEOUT_S,
    )
    device.get(there[1], logits)
    try:
        answer = np.load(logits, allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise DeviceError(f"the answers from {device.name} are not a readable .npy file: {error}") from error
    if answer.ndim != 2 or len(answer) != len(x) or answer.dtype != np.float32 or not answer.size:
        found = f"{answer.dtype} {answer.shape}"
        raise DeviceError(f"{device.name} answered {len(x)} images with {found}; expected float32 (N, K)")
    return answer
