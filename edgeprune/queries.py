"""The commands that look and change nothing: profile, evaluate, gate, why, doctor, list; and the demo."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeprune import bundled, plugins
from edgeprune import recipe as recipes
from edgeprune.context import Result, Say, stage, torch_part
from edgeprune.errors import MissingDependency, UsageError
from edgeprune.pipeline import compress
from edgeprune.quantities import number, suggest
from edgeprune.recipe import Recipe
from edgeprune.records import InputSpec, Reading

ATTACKS = ("none", "fgsm", "pgd", "standard")
FAMILIES = ("methods", "targets", "attacks", "runtimes", "devices", "calibration")


def profile(artifact: Path, recipe: Recipe, *, say: Say) -> tuple[Reading, ...]:
    """Time an ONNX file, and read its memory, size and, with data, its accuracy.

    Raises:
        UsageError: no such file, or not an ONNX file. DeviceError: the device failed.
    """
    path = _onnx(artifact)
    spec = stage("evaluate").input_of(path)
    measure_run = stage("measure_run")
    target = bundled.target(recipe.target)
    device = import_module("edgeprune.devices").device_from_url(recipe.measure.device)
    images = (
        torch_part("data").open_data(recipe.data, spec, recipe.seed).held_out if recipe.data.path else None
    )
    say(f"profile: {path} on {device.where()}")
    wanted = measure_run.Wanted(spec, device, recipe.measure, target, images, say)
    measured = measure_run.run(wanted, {path.stem: path}, None)
    for note in measured.notes:
        say(note)
    return measured.after


def evaluate(recipe: Recipe, *, attack: str, eps: str, limit: int | None) -> tuple[Reading, ...]:
    """The clean accuracy of a file or a model on held-out images.

    Raises:
        UsageError: no data, an attack that is not in this version, or a wrong limit.
    """
    if attack not in ATTACKS:
        raise UsageError(f"attack {attack!r} is not one of {', '.join(ATTACKS)}", suggest(attack, ATTACKS))
    number(eps, "fraction")
    if attack != "none":
        raise UsageError(f"attack {attack!r} is not in this version", "accepted: none")
    if not recipe.data.path:
        raise UsageError("evaluate needs images", "give --data")
    path = Path(recipe.model.path)
    if path.suffix == ".onnx" or (path / "model.onnx").is_file():
        file = _onnx(path)
        spec = stage("evaluate").input_of(file)
        images = _held_out(recipe, spec, limit)
        device = import_module("edgeprune.devices").device_from_url("local")
        answers = stage("measure_answers")
        reading, _ = answers.accuracy(
            stage("measure_run").artifact(file, spec), images, device, name=file.name
        )
        return (reading,)
    bundle = stage("load").run(recipe.model)
    images = _held_out(recipe, bundle.input, limit)
    return (stage("evaluate").of_network(bundle, images, path.name),)


def gate(run: Path, budget: list[str], baseline: Path | None, output_format: str) -> tuple[str, int]:
    """The verdict on a run as text, and the exit code.

    Raises:
        UsageError: an unreadable report, budget or baseline, or an unknown format.
    """
    gate_stage, report_stage = stage("gate"), stage("report")
    if output_format not in gate_stage.FORMATS:
        raise UsageError(
            f"--format {output_format!r} is not one of {', '.join(gate_stage.FORMATS)}",
            suggest(output_format, gate_stage.FORMATS),
        )
    limits = gate_stage.budget_from(budget, Path.cwd())
    report = report_stage.load(run)
    missing = baseline is not None and not baseline.exists()
    base = report_stage.load(baseline) if baseline is not None and not missing else None
    verdict = gate_stage.run(report, limits, base, baseline_missing=missing)
    return gate_stage.render(verdict, output_format), verdict.exit_code


def why(recipe: Recipe, *, say: Say) -> tuple[Any, list[str]]:
    """What every layer costs, its share of the time here, how compressible it looks, and why it can't be pruned.

    Raises:
        ModelError: the model can't be loaded or run.
    """
    say(f"load: {recipe.model.path}")
    bundle = stage("load").run(recipe.model)
    target = bundled.target(recipe.target)
    notes: list[str] = []
    times: dict[str, float] = {}
    device = import_module("edgeprune.devices").device_from_url("local")
    with TemporaryDirectory(prefix="edgeprune-") as folder:
        say(f"why: time every layer on {device.where()}")
        path = Path(folder, "model.onnx")
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
    return rows, [*notes, stage("why").ABOUT_PQI]


def doctor(target: str | None, device: str) -> Any:
    """What works here, and the line that installs what is missing."""
    return stage("doctor").run(bundled.target(target) if target else None, device)


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
            "tune": {"epochs": 2, "augment": False},
        },
    )
    return compress(recipe, output / "run", say=say)


def _held_out(recipe: Recipe, spec: InputSpec, limit: int | None) -> Any:
    images = torch_part("data").open_data(recipe.data, spec, recipe.seed).held_out
    return images if limit is None else stage("evaluate").balanced(images, limit, recipe.seed)


def _onnx(path: Path) -> Path:
    found = path / "model.onnx" if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"no ONNX file at {found}", "give an .onnx file or a finished run directory")
    return found


def _title(family: str, name: str) -> str:
    table = bundled.read_toml(bundled.resolve(family, name))
    return str(table.get("title") or f"the same as {table.get('alias')}")
