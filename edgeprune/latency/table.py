"""Measured times of layer shapes on one device, kept between runs and models, and the times predicted from them.

A table holds the seconds of each signature (`segments`) at each pair of widths that was timed, and for each network
the whole files that were. All times are scaled to the speed of the machine when the network was first timed, by the
dense file that is timed beside every other one.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import optimize

from edgeprune import serialization
from edgeprune.errors import WorkdirError
from edgeprune.latency.segments import Segment
from edgeprune.models import CostModel

Array = npt.NDArray[np.float64]
INPUT_BLOCKS = (1, 4, 8, 16)
OUTPUT_BLOCKS = (1, 4, 8, 16, 32)
# Widths that are no multiple of these may take a slower path.
VECTORS = (4, 8, 16)
# The L1 penalty on the factors, relative to the mean square of the relative error.
PENALTY = 1e-4
# A kernel regression of the residuals: the bandwidth in octaves of width, and the weight of the prior 0.
BANDWIDTH = 0.2
PRIOR_WEIGHT = 0.3
_ROUNDS = 4
_RIDGE = 1e-6
# Errors are relative to the time, but at least to this share of the longest time.
_SMALL = 0.01
_LEAST_S = 1e-8


@dataclass(frozen=True)
class Staircase:
    """Time as a sum of terms, corrected by the residuals of timings at similar widths.

    factors: of `_terms`, >= 0. widths: float64 (n, 2), the timed ones. residuals: float64 (n,), log(measured / sum).
    """

    factors: Array
    widths: Array
    residuals: Array

    def at(self, inputs: int, outputs: int) -> float:
        """Seconds at these widths."""
        base = max(_LEAST_S, float(_terms(np.array([[inputs, outputs]], np.float64))[0] @ self.factors))
        gap = np.log2(self.widths / np.array([max(1, inputs), max(1, outputs)], np.float64))
        weight = np.exp(-((gap / BANDWIDTH) ** 2).sum(1))
        return base * math.exp(float(weight @ self.residuals) / (float(weight.sum()) + PRIOR_WEIGHT))


def fit(timed: Sequence[tuple[int, int, float]]) -> Staircase:
    """The staircase through at least one timing (input channels, output channels, seconds >= 0)."""
    widths = np.array([(max(1, r), max(1, m)) for r, m, _ in timed], np.float64)
    seconds = np.array([s for _, _, s in timed], np.float64)
    scale = np.maximum(seconds, max(_LEAST_S, _SMALL * float(seconds.max())))
    terms = _terms(widths)
    weights = np.ones(len(timed))
    factors = np.zeros(terms.shape[1])
    # Iteratively reweighted (Huber's weights), against timings that were disturbed.
    for _ in range(_ROUNDS):
        factors = _nonnegative(terms / scale[:, None] * weights[:, None], seconds / scale * weights)
        errors = np.abs(terms @ factors - seconds) / scale
        usual = max(0.01, float(np.median(errors)))
        weights = np.sqrt(np.minimum(1.0, 2 * usual / np.maximum(errors, 1e-12)))
    base = terms @ factors
    residuals = np.log((seconds + 0.1 * scale) / (base + 0.1 * scale))
    limit = 3 * max(0.02, float(np.median(np.abs(residuals))))
    return Staircase(factors, widths, np.clip(residuals, -limit, limit))


def _terms(widths: Array) -> Array:
    inputs, outputs = widths[:, 0], widths[:, 1]
    blocked_inputs = [np.ceil(inputs / b) * b for b in INPUT_BLOCKS]
    blocked_outputs = [np.ceil(outputs / b) * b for b in OUTPUT_BLOCKS]
    products = [i * o for i in blocked_inputs for o in blocked_outputs]
    columns = [np.ones(len(widths)), *blocked_inputs, *blocked_outputs, *products]
    for width in (inputs, outputs):
        for vector in VECTORS:
            odd = (np.mod(width, vector) > 0).astype(np.float64)
            columns += [odd, odd * width, odd * inputs * outputs]
    return np.stack(columns, 1)


def _nonnegative(a: Array, b: Array) -> Array:
    """Least squares with x >= 0 and an L1 penalty, on columns of length 1."""
    length = np.maximum(np.linalg.norm(a, axis=0), 1e-30)
    # Columns are nearly collinear (blocks of 4 and 8 at aligned widths): ridge regression.
    ridge = math.sqrt(_RIDGE)
    rows = np.concatenate([a / length, ridge * np.eye(a.shape[1])])
    # The penalty goes into the right-hand side: it lowers rows^T target by PENALTY sqrt(n).
    target = np.concatenate([b, np.full(a.shape[1], -PENALTY * math.sqrt(len(b)) / ridge)])
    return optimize.nnls(rows, target)[0] / length


SCHEMA = "edgeprune.latency-table/1"
TIME = "latency"


@dataclass(frozen=True)
class Entry:
    """Mean, lowest and highest of n timings at one pair of widths."""

    seconds: float
    n: int
    low: float
    high: float

    def with_another(self, seconds: float) -> Entry:
        """With one more timing."""
        n = self.n + 1
        mean = self.seconds + (seconds - self.seconds) / n
        return Entry(mean, n, min(self.low, seconds), max(self.high, seconds))


@dataclass(frozen=True)
class Whole:
    """A file that was timed whole. kept: group -> channels. predicted: seconds before it was added, 0 for none."""

    kept: Mapping[str, int]
    seconds: float
    predicted: float = 0.0


@dataclass(frozen=True)
class Known:
    """The timings of one network. dense: seconds of the dense file in the first batch."""

    dense: float
    wholes: tuple[Whole, ...] = ()


@dataclass(frozen=True)
class Table:
    """The timings at one place: a device with its processor, runtime, version and threads.

    entries: signature -> "input channels>output channels" -> entry. networks: by key.
    """

    place: str
    entries: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    networks: Mapping[str, Known] = field(default_factory=dict)
    schema: str = SCHEMA

    def learn(
        self, network: str, dense: float, whole: Whole, shares: Sequence[tuple[Segment, float]]
    ) -> Table:
        """With one more file of a network. shares: segments and their seconds, which add up to the file's."""
        rows = [(segment.signature, segment.widths(whole.kept), seconds) for segment, seconds in shares]
        before = self.networks.get(network, Known(dense))
        networks = {**self.networks, network: replace(before, wholes=(*before.wholes, whole))}
        return replace(self.note(rows), networks=networks)

    def note(self, rows: Sequence[tuple[str, tuple[int, int], float]]) -> Table:
        """With more timings: signature, input and output channels, seconds."""
        entries = {signature: dict(known) for signature, known in self.entries.items()}
        for signature, (inputs, outputs), seconds in rows:
            known = entries.setdefault(signature, {})
            name = f"{inputs}>{outputs}"
            first = Entry(seconds, 1, seconds, seconds)
            known[name] = known[name].with_another(seconds) if name in known else first
        return replace(self, entries=entries)

    def entry(self, signature: str, widths: tuple[int, int]) -> Entry | None:
        """The timings at exactly these widths."""
        return self.entries.get(signature, {}).get(f"{widths[0]}>{widths[1]}")

    def timed(self, signature: str) -> list[tuple[int, int, float]]:
        """(input channels, output channels, seconds) of a signature."""
        found = []
        for widths, entry in self.entries.get(signature, {}).items():
            inputs, _, outputs = widths.partition(">")
            found.append((int(inputs), int(outputs), entry.seconds))
        return found


