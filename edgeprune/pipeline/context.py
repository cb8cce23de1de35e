"""What one run is: its context, what one stage of it is given, its result, and the keys of its stages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune import (
    data,
    export,
    measure,
    models,
    prune,
    quantize,
    recipe,
    repair,
    robustness,
    targets,
    train,
)
from edgeprune.data import Data
from edgeprune.devices import Device
from edgeprune.errors import EdgepruneError, InfeasibleBudget, UsageError
from edgeprune.measure import Measured
from edgeprune.pipeline.run_directory import STAGES, Workdir, check_plain, check_shipped
from edgeprune.recipe import ExportTable, ModelTable, Recipe, TuneTable, with_defaults
from edgeprune.records import Budget, Bundle, Reading, Report, Target, Verdict
from edgeprune.serialization import sha256, to_json

Log = Callable[[str], None]

# Of a method that trains, when nobody says how long.
EPOCHS = 10


@dataclass(frozen=True)
class Result:
    """A finished run: where it lies, its report, and how its own budget came out.

    trouble: the error where some of several devices gave no readings, which is all that is missing; or None.
    """

    folder: Path
    report: Report
    verdict: Verdict
    bundle: Bundle
    trouble: EdgepruneError | None = None

    @property
    def exit_code(self) -> int:
        """0; what a device that failed stands for; or 4 when the budget is missed by what was measured in the end."""
        if self.trouble is not None:
            return self.trouble.exit_code
        return InfeasibleBudget.exit_code if any(c.status == "fail" for c in self.verdict.checks) else 0


@dataclass(frozen=True)
class Ledger:
    """What a stage leaves besides the weights: accuracies after each step, and what a reader must know."""

    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceResult:
    """A further device: its URL without a password, the place as its readings name it, and its facts."""

    url: str
    where: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class OtherDevices:
    """What the further devices of a run came to.

    found: each that gave readings, and what they are. failed: URL -> error of each that did not.
    """

    found: tuple[tuple[DeviceResult, Measured], ...] = ()
    failed: Mapping[str, EdgepruneError] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """What follows from the recipe, the target, the data and the device; decided once, when a run starts.

    trainable: there are images that may be learned from. method: its name, with "auto" decided. trains: it trains the
    network while it chooses. repair: the images that the network is repaired on: synthetic, data or none.
    tuning: what the tune stage does: nothing more when the method has trained. synthesizes: images are made from the
    network itself, to repair it on, or for data-free to look at. on_target: what is timed here is timed on the target.
    quantizes: another precision than fp32 is tried. file_share: PruneTable.int8_file where it counts: int8 was asked
    for by name, and channels go for MACs; else 0. minds_attacks: accuracy under attack matters to who runs this.
    looks_at_data: the method's unlabelled images are the calibration images.
    """

    trainable: bool
    method: str
    trains: bool
    repair: str
    tuning: TuneTable
    synthesizes: bool
    on_target: bool
    quantizes: bool
    file_share: float
    minds_attacks: bool
    looks_at_data: bool


def decide(recipe: Recipe, target: Target, budget: Budget, data: Data | None, device: Device) -> Decisions:
    """The decisions of a run."""
    table, precision = recipe.prune, recipe.export.precision
    trainable = data is not None and data.train is not None
    method = prune.method_name(table, trainable)
    trains = prune.trains(table, method)
    source = repair.source_of(table, method, trainable)
    channels, named = table.granularity == "channel", precision in ("int8", "fp16")
    chooses = not channels and method == "data-free"
    synthesizes = source == "synthetic" or (not trainable and (chooses or named))
    on_target = measure.on_target(target, device)
    quantizes = precision not in ("auto", "fp32")
    if precision == "auto" and (trainable or synthesizes):
        quantizes = quantize.wants_images(
            precision, target.precisions, timed=on_target, limits=tuple(budget.limits)
        )
    return Decisions(
        trainable, method, trains, source,
        tuning=replace(recipe.tune, epochs=0, recalibrate=False) if trains else recipe.tune,
        synthesizes=synthesizes, on_target=on_target, quantizes=quantizes,
        file_share=table.int8_file if precision == "int8" and channels and prune.limits_only_macs(budget) else 0.0,
        minds_attacks=recipe.tune.objective != "natural" or "robust_accuracy" in budget.limits,
        looks_at_data=source == "data" or (not channels and trainable),
    )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What every stage of one run is given. data: None where there is none."""

    recipe: Recipe
    target: Target
    budget: Budget
    work: Workdir
    bundle: Bundle
    data: Data | None
    device: Device
    log: Log
    cut: models.CutNetwork = field(default_factory=models.CutNetwork, compare=False)

    @cached_property
    def decisions(self) -> Decisions:
        """What follows from all of these."""
        return decide(self.recipe, self.target, self.budget, self.data, self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this the run of one model and not of another."""
        source, spec = self.bundle.source, self.bundle.input
        return {
            "path": Path(source.path).name, "sha256": source.sha256, "arch": source.arch,
            "input": list(spec.shape), "mean": list(spec.mean), "std": list(spec.std),
        }  # fmt: skip

    @property
    def code_key(self) -> str:
        """What the network owes to a file of the user's code: editing it makes another network of the same weights."""
        path = Path(self.bundle.source.arch.rpartition(":")[0])
        return sha256(path) if path.suffix == ".py" and path.is_file() else ""

    @property
    def data_key(self) -> list[Any] | None:
        """What the results owe to the data."""
        if not self.data:
            return None
        calibration = sha256(targets.resolve("calibration", self.recipe.data.calibration))
        return [data.VERSION, self.data.fingerprint, recipe.to_dict(self.recipe)["data"], calibration]


@dataclass(frozen=True)
class Step:
    """One stage at work. folders: stage -> the finished folder of each stage before it.

    out: where it writes. scratch: where it may keep what lets it go on after a kill.
    """

    run: Context
    folders: Mapping[str, Path]
    out: Path
    scratch: Path


def load(table: ModelTable) -> Bundle:
    """The network of [model]: a file, or a run directory that holds what its report was made of."""
    if (Path(table.path) / "model.pt2").is_file():
        check_plain(Path(table.path))
        check_shipped(Path(table.path))
    return models.load_bundle(table)


def with_epochs(recipe: Recipe) -> Recipe:
    """The recipe with the epochs of a method that trains written out when it names none."""
    name = recipe.prune.method
    untold = not recipe.tune.epochs and recipe.data.path and recipe.data.use != "evaluate"
    if name != "auto" and untold and prune.trains(recipe.prune, name):
        return with_defaults(recipe, tune={"epochs": EPOCHS})
    return recipe


def check_together(recipe: Recipe, target: Target) -> None:
    """Refuse what each by itself is accepted but not together."""
    if recipe.export.precision not in ("auto", "fp32"):
        quantize.check_precision(recipe.export.precision, target.precisions, target.name)
    if recipe.tune.epochs and (not recipe.data.path or recipe.data.use == "evaluate"):
        raise UsageError(
            f"--epochs {recipe.tune.epochs} needs images to train on",
            "give --data (without --data-use evaluate)",
        )
    if "fp32" not in target.precisions:
        raise UsageError(f"target {target.name} does not run fp32", "choose another target")


# Raised where the same inputs give another result than before.
VERSIONS = {
    "dense": export.RESULT_VERSION, "synthesize": data.SYNTHESIS_VERSION, "prune": prune.RESULT_VERSION,
    "cut": prune.CUT_VERSION, "repair": repair.RESULT_VERSION, "tune": train.TUNE_VERSION,
    "export": export.RESULT_VERSION, "quantize": quantize.RESULT_VERSION, "measure": measure.RESULT_VERSION,
    "attack": robustness.RESULT_VERSION,
}  # fmt: skip


def stage_keys(run: Context) -> dict[str, str]:
    """Stage -> key, in the order of the stages; a stage that this run does without is absent.

    Images are synthesized, and the network is repaired, only where the recipe's `prune.repair` comes to that.
    """
    repair, table = run.decisions.repair, run.recipe
    keys = {"dense": dense_key(run)}
    if run.decisions.synthesizes:
        # Not the budget and not the opset: another one finds the same images.
        keys["synthesize"] = _key(run, "synthesize", run.identity, run.code_key, table.synthesize, table.seed)
    keys["prune"] = _prune_key(run, keys)
    keys["cut"] = _key(run, "cut", keys["prune"])
    if repair != "none":
        images = keys.get("synthesize", run.data_key)
        keys["repair"] = _key(run, "repair", keys["cut"], repair, images, run.data_key, table.seed)
    pruned = keys.get("repair", keys["cut"])
    keys["tune"] = _key(run, "tune", pruned, run.decisions.tuning, run.data_key, table.seed)
    keys["export"] = _key(run, "export", keys["tune"], _float(run), run.target)
    where, attack = run.device.where(), recipe.attack(table)
    if run.decisions.quantizes:
        keys["quantize"] = _quantize_key(run, keys, where)
    shipped = keys.get("quantize", keys["export"])
    keys["measure"] = _key(run, "measure", shipped, _timing(run), run.data_key, where)
    if run.data and attack.name != "none":
        keys["attack"] = _key(run, "attack", shipped, keys["tune"], attack, run.data_key, table.seed, where)
    return {name: keys[name] for name in STAGES if name in keys}


def beside_key(run: Context, keys: Mapping[str, str], url: str) -> str:
    """What the readings of a further device depend on; the device itself is not contacted, so that it may be away."""
    shipped = keys.get("quantize", keys["export"])
    return _key(run, "measure", shipped, {**_timing(run), "device": url}, run.data_key, "beside")


def dense_key(run: Context) -> str:
    """What dense.onnx depends on: the network, the user's code that it is made by, and how it is exported."""
    inputs = (run.identity, run.code_key, _float(run), run.target.opset)
    return run.work.key("dense", VERSIONS["dense"], *inputs)


def multiple_of(run: Context) -> int:
    """What kept channels should be multiples of: the recipe's, or the target's fact for what is built."""
    precision = run.recipe.export.precision
    return (
        run.recipe.prune.multiple_of or run.target.multiple_of["fp32" if precision == "auto" else precision]
    )


def _float(run: Context) -> ExportTable:
    return replace(run.recipe.export, precision="fp32")


def _timing(run: Context) -> dict[str, Any]:
    """How the device that decides is timed; that others measure beside it changes nothing there."""
    return {name: value for name, value in to_json(run.recipe.measure).items() if name != "beside"}


def _quantize_key(run: Context, keys: dict[str, str], where: str) -> str:
    table = run.recipe
    images = run.data_key if run.decisions.trainable else keys.get("synthesize")
    clock = [_timing(run), where] if run.decisions.on_target and table.export.precision == "auto" else None
    ball = replace(recipe.attack(table), name="pgd", limit=0, batch=0)
    crafted = [ball, table.seed] if run.decisions.trainable and run.decisions.minds_attacks else None
    options = (table.quantize, table.export.precision, run.target.precisions, run.target.int8, run.budget)
    return _key(run, "quantize", keys["export"], *options, images, clock, crafted)


def _prune_key(run: Context, keys: dict[str, str]) -> str:
    timed = any(m.startswith("latency") for m in run.budget.limits)
    seen = run.data_key if run.decisions.trainable else None
    clock = [_timing(run), run.device.where()] if timed else None
    # "auto" and what it is decided to be are the same. A method may look at the images that the repair will use.
    table = replace(run.recipe.prune, repair=run.decisions.repair)
    images = keys.get("synthesize")
    training = run.recipe.tune if run.decisions.trains else None
    built = (
        run.recipe.export.precision
        if timed or "size" in run.budget.limits or run.decisions.file_share
        else ""
    )
    chosen_by = (table, run.budget, multiple_of(run), run.recipe.seed, seen, clock, images, training, built)
    return _key(run, "prune", keys["dense"], *chosen_by)


def _key(run: Context, name: str, *inputs: object) -> str:
    return run.work.key(name, VERSIONS[name], *inputs)
