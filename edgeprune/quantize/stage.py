"""quantize: give the file the precision that was asked for, or the fastest that keeps its answers; and prove it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune import serialization
from edgeprune.errors import ParityError, UnsupportedModel, UsageError, WorkdirError
from edgeprune.quantities import suggest
from edgeprune.quantize import fp16, int8
from edgeprune.quantize.evaluation import floats
from edgeprune.quantize.finalize import Shipped, finish
from edgeprune.quantize.job import Built, Job, Quantized
from edgeprune.quantize.selection import FLOAT, Candidate, Selection, entries, of_dense, pick, rows, timed

RESULT_VERSION = 1
FILE, RECORD = "model.onnx", "quantized.json"
BUILDERS = {"int8": int8.build, "fp16": fp16.build}

IMAGES_HINT = "give --data with a training part (without --data-use evaluate), or ask for --precision fp32"


def run(exported: Path, out: Path, job: Job) -> Quantized:
    """Make the file that ships: out/model.onnx, unless the exported one does; and out/quantized.json, what was done.

    A precision that is asked for by name ships, or there is an error. With "auto" every precision of the target is
    built, timed and judged, and the fastest ships that stays within the tolerance and the budget: the exported file
    itself where nothing else does, with a note that says why.
    """
    check_asked(job.precision, job.precisions)
    out.mkdir(parents=True, exist_ok=True)
    wanted, notes = _wanted(job)
    if wanted and job.precision == "auto":
        result, data = _auto(exported, wanted, job)
    elif wanted:
        result, data = _named(exported, job)
    else:
        result, data = Quantized(FLOAT, "", {}, (), (), ()), None
    result = replace(result, notes=(*result.notes, *notes))
    (out / FILE).unlink(missing_ok=True)
    if data is not None:
        _write(out / FILE, data)
    serialization.write(out / RECORD, result)
    return result


def read(folder: Path) -> Quantized:
    """What `run` left in a folder."""
    return serialization.read(Quantized, folder / RECORD, WorkdirError)


def shipped(exported: Path, folder: Path) -> Path:
    """The file that ships: the one in the stage's folder, or the exported one where there is none."""
    return folder / FILE if (folder / FILE).is_file() else exported


def check_asked(precision: str, precisions: Sequence[str], target: str = "the target") -> None:
    """Refuse a precision that the target doesn't take.

    Raises:
        UsageError: names what it takes.
    """
    if precision not in ("auto", *precisions):
        raise UsageError(
            f"precision {precision!r} is not one that {target} takes; it takes {', '.join(precisions)}",
            suggest(precision, ("auto", *precisions)),
        )


def wants_images(
    precision: str, precisions: Sequence[str], *, timed: bool, limits: Collection[str] = ()
) -> bool:
    """Whether images will be looked at: a low precision is asked for, or there are some to choose from."""
    if precision == "auto":
        return (timed or "size" in limits) and any(name in precisions for name in BUILDERS)
    return precision in BUILDERS


def _wanted(job: Job) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if job.precision == FLOAT:
        return (), ()
    if job.precision != "auto":
        if job.material is None and job.precision == "int8":
            raise UsageError(
                "int8 needs images to choose its ranges on, and there are none (random noise would not do)",
                IMAGES_HINT,
            )
        return (job.precision,), ()
    able = tuple(name for name in BUILDERS if name in job.precisions)
    words = " and ".join(able)
    if not wants_images("auto", job.precisions, timed=job.timer is not None, limits=job.limits):
        return (), (
            f"The file is {FLOAT}: whether {words} is faster is only known on the target itself. Give its --device, or "
            f"name the precision (--precision {able[0]}).",
        ) if able else ()
    if job.material is None and "int8" in able:
        left_out = (
            "int8 was not built: it needs images to choose its ranges on. Give --data with a training part."
        )
        return tuple(name for name in able if name != "int8"), (left_out,)
    return able, ()


def _named(exported: Path, job: Job) -> tuple[Quantized, bytes]:
    name, start = job.precision, floats(exported, job)
    built = BUILDERS[name](start, job)
    _check_loss(built, job)
    made = finish(built, start)
    field = Candidate(exported, start, {name: built}, {name: made}, {}, timed(exported, {name: made}, job))
    notes, seconds = list(made.notes), field.seconds
    if seconds and seconds[name] > seconds[FLOAT]:
        notes.append(
            f"{name} is slower than {FLOAT} here, {field.against_float(name)}; it ships because it was asked for. "
            "--precision auto keeps the faster one."
        )
    picked = Selection(name, {FLOAT: f"{name} was asked for"})
    return Quantized(name, FILE, made.choice, rows(field, picked), made.readings, tuple(notes)), made.data


def _auto(exported: Path, wanted: Sequence[str], job: Job) -> tuple[Quantized, bytes | None]:
    start = floats(exported, job)
    built: dict[str, Built] = {}
    made: dict[str, Shipped] = {}
    failed: dict[str, str] = {}
    for name in wanted:
        try:
            built[name] = BUILDERS[name](start, job)
            _check_loss(built[name], job)
            made[name] = finish(built[name], start)
        except (UnsupportedModel, ParityError) as error:
            failed[name] = error.message
    field = Candidate(exported, start, built, made, failed, timed(exported, made, job))
    picked = pick(entries(field), job.limits, of_dense(field, job), field.place)
    notes = tuple(f"{name} does not ship: {why}." for name, why in picked.why_not.items() if name != FLOAT)
    ships = made.get(picked.precision)
    if ships is None:
        return Quantized(FLOAT, "", {}, rows(field, picked), (), notes), None
    result = Quantized(
        picked.precision, FILE, ships.choice, rows(field, picked), ships.readings, (*ships.notes, *notes)
    )
    return result, ships.data


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


def _write(path: Path, data: bytes) -> None:
    with serialization.replace_file(path) as file:
        file.write(data)
