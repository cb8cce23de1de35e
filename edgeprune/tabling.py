"""The latency table of a device: where it is kept, how its files are timed, and what predicts a network by it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.building import trials
from edgeprune.context import Context, Say, torch_part
from edgeprune.errors import UsageError
from edgeprune.keys import multiple_of
from edgeprune.recipe import MeasureTable

# Seconds for each of many small files; the whole network is timed longer in the end.
EACH_S = 2.0
TIMED = ("latency_p50", "latency_p90", "latency_p99")


def bench(trials: Any, table: MeasureTable, say: Say) -> Any:
    """A device as `nn.latency_survey.Bench`. Tables are shared by all runs of a user: ~/.cache/edgeprune/tables.

    Args:
        trials: `stages.measure_trial.Trials`, how files are timed there.

    Raises:
        UsageError: the folder of the tables can't be written. DeviceError: the device does not answer.
    """
    folder = _folder()
    facts = trials.device.facts()
    quick = replace(table, seconds=min(EACH_S, table.seconds))
    processor = f"{facts.get('board', '')} {facts.get('cpu', '')}".strip()
    where = f"{trials.device.where()}{' (emulated)' if trials.emulated else ''}"
    place = f"{where}, {processor}, {trials.version}, {table.threads} thread(s), fp32"

    def seconds(files: Mapping[str, Path]) -> dict[str, float]:
        timed = trials.latency(files, quick)
        rows = {n: next(r for r in rows if r.metric == TIMED[0]) for n, rows in timed.readings.items()}
        # One clock for all of a table: the thread's own where there is one, which other work does not disturb.
        own = all(r.conditions.get("cpu_p50") for r in rows.values())
        return {n: float(r.conditions["cpu_p50"] if own else r.value) for n, r in rows.items()}

    def nodes(file: Path) -> list[tuple[str, float]]:
        return [(node.name, node.seconds) for node in trials.nodes(file, quick)]

    return torch_part("latency_survey").Bench(seconds, nodes, place, folder, say)


def clock(run: Context, file: Path) -> Callable[[Any], Any] | None:
    """From the costs of a run's network to what predicts the time of its cuts, by a table that is filled where it must.

    None where no latency is in the budget, where the method trains, or where the file will have another precision: the
    table is of fp32 files.

    Args:
        file: the dense network, as exported.
    """
    timed = any(metric in run.budget.limits for metric in TIMED)
    if (
        not timed
        or run.trains
        or run.device.name == "fake"
        or run.recipe.export.precision not in ("auto", "fp32")
    ):
        return None

    def predictor(costs: Any) -> Any:
        survey = torch_part("latency_survey")
        there = bench(trials(run), run.recipe.measure, run.say)
        floor = run.recipe.prune.floor
        return survey.survey(survey.subject(file, costs), there, multiple_of=multiple_of(run), floor=floor)

    return predictor


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
