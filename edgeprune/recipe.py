"""Everything that decides a run: recipe.toml and flags -> Recipe, with every default written out.

A recipe is TOML with the tables below; a flag or `--set table.key=value` wins over the file. Unknown keys are refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Dict, Mapping, Sequence, Tuple

from edgeprune import choices, plugins
from edgeprune.errors import UsageError
from edgeprune.quantities import limit, suggest
from edgeprune.records import Budget


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
    use: str = "all"
    val_share: float = 0.2
    calibration: str = "default"


@dataclass(frozen=True)
class PruneTable:
    """[prune]: the method and how channels are shared out.

    granularity: what goes whole: "channel", "weight", or half of each block of four weights, "2:4".
    allocation: "global", "uniform", or "pqi" (layers share by their PQ index). floor: the least share of a layer's
    channels that stays.
    multiple_of: 0 takes the target's. skip: layers whose channels are left alone. repair: the images on which the
    layers after a cut are solved anew: "synthetic" (made from the network itself), "data" (calibration images),
    "none", or "auto". `options` are the method's own (its dataclass fields).
    """

    method: str = "auto"
    granularity: str = "channel"
    allocation: str = "global"
    floor: float = 0.1
    multiple_of: int = 0
    skip: Tuple[str, ...] = ()
    repair: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SynthesizeTable:
    """[synthesize]: images made from the network itself: how many, and in how many steps.

    0 is as many as the cost of the network allows.
    """

    images: int = 0
    steps: int = 0


@dataclass(frozen=True)
class TuneTable:
    """[tune]: training with data, after a cut or, for a method that trains, while it chooses. Warm-up, then a cosine.

    epochs: all of them; of a method that trains they are its own. optimizer: sgd (Nesterov momentum) or adamw.
    distill: the weight of the dense model's answers. eps: radius of the attack ("8/255"; empty for the norm's usual
    one), attack_step 0 for a step that fits attack_steps of them. beta: share of the clean images' loss in fgsm and
    pgd. trades: weight of the divergence. keep: "last" epoch, or the "best" on val_share of the training images.
    mixed: "auto", "fp32" or "bf16".
    """

    epochs: int = 0
    objective: str = "natural"
    lr: float = 0.03
    batch: int = 128
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    distill: float = 0.9
    temperature: float = 4.0
    augment: bool = True
    recalibrate: bool = True
    eps: str = ""
    norm: str = "Linf"
    attack_steps: int = 7
    attack_step: float = 0.0
    beta: float = 0.0
    trades: float = 6.0
    keep: str = "last"
    val_share: float = 0.1
    mixed: str = "auto"


@dataclass(frozen=True)
class ExportTable:
    """[export]: the file that ships. opset 0 takes the target's."""

    precision: str = "auto"
    opset: int = 0
    dynamic_batch: bool = False
    tolerance: float = 1e-4


@dataclass(frozen=True)
class MeasureTable:
    """[measure]: how the file is timed. threads 0 takes the target's.

    seconds bounds the time for each of the two files.
    """

    device: str = "local"
    threads: int = 1
    warmup: int = 10
    iterations: int = 400
    seconds: float = 20.0


@dataclass(frozen=True)
class AttackTable:
    """[attack]: how accuracy under attack is measured.

    name: "standard" (the four attacks of AutoAttack's standard version), "pgd", "fgsm", "none", or "auto": standard
    where a robust accuracy is asked for. eps: radius ("8/255"; empty for the one that was trained against, or the
    norm's usual one). limit: so many held-out images, the same share of each class; 0 is all. steps, restarts: of
    pgd. batch: images at a time; 0 is sized to memory.
    """

    name: str = "auto"
    eps: str = ""
    norm: str = "Linf"
    limit: int = 500
    steps: int = 20
    restarts: int = 1
    batch: int = 0


@dataclass(frozen=True)
class Recipe:
    """A run, decided completely: same recipe, same model, same data give the same result."""

    target: str = "local"
    seed: int = 0
    model: ModelTable = ModelTable()
    data: DataTable = DataTable()
    synthesize: SynthesizeTable = SynthesizeTable()
    prune: PruneTable = PruneTable()
    budget: Mapping[str, str] = field(default_factory=dict)
    tune: TuneTable = TuneTable()
    export: ExportTable = ExportTable()
    measure: MeasureTable = MeasureTable()
    attack: AttackTable = AttackTable()


_TABLES = {
    "model": ModelTable,
    "data": DataTable,
    "synthesize": SynthesizeTable,
    "prune": PruneTable,
    "tune": TuneTable,
    "export": ExportTable,
    "measure": MeasureTable,
    "attack": AttackTable,
}


