"""Measured times of layer shapes on one device, kept between runs and models, and what they predict for a network.

A table holds, for each signature (`latency_parts`), the seconds at each pair of widths that was timed, and for each
network the whole files that were. Everything is scaled to the speed that the machine had when the network was first
timed: the dense file is timed beside every other one.
"""

from __future__ import annotations

import hashlib
import json
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
READ_BLOCKS = (1, 4, 8, 16)
MADE_BLOCKS = (1, 4, 8, 16, 32)
# Widths that are no multiple of these may take a slower path.
VECTORS = (4, 8, 16)
# A factor must earn its place: it costs so much of the mean square of the relative error.
THRIFT = 1e-4
# Widths this many octaves apart have little to say about each other, and a timing counts as much as this.
REACH = 0.2
DOUBT = 0.3
_ROUNDS = 4
_RIDGE = 1e-6
# Errors count relative to the time, but below this share of the longest time of its kind they count alike.
_SMALL = 0.01
_LEAST_S = 1e-8


@dataclass(frozen=True)
class Staircase:
    """Time as a sum of terms, and what it leaves of the timings.

    factors: of `_terms`, >= 0. seen: float64 (n, 2), the widths that were timed. rest: float64 (n,), the log of what
    the sum misses there.
    """

    factors: Array
    seen: Array
    rest: Array

    def at(self, reads: int, makes: int) -> float:
        """Seconds at these widths."""
        base = max(_LEAST_S, float(_terms(np.array([[reads, makes]], np.float64))[0] @ self.factors))
        gap = np.log2(self.seen / np.array([max(1, reads), max(1, makes)], np.float64))
        weight = np.exp(-((gap / REACH) ** 2).sum(1))
        return base * math.exp(float(weight @ self.rest) / (float(weight.sum()) + DOUBT))


def fit(timed: Sequence[tuple[int, int, float]]) -> Staircase:
    """The staircase through timings.

    Args:
        timed: (channels read, channels made, seconds >= 0), at least one, in any order, repeats allowed.
    """
    widths = np.array([(max(1, r), max(1, m)) for r, m, _ in timed], np.float64)
    seconds = np.array([s for _, _, s in timed], np.float64)
    scale = np.maximum(seconds, max(_LEAST_S, _SMALL * float(seconds.max())))
    terms = _terms(widths)
    trust = np.ones(len(timed))
    factors = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        factors = _nonnegative(terms / scale[:, None] * trust[:, None], seconds / scale * trust)
        # A timing that something disturbed is far off; it counts less then (Huber's weights).
        off = np.abs(terms @ factors - seconds) / scale
        usual = max(0.01, float(np.median(off)))
        trust = np.sqrt(np.minimum(1.0, 2 * usual / np.maximum(off, 1e-12)))
    base = terms @ factors
    rest = np.log((seconds + 0.1 * scale) / (base + 0.1 * scale))
    limit = 3 * max(0.02, float(np.median(np.abs(rest))))
    return Staircase(factors, widths, np.clip(rest, -limit, limit))


def _terms(widths: Array) -> Array:
    """(n, terms): what time may be a sum of, from (n, 2) channels read and made."""
    reads, makes = widths[:, 0], widths[:, 1]
    read = [np.ceil(reads / b) * b for b in READ_BLOCKS]
    made = [np.ceil(makes / b) * b for b in MADE_BLOCKS]
    columns = [np.ones(len(widths)), *read, *made, *(r * m for r in read for m in made)]
    for width in (reads, makes):
        for vector in VECTORS:
            odd = (np.mod(width, vector) > 0).astype(np.float64)
            columns += [odd, odd * width, odd * reads * makes]
    return np.stack(columns, 1)


def _nonnegative(a: Array, b: Array) -> Array:
    """x >= 0 with the least |a x - b|^2 + THRIFT times the sum of x, on columns of length 1."""
    length = np.maximum(np.linalg.norm(a, axis=0), 1e-30)
    # Columns are nearly alike (blocks of 4 and 8 at aligned widths), so a little is added to the diagonal.
    ridge = math.sqrt(_RIDGE)
    rows = np.concatenate([a / length, ridge * np.eye(a.shape[1])])
    # The price of each entry goes into the right-hand side: it lowers rows^T target by THRIFT sqrt(n).
    target = np.concatenate([b, np.full(a.shape[1], -THRIFT * math.sqrt(len(b)) / ridge)])
    return optimize.nnls(rows, target)[0] / length


SCHEMA = "edgeprune.latency-table/1"
TIME = "latency"


@dataclass(frozen=True)
class Entry:
    """Seconds at one pair of widths: the mean of n timings, the lowest and the highest."""

    seconds: float
    n: int
    low: float
    high: float

    def with_another(self, seconds: float) -> Entry:
        """The entry after one more timing."""
        n = self.n + 1
        mean = self.seconds + (seconds - self.seconds) / n
        return Entry(mean, n, min(self.low, seconds), max(self.high, seconds))


@dataclass(frozen=True)
class Whole:
    """One file that was timed whole. kept: group -> channels. predicted: before it was learned from; 0 is not."""

    kept: Mapping[str, int]
    seconds: float
    predicted: float = 0.0


@dataclass(frozen=True)
class Known:
    """What was timed of one network: the dense file's seconds when that began, and the others."""

    dense: float
    wholes: tuple[Whole, ...] = ()


