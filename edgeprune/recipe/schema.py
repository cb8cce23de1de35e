"""The tables of a recipe, one frozen record each, with every default; `recipe.py` reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Mapping, Tuple, TypeVar

from edgeprune import plugins
from edgeprune.errors import UsageError
from edgeprune.quantities import check_choice, eps_of, limit, suggest

T = TypeVar("T")

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
    """Refuse a value that is not accepted."""
    _check_fields("", recipe)
    for table in fields(recipe):
        if is_dataclass(getattr(recipe, table.name)):
            _check_fields(f"{table.name}.", getattr(recipe, table.name))
    _check_options(recipe.prune)
    eps_of(recipe.tune.eps, recipe.tune.norm)
    eps_of(recipe.attack.eps, recipe.attack.norm)
    for metric, text in recipe.budget.items():
        if metric == ALLOW_ESTIMATES and text in ("True", "true", "False", "false"):
            continue
        limit(metric, text)


def _check_fields(prefix: str, table: Any) -> None:
    for item in fields(table):
        where, value = f"{prefix}{item.name}", getattr(table, item.name)
        if "accepted" in item.metadata:
            check_choice(where, value, item.metadata["accepted"])
        if "between" in item.metadata:
            low, high = item.metadata["between"]
            if not low <= value <= high:
                raise UsageError(f"{where} = {value} must be between {low:.10g} and {high:.10g}")


def _check_options(table: PruneTable) -> None:
    known: dict[str, str] = {}
    if table.method == "auto":
        known = {key: text for name in AUTO for key, text in plugins.options("methods", name).items()}
        for key in table.options:
            if key not in known:
                raise UsageError(f"neither {' nor '.join(AUTO)} has an option {key!r}", suggest(key, known))
    elif "." not in table.method:
        plugins.check_options("methods", table.method, table.options)
        known = plugins.options("methods", table.method)
    for key, value in table.options.items():
        default = known.get(key, "")
        if default[:1] in ("'", '"') and not isinstance(value, str):
            raise UsageError(f"prune.{key} = {value!r:.80} must be of type str")
        if default[:1].isdigit() and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UsageError(f"prune.{key} = {value!r:.80} must be a number")


def _choice(default: str, accepted: Tuple[str, ...]) -> str:
    return field(default=default, metadata={"accepted": accepted})


def _number(default: T, low: float, high: float) -> T:
    return field(default=default, metadata={"between": (low, high)})


@dataclass(frozen=True)
class ModelTable:
    """[model]: the network and how to load it. `input` is "CxHxW" or empty when the file says it."""

    path: str = ""
    arch: str = ""
    input: str = ""
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    allow_class: Tuple[str, ...] = ()
    trust_pickle: bool = False


@dataclass(frozen=True)
class DataTable:
    """[data]: where the images are. `use` is "all" or "evaluate" (then nothing is trained or calibrated on them).

    val_share: held-out share of a set that came without a split. calibration: which images methods, batch-norm
    recalibration and quantization look at, a name or path of `calibration/*.toml`.
    """

    path: str = ""
    use: str = _choice("all", ("all", "evaluate"))
    val_share: float = _number(0.2, 0.01, 0.99)
    calibration: str = "default"


@dataclass(frozen=True)
class PruneTable:
    """[prune]: the method and how channels are shared out.

    granularity: what goes whole: "channel", "weight", or half of each block of four weights, "2:4".
    allocation: "global", "uniform", or "pqi" (layers share by their PQ index). floor: the least share of a layer's
    channels that stays.
    multiple_of: 0 takes the target's. skip: layers whose channels are left alone. repair: the images on which the
    layers after a cut are solved anew: "synthetic" (made from the network itself), "data" (calibration images),
    "none", or "auto". int8_file: with --precision int8 and a budget of macs without size, params or latency, the file
    is held to this times the MACs' share of the dense file too (0.2: to a tenth of it at macs=50 %); 0 is off.
    `options` are the method's own (its dataclass fields).
    """

    method: str = "auto"
    granularity: str = _choice("channel", GRANULARITIES)
    allocation: str = _choice("global", ALLOCATIONS)
    floor: float = _number(0.1, 0.0, 1.0)
    multiple_of: int = _number(0, 0, 1024)
    skip: Tuple[str, ...] = ()
    repair: str = _choice("auto", REPAIRS)
    int8_file: float = 0.2
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SynthesizeTable:
    """[synthesize]: images made from the network itself: how many, and in how many steps.

    0 is as many as the cost of the network allows.
    """

    images: int = _number(0, 0, 65536)
    steps: int = _number(0, 0, 10**6)


@dataclass(frozen=True)
class TuneTable:
    """[tune]: training with data, after a cut or, for a method that trains, while it chooses. Warm-up, then a cosine.

    epochs: all of them; of a method that trains they are its own. optimizer: sgd (Nesterov momentum) or adamw.
    distill: the weight of the dense model's outputs. eps: radius of the attack ("8/255"; empty for the norm's usual
    one), attack_step 0 for a step that fits attack_steps of them. beta: share of the clean images' loss in fgsm and
    pgd. trades: weight of the divergence. keep: "last" epoch, or the "best" on val_share of the training images.
    mixed: "auto", "fp32" or "bf16". augment: "on" (random shifts and mirrors; also `true`), "shift", "mirror", "off"
    (`false`), or "auto", those that the dense network does not mind.
    """

    epochs: int = _number(0, 0, 100000)
    objective: str = _choice("natural", OBJECTIVES)
    lr: float = _number(0.03, 0.0, 100.0)
    batch: int = _number(128, 2, 65536)
    weight_decay: float = _number(5e-4, 0.0, 1.0)
    optimizer: str = _choice("sgd", OPTIMIZERS)
    distill: float = _number(0.9, 0.0, 1.0)
    temperature: float = _number(4.0, 0.01, 1000.0)
    augment: str = _choice("auto", AUGMENTS)
    recalibrate: bool = True
    eps: str = ""
    norm: str = _choice("Linf", NORMS)
    attack_steps: int = _number(7, 1, 1000)
    attack_step: float = _number(0.0, 0.0, 100.0)
    beta: float = _number(0.0, 0.0, 1.0)
    trades: float = _number(6.0, 0.0, 1000.0)
    keep: str = _choice("last", KEEPS)
    val_share: float = _number(0.1, 0.01, 0.5)
    mixed: str = _choice("auto", MIXED)


@dataclass(frozen=True)
class ExportTable:
    """[export]: the file that ships. opset 0 takes the target's."""

    precision: str = _choice("auto", PRECISIONS)
    opset: int = _number(0, 0, 100)
    dynamic_batch: bool = False
    tolerance: float = _number(1e-4, 0.0, 1.0)


