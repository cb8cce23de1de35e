"""Everything that decides a run: recipe.toml and flags -> Recipe, with every default written out.

A recipe is TOML with the tables below; a flag or `--set table.key=value` wins over the file. Unknown keys are refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from typing import Any, Dict, Mapping, Sequence, Tuple

from edgeprune import plugins, targets
from edgeprune.errors import UsageError, visible
from edgeprune.quantities import limit, suggest
from edgeprune.recipe import schema
from edgeprune.recipe.schema import (
    AttackTable,
    DataTable,
    ExportTable,
    MeasureTable,
    ModelTable,
    PruneTable,
    QuantizeTable,
    Recipe,
    SynthesizeTable,
    TuneTable,
)
from edgeprune.records import Budget

_TABLES = {
    "model": ModelTable,
    "data": DataTable,
    "synthesize": SynthesizeTable,
    "prune": PruneTable,
    "tune": TuneTable,
    "export": ExportTable,
    "quantize": QuantizeTable,
    "measure": MeasureTable,
    "attack": AttackTable,
}


def build(file_tables: Mapping[str, Any], flags: Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """Merge a recipe file's tables, the flags and `table.key=value` lines."""
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
    schema.check(recipe)
    return recipe


def budget(recipe: Recipe) -> Budget:
    """The recipe's budget, parsed; when it names none, half of what the granularity makes less.

    None stands for `macs=50 %` of channels and `params=50 %` of weights. The 2:4 pattern is a budget by itself, and
    the method sap stops by itself.
    """
    half = {"channel": {"macs": "50 %"}, "weight": {"params": "50 %"}, "2:4": {}}[recipe.prune.granularity]
    limits = {metric: text for metric, text in recipe.budget.items() if metric != schema.ALLOW_ESTIMATES}
    limits = limits or ({} if recipe.prune.method == "sap" else half)
    allowed = recipe.budget.get(schema.ALLOW_ESTIMATES, "").lower() == "true"
    return Budget({metric: limit(metric, text) for metric, text in limits.items()}, allowed)


def attack(recipe: Recipe) -> AttackTable:
    """The recipe's attack with "auto" decided, and with its radius written out.

    "auto" is the standard evaluation where the budget names the robust accuracy, PGD (minutes, not hours) where the
    network is trained against attacks, and none otherwise.
    """
    table, tune = recipe.attack, recipe.tune
    adversarial = tune.objective != "natural"
    chosen = "standard" if "robust_accuracy" in recipe.budget else "pgd" if adversarial else "none"
    name = chosen if table.name == "auto" else table.name
    trained = tune.eps if adversarial and tune.norm == table.norm else ""
    return replace(table, name=name, eps=table.eps or trained or schema.USUAL_EPS_TEXT[table.norm])


def to_dict(recipe: Recipe) -> Dict[str, Any]:
    """Plain nested dicts and lists, every default written out; `build(to_dict(r), {})` gives r again.

    One device is a text, several are a list.
    """
    tables = json.loads(json.dumps(asdict(recipe)))
    measure = tables["measure"]
    beside = measure.pop("beside")
    if beside:
        measure["device"] = [measure["device"], *beside]
    return tables


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
    """TOML reads what JSON writes, but for pairs of surrogates and a bare DEL; what nobody sees is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return (
        text if text == visible(text) else "".join(c if c == visible(c) else f"\\u{ord(c):04x}" for c in text)
    )


def _table(name: str, cls: Any, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"[{name}] must be a table, got {values!r}")
    defaults = {f.name: getattr(cls(), f.name) for f in fields(cls)}
    known: Dict[str, Any] = {}
    options = values.get("options", {}) if name == "prune" else {}
    if not isinstance(options, Mapping):
        raise UsageError(f"prune.options = {options!r} must be a table of the method's options")
    options = dict(options)
    if name == "measure":
        del defaults["beside"]
        known = _devices(values.get("device", defaults["device"]))
    for key, value in values.items():
        if (name, key) in (("prune", "options"), ("measure", "device")):
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


def _devices(given: Any) -> Dict[str, Any]:
    """Where to measure: one URL or several, the first of which decides; one that is named twice counts once."""
    if isinstance(given, str):
        return {"device": given}
    listed = isinstance(given, (list, tuple)) and all(isinstance(url, str) for url in given)
    urls = list(dict.fromkeys(given)) if listed else []
    if not urls:
        raise UsageError(f"measure.device = {given!r} must be a URL or a list of URLs", 'as in "local"')
    return {"device": urls[0], "beside": tuple(urls[1:])}


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
    if where == "tune.augment" and isinstance(value, bool):
        return "on" if value else "off"
    kind = type(default)
    if isinstance(value, int) and value.bit_length() > targets.WHOLE_BITS:
        raise UsageError(f"{where} is a whole number of {value.bit_length() + 1} bits, accepted are 64")
    if isinstance(value, bool) != (kind is bool) or not isinstance(
        value, (kind, int) if kind is float else kind
    ):
        raise UsageError(f"{where} = {value!r} must be of type {kind.__name__}")
    return kind(value)


def _numbers(where: str, given: Any, values: Sequence[Any]) -> Tuple[float, ...]:
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{where} = {given!r} must be numbers with commas between") from error
    if not all(math.isfinite(v) and (v > 0 or where == "model.mean") for v in numbers):
        raise UsageError(
            f"{where} = {given!r} must be finite{', and more than 0' if where == 'model.std' else ''}"
        )
    return numbers


def _parse_sets(sets: Sequence[str]) -> Dict[str, Any]:
    out: Dict[str, Any] = {}
    for text in sets:
        path, equals, raw = text.partition("=")
        table, dot, key = path.strip().partition(".")
        if not equals or (dot and not key):
            raise UsageError(
                f"--set {text!r} must be table.key=value", 'for example --set prune.allocation="uniform"'
            )
        try:
            value = targets.parse_toml(f"v = {raw.strip()}")["v"]
        except ValueError:
            value = raw.strip()
        if dot and not isinstance(out.get(table), dict):
            out[table] = {}
        if dot:
            out[table][key] = value
        else:
            out[table] = value
    return out
