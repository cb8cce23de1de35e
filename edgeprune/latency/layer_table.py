"""table: the time of each prunable layer on a device at each channel count, alone and in its network."""

from collections.abc import Mapping
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

Steps = Mapping[str, tuple[int, ...]]
# Shares of its channels at which each layer is timed alone.
ALONE = (1.0, 0.75, 0.5, 0.25)
# Shares of all groups' channels for which the whole network's time is predicted.
WHOLES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class SurveyOptions:
    """Channel counts of the table, as for pruning. skip: layers that keep their channels."""

    multiple_of: int = 1
    floor: float = 0.1
    skip: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One layer with `reads` input and `makes` output channels. kind: its signature.

    seconds: in the network with the operators fused into it, from the staircase through the timings. n: number of
    timings at exactly these widths; low, high: the fastest and slowest of them, or `seconds` where there is none.
    alone: seconds of the layer alone in a file; 0 where it was not timed.
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
    """The whole network when every group keeps about this share of its channels."""

    share: float
    channels: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A cut that was timed whole after its time was predicted."""

    channels: Mapping[str, int]
    predicted: float
    seconds: float


@dataclass(frozen=True)
class LatencyTable:
    """The output of `profile --table`. dense: measured seconds of the whole file. path: of the table."""

    place: str
    path: str
    dense: float
    rows: tuple[Row, ...]
    wholes: tuple[Predicted, ...]
    measured: tuple[Measured, ...]


def run(bundle: Bundle, file: Path, backend: TimingBackend, options: SurveyOptions) -> LatencyTable:
    """Time the layers of a network at their channel counts, unless they are in the device's table."""
    example = normalized_example(bundle.input, options.seed)
    graph = provable_groups(
        bundle.module, find_groups(bundle.module, example, options.skip), example, options.seed
    )
    network = subject(file, cost_model(bundle.module, graph.groups, example))
    model = survey(network, backend, multiple_of=options.multiple_of, floor=options.floor)
    steps = {g: timed_levels(c, options.multiple_of, options.floor) for g, c in network.channels.items()}
    counts = {segment: _counts(segment, network, steps) for segment in network.segments}
    _time_alone(network, counts, backend)
    table = load(Path(model.path), backend.place)
    rows = []
    for segment, choices in counts.items():
        for kept in choices:
            widths, seconds = segment.widths(kept), model.of(segment, kept)
            timed, alone = table.entry(segment.signature, widths), table.entry(_alone(segment), widths)
            n, low, high = (timed.n, timed.low, timed.high) if timed else (0, seconds, seconds)
            single = alone.seconds if alone else 0.0
            rows.append(Row(segment.layer, segment.signature, *widths, seconds, n, low, high, single))
    measured = tuple(Measured(w.kept, w.predicted, w.seconds) for w in model.wholes if w.predicted > 0)
    wholes = _wholes(model, steps)
    return LatencyTable(backend.place, model.path, model.dense, tuple(rows), wholes, measured)


def _counts(segment: Segment, network: ProfiledNetwork, steps: Steps) -> list[Mapping[str, int]]:
    full = dict(network.channels)
    first = next(n for n in network.resizer.model.graph.node if n.name == segment.layer)
    if first.op_type not in WEIGHTED or not segment.out_channels.per:
        return [full] if first.op_type in WEIGHTED and segment.groups else []
    own = {g: steps[g] for g in segment.out_channels.per}
    longest = max(len(levels) for levels in own.values())
    return [{**full, **{g: ks[min(i, len(ks) - 1)] for g, ks in own.items()}} for i in range(longest)]


def _wholes(model: Predictor, steps: Steps) -> tuple[Predicted, ...]:
    found = []
    for share in WHOLES:
        kept = {g: min(ks, key=lambda k, s=share * ks[0]: (abs(k - s), k)) for g, ks in steps.items()}
        found.append(Predicted(share, kept, model.seconds(kept)))
    return tuple(found)


def _alone(segment: Segment) -> str:
    return f"alone: {segment.signature}"


def _time_alone(
    network: ProfiledNetwork, counts: Mapping[Segment, list[Mapping[str, int]]], backend: TimingBackend
) -> None:
    path = table_path(backend.folder, backend.place)
    table = load(path, backend.place)
    missing: dict[tuple[str, tuple[int, int]], tuple[str, Mapping[str, int]]] = {}
    for segment, choices in counts.items():
        outputs = [segment.out_channels.at(kept) for kept in choices]
        for target in [share * max(outputs) for share in ALONE if outputs]:
            nearest = min(range(len(choices)), key=lambda i, t=target, o=outputs: abs(o[i] - t))
            kept = choices[nearest]
            if table.entry(_alone(segment), segment.widths(kept)) is None:
                missing[_alone(segment), segment.widths(kept)] = (segment.layer, kept)
    with scratch_folder() as folder:
        timings = track(missing.items(), len(missing), "time single layers")
        for number, ((signature, widths), (layer, kept)) in enumerate(timings):
            file = folder / f"layer{number}.onnx"
            onnx.save(network.resizer.layer(kept, layer), file)
            seconds = sum(spent for node, spent in backend.nodes(file) if node == layer)
            if seconds > 0:
                table = table.note([(signature, widths, seconds)])
                save(table, path)
