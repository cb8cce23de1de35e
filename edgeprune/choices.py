"""What a recipe's words and numbers may be; `check` refuses the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune import plugins
from edgeprune.errors import UsageError
from edgeprune.quantities import eps_of, limit, suggest

if TYPE_CHECKING:
    from edgeprune.recipe import PruneTable, Recipe

GRANULARITIES = ("channel", "weight", "2:4")
ALLOCATIONS = ("global", "uniform", "pqi")
OBJECTIVES = ("natural", "fgsm", "pgd", "trades")
OPTIMIZERS = ("sgd", "adamw")
NORMS = ("Linf", "L2")
KEEPS = ("last", "best")
MIXED = ("auto", "fp32", "bf16")
PRECISIONS = ("auto", "fp32", "fp16", "int8")
CALIBRATORS = ("auto", "minmax", "percentile", "entropy", "mse")
SCHEMES = ("auto", "u8", "s8")
SWITCHES = ("auto", "on", "off")
AUGMENTS = ("auto", "on", "off", "shift", "mirror")
ATTACKS = ("auto", "none", "fgsm", "pgd", "standard")
# The radius of a norm that people mean when they name none.
USUAL_EPS_TEXT = {"Linf": "8/255", "L2": "128/255"}
REPAIRS = ("auto", "none", "synthetic", "data")
# In a budget: an estimate may stand for a measurement.
ALLOW_ESTIMATES = "allow-estimates"
# What the method "auto" stands for, with and without training images.
AUTO = ("taylor", "data-free")


def check(recipe: Recipe) -> None:
    """Refuse a value that is not accepted.

    Raises:
        UsageError: names the key, what was found and what is accepted.
    """
    words = (
        ("data.use", recipe.data.use, ("all", "evaluate")),
        ("prune.granularity", recipe.prune.granularity, GRANULARITIES),
        ("prune.allocation", recipe.prune.allocation, ALLOCATIONS),
        ("prune.repair", recipe.prune.repair, REPAIRS),
        ("tune.objective", recipe.tune.objective, OBJECTIVES),
        ("tune.optimizer", recipe.tune.optimizer, OPTIMIZERS),
        ("tune.norm", recipe.tune.norm, NORMS),
        ("tune.keep", recipe.tune.keep, KEEPS),
        ("tune.augment", recipe.tune.augment, AUGMENTS),
        ("tune.mixed", recipe.tune.mixed, MIXED),
        ("export.precision", recipe.export.precision, PRECISIONS),
        ("quantize.calibrator", recipe.quantize.calibrator, CALIBRATORS),
        ("quantize.scheme", recipe.quantize.scheme, SCHEMES),
        ("quantize.equalize", recipe.quantize.equalize, SWITCHES),
        ("quantize.bias_correction", recipe.quantize.bias_correction, SWITCHES),
        ("attack.name", recipe.attack.name, ATTACKS),
        ("attack.norm", recipe.attack.norm, NORMS),
    )
    for where, value, accepted in words:
        if value not in accepted:
            raise UsageError(
                f"{where} = {value!r} is not one of {', '.join(accepted)}", suggest(value, accepted)
            )
    _check_options(recipe.prune)
    _check_ranges(recipe)
    eps_of(recipe.tune.eps, recipe.tune.norm)
    eps_of(recipe.attack.eps, recipe.attack.norm)
    for metric, text in recipe.budget.items():
        if metric == ALLOW_ESTIMATES and text in ("True", "true", "False", "false"):
            continue
        limit(metric, text)


def _check_ranges(recipe: Recipe) -> None:
    ranges = (
        ("seed", recipe.seed, 0, 2**32 - 1),
        ("prune.floor", recipe.prune.floor, 0.0, 1.0),
        ("prune.int8_file", recipe.prune.int8_file, 0.0, 1.0),
        ("data.val_share", recipe.data.val_share, 0.01, 0.99),
        ("tune.distill", recipe.tune.distill, 0.0, 1.0),
        ("tune.lr", recipe.tune.lr, 0.0, 100.0),
        ("tune.weight_decay", recipe.tune.weight_decay, 0.0, 1.0),
        ("tune.temperature", recipe.tune.temperature, 0.01, 1000.0),
        ("tune.epochs", recipe.tune.epochs, 0, 100000),
        ("tune.batch", recipe.tune.batch, 2, 65536),
        ("tune.attack_steps", recipe.tune.attack_steps, 1, 1000),
        ("tune.attack_step", recipe.tune.attack_step, 0.0, 100.0),
        ("tune.beta", recipe.tune.beta, 0.0, 1.0),
        ("tune.trades", recipe.tune.trades, 0.0, 1000.0),
        ("tune.val_share", recipe.tune.val_share, 0.01, 0.5),
        ("prune.multiple_of", recipe.prune.multiple_of, 0, 1024),
        ("synthesize.images", recipe.synthesize.images, 0, 65536),
        ("synthesize.steps", recipe.synthesize.steps, 0, 10**6),
        ("export.opset", recipe.export.opset, 0, 100),
        ("export.tolerance", recipe.export.tolerance, 0.0, 1.0),
        ("quantize.tolerance", recipe.quantize.tolerance, 0.0, 1.0),
        ("measure.threads", recipe.measure.threads, 0, 1024),
        ("measure.warmup", recipe.measure.warmup, 0, 10**6),
        ("measure.iterations", recipe.measure.iterations, 10, 10**6),
        ("measure.seconds", recipe.measure.seconds, 0.1, 86400.0),
        ("attack.limit", recipe.attack.limit, 0, 10**9),
        ("attack.steps", recipe.attack.steps, 1, 100000),
        ("attack.restarts", recipe.attack.restarts, 1, 1000),
        ("attack.batch", recipe.attack.batch, 0, 65536),
    )
    for where, value, low, high in ranges:
        if not low <= value <= high:
            raise UsageError(f"{where} = {value} must be between {low:g} and {high:g}")


def _check_options(table: PruneTable) -> None:
    if table.method == "auto" and table.options:
        known = {key for name in AUTO for key in plugins.options("methods", name)}
        for key in table.options:
            if key not in known:
                raise UsageError(f"neither {' nor '.join(AUTO)} has an option {key!r}", suggest(key, known))
    elif table.method != "auto" and "." not in table.method:
        plugins.check_options("methods", table.method, table.options)
