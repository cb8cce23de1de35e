"""What one run is: its context, what one stage of it is given, its result, and how a stage's module is had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeprune import bundled
from edgeprune import recipe as recipes
from edgeprune.errors import EdgepruneError, InfeasibleBudget, UsageError
from edgeprune.recipe import ModelTable, Recipe, TuneTable
from edgeprune.records import Budget, Bundle, Reading, Report, Target, Verdict
from edgeprune.workdir import Workdir, check_shipped, digest

Say = Callable[[str], None]

# Of a method that trains, when nobody says how long.
EPOCHS = 10


@dataclass(frozen=True)
class Result:
    """A finished run: where it lies, its report, and how its own budget came out.

    trouble: what to tell where some of several devices gave no readings, which is all that is missing; or None.
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
class Site:
    """A further device: its URL without a password, the place as its readings name it, and its facts."""

    url: str
    where: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Beside:
    """What the further devices of a run came to.

    found: each that gave readings, and its `stages.measure_run.Measured`. failed: URL -> error of each that did not.
    """

    found: tuple[tuple[Site, Any], ...] = ()
    failed: Mapping[str, EdgepruneError] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What every stage of one run is given. data: `nn.data.Data` or None. device: `devices.Device`."""

    recipe: Recipe
    target: Target
    budget: Budget
    work: Workdir
    bundle: Bundle
    data: Any
    device: Any
    say: Say

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
        return digest(path) if path.suffix == ".py" and path.is_file() else ""

    @property
    def data_key(self) -> Any:
        """What the results owe to the data."""
        if not self.data:
            return None
        calibration = digest(bundled.resolve("calibration", self.recipe.data.calibration))
        return [self.data.fingerprint, recipes.to_dict(self.recipe)["data"], calibration]

    @property
    def trainable(self) -> bool:
        """Whether there are images that may be learned from."""
        return self.data is not None and self.data.train is not None

    @property
    def method(self) -> str:
        """The method's name, with "auto" decided."""
        return stage("prune").method_name(self.recipe.prune, self.trainable)

    @property
    def trains(self) -> bool:
        """Whether the method trains the network while it chooses."""
        return stage("prune").trains(self.recipe.prune, self.method)

    @property
    def synthesizes(self) -> bool:
        """Whether images are made from the network itself: to repair it on, or for data-free to look at."""
        if self.repair == "synthetic":
            return True
        finer = self.recipe.prune.granularity != "channel"
        chooses = finer and self.method == "data-free"
        return not self.trainable and (chooses or self.recipe.export.precision in ("int8", "fp16"))

    @property
    def on_target(self) -> bool:
        """Whether what is timed here is timed on the target: see `stages.measure_place.on_target`."""
        return stage("measure_place").on_target(self.target, self.device)

    @property
    def quantizes(self) -> bool:
        """Whether another precision than fp32 is tried: it is asked for, or there is a choice and a way to choose."""
        precision, table = self.recipe.export.precision, self.target.precisions
        if precision != "auto":
            return precision != "fp32"
        pictures = self.trainable or self.synthesizes
        limits = tuple(self.budget.limits)
        return pictures and stage("quantize").wants_images(
            precision, table, timed=self.on_target, limits=limits
        )

    @property
    def file_share(self) -> float:
        """PruneTable.int8_file where it counts: int8 was asked for by name, and channels go for MACs; else 0."""
        named = self.recipe.export.precision == "int8" and self.recipe.prune.granularity == "channel"
        return self.recipe.prune.int8_file if named and stage("prune").minds_macs(self.budget) else 0.0

    @property
    def minds_attacks(self) -> bool:
        """Whether accuracy under attack matters to who runs this."""
        return self.recipe.tune.objective != "natural" or "robust_accuracy" in self.budget.limits

    @property
    def looks_at_data(self) -> bool:
        """Whether the method's unlabelled images are the calibration images."""
        finer = self.recipe.prune.granularity != "channel"
        return self.repair == "data" or (finer and self.trainable)

    @property
    def lesson(self) -> TuneTable:
        """What the tune stage does: nothing more when the method has trained."""
        table = self.recipe.tune
        return replace(table, epochs=0, recalibrate=False) if self.trains else table

    @property
    def repair(self) -> str:
        """Which images the network is repaired on: synthetic, data or none.

        Raises:
            UsageError: the recipe wants training images, and there are none.
        """
        return stage("repair").source_of(self.recipe.prune, self.method, self.trainable)


@dataclass(frozen=True)
class Step:
    """One stage at work. folders: stage -> the finished folder of each stage before it.

    out: where it writes. scratch: where it may keep what lets it go on after a kill.
    """

    run: Context
    folders: Mapping[str, Path]
    out: Path
    scratch: Path


def stage(name: str) -> Any:
    """The module of a stage, imported now."""
    return import_module(f"edgeprune.stages.{name}")


def torch_part(name: str) -> Any:
    """A module of `nn/`, imported now."""
    return import_module(f"edgeprune.nn.{name}")


def load(table: ModelTable) -> Bundle:
    """The network of [model]: a file, or a run directory that holds what its report was made of.

    Raises:
        UsageError: a file of the run was replaced. Others as `nn.bundle.load_bundle`.
    """
    if (Path(table.path) / "model.pt2").is_file():
        check_shipped(Path(table.path))
    return stage("load").run(table)


def with_epochs(recipe: Recipe) -> Recipe:
    """The recipe with the epochs of a method that trains written out when it names none."""
    name = recipe.prune.method
    untold = not recipe.tune.epochs and recipe.data.path and recipe.data.use != "evaluate"
    if name != "auto" and untold and stage("prune").trains(recipe.prune, name):
        return recipes.with_defaults(recipe, tune={"epochs": EPOCHS})
    return recipe


def check_together(recipe: Recipe, target: Target) -> None:
    """Refuse what each by itself is accepted but not together.

    Raises:
        UsageError: names the option and what is accepted.
    """
    if recipe.export.precision not in ("auto", "fp32"):
        stage("quantize").check_asked(recipe.export.precision, target.precisions, target.name)
    if recipe.tune.epochs and (not recipe.data.path or recipe.data.use == "evaluate"):
        raise UsageError(
            f"--epochs {recipe.tune.epochs} needs images to train on",
            "give --data (without --data-use evaluate)",
        )
    if "fp32" not in target.precisions:
        raise UsageError(f"target {target.name} does not run fp32", "choose another target")
