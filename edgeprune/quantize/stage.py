"""quantize: give the file the requested precision, or the fastest that keeps the accuracy, and verify it."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune import serialization
from edgeprune.errors import ParityError, UnsupportedModel, UsageError, WorkdirError
from edgeprune.quantities import show, suggest
from edgeprune.quantize import fp16, int8
from edgeprune.quantize.evaluation import FloatBaseline, float_baseline
from edgeprune.quantize.finalize import finish
from edgeprune.quantize.job import Built, Job, Quantized
from edgeprune.quantize.selection import (
    FLOAT,
    Candidate,
    Selection,
    dense_facts,
    pick,
    place_of,
    rows,
    timed,
    with_facts,
)

RESULT_VERSION = 1
FILE, RECORD = "model.onnx", "quantized.json"
BUILDERS = {"int8": int8.build, "fp16": fp16.build}

IMAGES_HINT = "give --data with a training part (without --data-use evaluate), or ask for --precision fp32"


def run(exported: Path, out: Path, job: Job) -> Quantized:
    """Write the file that ships, out/model.onnx, unless the exported one does; and out/quantized.json.

    A precision that is asked for by name ships, or there is an error. With "auto" every precision of the target is
    built, timed and judged, and the fastest ships that stays within the tolerance and the budget: the exported file
    itself where nothing else does, with a note that says why.

    Raises:
        UsageError: the target doesn't take the precision; there are no calibration images, or they are no numbers; a
            name of the recipe is no layer.
        UnsupportedModel: the requested precision can't be built of this network.
        ParityError: it loses more than `quantize.tolerance`, or the built file fails its verification.
        ModelError: the exported file is not readable, or its logits are NaN or infinite.
    """
    check_precision(job.precision, job.precisions)
    out.mkdir(parents=True, exist_ok=True)
    precisions, notes = _precisions(job)
    result, data = Quantized(FLOAT, "", {}, (), (), ()), None
    if precisions:
        result, data = _quantize(exported, precisions, job)
    result = replace(result, notes=(*result.notes, *notes))
    (out / FILE).unlink(missing_ok=True)
    if data is not None:
        with serialization.replace_file(out / FILE) as file:
            file.write(data)
    serialization.write(out / RECORD, result)
    return result


def read(folder: Path) -> Quantized:
    """The result of `run` in a folder."""
    return serialization.read(Quantized, folder / RECORD, WorkdirError)


def shipped(exported: Path, folder: Path) -> Path:
    """The file that ships: the one in the stage's folder, or the exported one where there is none."""
    return folder / FILE if (folder / FILE).is_file() else exported


def check_precision(precision: str, precisions: Sequence[str], target: str = "the target") -> None:
    """Refuse a precision that is none of those that the target takes."""
    if precision not in ("auto", *precisions):
        raise UsageError(
            f"precision {precision!r} is not one that {target} takes; it takes {', '.join(precisions)}",
            suggest(precision, ("auto", *precisions)),
        )


def wants_images(
    precision: str, precisions: Sequence[str], *, timed: bool, limits: Collection[str] = ()
) -> bool:
    """Whether calibration images are needed: for a low precision, or some to choose from.

    Args:
        timed: whether files can be timed on the target's device.
        limits: the metrics of the run's budget.
    """
    if precision == "auto":
        return (timed or "size" in limits) and any(name in precisions for name in BUILDERS)
    return precision in BUILDERS


def _precisions(job: Job) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The precisions to build, and notes about those that are left out."""
    if job.precision == FLOAT:
        return (), ()
    if job.precision != "auto":
        if job.calibration is None and job.precision == "int8":
            raise UsageError(
                "int8 needs images to choose its ranges on, and there are none (random noise would not do)",
                IMAGES_HINT,
            )
        return (job.precision,), ()
    able = tuple(name for name in BUILDERS if name in job.precisions)
    if not wants_images("auto", job.precisions, timed=job.timer is not None, limits=job.limits):
        return (), (
            f"The file is {FLOAT}: whether {' and '.join(able)} is faster is only known on the target itself. Give its "
            f"--device, or name the precision (--precision {able[0]}).",
        ) if able else ()
    if job.calibration is None and "int8" in able:
        left_out = (
            "int8 was not built: it needs images to choose its ranges on. Give --data with a training part."
        )
        return tuple(name for name in able if name != "int8"), (left_out,)
    return able, ()


def _quantize(exported: Path, precisions: Sequence[str], job: Job) -> tuple[Quantized, bytes | None]:
    floats = float_baseline(exported, job)
    built = [_candidate(name, floats, job) for name in precisions]
    times = timed(exported, built, job)
    candidates, place = with_facts(built, exported, floats, times), place_of(times)
    if job.precision == "auto":
        selection = pick(candidates, job.limits, dense_facts(job, floats, times), place)
        notes = [f"{name} does not ship: {why}." for name, why in selection.why_not.items() if name != FLOAT]
    else:
        selection = Selection(job.precision, {FLOAT: f"{job.precision} was asked for"})
        notes = _slower(candidates, place)
    table = rows(candidates, floats, selection)
    ships = next(c.file for c in candidates if c.precision == selection.precision)
    if ships is None:
        return Quantized(FLOAT, "", {}, table, (), tuple(notes)), None
    notes = (*ships.notes, *notes)
    return Quantized(selection.precision, FILE, ships.choice, table, ships.readings, notes), ships.data


def _candidate(name: str, floats: FloatBaseline, job: Job) -> Candidate:
    """Build a precision; with "auto" a failure is the reason why it does not ship."""
    built = None
    try:
        built = BUILDERS[name](floats, job)
        _check_loss(built, job)
        return Candidate(name, built=built, file=finish(built, floats))
    except (UnsupportedModel, ParityError) as error:
        if job.precision != "auto":
            raise
        return Candidate(name, why_not=error.message, built=built)


def _check_loss(built: Built, job: Job) -> None:
    loss, tolerance = built.judgement.loss, job.table.tolerance
    if loss <= tolerance:
        return
    what = "agreement with the float file" if built.judgement.clean_accuracy is None else "accuracy"
    back = f" with {len(built.fallback)} layers in float" if built.fallback else ""
    accept = math.ceil(loss * 1000.0) / 1000.0
    raise ParityError(
        f"{built.name} loses {100 * loss:.2f} points of {what}{back}; quantize.tolerance accepts {100 * tolerance:g}",
        f"accept it with --set quantize.tolerance={accept:g}, or ask for --precision fp32",
    )


def _slower(candidates: Sequence[Candidate], place: str) -> list[str]:
    first, asked = candidates
    if first.seconds is None or asked.seconds is None or asked.seconds <= first.seconds:
        return []
    times = f"{show(asked.seconds, 's')} against {show(first.seconds, 's')} on {place}"
    return [
        f"{asked.precision} is slower than {FLOAT} here, {times}; it ships because it was asked for. "
        "--precision auto keeps the faster one."
    ]