@dataclass(frozen=True)
class Predictor:
    """Predicts the seconds of a network at any channel counts of its groups.

    dense: measured seconds of the dense file. wholes: the timed files. path: of the table. of_dense: time of the dense
    file in the precision of the table over the time of the file that budgets are shares of.
    """

    segments: tuple[Segment, ...]
    fits: Mapping[str, Staircase]
    channels: Mapping[str, int]
    dense: float
    wholes: tuple[Whole, ...] = ()
    place: str = ""
    path: str = ""
    of_dense: float = 1.0

    @cached_property
    def _memory(self) -> dict[tuple[str, int, int], float]:
        return {}

    @cached_property
    def scale(self) -> float:
        """Median of the times of whole files over the sums of their segments."""
        sums = [
            sum(self._raw(segment, {**self.channels, **w.kept}) for segment in self.segments)
            for w in self.wholes
        ]
        ratios = [w.seconds / total for w, total in zip(self.wholes, sums, strict=True) if total > 0]
        return statistics.median(ratios) if ratios else 1.0

    @cached_property
    def touched(self) -> dict[str, tuple[Segment, ...]]:
        """Group -> segments whose time depends on it."""
        return {g: tuple(p for p in self.segments if g in p.groups) for g in self.channels}

    def seconds(self, kept: Mapping[str, int]) -> float:
        """Of the whole network; missing groups keep all of their channels."""
        full = {**self.channels, **kept}
        return sum(self.of(segment, full) for segment in self.segments)

    def of(self, segment: Segment, kept: Mapping[str, int]) -> float:
        """Seconds of one segment; `kept` has every group."""
        return self.scale * self._raw(segment, kept)

    def errors(self) -> list[float]:
        """Predicted over measured time - 1, of the files that were predicted before they were added."""
        return [w.predicted / w.seconds - 1 for w in self.wholes if w.predicted > 0]

    def _raw(self, segment: Segment, kept: Mapping[str, int]) -> float:
        key = (segment.signature, *segment.widths(kept))
        if key not in self._memory:
            self._memory[key] = self.fits[segment.signature].at(key[1], key[2])
        return self._memory[key]


@dataclass(frozen=True)
class TimedCosts:
    """Counted costs and predicted seconds, for an allocation under a limit on time."""

    counted: CostModel
    model: Predictor

    @property
    def channels(self) -> Mapping[str, int]:
        """Group -> channels."""
        return self.counted.channels

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """macs, params, and seconds as "latency"."""
        return {**self.counted.cost(kept), TIME: self.model.seconds(kept)}


def predictor(
    table: Table, segments: tuple[Segment, ...], key: str, channels: Mapping[str, int]
) -> Predictor:
    """Fit the timings of a network's segments."""
    fits = {
        signature: fit(table.timed(signature)) for signature in dict.fromkeys(p.signature for p in segments)
    }
    known = table.networks[key]
    return Predictor(segments, fits, dict(channels), known.dense, known.wholes, table.place)


def table_path(folder: Path, place: str) -> Path:
    """The file of a place, with a readable name."""
    readable = "".join(c if c.isalnum() or c in "-." else "-" for c in place)[:80].strip("-")
    return folder / f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"


def load(path: Path, place: str) -> Table:
    """The table of a place; empty where no file exists."""
    if not path.exists():
        return Table(place)
    table = serialization.read(Table, path, WorkdirError)
    hint = f"delete {path}: it is measured anew"
    if table.schema != SCHEMA or table.place != place:
        raise WorkdirError(
            f"{path} is a table of {table.place!r} in {table.schema!r}, not of {place!r}", hint
        )
    seconds = [entry.seconds for known in table.entries.values() for entry in known.values()]
    if not all(math.isfinite(s) and s >= 0 for s in seconds):
        raise WorkdirError(f"{path} holds times that are negative or not finite", hint)
    return table


def save(table: Table, path: Path) -> None:
    """Write a table atomically."""
    serialization.sweep(path.parent, serialization.LEFT_FILES)
    serialization.write(path, table)
