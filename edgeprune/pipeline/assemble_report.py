"""Putting a finished run's report together: what the stages left in their folders, and the notes a reader must see."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune import (
    data,
    measure,
    models,
    prune,
    quantize,
    recipe,
    report,
    robustness,
    serialization,
    targets,
)
from edgeprune.errors import WorkdirError
from edgeprune.measure import nonzero_weights as count
from edgeprune.pipeline.context import Context, Ledger, OtherDevices
from edgeprune.pipeline.measure_devices import joined
from edgeprune.records import Bundle, Plan, Reading, Report


def build_report(
    run: Context, folders: Mapping[str, Path], small: Bundle, beside: OtherDevices | None = None
) -> Report:
    """The report of a run whose stages are all done."""
    plan = small.plans[-1]
    measured = serialization.read(measure.Measured, folders["measure"] / "measured.json", WorkdirError)
    further = joined(run, measured, beside or OtherDevices())
    ledgers = [
        serialization.read(Ledger, folders[name] / "ledger.json", WorkdirError)
        for name in ("repair", "tune")
        if name in folders
    ]
    attacked = robustness.Attacked((), (), (), ())
    if "attack" in folders:
        attacked = serialization.read(type(attacked), folders["attack"] / "attacked.json", WorkdirError)
    example = models.normalized_example(run.bundle.input, run.recipe.seed)
    rows = (models.layer_costs(run.bundle.module, example), models.layer_costs(small.module, example))
    nonzero = None
    if run.recipe.prune.granularity != "channel":
        nonzero = {"dense": count(run.bundle.module), "compressed": count(small.module)}
    chosen = prune.read(folders["prune"])
    environment = report.environment(run.device.facts(), run.target.title)
    parts: dict[str, Any] = {
        "recipe": recipe.to_dict(run.recipe),
        "environment": {**environment, **further.environment, "threads": run.work.threads},
        "before": (*measured.before, *attacked.before, *further.measured.before),
        "after": (*measured.after, *attacked.after, *further.measured.after),
        "samples": {**measured.samples, **further.measured.samples},
        "layers": report.layers(*rows, measured.times, plan.left_out, nonzero=nonzero),
        "history": chosen.record,
    }  # fmt: skip
    made = quantize.read(folders["quantize"]) if "quantize" in folders else None
    if made is not None:
        parts["after"] = (*parts["after"], *made.readings)
        parts["history"] = {**chosen.record, "precision": [dict(row) for row in made.candidates]}
    parity = serialization.read(Ledger, folders["export"] / "parity.json", WorkdirError)
    notes = (
        *run.bundle.notes,
        *report.sparse_notes(run.recipe.prune.granularity, measured.after),
        *further.measured.notes,
        *(made.notes if made is not None else ()),
        *attacked.notes,
        *_parity_notes(parity.readings),
        *(data.read(folders["synthesize"]).notes if "synthesize" in folders else ()),
        *chosen.notes,
        *(note for ledger in ledgers for note in ledger.notes),
        *_notes(run, plan),
    )
    readings = [reading for ledger in ledgers for reading in ledger.readings]
    lines = robustness.merged(readings, attacked.ledger)
    return report.build_sections(parts, ledger=lines, notes=notes, plan=plan)


def lock_facts(run: Context) -> dict[str, Any]:
    """The rest of edgeprune.lock: what one needs to make the same files again."""
    calibration = targets.resolve("calibration", run.recipe.data.calibration)
    chosen = None
    if run.data is not None and run.data.train is not None:
        chosen = data.calibration_digest(run.data.train.labels, run.recipe.data.calibration)
    return {
        "recipe": recipe.to_dict(run.recipe), "versions": report.versions(),
        "data": run.data.fingerprint if run.data else None, "calibration": serialization.sha256(calibration),
        "calibration_images": chosen, "threads": run.work.threads,
    }  # fmt: skip


def _parity_notes(readings: Sequence[Reading]) -> list[str]:
    """How far the files' outputs are from the network's, relative to the largest logit; and the 2:4 pattern's proof."""
    proofs = [str(r.conditions["words"]) for r in readings if "words" in r.conditions]
    worst: dict[str, float] = {}
    for reading in readings:
        if reading.value is not None and "words" not in reading.conditions:
            worst[reading.artifact] = max(worst.get(reading.artifact, 0.0), reading.value)
    if not worst:
        return proofs
    largest = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return [*proofs, f"Largest difference to the network in torch, relative to the largest logit: {largest}."]


def _why_float(run: Context) -> str:
    others = [p for p in run.target.precisions if p != "fp32"]
    if not others:
        return f"The file is fp32, the only precision that {run.target.title} takes."
    if not run.decisions.on_target:
        return (
            f"The file is fp32: whether {' or '.join(others)} is faster on {run.target.title} shows only there. "
            f"Give --device, or name it with --precision {others[-1]}."
        )
    return (
        "The file is fp32: there are no images to choose a precision by. Give --data, or name one with "
        f"--precision {others[-1]}, which makes images from the network itself."
    )


def _notes(run: Context, plan: Plan) -> list[str]:
    """What the reader of a report must know of how it came to be."""
    notes = list(run.data.notes) if run.data else []
    others = {name: n for name, n in run.work.made_with.items() if n and n != run.work.threads}
    if others:
        made = ", ".join(f"{name} with {n}" for name, n in others.items())
        notes.append(
            f"Not all stages were made with the {run.work.threads} thread(s) of this process: {made}. Sums are rounded "
            "in another order then, and training gives other weights; OMP_NUM_THREADS sets the number."
        )
    if run.recipe.prune.method == "auto":
        why = "there are training images" if run.decisions.trainable else "there is no training data"
        notes.append(f"The method is {run.decisions.method}, because {why}.")
    if run.recipe.export.precision == "auto" and not run.decisions.quantizes:
        notes.append(_why_float(run))
    if plan.left_out:
        named = ", ".join(list(plan.left_out)[:3])
        more = f" and {len(plan.left_out) - 3} more" if len(plan.left_out) > 3 else ""
        notes.append(f"Left whole: {named}{more}; the report says why.")
    return notes
