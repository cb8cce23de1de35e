"""table: what each prunable layer costs on a device at each number of channels, alone and in its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgeprune.latency.resized_graph import WEIGHTED
from edgeprune.latency.sampling import ProfiledNetwork, TimingBackend, subject, survey
from edgeprune.latency.segments import Segment
from edgeprune.latency.table import Predictor, load, save, table_path
from edgeprune.models import cost_model, normalized_example
from edgeprune.progress import track
from edgeprune.records import Bundle
from edgeprune.serialization import scratch_folder
from edgeprune.structure import find_groups, provable_groups, timed_levels

# Of each layer these shares of its channels are timed alone; in its place it is at the widths of all cuts.
ALONE = (1.0, 0.75, 0.5, 0.25)
# Shares of all groups' channels for which the whole network's time is predicted.
WHOLES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class SurveyOptions:
    """What counts are asked for. multiple_of, floor: as for pruning. skip: layers that keep their channels."""

    multiple_of: int = 1
    floor: float = 0.1
    skip: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One layer at one number of channels. kind: its signature.

    reads, makes: channels. seconds: in its place in the network with what is fused into it, from the staircase through
    the timings. n: how many timings there are at exactly these widths; low, high: the fastest and slowest of them, or
    `seconds` where there is none. alone: seconds of the layer in a file of its own; 0 where it was not timed.
    """

    layer: str
    kind: str
    reads: int
    makes: int
    seconds: float
    n: int
    low: float
    high: float
    alone: float


@dataclass(frozen=True)
class Predicted:
    """The whole network when every group keeps about this share of its channels: predicted seconds."""

    share: float
    channels: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A cut that was timed whole, and what had been predicted before it was."""

    channels: Mapping[str, int]
    predicted: float
    seconds: float


@dataclass(frozen=True)
class LatencyTable:
    """What `profile --table` shows. dense: measured seconds of the whole file. path: where all timings are kept."""

    place: str
    path: str
    dense: float
    rows: tuple[Row, ...]
    wholes: tuple[Predicted, ...]
    measured: tuple[Measured, ...]


def run(bundle: Bundle, file: Path, bench: TimingBackend, wish: SurveyOptions) -> LatencyTable:
    """Time the layers of a network at their channel counts, as far as they are not in the device's table yet."""
    example = normalized_example(bundle.input, wish.seed)
    graph = provable_groups(bundle.module, find_groups(bundle.module, example, wish.skip), example, wish.seed)
    network = subject(file, cost_model(bundle.module, graph.groups, example))
    clock = survey(network, bench, multiple_of=wish.multiple_of, floor=wish.floor)
    counts = [(part, kept) for part in network.parts for kept in _counts(part, network, wish)]
    _time_alone(network, counts, bench)
    table = load(Path(clock.path), bench.place)
    rows = []
    for part, kept in counts:
        widths, seconds = part.widths(kept), clock.of(part, kept)
        timed, alone = table.entry(part.signature, widths), table.entry(_alone(part), widths)
        n, low, high = (timed.n, timed.low, timed.high) if timed else (0, seconds, seconds)
        single = alone.seconds if alone else 0.0
        rows.append(Row(part.layer, part.signature, *widths, seconds, n, low, high, single))
    measured = tuple(Measured(w.kept, w.predicted, w.seconds) for w in clock.wholes if w.predicted > 0)
    return LatencyTable(bench.place, clock.path, clock.dense, tuple(rows), _wholes(clock, wish), measured)


def _counts(part: Segment, network: ProfiledNetwork, wish: SurveyOptions) -> Sequence[Mapping[str, int]]:
    """Counts of the groups that a prunable layer with weights makes; all others are whole."""
    full = dict(network.channels)
    first = next(n for n in network.resizer.model.graph.node if n.name == part.layer)
    if first.op_type not in WEIGHTED or not part.makes.per:
        return [full] if first.op_type in WEIGHTED and part.groups else []
    own = {g: timed_levels(full[g], wish.multiple_of, wish.floor) for g in part.makes.per}
    longest = max(len(steps) for steps in own.values())
    return [
        {**full, **{g: steps[min(i, len(steps) - 1)] for g, steps in own.items()}} for i in range(longest)
    ]


def _wholes(clock: Predictor, wish: SurveyOptions) -> tuple[Predicted, ...]:
    found = []
    for share in WHOLES:
        kept = {
            g: min(timed_levels(c, wish.multiple_of, wish.floor), key=lambda k, s=share * c: (abs(k - s), k))
            for g, c in clock.channels.items()
        }
        found.append(Predicted(share, kept, clock.seconds(kept)))
    return tuple(found)


def _alone(part: Segment) -> str:
    return f"alone: {part.signature}"


def _time_alone(
    network: ProfiledNetwork, counts: Sequence[tuple[Segment, Mapping[str, int]]], bench: TimingBackend
) -> None:
    path = table_path(bench.folder, bench.place)
    table = load(path, bench.place)
    wanted: dict[tuple[str, tuple[int, int]], tuple[Segment, Mapping[str, int]]] = {}
    by_part: dict[str, list[tuple[Segment, Mapping[str, int]]]] = {}
    for part, kept in counts:
        by_part.setdefault(part.layer, []).append((part, kept))
    for rows in by_part.values():
        most = max(part.widths(kept)[1] for part, kept in rows)
        for share in ALONE:
            part, kept = min(rows, key=lambda row, s=share * most: abs(row[0].widths(row[1])[1] - s))
            if table.entry(_alone(part), part.widths(kept)) is None:
                wanted[_alone(part), part.widths(kept)] = (part, kept)
    with scratch_folder() as folder:
        for number, ((name, widths), (part, kept)) in enumerate(
            track(wanted.items(), len(wanted), "time single layers")
        ):
            file = folder / f"layer{number}.onnx"
            onnx.save(network.resizer.layer(kept, part.layer), file)
            seconds = sum(spent for node, spent in bench.nodes(file) if node == part.layer)
            if seconds > 0:
                table = table.note([(name, widths, seconds)])
                save(table, path)
