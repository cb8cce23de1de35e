"""The commands that look and change nothing: evaluate, gate, why, doctor, list; and the demo."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeprune import bundled, plugins
from edgeprune import recipe as recipes
from edgeprune.codec import scratch_folder
from edgeprune.context import Result, Say, load, stage, torch_part
from edgeprune.errors import DeviceError, MissingDependency, UsageError
from edgeprune.pipeline import compress
from edgeprune.quantities import suggest
from edgeprune.recipe import Recipe
from edgeprune.records import Bundle, InputSpec, Reading
from edgeprune.workdir import LOCKFILE, check_plain, check_shipped, own_scratch

ONLY_A_REPORT = (
    "Only a report was read and no file was checked: give the run directory to have its model.onnx checked."
)
FAMILIES = ("methods", "targets", "attacks", "runtimes", "devices", "calibration")


def evaluate(
    recipe: Recipe, *, limit: int | None, say: Say, output: str = "", trust_run: bool = False
) -> tuple[Reading, ...]:
    """The accuracy of a file or a model on held-out images, without and, where the recipe says so, under attack.

    Args:
        recipe: `[attack]` with the name "auto" is none.
        limit: so many images, the same share of each class, 0 for all; None for all without an attack, and for
            `attack.limit` with one.
        output: the name of a file's output that has the logits, "" where it is to be told.
        trust_run: code that the recipe of a run directory names may be imported.

    Raises:
        UnsafeModel: a run names code that `recipe.model` does not.
        UsageError: no data, an output that is not there or can't be told, an attack that needs gradients on a file
            that has none, or a wrong limit.
        ModelError, MissingDependency, DeviceError: the file or the model can't be used.
        WorkdirError: the state of an attack can't be written.
    """
    if not recipe.data.path:
        raise UsageError("evaluate needs images", "give --data")
    if limit is not None and limit < 0:
        raise UsageError(f"--limit {limit} must be at least 0", "0 is all images")
    attacks = recipe.attack.name not in ("none", "auto")
    wanted = limit if limit is not None else recipe.attack.limit if attacks else 0
    path = Path(recipe.model.path)
    is_file = path.suffix == ".onnx" or (path / "model.onnx").is_file()
    if output and not is_file:
        raise UsageError(
            f"--output {output!r} names an output of an ONNX file, and {path} is none", "leave it out"
        )
    with scratch_folder() as folder:
        look = stage("evaluate_file").look
        subject = look(onnx_of(path), folder, recipe.model.input) if is_file else load(recipe.model)
        return _evaluated(recipe, subject, (wanted, output, trust_run), say)


def _evaluated(recipe: Recipe, subject: Any, asked: tuple[int, str, bool], say: Say) -> tuple[Reading, ...]:
    """As `evaluate`. subject: a Bundle or an `evaluate_file.OnnxFile`. asked: limit, output, trust_run."""
    path, (limit, output, trust_run) = Path(recipe.model.path), asked
    bundle = subject if isinstance(subject, Bundle) else None
    given: Any = subject
    spec = bundle.input if bundle else given.spec(output)
    found, split = images(recipe, spec, limit)
    for note in found.notes:
        say(f"data: {note}")
    attacks, file = recipe.attack.name not in ("none", "auto"), None
    if bundle is not None:
        stage("evaluate_alone").check_bundle(bundle, split)
    else:
        file = given.judged(split, len(found.labels), wanted=output, attacked=attacks)
        spec = file.spec
    if attacks:
        scratch = (path if file and path.is_dir() else Path("runs")) / "scratch"
        place = _Place(limit, found.fingerprint, scratch, say, trust_run)
        clean, *rest = _attacked(recipe, _victim(path, bundle or file, recipe, place), split, place)
    else:
        clean, rest = _clean(path, bundle or file, split, _device(recipe)), []
    doubts = stage("evaluate_doubts")
    if file is not None:
        stage("evaluate_file").check(clean, file, split)
        clean = doubts.noted(clean, file.notes)
    clean = doubts.classes(doubts.guessing(clean, split, attacked=attacks), split, spec.classes)
    if file is not None:
        clean = doubts.normalized(doubts.reported(clean, path), recipe.model)
    return (with_notes(clean, found.notes), *rest)


def check_attack(recipe: Recipe) -> None:
    """Refuse an attack that can't be run, before anything is measured.

    Raises:
        UsageError: no images, or the attack does not exist or has no such option.
    """
    if not recipe.data.path:
        raise UsageError(f"the attack {recipe.attack.name!r} needs images", "give --data")
    stage("attack").job(recipes.attack(recipe), seed=recipe.seed, data="")


def with_notes(reading: Reading, notes: Sequence[str]) -> Reading:
    """A reading whose conditions say what a reader of it must know of the images."""
    said = {"notes": [*notes, *reading.conditions.get("notes", ())]} if notes else {}
    return replace(reading, conditions={**reading.conditions, **said})


def _device(recipe: Recipe) -> Any:
    """Where a file answers."""
    setup = bundled.target(recipe.target).setup
    return import_module("edgeprune.devices").device_from_url(recipe.measure.device, setup)


def _clean(path: Path, subject: Any, images: Any, device: Any) -> Reading:
    """The accuracy of a Bundle in torch, or of an `evaluate_file.Judged` through its runtime on a device."""
    if isinstance(subject, Bundle):
        return stage("evaluate").of_network(subject, images, path.name)
    artifact = stage("measure_run").artifact(subject.path, subject.spec)
    return stage("measure_answers").accuracy(artifact, images, device, name=subject.path.name)[0]


def _victim(path: Path, subject: Any, recipe: Recipe, place: _Place) -> Any:
    """A Bundle, the file of a run, or a bare file (`evaluate_file.Judged`); a file answers on the recipe's device."""
    attack, device = stage("attack"), _device(recipe)
    if isinstance(subject, Bundle):
        return attack.of_bundle(subject, path.name)
    here = import_module("edgeprune.devices").device_from_url("local").where()
    if path.is_dir():
        victim = attack.of_run(path, place.scratch, here, recipe.model, trusted=place.trust_run)
    else:
        victim = attack.of_file(path.name, subject.path, place.scratch, here)
    if not attack.elsewhere(device):
        return victim
    there = attack.There(device, bundled.target(recipe.target), place.scratch, place.say)
    return attack.on_device(victim, subject.path, subject.spec, there)


