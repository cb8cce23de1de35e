"""The order of the stages, and the one place that imports a stage, when it runs.

load -> dense -> synthesize -> prune -> cut -> repair -> tune -> export -> quantize -> measure -> attack -> report ->
the budget

Every stage between load and report leaves a folder in the run directory (`run_directory`), and the next one reads it
from there, so that a run that was killed and started again gives what an undisturbed one gives. What is synthesized and
repaired is decided by the recipe's `prune.repair`; where nothing is, those two stages are left out.

Under torchrun every process comes through here. What trains is done by all of them, the rest by the first alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune import (
    concurrency,
    data,
    devices,
    export,
    gate,
    models,
    plugins,
    prune,
    quantize,
    recipe,
    repair,
    robustness,
    serialization,
    targets,
    train,
)
from edgeprune import recipe as recipe_module
from edgeprune import report as report_stage
from edgeprune.data import open_data
from edgeprune.errors import UsageError
from edgeprune.measure import artifact, balanced, check_bundle
from edgeprune.pipeline.assemble_report import build_report, lock_facts
from edgeprune.pipeline.context import (
    Context,
    Ledger,
    Log,
    OtherDevices,
    Result,
    Step,
    check_together,
    load,
    multiple_of,
    stage_keys,
    with_epochs,
)
from edgeprune.pipeline.intermediates import (
    current_bundle,
    engine_script,
    export_onnx,
    measured_limits,
    quantize_job,
    shared_probes,
    victims,
)
from edgeprune.pipeline.latency_tables import latency_model
from edgeprune.pipeline.measure_devices import look_ahead, measure, side_by_side
from edgeprune.pipeline.run_directory import PUBLISHED, STAGES, Workdir
from edgeprune.quantities import suggest
from edgeprune.recipe import ALLOW_ESTIMATES, Recipe, TuneTable, to_toml
from edgeprune.records import Bundle, Reading

FORCEABLE = ("load", *STAGES)
SIZE_OF_FLOATS = (
    "With --precision auto the network is cut until its fp32 file has the size of the budget, for fp32 may ship; "
    "--precision int8 counts the int8 file, and keeps about four times as many parameters."
)


def recipe_from(file: Path | None, flags: Mapping[str, Any], sets: Sequence[str]) -> Recipe:
    """Merge a recipe file, flags and `--set` lines."""
    tables = targets.read_toml(file) if file else {}
    return recipe.build(tables, flags, sets)


def budget_pairs(lines: Sequence[str]) -> dict[str, str]:
    """`METRIC=LIMIT` lines as a mapping."""
    out = {}
    for line in lines:
        metric, equals, text = line.partition("=")
        if line.strip() == ALLOW_ESTIMATES:
            equals, text = "=", "true"
        if not equals or not text.strip():
            raise UsageError(f"--budget {line!r} must be METRIC=LIMIT", 'as in --budget "macs=50 %"')
        out[metric.strip()] = text.strip()
    return out


def compress(
    recipe: Recipe,
    output: Path | None,
    *,
    force: str | None = None,
    log: Log,
    bundle: Bundle | None = None,
    trust_run: bool = False,
) -> Result:
    """Run every stage that is not finished yet, and write the report.

    Args:
        output: the run directory; None for runs/MODEL-TARGET. force: the stage to redo from.
        bundle: a network in memory, instead of the recipe's model file. trust_run: believe what lies in the run
            directory although this user has not made it.
    """
    if force is not None and force not in FORCEABLE:
        raise UsageError(f"--force {force!r} is not a stage", suggest(force, FORCEABLE))
    recipe = with_epochs(recipe)
    target, budget = targets.target(recipe.target), recipe_module.budget(recipe)
    check_together(recipe, target)
    device = devices.device_from_url(recipe.measure.device, target.setup)
    folder = (
        output
        or Path("runs") / f"{Path(recipe.model.path).stem or 'model'}-{recipe.target.replace('/', '-')}"
    )
    if bundle is None:
        log(f"load: {recipe.model.path}")
    dense: Bundle = bundle or load(recipe.model)
    data = open_data(recipe.data, dense.input, recipe.seed) if recipe.data.path else None
    if data is not None:
        check_bundle(dense, data.held_out)
    with Workdir(folder, torch.get_num_threads(), trusted=trust_run) as work:
        run = Context(recipe, target, budget, work, dense, data, device, log)
        keys = work.agree(stage_keys(run))
        if "." not in run.decisions.method:
            plugins.check_options("methods", run.decisions.method, recipe.prune.options)
        if work.leads:
            work.claim(run.identity, lock_facts(run), again=force == "load")
            with serialization.replace_file(work.root / "recipe.toml") as file:
                file.write(to_toml(recipe).encode())
            if force is not None:
                work.forget_from(force)
        look_ahead(run, keys)
        return _run(run, keys)


def _run(run: Context, keys: Mapping[str, str]) -> Result:
    order = (
        ("dense", _dense), ("synthesize", _synthesize), ("prune", _prune), ("cut", _cut),
        ("repair", _repair), ("tune", _tune), ("export", _export), ("quantize", _quantize), ("measure", measure),
        ("attack", _attack),
    )  # fmt: skip
    folders: dict[str, Path] = {}
    beside = OtherDevices()

    def write(name: str, work: Callable[[Step], None], out: Path) -> None:
        work(Step(run, dict(folders), out, run.work.scratch(keys[name])))

    for name, work in order:
        if name not in keys:
            continue
        make = partial(
            run.work.stage, name, keys[name], partial(write, name, work), together=_trains(run, name)
        )
        if name == "measure":
            folders[name], beside = side_by_side(run, keys, folders, make)
        else:
            folders[name] = make()
    return _finish(run, folders, beside)


def _trains(run: Context, name: str) -> bool:
    if name == "prune":
        return run.decisions.trains
    return name == "tune" and run.decisions.trainable and run.decisions.tuning.epochs > 0


def _dense(step: Step) -> None:
    step.run.log("dense: export the network as it is")
    export_onnx(step.run, step.run.bundle, step.out / "dense.onnx", parent="")


def _synthesize(step: Step) -> None:
    run = step.run
    run.log("synthesize: make images from the network itself")
    made = data.run(run.bundle, run.recipe.synthesize, run.recipe.seed, step.scratch)
    run.log(f"synthesize: {len(made.images)} images")
    data.write(made, step.out)


def _prune(step: Step) -> None:
    run = step.run
    training = f"{run.recipe.tune.epochs} epochs of training, " if run.decisions.trains else ""
    pattern = "two of every four weights" if run.recipe.prune.granularity == "2:4" else "no limit"
    limits = ", ".join(f"{m} {limit.text}" for m, limit in run.budget.limits.items()) or pattern
    run.log(f"prune: {run.decisions.method}, {training}{limits}")
    if run.decisions.quantizes:
        quantize.check_skipped(step.folders["dense"] / "dense.onnx", run.recipe.quantize.skip)
    images = labels = None
    train = run.data.train if run.data is not None else None
    if run.data is not None and train is not None:
        images, labels = data.calibration_set(run.data, run.recipe.data.calibration)
    trials = shared_probes if run.decisions.trains else measured_limits
    table, notes = _training_table(run, run.recipe.tune) if run.decisions.trains else (run.recipe.tune, ())
    material = prune.PruningInputs(
        images, labels, trials(run, step.folders["dense"]), multiple_of(run), run.recipe.seed,
        unlabelled=images if run.decisions.looks_at_data else _synthetic(step),
        train=train, table=table, scratch=step.scratch,
        latency_model=latency_model(run, step.folders["dense"] / "dense.onnx"),
        file_share=run.decisions.file_share,
    )  # fmt: skip
    chosen = prune.run(run.bundle, run.recipe.prune, run.budget, material)
    chosen = replace(chosen, notes=(*chosen.notes, *notes))
    if run.decisions.quantizes and "size" in run.budget.limits and run.recipe.export.precision == "auto":
        chosen = replace(chosen, notes=(*chosen.notes, SIZE_OF_FLOATS))
    prune.write(chosen, step.out)


def _synthetic(step: Step) -> Tensor | None:
    return data.read(step.folders["synthesize"]).images if "synthesize" in step.folders else None


def _cut(step: Step) -> None:
    run = step.run
    channels = run.recipe.prune.granularity == "channel"
    run.log("cut: remove the channels and prove it" if channels else "cut: count what the zeros leave")
    chosen = prune.read(step.folders["prune"])
    example = models.normalized_example(run.bundle.input, run.recipe.seed + 1)
    plan, small = prune.run_cut(
        run.bundle, chosen.groups, chosen.masks, chosen.left_out, example, edited=chosen.edited
    )
    serialization.write(step.out / "plan.json", plan)
    models.save_network(small.module, step.out / "weights.safetensors")


def _repair(step: Step) -> None:
    run, small = step.run, current_bundle(step.run, step.folders)
    images = _synthetic(step)
    if images is None:
        assert run.data is not None, "stage_keys has refused such a run"
        images = data.calibration_images(run.data, run.recipe.data.calibration)
    kind = {"synthetic": "synthesized", "data": "calibration"}[run.decisions.repair]
    run.log(f"repair: solve the layers after each cut anew on {len(images)} {kind} images")
    held_out = run.data.held_out if run.data else None
    repaired, ledger = repair.run(run.bundle, small, images, held_out=held_out, seed=run.recipe.seed)
    models.save_network(repaired.bundle.module, step.out / "weights.safetensors")
    serialization.write(step.out / "ledger.json", Ledger(ledger, repaired.notes, repaired.facts))


def _tune(step: Step) -> None:
    run, small = step.run, current_bundle(step.run, step.folders)
    ledger: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()
    if run.data is not None:
        run.log(f"tune: {_describe_tuning(run)}")
        table, notes = _training_table(run, run.decisions.tuning)
        teacher = run.bundle if run.decisions.tuning.distill > 0 and run.decisions.tuning.epochs else None
        small, ledger = train.run(
            small, run.data, table, calibration=run.recipe.data.calibration, teacher=teacher,
            seed=run.recipe.seed, scratch=step.scratch, measured="repair" in step.folders,
            masks=prune.read(step.folders["prune"]).masks.weights,
        )  # fmt: skip
    models.save_network(small.module, step.out / "weights.safetensors")
    serialization.write(step.out / "ledger.json", Ledger(ledger, notes))


def _training_table(run: Context, table: TuneTable) -> tuple[TuneTable, tuple[str, ...]]:
    assert run.data is not None, "a method that trains is refused without data"
    dense = models.deployed(run.bundle).eval()
    found, notes = train.choose_augmentation(dense, run.data, table, run.recipe.seed)
    for note in notes:
        run.log(f"augment: {note}")
    return found, notes


def _describe_tuning(run: Context) -> str:
    if not run.decisions.trainable:
        return "nothing (the data is for evaluation only)"
    tuning = run.decisions.tuning
    recalibrates = tuning.recalibrate and train.normalizers(run.bundle.module)
    words = ["recalibrate batch-norm"] if recalibrates else []
    if tuning.epochs:
        words.append(f"{tuning.epochs} epoch{'s' if tuning.epochs > 1 else ''} of fine-tuning")
    return ", ".join(words) or "nothing"


def _export(step: Step) -> None:
    run, out = step.run, step.out
    run.log("export: model.onnx, model.pt2, weights and plan; read them back in a fresh process")
    small = current_bundle(run, step.folders)
    pattern = None
    if run.recipe.prune.granularity == "2:4":
        masks = prune.read(step.folders["prune"]).masks.weights
        pattern = {name: tuple(keep.shape) for name, keep in masks.items()}
    parent = run.bundle.source.sha256
    artifact, parity = export_onnx(run, small, out / "model.onnx", parent=parent, pattern=pattern)
    export.save_modules(small, out)
    reloaded = export.check_reload(out, small.input, models.deployed(small))
    serialization.write(out / "parity.json", Ledger((*parity, *reloaded)))
    engine_script(run, artifact, out)


def _quantize(step: Step) -> None:
    run = step.run
    run.log(f"quantize: {run.recipe.export.precision}")
    job = quantize_job(run, step.folders, step.scratch)
    made = quantize.run(step.folders["export"] / "model.onnx", step.out, job)
    if made.file:
        precise = artifact(step.out / made.file, run.bundle.input)
        opset = run.recipe.export.opset or run.target.opset
        engine_script(run, replace(precise, precision=made.precision, opset=opset), step.out)


def _attack(step: Step) -> None:
    run, table = step.run, recipe.attack(step.run.recipe)
    assert run.data is not None, "an attack is refused without data"
    images = run.data.held_out
    if table.limit:
        images = balanced(images, table.limit, run.recipe.seed)
    run.log(f"attack: {table.name} on {len(images)} held-out images, after every stage")
    data = f"{run.data.fingerprint} {images.name} {len(images)}"
    job = robustness.attack_job(table, seed=run.recipe.seed, data=data)
    found = victims(run, step.folders, step.scratch)
    serialization.write(
        step.out / "attacked.json",
        robustness.run_stages(found, images, job, scratch=step.scratch, log=run.log),
    )


def _finish(run: Context, folders: Mapping[str, Path], beside: OtherDevices) -> Result:
    small = current_bundle(run, folders)
    places = [folders[name] for name in ("quantize", "export", "dense") if name in folders]
    sources = {
        name: place / name for name in PUBLISHED for place in reversed(places) if (place / name).exists()
    }
    report = build_report(run, folders, small, beside)
    hashes = {name: serialization.sha256(path) for name, path in sources.items()}
    report = replace(report, environment={**report.environment, "files": hashes})
    if run.work.leads:
        for name in PUBLISHED:
            if name in sources:
                run.work.publish(sources[name], name)
            else:
                (run.work.root / name).unlink(missing_ok=True)
        report_stage.run(report, run.work.root)
    # A run that is not faster says so first and is no failure of the run: a gate is what may fail it.
    verdict = gate.run(report, run.budget, None, baseline_missing=False, must_be_faster=False)
    count = 1 + len(run.recipe.measure.beside)
    trouble = concurrency.combined_error(beside.failed, count) if beside.failed else None
    return Result(run.work.root, report, verdict, small, trouble)
