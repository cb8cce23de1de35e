"""The command line: parse, call the pipeline, print, exit code. No logic, no heavy import."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune import distributed, pipeline, recipe
from edgeprune.cli import options
from edgeprune.cli import output as printed
from edgeprune.serialization import to_json
from edgeprune.version import __version__

# Typer carries its own click and does not name this class: the parent of BadParameter, which it does name.
USAGE_ERROR: Any = typer.BadParameter.__base__
app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Make a trained vision network small, fast and still right on the device it ships to.",
)  # fmt: skip


@app.command()
def compress(
    model: options.Model,
    target: options.TargetName = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="default: runs/MODEL-TARGET", metavar="DIR")
    ] = None,
    arch: options.Arch = None,
    input_shape: options.Input = None,
    mean: options.Mean = None,
    std: options.Std = None,
    allow_class: options.Allow = None,
    trust_pickle: options.Trust = False,
    trust_run: options.TrustRun = False,
    data: options.TrainingData = None,
    data_use: options.DataUse = None,
    method: options.Method = None,
    granularity: Annotated[str | None, typer.Option(metavar="channel|weight|2:4")] = None,
    budget: options.Budgets = None,
    objective: Annotated[str | None, typer.Option(metavar="natural|fgsm|pgd|trades")] = None,
    epochs: Annotated[int | None, typer.Option(help="fine-tuning after the cut")] = None,
    precision: Annotated[str | None, typer.Option(metavar="auto|fp32|fp16|int8")] = None,
    device: options.DeviceUrls = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="a recipe.toml; flags win over it", metavar="FILE")
    ] = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
    force: Annotated[str | None, typer.Option(help="redo from this stage on", metavar="STAGE")] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Load, prune, cut, repair, tune, export, measure and report; resumes where it was stopped. Data is optional."""
    flags = options.only_given(
        options.model_table(model, arch, input_shape, mean, std, allow_class, trust_pickle),
        data={"path": data, "use": data_use}, prune={"method": method, "granularity": granularity},
        tune={"objective": objective, "epochs": epochs}, export={"precision": precision},
        measure={"device": device or None}, target=target, seed=seed,
    )  # fmt: skip

    def work() -> int:
        limits = {"budget": pipeline.budget_pairs(budget)} if budget else {}
        built = pipeline.recipe_from(recipe_file, {**flags, **limits}, sets or [])
        result = pipeline.compress(built, output, force=force, trust_run=trust_run, log=printed.log)
        printed.show_run(result, as_json)
        return result.exit_code

    printed.guard(
        lambda: distributed.run_on_all_ranks(work), as_json and distributed.launch().rank == 0, debug
    )