@dataclass(frozen=True)
class QuantizeTable:
    """[quantize]: how the file gets the precision that `export.precision` names.

    calibrator: how the range of an activation is chosen; "auto" tries all. scheme: "u8" (unsigned asymmetric
    activations), "s8" (signed symmetric), or "auto", the target's. equalize, bias_correction: "on", "off", or "auto",
    which tries both. tolerance: the loss of accuracy (without labels: of agreement with the float file) above which
    layers go back to float, one after the other. skip: layers that stay float.
    """

    calibrator: str = _choice("auto", CALIBRATORS)
    scheme: str = _choice("auto", SCHEMES)
    equalize: str = _choice("auto", SWITCHES)
    bias_correction: str = _choice("auto", SWITCHES)
    tolerance: float = _number(0.01, 0.0, 1.0)
    skip: Tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasureTable:
    """[measure]: how the file is timed. threads 0 takes the target's.

    device: a URL, or a list of them: the first one decides whatever is decided by time; the others, which are held in
    `beside`, measure what ships at the same time.
    iterations, seconds (for each file): caps; timing ends before when the medians are known within 2 %.
    """

    device: str = "local"
    beside: Tuple[str, ...] = ()
    threads: int = _number(1, 0, 1024)
    warmup: int = _number(10, 0, 10**6)
    iterations: int = _number(4000, 10, 10**6)
    seconds: float = _number(20.0, 0.1, 86400.0)


@dataclass(frozen=True)
class AttackTable:
    """[attack]: how accuracy under attack is measured.

    name: "standard" (the four attacks of AutoAttack's standard version), "pgd", "fgsm", "none", or "auto": standard
    where the budget has a robust accuracy. eps: radius ("8/255"; empty for the one that was trained against, or the
    norm's usual one). limit: so many held-out images, the same share of each class; 0 is all. steps, restarts: of
    pgd. batch: images at a time; 0 is sized to memory.
    """

    name: str = _choice("auto", ATTACKS)
    eps: str = ""
    norm: str = _choice("Linf", NORMS)
    limit: int = _number(500, 0, 10**9)
    steps: int = _number(20, 1, 100000)
    restarts: int = _number(1, 1, 1000)
    batch: int = _number(0, 0, 65536)


@dataclass(frozen=True)
class Recipe:
    """A run, decided completely: same recipe, same model, same data give the same result."""

    target: str = "local"
    seed: int = _number(0, 0, 2**32 - 1)
    model: ModelTable = ModelTable()
    data: DataTable = DataTable()
    synthesize: SynthesizeTable = SynthesizeTable()
    prune: PruneTable = PruneTable()
    budget: Mapping[str, str] = field(default_factory=dict)
    tune: TuneTable = TuneTable()
    export: ExportTable = ExportTable()
    quantize: QuantizeTable = QuantizeTable()
    measure: MeasureTable = MeasureTable()
    attack: AttackTable = AttackTable()
