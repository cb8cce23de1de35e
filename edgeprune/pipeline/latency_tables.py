"""The latency table of a device: where it is kept, how its files are timed, and what predicts a network by it."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune import latency, quantize
from edgeprune.errors import UsageError
from edgeprune.latency import Predictor, TimingBackend
from edgeprune.measure import Latency, Trials
from edgeprune.models import CostModel
from edgeprune.pipeline.context import Context, Log, multiple_of
from edgeprune.pipeline.intermediates import seconds_of, timing_trials
from edgeprune.recipe import MeasureTable
from edgeprune.serialization import scratch_folder

# Seconds for each of many small files; the whole network is timed longer in the end.
EACH_S = 2.0
TIMED = ("latency_p50", "latency_p90", "latency_p99")


@dataclass(frozen=True)
class Written:
    """The precision that files are timed in. rewrite: from a float file to the bytes of one in it, None as it is."""

    precision: str = "fp32"
    rewrite: Callable[[Path], bytes] | None = None

    @contextmanager
    def files(self, files: Mapping[str, Path]) -> Iterator[Mapping[str, Path]]:
        """The files in that precision, gone afterwards."""
        if self.rewrite is None:
            yield files
            return
        with scratch_folder() as folder:
            found = {}
            for number, (name, path) in enumerate(files.items()):
                found[name] = folder / f"{number}.onnx"
                found[name].write_bytes(self.rewrite(path))
            yield found


AS_EXPORTED = Written()


def bench(trials: Trials, table: MeasureTable, log: Log, written: Written = AS_EXPORTED) -> TimingBackend:
    """A device as what times files. Tables are shared by all runs of a user: ~/.cache/edgeprune/tables."""
    folder = _folder()
    facts = trials.device.facts()
    quick = replace(table, seconds=min(EACH_S, table.seconds))
    processor = f"{facts.get('board', '')} {facts.get('cpu', '')}".strip()
    where = f"{trials.device.where()}{' (emulated)' if trials.emulated else ''}"
    place = f"{where}, {processor}, {trials.version}, {table.threads} thread(s), {written.precision}"

    def seconds(files: Mapping[str, Path]) -> dict[str, float]:
        with written.files(files) as there:
            return medians(trials.latency(there, quick))

    def nodes(file: Path) -> list[tuple[str, float]]:
        with written.files({"model": file}) as there:
            return [(node.name, node.seconds) for node in trials.nodes(there["model"], quick)]

    return TimingBackend(seconds, nodes, place, folder, log)


def medians(timed: Latency) -> dict[str, float]:
    """Seconds of each file.

    One clock for all: the thread's own where there is one, which other work does not disturb.
    """
    rows = {n: next(r for r in rows if r.metric == TIMED[0]) for n, rows in timed.readings.items()}
    own = all(r.conditions.get("cpu_p50") for r in rows.values())
    return {n: float(r.conditions["cpu_p50"]) if own else seconds_of((r,), TIMED[0]) for n, r in rows.items()}


def latency_model(run: Context, file: Path) -> Callable[[CostModel], Predictor] | None:
    """From the costs of a run's network to what predicts the time of its cuts, by a table that is filled where it must.

    The table is of the precision that the file will have where it is named, else of fp32. None where no latency is in
    the budget or where the method trains.
    """
    timed = any(metric in run.budget.limits for metric in TIMED)
    if not timed or run.decisions.trains or run.device.name == "fake":
        return None

    def predictor(costs: CostModel) -> Predictor:
        there = timing_trials(run)
        written = _written(run)
        bench_ = bench(there, run.recipe.measure, run.log, written)
        floor = run.recipe.prune.floor
        found = latency.survey(
            latency.subject(file, costs), bench_, multiple_of=multiple_of(run), floor=floor
        )
        if written is AS_EXPORTED:
            return found
        with written.files({"written": file}) as files:
            seconds = medians(there.latency({"dense": file, **files}, run.recipe.measure))
        return replace(found, of_dense=seconds["written"] / seconds["dense"])

    return predictor


def _written(run: Context) -> Written:
    precision, scheme = run.recipe.export.precision, run.target.int8
    if precision in ("auto", "fp32"):
        return AS_EXPORTED

    def rewrite(path: Path) -> bytes:
        return quantize.rough(path, precision, scheme).SerializeToString()

    return Written(precision, rewrite)


def _folder() -> Path:
    """Where tables are kept: made, and tried by writing, since timing for minutes comes before the first table."""
    folder = Path("~", ".cache", "edgeprune", "tables")
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\n")
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"latency tables are kept in {folder}, which can't be written: {error}",
            "set HOME to a folder that can be written, as in HOME=/path/to/folder edgeprune ...",
        ) from error
    return folder
