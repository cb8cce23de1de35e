"""What the result of each stage depends on, as the key of its folder: what did not change is not done again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgeprune import recipe as recipes
from edgeprune.codec import to_json
from edgeprune.context import Context, stage
from edgeprune.recipe import ExportTable
from edgeprune.workdir import STAGES


def stage_keys(run: Context) -> dict[str, str]:
    """Stage -> key, in the order of the stages; a stage that this run does without is absent.

    Images are synthesized, and the network is repaired, only where the recipe's `prune.repair` comes to that.

    Raises:
        UsageError: the recipe wants a repair with training images, and there are none.
    """
    repair, table = run.repair, run.recipe
    keys = {"dense": dense_key(run)}
    if run.synthesizes:
        # Not the budget and not the opset: another one finds the same images.
        keys["synthesize"] = _key(run, "synthesize", run.identity, run.code_key, table.synthesize, table.seed)
    keys["prune"] = _prune_key(run, keys)
    keys["cut"] = _key(run, "cut", keys["prune"])
    if repair != "none":
        images = keys.get("synthesize", run.data_key)
        keys["repair"] = _key(run, "repair", keys["cut"], repair, images, run.data_key, table.seed)
    pruned = keys.get("repair", keys["cut"])
    keys["tune"] = _key(run, "tune", pruned, run.lesson, run.data_key, table.seed)
    keys["export"] = _key(run, "export", keys["tune"], _float(run), run.target)
    where, attack = run.device.where(), recipes.attack(table)
    if run.quantizes:
        keys["quantize"] = _quantize_key(run, keys, where)
    shipped = keys.get("quantize", keys["export"])
    keys["measure"] = _key(run, "measure", shipped, _timing(run), run.data_key, where)
    if run.data and attack.name != "none":
        keys["attack"] = _key(run, "attack", shipped, keys["tune"], attack, run.data_key, table.seed, where)
    return {name: keys[name] for name in STAGES if name in keys}


def beside_key(run: Context, keys: Mapping[str, str], url: str) -> str:
    """What the readings of a further device depend on; the device itself is not asked, so that it may be away.

    Args:
        keys: of `stage_keys`. url: of the device, without a password.
    """
    shipped = keys.get("quantize", keys["export"])
    return _key(run, "measure", shipped, {**_timing(run), "device": url}, run.data_key, "beside")


def dense_key(run: Context) -> str:
    """What dense.onnx depends on: the network, the user's code that it is made by, and how it is exported."""
    inputs = (run.identity, run.code_key, _float(run), run.target.opset)
    return run.work.key("dense", stage("export").RESULT_VERSION, *inputs)


def multiple_of(run: Context) -> int:
    """What kept channels should be multiples of: the recipe's wish, or the target's fact for what is built."""
    precision = run.recipe.export.precision
    return (
        run.recipe.prune.multiple_of or run.target.multiple_of["fp32" if precision == "auto" else precision]
    )


def _float(run: Context) -> ExportTable:
    """How networks are exported, whatever precision the file gets in the end."""
    return replace(run.recipe.export, precision="fp32")


def _timing(run: Context) -> dict[str, Any]:
    """How the device that decides is timed; that others measure beside it changes nothing there."""
    return {name: value for name, value in to_json(run.recipe.measure).items() if name != "beside"}


def _quantize_key(run: Context, keys: dict[str, str], where: str) -> str:
    table = run.recipe
    images = run.data_key if run.trainable else keys.get("synthesize")
    clock = [_timing(run), where] if run.on_target and table.export.precision == "auto" else None
    ball = replace(recipes.attack(table), name="pgd", limit=0, batch=0)
    crafted = [ball, table.seed] if run.trainable and run.minds_attacks else None
    wanted = (table.quantize, table.export.precision, run.target.precisions, run.target.int8, run.budget)
    return _key(run, "quantize", keys["export"], *wanted, images, clock, crafted)


def _prune_key(run: Context, keys: dict[str, str]) -> str:
    timed = any(m.startswith("latency") for m in run.budget.limits)
    seen = run.data_key if run.trainable else None
    clock = [_timing(run), run.device.where()] if timed else None
    # "auto" and the word that it comes to are the same. A method may look at the images that the repair will use.
    table = replace(run.recipe.prune, repair=run.repair)
    images = keys.get("synthesize")
    lesson = run.recipe.tune if run.trains else None
    built = run.recipe.export.precision if timed or "size" in run.budget.limits or run.file_share else ""
    chosen_by = (table, run.budget, multiple_of(run), run.recipe.seed, seen, clock, images, lesson, built)
    return _key(run, "prune", keys["dense"], *chosen_by)


def _key(run: Context, name: str, *inputs: object) -> str:
    return run.work.key(name, stage(name).RESULT_VERSION, *inputs)
