"""Sampling a latency table: which cuts of a network are timed, in which order, and when to stop.

Every cut is timed twice: whole, in turn with the dense file and by the same clock, and node by node, which divides
the time among its segments as the runtime fuses them, in the network with its caches and memory layouts. One file times
every layer at one pair of widths, so a few dozen are enough. Each batch is predicted before it is added; when the
predictions are good the survey ends.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import onnx

from edgeprune.errors import DeviceError, ModelError, NoLayerTimes
from edgeprune.latency.resized_graph import Resizer, resizer
from edgeprune.latency.segments import Segment, attribute_times, network_key, segments_of
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
# Step of the counts of successive cuts. Most are aligned, as the cuts that save time are; some have finer steps, and
# some any count: such cuts exist, and are slower.
ALIGNED, FINE, ANY = "aligned", "fine", "any"
KINDS = (ALIGNED, ALIGNED, FINE, ANY, ALIGNED, ALIGNED, FINE, ANY)
# Two sessions of one file differ by up to 2 %, so the dense file is timed twice with each batch.
DENSE = ("dense", "dense again")
_SEED = 3
_GOLDEN = 0.618034


@dataclass(frozen=True)
class TimingBackend:
    """A device to time on.

    time: name -> file to name -> seconds of one image, all in turn in one process.
    nodes: file -> name and seconds of each node, in order of execution.
    place: device, processor, runtime, version, threads, precision: all that times depend on.
    folder: of the tables.
    """

    time: Callable[[Mapping[str, Path]], Mapping[str, float]]
    nodes: Callable[[Path], Sequence[tuple[str, float]]]
    place: str
    folder: Path
    log: Callable[[str], None] = lambda _line: None


@dataclass(frozen=True)
class ProfiledNetwork:
    """A network whose cuts can be timed. file: the dense network, as exported."""

    file: Path
    resizer: Resizer
    segments: tuple[Segment, ...]
    key: str

    @property
    def channels(self) -> Mapping[str, int]:
        """Group -> channels."""
        return self.resizer.costs.channels


def subject(file: Path, costs: CostModel) -> ProfiledNetwork:
    """Read the file of a dense network."""
    try:
        model = onnx.load(file)
    except ONNX_ERRORS as error:
        raise ModelError(f"{file} is not a readable ONNX file: {error}") from error
    source = resizer(model, costs)
    found = segments_of(source)
    return ProfiledNetwork(file, source, found, network_key(found, costs.channels))


def survey(
    network: ProfiledNetwork, backend: TimingBackend, *, multiple_of: int = 1, floor: float = 0.1
) -> Predictor:
    """Time cuts until the table predicts this network.

    The table is saved after every batch, so an interrupted survey resumes.
    """
    path = table_path(backend.folder, backend.place)
    table = load(path, backend.place)
    designs = list(islice(_designs(network.channels, multiple_of, floor), MOST))
    for start in range(0, len(designs), BATCH):
        known = table.networks.get(network.key)
        timed = [dict(whole.kept) for whole in known.wholes] if known else []
        batch = [kept for kept in designs[start : start + BATCH] if kept not in timed]
        if batch:
            backend.log(f"table: time {len(batch)} cuts on {backend.place}")
            table = _learn(table, network, batch, backend)
            save(table, path)
        if start + BATCH >= LEAST and _good(table, network.key):
            break
    return replace(predictor(table, network.segments, network.key, network.channels), path=str(path))


def _good(table: Table, key: str) -> bool:
    errors = [
        abs(w.predicted / w.seconds - 1) for w in table.networks[key].wholes[-BATCH:] if w.predicted > 0
    ]
    return len(errors) > 1 and statistics.median(errors) <= GOOD and sorted(errors)[-2] <= STRAY


def _designs(channels: Mapping[str, int], multiple_of: int, floor: float) -> Iterator[dict[str, int]]:
    """The dense network, then cuts: alternately with shares around a common one and with random shares."""
    draw = random.Random(_SEED)
    seen = {tuple(channels.values())}
    yield dict(channels)
    for number in range(1, 4 * MOST):
        common, spread = 0.3 + 0.7 * (number * _GOLDEN % 1), 0.15 if number % 2 else 1.0
        kept = {}
        for group, count in channels.items():
            share = min(1.0, max(floor, common + spread * draw.uniform(-1, 1)))
            kind = KINDS[number % len(KINDS)]
            if kind == FINE:
                steps = timed_levels(count, multiple_of, floor)
            else:
                steps = levels(count, multiple_of if kind == ALIGNED else 1, floor)
            kept[group] = min(steps, key=lambda k, s=share * count: abs(k - s))
        if tuple(kept.values()) not in seen:
            seen.add(tuple(kept.values()))
            yield kept


def _learn(
    table: Table, network: ProfiledNetwork, batch: Sequence[Mapping[str, int]], backend: TimingBackend
) -> Table:
    known = table.networks.get(network.key)
    before = predictor(table, network.segments, network.key, network.channels) if known else None
    with scratch_folder() as folder:
        cuts = [folder / f"cut{number}.onnx" for number in range(len(batch))]
        for kept, path in zip(batch, cuts, strict=True):
            onnx.save(network.resizer.file(kept), path)
        seconds, nodes = _timed(network, cuts, backend)
    dense = statistics.mean(seconds[name] for name in DENSE)
    # The speed of the machine may have changed since the first batch; the dense file measures by how much.
    speed = known.dense / dense if known else 1.0
    first = known.dense if known else dense
    for kept, path, spent in zip(batch, cuts, nodes, strict=True):
        whole = seconds[path.stem] * speed
        shares = [
            (segment, whole * s / sum(spent)) for segment, s in zip(network.segments, spent, strict=True)
        ]
        predicted = before.seconds(kept) if before else 0.0
        table = table.learn(network.key, first, Whole(dict(kept), whole, predicted), shares)
    return table


def _timed(
    network: ProfiledNetwork, cuts: Sequence[Path], backend: TimingBackend
) -> tuple[dict[str, float], list[list[float]]]:
    # First, before minutes of timing: not every device reports the times of layers.
    nodes = [_layers(network, cuts[0], backend)]
    files = {DENSE[0]: network.file, **{path.stem: path for path in cuts}, DENSE[1]: network.file}
    first = backend.time(files)
    _check(first, files)
    nodes += [_layers(network, path, backend) for path in track(cuts[1:], len(cuts) - 1, "time every layer")]
    again = backend.time(files)
    _check(again, files)
    return {name: min(first[name], again[name]) for name in files}, nodes


def _layers(network: ProfiledNetwork, path: Path, backend: TimingBackend) -> list[float]:
    seconds = attribute_times(network.segments, backend.nodes(path))
    if sum(seconds) <= 0:
        raise NoLayerTimes(f"{backend.place} reports no time of any layer of {network.file.name}")
    return seconds


def _check(seconds: Mapping[str, float], files: Mapping[str, Path]) -> None:
    bad = [name for name in files if not seconds.get(name, 0.0) > 0]
    if bad:
        raise DeviceError(f"the device gave no time for {bad[0]!r}: {dict(seconds)!r:.200}")
