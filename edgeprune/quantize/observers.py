"""Ranges, histograms and channel means of all activations of an ONNX model, from one pass over images.

The bins of a histogram lie on a grid of powers of two, bin i of width 2**k being [i * 2**k, (i + 1) * 2**k). When a
value falls outside of the bins and they do not suffice, k grows by one and neighbours are merged, which is exact. So
memory is bounded, one pass is enough, and a histogram is the same for any order and any batch size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from edgeprune.data import BROKEN_NPZ
from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.models import reason
from edgeprune.onnx_graph import ORT_ERRORS, Array, batch_of, copied, freed, inputs_of, open_session
from edgeprune.progress import bar
from edgeprune.serialization import replace_file

BINS = 4096
# Finer bins than a 2**20-th of the largest value are of no use to an 8-bit grid.
_FINEST = 20
_SMALLEST_EXPONENT = -100
# The most bytes of all activations of one batch, and the largest batch.
_BATCH_BYTES, MOST_IMAGES = 64_000_000, 64
# So many values fit into the cache of a core while they are counted.
_CHUNK = 1 << 15
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True, eq=False)
class Seen:
    """The observed values of one tensor.

    counts: int64 (B,), how many values lie in each of B bins of equal width between edge_low and edge_high, B <= 4096;
    zero is an edge if it lies between. mean: float64 (C,), of each channel (axis 1); of all values (1,) where there is
    no such axis. count: of values.
    """

    low: float
    high: float
    counts: Array
    edge_low: float
    edge_high: float
    mean: Array
    count: int


Activations = Mapping[str, Seen]
_PARTS = tuple(part.name for part in fields(Seen))


def observe(model: ModelProto, images: Tensor, *, free: bool = False, label: str = "") -> dict[str, Seen]:
    """Observe every float activation of a model, its input included, in one pass over images.

    Args:
        free: whether a model with a fixed batch may run with any.

    Returns:
        Value name -> observation, the input first, then in the order of the nodes. What nodes with bodies compute
        inside is not observed.
    """
    check_images(model, images)
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.HasField("tensor_type")
    }
    names = [name for node in model.graph.node for name in node.output if kinds.get(name) in _FLOATS]
    watched = copied(model)
    del watched.graph.value_info[:], watched.graph.output[:]
    watched.graph.output.extend(helper.make_tensor_value_info(name, kinds[name], None) for name in names)
    entry, fixed = inputs_of(model)[0].name, 0 if free else batch_of(model) or 0
    if fixed and len(images) % fixed:
        raise UsageError(
            f"the model takes {fixed} images at a time, which {len(images)} calibration images are no multiple of"
        )
    session = open_session(freed(watched) if free else watched)
    first = _run(session, names, {entry: images[: fixed or 1].contiguous().numpy()})
    size = fixed or max(1, min(MOST_IMAGES, _BATCH_BYTES // max(1, sum(value.nbytes for value in first))))
    tallies = {name: Tally(name) for name in (entry, *names)}
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
            columns = [np.split(file[part], np.cumsum(file[f"{part}_sizes"])[:-1]) for part in _PARTS]
    except BROKEN_NPZ as error:
        raise UsageError(
            f"{path} holds no observed activations: {reason(error)}", "delete it; it is made again"
        ) from error
    found: dict[str, Seen] = {}
    for name, *values in zip(names, *columns, strict=False):
        low, high, counts, edge_low, edge_high, mean, count = values
        found[name] = Seen(
            low.item(), high.item(), counts, edge_low.item(), edge_high.item(), mean, count.item()
        )
    return found


class Tally:
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


def check_images(model: ModelProto, images: Tensor) -> None:
    """Refuse calibration images that are none, do not fit the model, or hold NaN or infinity."""
    if not len(images):
        raise UsageError("there are no calibration images", "give at least one; 128 or more are better")
    wanted = [d.dim_value for d in inputs_of(model)[0].type.tensor_type.shape.dim][1:]
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


def _run(session: Any, names: list[str], feed: dict[str, Array]) -> list[Array]:
    try:
        return session.run(names, feed)
    except ORT_ERRORS as error:
        raise UnsupportedModel(f"ONNX Runtime can't run the model: {reason(error)}") from error
