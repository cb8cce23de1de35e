"""The command `why`: what every layer costs, and why it can not be pruned."""

from typing import Any

from edgeprune import devices, diagnose, export, measure, models, targets
from edgeprune.errors import MissingDependency, ModelError
from edgeprune.pipeline.context import Log, load
from edgeprune.recipe import Recipe
from edgeprune.serialization import scratch_folder


def why(recipe: Recipe, *, log: Log) -> tuple[Any, list[str]]:
    """What every layer costs, its share of the time here, how compressible it looks, and why it can't be pruned."""
    log(f"load: {recipe.model.path}")
    bundle = load(recipe.model)
    target = targets.target(recipe.target)
    notes: list[str] = []
    times: dict[str, float] = {}
    device = devices.device_from_url("local")
    with scratch_folder() as folder:
        log(f"why: time every layer on {device.where()}")
        path = folder / "model.onnx"
        try:
            export.run(
                models.deployed(bundle), bundle.input, path, opset=target.opset, table=recipe.export,
                meta={}, real=None,
            )  # fmt: skip
            times = measure.per_layer(path, device, recipe.measure)
            notes.append(
                f"Time shares: measured on {device.where()} with ONNX Runtime, {recipe.measure.threads} thread(s)."
            )
        except (MissingDependency, ModelError) as error:
            notes.append(f"No times: {error.message}")
    rows = diagnose.explain_layers(bundle, times, recipe.prune.skip)
    rest = 1 - sum(row.macs_share for row in rows)
    if rest > 1e-9:
        notes.append(
            f"{rest:.1%} of the multiply-accumulates are in none of these layers, as those of attention."
        )
    return rows, [*notes, diagnose.ABOUT_PQI]