def warnings(readings: tuple[Reading, ...]) -> list[str]:
    """What a reader of readings must know: how they were had, and signs that they are too good to be true."""
    lines: list[str] = []
    for reading in readings:
        facts = reading.conditions
        if reading.metric == "robust_accuracy":
            broken = ", ".join(f"{name} {count}" for name, count in facts["broken"].items())
            lines.append(f"{facts['attack']}, {facts['norm']} eps {facts['eps']}, {facts['gradients']}.")
            lines.append(f"Of {reading.n} images broken by: {broken}; {facts['right']} survived.")
        lines += [f"note: {note}" for note in facts.get("notes", ())]
        lines += [f"WARNING: {flag}" for flag in facts.get("flags", ())]
    return lines


def gate(run: Path, budget: list[str], baseline: Path | None, output_format: str) -> tuple[str, int]:
    """The verdict on a run as text, and the exit code.

    Args:
        run: a run directory, whose model.onnx must be the one that the report is of; or a report by itself.

    Raises:
        UsageError: an unreadable report, budget or baseline, another file than the report's, or an unknown format.
    """
    gate_stage, report_stage = stage("gate"), stage("report")
    if output_format not in gate_stage.FORMATS:
        raise UsageError(
            f"--format {output_format!r} is not one of {', '.join(gate_stage.FORMATS)}",
            suggest(output_format, gate_stage.FORMATS),
        )
    limits = gate_stage.budget_from(budget, Path())
    report = report_stage.load(run)
    folder = run if run.is_dir() else run.parent
    checked = run.is_dir() or (run.name == "report.json" and (folder / LOCKFILE).is_file())
    if checked:
        check_shipped(folder)
    missing = baseline is not None and _absent(baseline)
    base = report_stage.load(baseline) if baseline is not None and not missing else None
    verdict = gate_stage.run(report, limits, base, baseline_missing=missing)
    if not checked:
        verdict = replace(verdict, notes=(*verdict.notes, ONLY_A_REPORT))
    return gate_stage.render(verdict, output_format), verdict.exit_code


