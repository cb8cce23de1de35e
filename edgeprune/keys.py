"""What the result of each stage depends on, as the key of its folder: what did not change is not done again."""

from __future__ import annotations

from dataclasses import replace

from edgeprune import recipe as recipes
from edgeprune.context import Context, stage
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
    keys["export"] = _key(run, "export", keys["tune"], table.export, run.target)
    where = run.device.where()
    keys["measure"] = _key(run, "measure", keys["export"], table.measure, run.data_key, where)
    attack = recipes.attack(table)
    if run.data and attack.name != "none":
        keys["attack"] = _key(run, "attack", keys["export"], keys["tune"], attack, run.data_key, table.seed)
    return {name: keys[name] for name in STAGES if name in keys}


def dense_key(run: Context) -> str:
    """What dense.onnx depends on: the network, the user's code that it is made by, and how it is exported."""
    inputs = (run.identity, run.code_key, run.recipe.export, run.target.opset)
    return run.work.key("dense", stage("export").RESULT_VERSION, *inputs)


def multiple_of(run: Context) -> int:
    """What kept channels should be multiples of: the recipe's wish, or the target's fact for what is built."""
    return run.recipe.prune.multiple_of or run.target.multiple_of["fp32"]


def _prune_key(run: Context, keys: dict[str, str]) -> str:
    timed = any(m.startswith("latency") for m in run.budget.limits)
    seen = run.data_key if run.trainable else None
    clock = [run.recipe.measure, run.device.where()] if timed else None
    # "auto" and the word that it comes to are the same. A method may look at the images that the repair will use.
    table = replace(run.recipe.prune, repair=run.repair)
    images = keys.get("synthesize")
    lesson = run.recipe.tune if run.trains else None
    chosen_by = (table, run.budget, multiple_of(run), run.recipe.seed, seen, clock, images, lesson)
    return _key(run, "prune", keys["dense"], *chosen_by)


def _key(run: Context, name: str, *inputs: object) -> str:
    return run.work.key(name, stage(name).RESULT_VERSION, *inputs)
