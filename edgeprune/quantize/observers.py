"""What flows through an ONNX model: ranges, histograms and channel means of all activations from one pass over images.

The bins of a histogram lie on a grid of powers of two, bin i of width 2**k being [i * 2**k, (i + 1) * 2**k). When a
value falls outside of what is counted so far and the bins do not suffice, k grows by one and neighbours are merged,
which is exact. So memory is bounded, one pass is enough, and a histogram is the same for any order and any batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from edgeprune.data import BROKEN_NPZ
from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.models import reason
from edgeprune.onnx_graph import ORT_ERRORS, open_session
from edgeprune.progress import bar
from edgeprune.serialization import replace_file

Array = npt.NDArray[Any]
BINS = 4096
# Finer bins than a 2**20-th of the largest value tell nothing that an 8-bit grid could use.
_FINEST = 20
_SMALLEST_EXPONENT = -100
# What all activations of one batch may take, and how many images are asked at once at most.
_BATCH_BYTES, _MOST_IMAGES = 64_000_000, 64
# So many values fit into the cache of a core while they are counted.
_CHUNK = 1 << 15
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_PARTS = ("low", "high", "counts", "edge_low", "edge_high", "mean", "count")


@dataclass(frozen=True, eq=False)
class Seen:
    """What one tensor was seen to be.

    low, high: the smallest and the largest value. counts: int64 (B,), how many values lie in each of B bins of equal
    width between edge_low and edge_high, B <= 4096; zero is an edge if it lies between. mean: float64 (C,), of each
    channel (axis 1); of all values (1,) where there is no such axis. count: how many values there were.
    """

    low: float
    high: float
    counts: Array
    edge_low: float
    edge_high: float
    mean: Array
    count: int


Activations = Mapping[str, Seen]


def observe(model: ModelProto, images: Tensor, *, label: str = "") -> dict[str, Seen]:
    """Look at every float activation of a model, its input included, in ONE pass over images.

    Returns:
        Value name -> what it was, the input first, then in the order of the nodes. What nodes with bodies compute
        inside is not seen.
    """
    _check_images(model, images)
    names = _float_values(model)
    watched = _watched(model, names)
    session, size = _open(watched, names, images)
    entry = model.graph.input[0].name
    tallies = {name: _Tally(name) for name in (entry, *names)}
    with bar(len(images), label or "activations") as advance:
        for batch in images.split(size):
            pixels = batch.contiguous().numpy()
            tallies[entry].add(pixels)
            for name, value in zip(names, _run(session, names, {entry: pixels}), strict=True):
                tallies[name].add(value)
            advance(len(batch))
    return {name: tally.seen() for name, tally in tallies.items()}


def save(seen: Activations, path: Path) -> None:
    """Write observations to a .npz file, whole or not at all."""
    arrays: dict[str, Array] = {"names": np.array(list(seen))}
    for part in _PARTS:
        values = [np.atleast_1d(getattr(item, part)) for item in seen.values()]
        arrays[part] = np.concatenate(values) if values else np.empty(0)
        arrays[f"{part}_sizes"] = np.array([len(value) for value in values], np.int64)
    with replace_file(path) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def load(path: Path) -> dict[str, Seen]:
    """Read what `save` wrote; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            parts = {
                part: np.split(file[part], np.cumsum(file[f"{part}_sizes"])[:-1]) if names else []
                for part in _PARTS
            }
    except BROKEN_NPZ as error:
        raise UsageError(
            f"{path} holds no observed activations: {reason(error)}", "delete it; it is made again"
        ) from error
    return {name: _seen({part: parts[part][i] for part in _PARTS}) for i, name in enumerate(names)}


def _seen(part: dict[str, Array]) -> Seen:
    return Seen(
        low=float(part["low"][0]),
        high=float(part["high"][0]),
        counts=part["counts"].astype(np.int64),
        edge_low=float(part["edge_low"][0]),
        edge_high=float(part["edge_high"][0]),
        mean=part["mean"].astype(np.float64),
        count=int(part["count"][0]),
    )