def _absent(path: Path) -> bool:
    """Whether there is nothing by that name; what is there and can't be read is not absent."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def why(recipe: Recipe, *, say: Say) -> tuple[Any, list[str]]:
    """What every layer costs, its share of the time here, how compressible it looks, and why it can't be pruned.

    Raises:
        ModelError: the model can't be loaded or run.
    """
    say(f"load: {recipe.model.path}")
    bundle = load(recipe.model)
    target = bundled.target(recipe.target)
    notes: list[str] = []
    times: dict[str, float] = {}
    device = import_module("edgeprune.devices").device_from_url("local")
    with scratch_folder() as folder:
        say(f"why: time every layer on {device.where()}")
        path = folder / "model.onnx"
        try:
            stage("export").run(
                torch_part("bundle").deployed(bundle), bundle.input, path, opset=target.opset, table=recipe.export,
                meta={}, real=None,
            )  # fmt: skip
            times = stage("measure_layers").per_layer(path, device, recipe.measure)
            notes.append(
                f"Time shares: measured on {device.where()} with ONNX Runtime, {recipe.measure.threads} thread(s)."
            )
        except (MissingDependency, import_module("edgeprune.errors").ModelError) as error:
            notes.append(f"No times: {error.message}")
    rows = stage("why").run(bundle, times, recipe.prune.skip)
    rest = 1 - sum(row.macs_share for row in rows)
    if rest > 1e-9:
        notes.append(
            f"{rest:.1%} of the multiply-accumulates are in none of these layers, as those of attention."
        )
    return rows, [*notes, stage("why").ABOUT_PQI]


def doctor(target: str | None, devices: Sequence[str]) -> Any:
    """What works here and on each device, and the line that installs what is missing."""
    return stage("doctor").run(bundled.target(target) if target else None, *dict.fromkeys(devices))


def doctor_status(rows: Sequence[Any]) -> int:
    """The exit status of doctor: 6 where a device does not answer as it must, 3 where something else is missing."""
    missing = [row for row in rows if row.status == "missing"]
    if any(row.name.startswith("device ") for row in missing):
        return DeviceError.exit_code
    return MissingDependency.exit_code if missing else 0


def members(family: str) -> list[dict[str, str]]:
    """The members of a family with one line each.

    Raises:
        UsageError: no such family.
    """
    if family not in FAMILIES:
        raise UsageError(f"no family is named {family!r}", suggest(family, FAMILIES))
    if family in ("targets", "calibration"):
        return [{"name": n, "about": _title(family, n)} for n in bundled.names(family)]
    return [{"name": n, "about": plugins.describe(family, n)} for n in plugins.names(family)]


def demo(output: Path, *, say: Say) -> Result:
    """Train a small network on scikit-learn's digits and compress it for this machine."""
    say("demo: train a small network on 1,797 real digits")
    files = import_module("edgeprune.demo").prepare(output)
    recipe = recipes.build(
        {},
        {
            "target": "local",
            "model": {"path": str(files.model)},
            "data": {"path": str(files.data)},
            "budget": {"macs": "50 %"},
            "tune": {"epochs": 2, "augment": "off"},
        },
    )
    return compress(recipe, output / "run", say=say)


@dataclass(frozen=True)
class _Place:
    """What an attack needs beside the victim and the images. data: their fingerprint. limit: how many; 0 is all."""

    limit: int
    data: str
    scratch: Path
    say: Say
    trust_run: bool


def _attacked(recipe: Recipe, victim: Any, images: Any, place: _Place) -> tuple[Reading, ...]:
    """Readings of an attack; what lets it go on after a kill is deleted when it is done."""
    attack = stage("attack")
    table = replace(recipes.attack(recipe), limit=place.limit)
    job = attack.job(table, seed=recipe.seed, data=f"{place.data} {images.name} {len(images)}")
    place.say(f"attack: {table.name}, {table.norm} eps {table.eps}, {len(images)} images of {victim.name}")
    victim = attack.proven(victim, images, say=place.say)
    scratch = place.scratch / f"attack-{job.key(victim)}"
    own_scratch(scratch)
    verdicts = attack.run(victim, images, job, scratch=scratch, say=place.say)
    place.say("attack: look for signs that the gradients mislead")
    found = attack.flags(victim, images, job, verdicts)
    rows = attack.readings(victim, job, verdicts, part=images.name, flags=found)
    rows = (*rows, *attack.bounded(victim, images, job, rows[0].artifact))
    shutil.rmtree(scratch, ignore_errors=True)
    for folder in (place.scratch, place.scratch.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return rows


def images(recipe: Recipe, spec: InputSpec, limit: int) -> tuple[Any, Any]:
    """The data set, and so many of its held-out images; 0 is all."""
    data = torch_part("data").open_data(recipe.data, spec, recipe.seed)
    held_out = data.held_out
    return data, stage("evaluate").balanced(held_out, limit, recipe.seed) if limit else held_out


def onnx_of(path: Path) -> Path:
    """The ONNX file that a path names: itself, or the one of a run directory.

    Raises:
        UsageError: there is none, or it is not the one that the report of the run was made of.
    """
    found = path / "model.onnx" if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"no ONNX file at {found}", "give an .onnx file or a finished run directory")
    if path.is_dir():
        check_plain(path)
        check_shipped(path)
    return found


def _title(family: str, name: str) -> str:
    table = bundled.read_toml(bundled.resolve(family, name))
    return str(table.get("title") or f"the same as {table.get('alias')}")