@app.command()
def profile(
    artifact: Annotated[str, typer.Argument(help="an .onnx file, or a run directory")],
    target: options.TargetName = None,
    device: options.DeviceUrls = None,
    data: options.Data = None,
    table: Annotated[
        bool, typer.Option("--table", help="time the layers of MODEL or RUN over their channel counts")
    ] = False,
    arch: options.Arch = None,
    input_shape: options.Input = None,
    mean: options.Mean = None,
    std: options.Std = None,
    allow_class: options.Allow = None,
    trust_pickle: options.Trust = False,
    trust_run: options.TrustRun = False,
    attack: options.Attacked = None,
    eps: options.Eps = None,
    limit: options.Limit = None,
    output: options.OutputName = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a file, and read its memory, size and, with data, its accuracy, also under attack."""
    flags = options.only_given(
        options.model_table(artifact, arch, input_shape, mean, std, allow_class, trust_pickle),
        data={"path": data, "use": "evaluate"}, measure={"device": device or None},
        attack={"name": attack, "eps": eps}, target=target, seed=seed,
    )  # fmt: skip

    def work() -> int:
        built = recipe.build({}, flags, sets or [])
        if table:
            printed.show_table(pipeline.table(built, log=printed.log), as_json)
            return 0
        found = pipeline.profile(
            built, limit=limit, output=output or "", log=printed.log, trust_run=trust_run
        )
        printed.show_readings(found.readings, as_json, found.trouble)
        if not as_json:
            printed.print_lines(pipeline.warnings(found.readings))
        return found.trouble.exit_code if found.trouble else 0

    printed.guard(work, as_json, debug)


@app.command()
def evaluate(
    artifact: Annotated[
        str, typer.Argument(help="an .onnx file, a run directory, or a model", metavar="ARTIFACT|RUN|MODEL")
    ],
    data: options.Data = None,
    arch: options.Arch = None,
    input_shape: options.Input = None,
    mean: options.Mean = None,
    std: options.Std = None,
    allow_class: options.Allow = None,
    trust_pickle: options.Trust = False,
    trust_run: options.TrustRun = False,
    attack: options.Attacked = None,
    eps: options.Eps = None,
    limit: options.Limit = None,
    output: options.OutputName = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """The accuracy of a file or a model on held-out images, also under attack: the worst case for every image."""
    flags = options.only_given(
        options.model_table(artifact, arch, input_shape, mean, std, allow_class, trust_pickle),
        data={"path": data, "use": "evaluate"}, attack={"name": attack, "eps": eps}, seed=seed,
    )  # fmt: skip

    def work() -> int:
        built = recipe.build({}, flags, sets or [])
        readings = pipeline.evaluate(
            built, limit=limit, output=output or "", log=printed.log, trust_run=trust_run
        )
        printed.show_readings(readings, as_json)
        if not as_json:
            printed.print_lines(pipeline.warnings(readings))
        return 0

    printed.guard(work, as_json, debug)


@app.command()
def gate(
    run: Annotated[Path, typer.Argument(help="a run directory or a report.json", metavar="RUN|report.json")],
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help='a TOML file or "METRIC=LIMIT"')
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="the report.json that relative limits are held against")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", metavar="text|json|markdown|junit")] = "text",
    debug: options.Debug = False,
) -> None:
    """Hold a report against a budget. Exit 0: met; 1: missed; 8: can't tell; 2: wrong input."""

    def work() -> int:
        text, code = pipeline.gate(run, budget or [], baseline, output_format)
        printed.echo(text)
        return code

    printed.guard(work, False, debug)


@app.command()
def why(
    model: options.Model,
    target: options.TargetName = None,
    arch: options.Arch = None,
    input_shape: options.Input = None,
    mean: options.Mean = None,
    std: options.Std = None,
    allow_class: options.Allow = None,
    trust_pickle: options.Trust = False,
    trust_run: options.TrustRun = False,
    sets: options.Sets = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """What every layer costs, and why a layer can't be pruned."""
    flags = options.only_given(
        options.model_table(model, arch, input_shape, mean, std, allow_class, trust_pickle), target=target,
    )  # fmt: skip

    def work() -> int:
        rows, lines = pipeline.why(recipe.build({}, flags, sets or []), log=printed.log)
        if as_json:
            printed.echo_json({"layers": to_json(rows), "notes": lines})
            return 0
        printed.print_table(printed.tables().why_table(rows))
        printed.print_lines([*printed.tables().reasons(rows), *lines])
        return 0

    printed.guard(work, as_json, debug)


@app.command()
def doctor(
    target: options.TargetName = None,
    device: options.DeviceUrls = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """What works here, what is missing, and the line that installs it."""

    def work() -> int:
        rows = pipeline.doctor(target, device or ["local"])
        if as_json:
            printed.echo_json({"checks": to_json(rows)})
        else:
            printed.print_table(printed.tables().doctor_table(rows))
        return pipeline.doctor_status(rows)

    printed.guard(work, as_json, debug)


@app.command("list")
def list_(
    family: Annotated[str, typer.Argument(metavar="methods|targets|attacks|runtimes|devices|calibration")],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """The members of a family, one line each."""

    def work() -> int:
        members = pipeline.members(family)
        if as_json:
            printed.echo_json({family: members})
            return 0
        width = max((len(m["name"]) for m in members), default=0)
        for member in members:
            printed.echo(f"{member['name']:<{width}}  {member['about']}")
        if not members:
            printed.echo(f"no {family} in this version")
        return 0

    printed.guard(work, as_json, debug)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")] = Path("runs/demo"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a small network on real digits and compress it for this machine; nothing to download."""

    def work() -> int:
        result = pipeline.demo(output, log=printed.log)
        printed.show_run(result, as_json)
        return result.exit_code

    printed.guard(work, as_json, debug)


def main() -> None:
    """The program."""
    # torch's threads spin while they wait, which on a busy machine takes the time from those that work: with two
    # threads and other load, training was 1.3 to 1.7 times as fast when they sleep instead.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    follows = distributed.launch().rank > 0  # the first process that torchrun started speaks for all
    if follows and sys.argv[1:2] != ["compress"]:  # the only command that several processes share
        sys.exit(0)
    signal.signal(signal.SIGTERM, printed.terminate)
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:  # an option that the command does not have, or its value
        if follows:
            sys.exit(0)
        message = error.format_message()
        if message:  # it is empty when the help was shown
            printed.print_error(message, "see edgeprune COMMAND --help", printed.USAGE, "--json" in sys.argv)
        code = printed.USAGE
    except typer.Abort as error:
        code = printed.print_interrupted(error.__context__, "--json" in sys.argv)
    sys.exit(code or 0)


def _version(show: bool) -> None:
    if show:
        printed.echo(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Make a trained vision network small, fast and still right on the device it ships to."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(printed.shown)
    logger = logging.getLogger("edgeprune")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