@dataclass(frozen=True)
class Table:
    """All that was timed at one place: a device with its processor, runtime, version and threads.

    entries: signature -> "read>made" -> entry. networks: key -> what was timed of it.
    """

    place: str
    entries: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    networks: Mapping[str, Known] = field(default_factory=dict)
    schema: str = SCHEMA

    def learn(
        self, network: str, dense: float, whole: Whole, shares: Sequence[tuple[Segment, float]]
    ) -> Table:
        """The table with one more file in it.

        Args:
            network: its key. dense: seconds of the dense file at the speed of the table. whole: the file, at that
                speed. shares: each part with its seconds, which add up to the file's.
        """
        rows = [(part.signature, part.widths(whole.kept), seconds) for part, seconds in shares]
        before = self.networks.get(network, Known(dense))
        networks = {**self.networks, network: replace(before, wholes=(*before.wholes, whole))}
        return replace(self.note(rows), networks=networks)

    def note(self, rows: Sequence[tuple[str, tuple[int, int], float]]) -> Table:
        """The table with more timings: signature, channels read and made, seconds."""
        entries = {signature: dict(known) for signature, known in self.entries.items()}
        for signature, (reads, makes), seconds in rows:
            known = entries.setdefault(signature, {})
            name = f"{reads}>{makes}"
            first = Entry(seconds, 1, seconds, seconds)
            known[name] = known[name].with_another(seconds) if name in known else first
        return replace(self, entries=entries)

    def entry(self, signature: str, widths: tuple[int, int]) -> Entry | None:
        """What was timed at exactly these widths."""
        return self.entries.get(signature, {}).get(f"{widths[0]}>{widths[1]}")

    def timed(self, signature: str) -> list[tuple[int, int, float]]:
        """(channels read, channels made, seconds) of a signature."""
        found = []
        for widths, entry in self.entries.get(signature, {}).items():
            reads, _, makes = widths.partition(">")
            found.append((int(reads), int(makes), entry.seconds))
        return found


@dataclass(frozen=True)
class Predictor:
    """Seconds of a network at any counts that its groups keep.

    dense: measured seconds of the dense file. wholes: files that were timed; those with a prediction made before they
    were learned from say how good it is. path: where the table is kept. of_dense: what the dense file in the precision
    of the table takes, over the file that budgets are shares of.
    """

    parts: tuple[Segment, ...]
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
        """What the sum of the parts is multiplied with: the middle of what whole files took over their sums."""
        sums = [sum(self._raw(part, {**self.channels, **w.kept}) for part in self.parts) for w in self.wholes]
        ratios = [w.seconds / total for w, total in zip(self.wholes, sums, strict=True) if total > 0]
        return statistics.median(ratios) if ratios else 1.0

    @cached_property
    def touched(self) -> dict[str, tuple[Segment, ...]]:
        """Group -> the parts whose time depends on it."""
        return {g: tuple(p for p in self.parts if g in p.groups) for g in self.channels}

    def seconds(self, kept: Mapping[str, int]) -> float:
        """The whole network's time; groups that are missing keep all of their channels."""
        full = {**self.channels, **kept}
        return sum(self.of(part, full) for part in self.parts)

    def of(self, part: Segment, kept: Mapping[str, int]) -> float:
        """The time of one part; `kept` names every group."""
        return self.scale * self._raw(part, kept)

    def errors(self) -> list[float]:
        """Predicted over measured - 1, of the files that were predicted before they were learned from."""
        return [w.predicted / w.seconds - 1 for w in self.wholes if w.predicted > 0]

    def _raw(self, part: Segment, kept: Mapping[str, int]) -> float:
        key = (part.signature, *part.widths(kept))
        if key not in self._memory:
            self._memory[key] = self.fits[part.signature].at(key[1], key[2])
        return self._memory[key]


@dataclass(frozen=True)
class TimedCosts:
    """Counted costs and predicted seconds of the same counts, for an allocation under a limit on time."""

    counted: CostModel
    clock: Predictor

    @property
    def channels(self) -> Mapping[str, int]:
        """Group -> channels."""
        return self.counted.channels

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """macs, params, and seconds as "latency"."""
        return {**self.counted.cost(kept), TIME: self.clock.seconds(kept)}


def predictor(table: Table, parts: tuple[Segment, ...], key: str, channels: Mapping[str, int]) -> Predictor:
    """Fit what the table knows of the parts of a network that it has timings of."""
    fits = {signature: fit(table.timed(signature)) for signature in dict.fromkeys(p.signature for p in parts)}
    known = table.networks[key]
    return Predictor(parts, fits, dict(channels), known.dense, known.wholes, table.place)


def table_path(folder: Path, place: str) -> Path:
    """The file of a place: readable, and different for different places."""
    readable = "".join(c if c.isalnum() or c in "-." else "-" for c in place)[:80].strip("-")
    return folder / f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"


def load(path: Path, place: str) -> Table:
    """The table of a place; empty where there is none yet."""
    if not path.exists():
        return Table(place)
    table = serialization.read(Table, path, WorkdirError)
    hint = f"delete {path}: it is measured anew"
    if table.schema != SCHEMA or table.place != place:
        raise WorkdirError(
            f"{path} is a table of {table.place!r} in {table.schema!r}, not of {place!r}", hint
        )
    good = all(
        math.isfinite(e.seconds) and e.seconds >= 0
        for known in table.entries.values()
        for e in known.values()
    )
    if not good:
        raise WorkdirError(f"{path} holds times that are none", hint)
    return table


def save(table: Table, path: Path) -> None:
    """Write a table, whole or not at all."""
    serialization.sweep(path.parent, serialization.LEFT_FILES)
    with serialization.replace_file(path) as file:
        file.write((json.dumps(serialization.to_json(table)) + "\n").encode())
