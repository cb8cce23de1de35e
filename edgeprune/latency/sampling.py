"""Filling a latency table: which cuts of a network are timed, in which order, and when it is enough.

Every cut of the network is timed twice: whole, in turn with the dense file and by the same clock, and node by node,
which says how the time is shared out among its parts with all that the runtime fuses, at their place in the network,
with its caches and memory layouts. One file times every layer at one pair of widths, so a few dozen files are enough.
Each batch is predicted before it is learned from; when the predictions are good the survey ends.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import onnx

from edgeprune.errors import DeviceError, ModelError, NoLayerTimes
from edgeprune.latency.resized_graph import Resizer, resizer
from edgeprune.latency.segments import Segment, attribute_times, network_key, parts
from edgeprune.latency.table import Predictor, Table, Whole, load, predictor, save, table_path
from edgeprune.models import CostModel
from edgeprune.onnx_graph import ONNX_ERRORS
from edgeprune.progress import track
from edgeprune.serialization import scratch_folder
from edgeprune.structure import levels, timed_levels

BATCH = 8
LEAST = 16
MOST = 32
# The survey ends when, of a batch, the median error and the largest but one are below these.
GOOD, STRAY = 0.03, 0.07
# Of what the counts of one cut after the other are multiples. Most are aligned, as the cuts are that gain time; some
# have the finer steps between, and some are multiples of nothing: such cuts exist, and cost more.
ALIGNED, FINE, ANY = "aligned", "fine", "any"
KINDS = (ALIGNED, ALIGNED, FINE, ANY, ALIGNED, ALIGNED, FINE, ANY)
# Two sessions of one file differ by up to 2 %, and all cuts of a batch are compared with the dense one.
DENSE = ("dense", "dense again")
_SEED = 3
_GOLDEN = 0.618034


@dataclass(frozen=True)
class TimingBackend:
    """A device to time on.

    time: name -> file to name -> seconds of one image, all in turn in one process, by the clock to be believed there.
    nodes: file -> name and seconds of each node in the order in which they ran. place: device, processor, runtime,
    version, threads, precision: whatever makes times differ. folder: where tables are kept.
    """

    time: Callable[[Mapping[str, Path]], Mapping[str, float]]
    nodes: Callable[[Path], Sequence[tuple[str, float]]]
    place: str
    folder: Path
    log: Callable[[str], None] = lambda _line: None


@dataclass(frozen=True)
class ProfiledNetwork:
    """A network whose cuts can be timed. file: the dense one, as exported."""

    file: Path
    resizer: Resizer
    parts: tuple[Segment, ...]
    key: str

    @property
    def channels(self) -> Mapping[str, int]:
        """Group -> channels."""
        return self.resizer.costs.channels


def subject(file: Path, costs: CostModel) -> ProfiledNetwork:
    """Read the file of a dense network.

    Raises:
        ModelError: not an ONNX file. UnsupportedModel: its shapes at other counts can't be told.
    """
    try:
        model = onnx.load(file)
    except ONNX_ERRORS as error:
        raise ModelError(f"{file} is not a readable ONNX file: {error}") from error
    source = resizer(model, costs)
    found = parts(source)
    return ProfiledNetwork(file, source, found, network_key(found, costs.channels))


def survey(
    network: ProfiledNetwork, bench: TimingBackend, *, multiple_of: int = 1, floor: float = 0.1
) -> Predictor:
    """Time cuts until the table predicts this network, and give what predicts it.

    What was timed is kept after every batch, so that a survey that was interrupted goes on where it was.
    """
    path = table_path(bench.folder, bench.place)
    table = load(path, bench.place)
    wanted = list(islice(_designs(network.channels, multiple_of, floor), MOST))
    for start in range(0, len(wanted), BATCH):
        batch = [kept for kept in wanted[start : start + BATCH] if not _has(table, network.key, kept)]
        if batch:
            bench.log(f"table: time {len(batch)} cuts on {bench.place}")
            table = _learn(table, network, batch, bench)
            save(table, path)
        if start + BATCH >= LEAST and _good(table, network.key):
            break
    return replace(predictor(table, network.parts, network.key, network.channels), path=str(path))


def _has(table: Table, key: str, kept: Mapping[str, int]) -> bool:
    return key in table.networks and any(dict(w.kept) == dict(kept) for w in table.networks[key].wholes)


def _good(table: Table, key: str) -> bool:
    errors = [
        abs(w.predicted / w.seconds - 1) for w in table.networks[key].wholes[-BATCH:] if w.predicted > 0
    ]
    return len(errors) > 1 and statistics.median(errors) <= GOOD and sorted(errors)[-2] <= STRAY


def _designs(channels: Mapping[str, int], multiple_of: int, floor: float) -> Iterator[dict[str, int]]:
    """The dense network, then cuts: shares around a common one and shares drawn freely, in turn."""
    draw = random.Random(_SEED)
    seen = {tuple(channels.values())}
    yield dict(channels)
    for number in range(1, 4 * MOST):
        common, spread = 0.3 + 0.7 * (number * _GOLDEN % 1), 0.15 if number % 2 else 1.0
        kept = {}
        for group, count in channels.items():
            share = min(1.0, max(floor, common + spread * draw.uniform(-1, 1)))
            steps = _steps(KINDS[number % len(KINDS)], count, multiple_of, floor)
            kept[group] = min(steps, key=lambda k, s=share * count: abs(k - s))
        # Small networks have few cuts, and twice the same tells nothing.
        if tuple(kept.values()) not in seen:
            seen.add(tuple(kept.values()))
            yield kept


def _steps(kind: str, count: int, multiple_of: int, floor: float) -> tuple[int, ...]:
    if kind == FINE:
        return timed_levels(count, multiple_of, floor)
    return levels(count, multiple_of if kind == ALIGNED else 1, floor)


def _learn(
    table: Table, network: ProfiledNetwork, batch: Sequence[Mapping[str, int]], bench: TimingBackend
) -> Table:
    known = table.networks.get(network.key)
    before = predictor(table, network.parts, network.key, network.channels) if known else None
    with scratch_folder() as folder:
        cuts = [folder / f"cut{number}.onnx" for number in range(len(batch))]
        for kept, path in zip(batch, cuts, strict=True):
            onnx.save(network.resizer.file(kept), path)
        seconds, nodes = _timed(network, cuts, bench)
    dense = statistics.mean(seconds[name] for name in DENSE)
    # The machine may be faster or slower than it was at first; the dense file says by how much.
    speed = known.dense / dense if known else 1.0
    first = known.dense if known else dense
    for kept, path, spent in zip(batch, cuts, nodes, strict=True):
        whole = seconds[path.stem] * speed
        shares = [(part, whole * s / sum(spent)) for part, s in zip(network.parts, spent, strict=True)]
        predicted = before.seconds(kept) if before else 0.0
        table = table.learn(network.key, first, Whole(dict(kept), whole, predicted), shares)
    return table


def _timed(
    network: ProfiledNetwork, cuts: Sequence[Path], bench: TimingBackend
) -> tuple[dict[str, float], list[list[float]]]:
    # The first one before anything is timed for minutes: not every device tells the times of layers.
    nodes = [_layers(network, cuts[0], bench)]
    files = {DENSE[0]: network.file, **{path.stem: path for path in cuts}, DENSE[1]: network.file}
    first = bench.time(files)
    _check(first, files)
    nodes += [_layers(network, path, bench) for path in track(cuts[1:], len(cuts) - 1, "time every layer")]
    again = bench.time(files)
    _check(again, files)
    return {name: min(first[name], again[name]) for name in files}, nodes


def _layers(network: ProfiledNetwork, path: Path, bench: TimingBackend) -> list[float]:
    seconds = attribute_times(network.parts, bench.nodes(path))
    if sum(seconds) <= 0:
        raise NoLayerTimes(f"{bench.place} says of no layer of {network.file.name} how long it takes")
    return seconds


def _check(seconds: Mapping[str, float], files: Mapping[str, Path]) -> None:
    bad = [name for name in files if not seconds.get(name, 0.0) > 0]
    if bad:
        raise DeviceError(f"the device gave no time for {bad[0]!r}: {dict(seconds)!r:.200}")