def build(file_tables: Mapping[str, Any], flags: Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """Merge a recipe file's tables, the flags (nested like the file, only what was given) and `table.key=value` lines.

    Raises:
        UsageError: an unknown table or key (says the closest), a value of the wrong type or out of range.
    """
    merged: Dict[str, Any] = {}
    for layer in (file_tables, flags, _parse_sets(sets)):
        for key, value in layer.items():
            before = merged.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                merged[key] = {**before, **value}
            else:
                merged[key] = value
    scalars = {"target", "seed"}
    for key in merged:
        if key not in scalars and key not in _TABLES and key != "budget":
            raise UsageError(f"unknown recipe key {key!r}", suggest(key, [*_TABLES, "budget", *scalars]))
    tables = {name: _table(name, cls, merged.get(name, {})) for name, cls in _TABLES.items()}
    target = _typed("target", merged.get("target", "local"), "")
    seed = _typed("seed", merged.get("seed", 0), 0)
    limits = merged.get("budget", {})
    if not isinstance(limits, Mapping):
        raise UsageError(f"[budget] must be a table, got {limits!r}")
    recipe = Recipe(target=target, seed=seed, budget={k: str(v) for k, v in limits.items()}, **tables)
    choices.check(recipe)
    return recipe


def budget(recipe: Recipe) -> Budget:
    """The recipe's budget, parsed; when it names none, half of what the granularity makes less.

    None stands for `macs=50 %` of channels and `params=50 %` of weights. The 2:4 pattern is a budget by itself, and
    the method sap stops by itself.
    """
    half = {"channel": {"macs": "50 %"}, "weight": {"params": "50 %"}, "2:4": {}}[recipe.prune.granularity]
    limits = dict(recipe.budget) or ({} if recipe.prune.method == "sap" else half)
    return Budget({metric: limit(metric, text) for metric, text in limits.items()})


def attack(recipe: Recipe) -> AttackTable:
    """The recipe's attack with "auto" decided, and with its radius written out.

    "auto" is the standard evaluation where the budget names the robust accuracy, PGD (minutes, not hours) where the
    network is trained against attacks, and none otherwise.
    """
    table, tune = recipe.attack, recipe.tune
    adversarial = tune.objective != "natural"
    asked = "standard" if "robust_accuracy" in recipe.budget else "pgd" if adversarial else "none"
    name = asked if table.name == "auto" else table.name
    trained = tune.eps if adversarial and tune.norm == table.norm else ""
    return replace(table, name=name, eps=table.eps or trained or choices.USUAL_EPS_TEXT[table.norm])


def to_dict(recipe: Recipe) -> Dict[str, Any]:
    """Plain nested dicts and lists, every default written out; `build(to_dict(r), {})` gives r again."""
    return json.loads(json.dumps(asdict(recipe)))


def with_defaults(recipe: Recipe, **tables: Mapping[str, Any]) -> Recipe:
    """A copy with some fields of some tables changed, as in with_defaults(r, prune={"method": "taylor"})."""
    return replace(
        recipe, **{name: replace(getattr(recipe, name), **change) for name, change in tables.items()}
    )


def to_toml(recipe: Recipe) -> str:
    """The recipe as the text of a recipe.toml."""
    lines = [f"target = {_toml(recipe.target)}", f"seed = {recipe.seed}"]
    for name, table in to_dict(recipe).items():
        if isinstance(table, dict):
            nested = {k: v for k, v in table.items() if isinstance(v, dict)}
            lines += ["", f"[{name}]"] + [f"{k} = {_toml(v)}" for k, v in table.items() if k not in nested]
            for key, values in nested.items():
                lines += ["", f"[{name}.{key}]"] + [f"{k} = {_toml(v)}" for k, v in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """TOML reads what JSON writes, but for pairs of surrogates and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(name: str, cls: Any, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"[{name}] must be a table, got {values!r}")
    defaults = {f.name: getattr(cls(), f.name) for f in fields(cls)}
    known: Dict[str, Any] = {}
    options = _options(values.get("options", {})) if name == "prune" else {}
    for key, value in values.items():
        if key == "options" and name == "prune":
            continue
        if key in defaults:
            known[key] = _typed(f"{name}.{key}", value, defaults[key])
        elif name == "prune":
            options[key] = value
        else:
            raise UsageError(f"[{name}] has no key {key!r}", suggest(key, defaults))
    if name == "prune":
        known["options"] = options
        known["method"] = plugins.spelled(known.get("method", defaults["method"]))
    return cls(**known)


def _options(values: Any) -> Dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UsageError(f"prune.options = {values!r} must be a table of the method's options")
    return dict(values)


def _typed(where: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        values = (
            value
            if isinstance(value, (list, tuple))
            else [v.strip() for v in str(value).split(",") if v.strip()]
        )
        if where in ("model.mean", "model.std"):
            return _numbers(where, value, values)
        return tuple(str(v) for v in values)
    if (
        where in ("tune.eps", "attack.eps")
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ):
        # A radius is text because of "8/255"; 0.03 in TOML is a number.
        return str(value)
    kind = type(default)
    if isinstance(value, bool) != (kind is bool) or not isinstance(
        value, (kind, int) if kind is float else kind
    ):
        raise UsageError(f"{where} = {value!r} must be of type {kind.__name__}")
    return kind(value)


def _numbers(where: str, given: Any, values: Sequence[Any]) -> Tuple[float, ...]:
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} = {given!r} must be numbers with commas between") from error
    if not all(math.isfinite(v) and (v > 0 or where == "model.mean") for v in numbers):
        raise UsageError(
            f"{where} = {given!r} must be finite{', and more than 0' if where == 'model.std' else ''}"
        )
    return numbers


def _parse_sets(sets: Sequence[str]) -> Dict[str, Any]:
    import tomllib

    out: Dict[str, Any] = {}
    for text in sets:
        path, equals, raw = text.partition("=")
        table, dot, key = path.strip().partition(".")
        if not equals or (dot and not key):
            raise UsageError(
                f"--set {text!r} must be table.key=value", 'for example --set prune.allocation="uniform"'
            )
        try:
            value = tomllib.loads(f"v = {raw.strip()}")["v"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = raw.strip()
        if dot and not isinstance(out.get(table), dict):
            out[table] = {}
        if dot:
            out[table][key] = value
        else:
            out[table] = value
    return out
