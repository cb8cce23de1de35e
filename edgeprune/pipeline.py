"""The order of the stages, and the one place that imports a stage, when it runs.

load -> dense -> prune -> cut -> tune -> export -> measure -> report -> the budget

Every stage between load and report leaves a folder in the run directory (`workdir`), and the next one reads it from
there, so that a run that was killed and started again gives what an undisturbed one gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeprune import bundled, codec, plugins
from edgeprune import recipe as recipes
from edgeprune.building import export_onnx, probes
from edgeprune.context import Context, Ledger, Result, Say, refuse_later_versions, stage, torch_part
from edgeprune.errors import UsageError, WorkdirError
from edgeprune.quantities import suggest
from edgeprune.recipe import Recipe
from edgeprune.records import Budget, Bundle, Plan, Reading, Report
from edgeprune.workdir import STAGES, Workdir, digest

FORCEABLE = ("load", *STAGES)
TAKE_AWAY = ("model.onnx", "model.pt2", "weights.safetensors", "plan.json", "build_engine.sh")


def recipe_from(file: Path | None, flags: Mapping[str, Any], sets: Sequence[str]) -> Recipe:
    """Merge a recipe file, flags and `--set` lines.

    Raises:
        UsageError: an unknown key, a wrong value, or a file that is not TOML.
    """
    tables = bundled.read_toml(file) if file else {}
    return recipes.build(tables, flags, sets)


def budget_pairs(lines: Sequence[str]) -> dict[str, str]:
    """`METRIC=LIMIT` lines as a mapping.

    Raises:
        UsageError: a line without "=".
    """
    out = {}
    for line in lines:
        metric, equals, text = line.partition("=")
        if not equals or not text.strip():
            raise UsageError(f"--budget {line!r} must be METRIC=LIMIT", 'as in --budget "macs=50 %"')
        out[metric.strip()] = text.strip()
    return out


def compress(
    recipe: Recipe, output: Path | None, *, force: str | None = None, say: Say, bundle: Bundle | None = None
) -> Result:
    """Run every stage that is not finished yet, and write the report.

    Args:
        output: the run directory; None for runs/MODEL-TARGET. force: the stage to redo from.
        bundle: a network in memory, instead of the recipe's model file.

    Raises:
        EdgepruneError: any of its kinds; what was finished stays in the run directory.
    """
    if force is not None and force not in FORCEABLE:
        raise UsageError(f"--force {force!r} is not a stage", suggest(force, FORCEABLE))
    target, budget = bundled.target(recipe.target), recipes.budget(recipe)
    refuse_later_versions(recipe, target)
    device = import_module("edgeprune.devices").device_from_url(recipe.measure.device)
    folder = (
        output
        or Path("runs") / f"{Path(recipe.model.path).stem or 'model'}-{recipe.target.replace('/', '-')}"
    )
    if bundle is None:
        say(f"load: {recipe.model.path}")
    dense: Bundle = bundle or stage("load").run(recipe.model)
    data = torch_part("data").open_data(recipe.data, dense.input, recipe.seed) if recipe.data.path else None
    with Workdir(folder) as work:
        run = Context(recipe, target, budget, work, dense, data, device, say)
        work.claim(run.identity, _facts(run), again=force == "load")
        (work.root / "recipe.toml").write_text(recipes.to_toml(recipe), encoding="utf-8")
        if force is not None:
            work.forget_from(force)
        return _run(run)


def _run(run: Context) -> Result:
    dense_key = _dense_key(run)
    dense = run.work.stage("dense", dense_key, lambda out: _dense(run, out))
    prune_key = _prune_key(run, dense_key)
    chosen = run.work.stage("prune", prune_key, lambda out: _prune(run, dense, out))
    cut_key = run.work.key("cut", stage("cut").RESULT_VERSION, prune_key)
    cut = run.work.stage("cut", cut_key, lambda out: _cut(run, chosen, out))
    tune_key = run.work.key(
        "tune", stage("tune").RESULT_VERSION, cut_key, run.recipe.tune, run.data_key, run.recipe.seed
    )
    tuned = run.work.stage("tune", tune_key, lambda out: _tune(run, cut, out, run.work.scratch(tune_key)))
    export_key = run.work.key(
        "export", stage("export").RESULT_VERSION, tune_key, run.recipe.export, run.target
    )
    exported = run.work.stage("export", export_key, lambda out: _export(run, (cut, tuned), out))
    measure_key = run.work.key(
        "measure",
        stage("measure").RESULT_VERSION,
        export_key,
        run.recipe.measure,
        run.data_key,
        run.device.where(),
    )
    folders = {"dense": dense, "prune": chosen, "cut": cut, "tune": tuned, "export": exported}
    folders["measure"] = run.work.stage("measure", measure_key, lambda out: _measure(run, folders, out))
    return _finish(run, folders)


def _dense_key(run: Context) -> str:
    inputs = (run.identity, run.code_key, run.recipe.export, run.target.opset)
    return run.work.key("dense", stage("export").RESULT_VERSION, *inputs)


def _prune_key(run: Context, dense_key: str) -> str:
    timed = any(m.startswith("latency") for m in run.budget.limits)
    table, seed = run.recipe.prune, run.recipe.seed
    seen = run.data_key if run.trainable else None
    clock = [run.recipe.measure, run.device.where()] if timed else None
    inputs = (dense_key, table, run.budget, multiple_of(run), seed, seen, clock)
    return run.work.key("prune", stage("prune").RESULT_VERSION, *inputs)


def multiple_of(run: Context) -> int:
    """What kept channels should be multiples of: the recipe's wish, or the target's fact for what is built."""
    return run.recipe.prune.multiple_of or run.target.multiple_of["fp32"]


def _dense(run: Context, out: Path) -> None:
    run.say("dense: export the network as it is")
    export_onnx(run, run.bundle, out / "dense.onnx", parent="")


def _prune(run: Context, dense: Path, out: Path) -> None:
    prune = stage("prune")
    method = prune.method_name(run.recipe.prune, run.trainable)
    run.say(f"prune: {method} at {_budget_words(run.budget)}")
    images = labels = None
    if run.trainable:
        data = torch_part("data")
        images = data.calibration_images(run.data, run.recipe.data.calibration)
        labels = run.data.train.labels[
            data.calibration_indices(run.data.train.labels, run.recipe.data.calibration)
        ]
    material = prune.Material(images, labels, probes(run, dense), multiple_of(run), run.recipe.seed)
    chosen = prune.run(run.bundle, run.recipe.prune, run.budget, material)
    prune.write(chosen, out)


def _cut(run: Context, chosen_folder: Path, out: Path) -> None:
    run.say("cut: remove the channels and prove it")
    chosen = stage("prune").read(chosen_folder)
    example = torch_part("costs").normalized_example(run.bundle.input, run.recipe.seed + 1)
    plan, small = stage("cut").run(run.bundle, chosen.groups, chosen.masks, chosen.left_out, example)
    torch_part("store").save_plan(plan, out / "plan.json")
    torch_part("store").save_network(small.module, out / "weights.safetensors")


def _restored(run: Context, cut: Path, weights: Path) -> Bundle:
    store = torch_part("store")
    return store.restore(run.bundle, (store.load_plan(cut / "plan.json"),), weights / "weights.safetensors")


def _tune(run: Context, cut: Path, out: Path, scratch: Path) -> None:
    small = _restored(run, cut, cut)
    ledger: tuple[Reading, ...] = ()
    if run.data is not None:
        run.say(f"tune: {_tune_words(run)}")
        teacher = run.bundle if run.recipe.tune.distill > 0 and run.recipe.tune.epochs else None
        small, ledger = stage("tune").run(
            small, run.data, run.recipe.tune, calibration=run.recipe.data.calibration, teacher=teacher,
            seed=run.recipe.seed, scratch=scratch,
        )  # fmt: skip
    torch_part("store").save_network(small.module, out / "weights.safetensors")
    codec.write(out / "ledger.json", Ledger(ledger))


def _tune_words(run: Context) -> str:
    if not run.trainable:
        return "nothing (the data is for evaluation only)"
    epochs = run.recipe.tune.epochs
    words = ["recalibrate batch-norm"] if run.recipe.tune.recalibrate else []
    if epochs:
        words.append(f"{epochs} epoch{'s' if epochs > 1 else ''} of fine-tuning")
    return ", ".join(words) or "nothing"


def _export(run: Context, folders: tuple[Path, Path], out: Path) -> None:
    run.say("export: model.onnx, model.pt2, weights and plan; read them back in a fresh process")
    cut, tuned = folders
    export, small = stage("export"), _restored(run, cut, tuned)
    artifact, parity = export_onnx(run, small, out / "model.onnx", parent=run.bundle.source.sha256)
    export.save_modules(small, out)
    reloaded = export.check_reload(out, small.input, torch_part("bundle").deployed(small))
    codec.write(out / "parity.json", Ledger((*parity, *reloaded)))
    if "tensorrt" in run.target.setup:
        script = plugins.build("runtimes", "tensorrt", {}).engine_script(
            run.target, artifact, dynamic_batch=run.recipe.export.dynamic_batch
        )
        (out / "build_engine.sh").write_text(script, encoding="utf-8")
        (out / "build_engine.sh").chmod(0o755)


def _measure(run: Context, folders: Mapping[str, Path], out: Path) -> None:
    run.say(f"measure: dense and compressed in turn on {run.device.where()}")
    measure_run = stage("measure_run")
    plan: Plan = torch_part("store").load_plan(folders["cut"] / "plan.json")
    files = {"dense": folders["dense"] / "dense.onnx", "compressed": folders["export"] / "model.onnx"}
    images = run.data.held_out if run.data else None
    wanted = measure_run.Wanted(run.bundle.input, run.device, run.recipe.measure, run.target, images, run.say)
    codec.write(out / "measured.json", measure_run.run(wanted, files, plan))


def _finish(run: Context, folders: Mapping[str, Path]) -> Result:
    for name in TAKE_AWAY:
        if (folders["export"] / name).exists():
            run.work.publish(folders["export"] / name, name)
    run.work.publish(folders["dense"] / "dense.onnx", "dense.onnx")
    small = _restored(run, folders["cut"], folders["tune"])
    report = _report(run, folders, small)
    stage("report").run(report, run.work.root)
    verdict = stage("gate").run(report, run.budget, None, baseline_missing=False)
    return Result(run.work.root, report, verdict, small)


def _report(run: Context, folders: Mapping[str, Path], small: Bundle) -> Report:
    build, costs, plan = stage("report_build"), torch_part("costs"), small.plans[-1]
    measured = codec.read(stage("measure_run").Measured, folders["measure"] / "measured.json", WorkdirError)
    ledger = codec.read(Ledger, folders["tune"] / "ledger.json", WorkdirError)
    example = costs.normalized_example(run.bundle.input, run.recipe.seed)
    rows = (costs.layer_costs(run.bundle.module, example), costs.layer_costs(small.module, example))
    parts = {
        "recipe": recipes.to_dict(run.recipe),
        "environment": build.environment(run.device.facts(), run.target.title),
        "before": measured.before, "after": measured.after, "samples": measured.samples,
        "layers": build.layers(*rows, measured.times, plan.left_out),
    }  # fmt: skip
    parity = codec.read(Ledger, folders["export"] / "parity.json", WorkdirError)
    notes = (
        *measured.notes,
        *_parity_notes(parity.readings),
        *stage("prune").read(folders["prune"]).notes,
        *_notes(run, plan),
    )
    return build.build(parts, ledger=ledger.readings, notes=notes, plan=plan)


def _parity_notes(readings: Sequence[Reading]) -> list[str]:
    """How far the files' answers are from the network's; differences are relative to the largest logit."""
    worst: dict[str, float] = {}
    for reading in readings:
        if reading.value is not None:
            worst[reading.artifact] = max(worst.get(reading.artifact, 0.0), reading.value)
    if not worst:
        return []
    said = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return [f"Largest difference to the network in torch, relative to the largest logit: {said}."]


def _notes(run: Context, plan: Plan) -> list[str]:
    """What the reader of a report must know of how it came to be."""
    table = run.recipe.prune
    notes = list(run.data.notes) if run.data else []
    if table.method == "auto":
        why = "there are training images" if run.trainable else "there is no training data"
        notes.append(f"The method is {stage('prune').method_name(table, run.trainable)}, because {why}.")
    if run.recipe.export.precision == "auto":
        notes.append("The file is fp32: other precisions are not in this version.")
    if plan.left_out:
        named = ", ".join(list(plan.left_out)[:3])
        more = f" and {len(plan.left_out) - 3} more" if len(plan.left_out) > 3 else ""
        notes.append(f"Left whole: {named}{more}; the report says why.")
    return notes


def _facts(run: Context) -> dict[str, Any]:
    """The rest of edgeprune.lock: what one needs to make the same files again."""
    calibration = bundled.resolve("calibration", run.recipe.data.calibration)
    return {
        "recipe": recipes.to_dict(run.recipe), "versions": stage("report_build").versions(),
        "data": run.data.fingerprint if run.data else None, "calibration": digest(calibration),
    }  # fmt: skip


def _budget_words(budget: Budget) -> str:
    return ", ".join(f"{m} {limit.text}" for m, limit in budget.limits.items())