class _Tally:
    """The running observation of one tensor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high = math.inf, -math.inf
        self.exponent, self.first = _SMALLEST_EXPONENT, 0
        self.counts: Array = np.zeros(0, np.int64)
        self.sums: Array = np.zeros(1)
        self.count, self.each = 0, 0

    def add(self, value: Array) -> None:
        """Count the values of a batch."""
        flat = np.ravel(value).astype(np.float32, copy=False)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~np.isfinite(flat)).sum())
            raise ModelError(
                f"{self.name} holds {bad} values that are NaN or infinite, of {flat.size} on the calibration images",
                "look at the weights: training may have diverged",
            )
        self._widen(min(low, self.low), max(high, self.high))
        finer = math.ldexp(1.0, -self.exponent)
        for start in range(0, flat.size, _CHUNK):
            # In float32 a tiny negative value would become zero, which is in the next bin.
            place = np.multiply(flat[start : start + _CHUNK], finer, dtype=np.float64)
            np.floor(place, out=place)
            place -= self.first
            self.counts += np.bincount(place.astype(np.int64), minlength=len(self.counts))
        self.count += flat.size
        self._add_means(value)

    def seen(self) -> Seen:
        """The observation so far."""
        width = math.ldexp(1.0, self.exponent)
        edges = (self.first * width, (self.first + len(self.counts)) * width)
        mean = self.sums / max(1, self.each)
        return Seen(self.low, self.high, self.counts.copy(), *edges, mean, self.count)

    def _add_means(self, value: Array) -> None:
        if value.ndim < 2:
            sums, each = np.array([value.sum(dtype=np.float64)]), value.size
        else:
            rows = value.reshape(len(value), value.shape[1], -1)
            sums = rows.sum(axis=2).sum(axis=0, dtype=np.float64)
            each = value.size // value.shape[1]
        # A tensor whose axis 1 has no fixed size has no channels.
        if self.each and len(sums) != len(self.sums):
            sums, each = np.array([sums.sum()]), value.size
            self.sums, self.each = np.array([self.sums.sum()]), self.count - value.size
        self.sums = self.sums + sums
        self.each += each

    def _widen(self, low: float, high: float) -> None:
        """Make the bins cover [low, high], coarser only as far as needed."""
        exponent = max(self.exponent, _exponent(low, high))
        first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
        counts = np.zeros(last - first + 1, np.int64)
        if self.count:
            old = (self.first + np.arange(len(self.counts))) >> (exponent - self.exponent)
            np.add.at(counts, old - first, self.counts)
        self.low, self.high = low, high
        self.exponent, self.first, self.counts = exponent, first, counts


def _exponent(low: float, high: float) -> int:
    """The least k for which BINS bins of 2**k cover [low, high]; it never falls when the range grows."""
    largest = max(abs(low), abs(high))
    exponent = _SMALLEST_EXPONENT
    if largest > 0:
        exponent = max(exponent, math.frexp(largest)[1] - _FINEST)
    if high > low:
        exponent = max(exponent, math.frexp(high - low)[1] - 1 - BINS.bit_length())
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


def _check_images(model: ModelProto, images: Tensor) -> None:
    if not len(images):
        raise UsageError("there are no calibration images", "give at least one; 128 or more are better")
    wanted = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    if images.dtype != torch.float32 or list(images.shape[1:]) != wanted:
        raise UsageError(
            f"calibration images are {images.dtype} {tuple(images.shape)}, the model takes float32 (N, "
            f"{', '.join(map(str, wanted))})"
        )
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise UsageError(
            f"{int(bad.sum())} of {len(images)} calibration images hold NaN or infinity, the first is number {first}",
            "pixels are float32 in [0, 1]",
        )


def _float_values(model: ModelProto) -> list[str]:
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.HasField("tensor_type")
    }
    made = (name for node in model.graph.node for name in node.output if name)
    return [name for name in made if kinds.get(name) in _FLOATS]


def _watched(model: ModelProto, names: list[str]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]
    kinds = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    del graph.output[:]
    graph.output.extend(_of_any_size(kinds[name]) for name in names)
    return copy


def _of_any_size(value: ValueInfoProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)


def _open(watched: ModelProto, names: list[str], images: Tensor) -> tuple[Any, int]:
    dims = watched.graph.input[0].type.tensor_type.shape.dim
    entry, fixed = watched.graph.input[0].name, dims[0].dim_value
    image = images[: max(1, fixed)].contiguous().numpy()
    if fixed > 1 and len(images) % fixed:
        raise UsageError(
            f"the model takes {fixed} images at a time, which {len(images)} calibration images are no multiple of"
        )
    if fixed:
        dims[0].Clear()
        dims[0].dim_param = "batch"
    try:
        session = open_session(watched)
        alone = _run(session, names, {entry: image})
        size = max(1, min(_MOST_IMAGES, _BATCH_BYTES * len(image) // max(1, sum(v.nbytes for v in alone))))
        if not fixed or _is_free(session, names, entry, image):
            return session, size
    except UnsupportedModel:
        if not fixed:
            raise
    dims[0].Clear()
    dims[0].dim_value = fixed
    return open_session(watched), fixed


def _is_free(session: Any, names: list[str], entry: str, image: Array) -> bool:
    pair = np.concatenate([image, image[..., ::-1]])
    try:
        together = _run(session, names, {entry: pair})
        parts = [_run(session, names, {entry: np.ascontiguousarray(half)}) for half in np.split(pair, 2)]
    except UnsupportedModel:
        return False
    return all(
        v.shape[:1] == (len(pair),) and np.allclose(v, np.concatenate([a, b]), rtol=1e-3, atol=1e-5)
        for v, a, b in zip(together, *parts, strict=True)
        if v.ndim
    ) and all(v.ndim for v in together)


def _run(session: Any, names: list[str], feed: dict[str, Array]) -> list[Array]:
    try:
        return session.run(names, feed)
    except ORT_ERRORS as error:
        raise UnsupportedModel(f"ONNX Runtime can't run the model: {reason(error)}") from error
