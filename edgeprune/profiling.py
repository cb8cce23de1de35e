"""profile: what a file costs on one device or on several at once, and the latency table of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeprune import bundled, queries
from edgeprune.context import Say, stage, torch_part
from edgeprune.recipe import Recipe
from edgeprune.records import InputSpec, Reading
from edgeprune.tabling import bench

# A profile that finds somebody else measuring is refused at once.
PATIENCE_S = 0.0


def profile(recipe: Recipe, devices: Sequence[str], *, limit: int | None, say: Say) -> tuple[Reading, ...]:
    """Time an ONNX file, and read its memory, size and, with data, its accuracy, on each device.

    Args:
        recipe: `model.path` is the file or a run directory; `[attack]` with the name "auto" is none.
        devices: URLs; none for the recipe's. Several are measured side by side.
        limit: as for `queries.evaluate`.

    Raises:
        UsageError: no such file, or not an ONNX file. DeviceError: a device failed.
    """
    path = queries.onnx_of(Path(recipe.model.path))
    spec = stage("evaluate").input_of(path)
    urls = list(dict.fromkeys(devices)) or [recipe.measure.device]
    images = (
        torch_part("data").open_data(recipe.data, spec, recipe.seed).held_out if recipe.data.path else None
    )
    if images is not None and limit:
        images = stage("evaluate").balanced(images, limit, recipe.seed)
    setup = bundled.target(recipe.target).setup
    found = [import_module("edgeprune.devices").device_from_url(url, setup) for url in urls]
    job = _Job(recipe, path, spec, images, say)
    if len(found) == 1:
        readings = job.on(found[0])
    else:
        with ThreadPoolExecutor(len(found)) as pool:
            readings = tuple(reading for rows in pool.map(job.on, found) for reading in rows)
    if recipe.attack.name in ("none", "auto"):
        return readings
    attacked = queries.evaluate(recipe, limit=limit, say=say)
    return (*readings, *(r for r in attacked if r.metric != "clean_accuracy"))


def table(recipe: Recipe, *, say: Say) -> Any:
    """Time the layers of a model over their channel counts on the recipe's device (`stages.table.LatencyTable`).

    Raises:
        ModelError: the model can't be loaded or cut. DeviceError: the device failed.
    """
    say(f"load: {recipe.model.path}")
    bundle, target = stage("load").run(recipe.model), bundled.target(recipe.target)
    device = import_module("edgeprune.devices").device_from_url(recipe.measure.device, target.setup)
    there = bench(device, recipe.measure, say, wait_s=PATIENCE_S)
    prune, module = recipe.prune, stage("table")
    wish = module.Wish(prune.multiple_of or target.multiple_of["fp32"], prune.floor, prune.skip, recipe.seed)
    with TemporaryDirectory(prefix="edgeprune-") as folder:
        file = Path(folder, "dense.onnx")
        stage("export").run(
            torch_part("bundle").deployed(bundle), bundle.input, file, opset=recipe.export.opset or target.opset,
            table=recipe.export, meta={}, real=None,
        )  # fmt: skip
        return module.run(bundle, file, there, wish)


@dataclass(frozen=True)
class _Job:
    """What is measured on every device alike. images: `nn.data.Split` or None."""

    recipe: Recipe
    path: Path
    spec: InputSpec
    images: Any
    say: Say

    def on(self, device: Any) -> tuple[Reading, ...]:
        """The readings of one device.

        Raises:
            DeviceError: it failed.
        """
        measure_run = stage("measure_run")
        self.say(f"profile: {self.path} on {device.where()}")
        target = bundled.target(self.recipe.target)
        wanted = measure_run.Wanted(
            self.spec, device, self.recipe.measure, target, self.images, self.say, wait_s=PATIENCE_S
        )
        measured = measure_run.run(wanted, {self.path.stem: self.path}, None)
        for note in measured.notes:
            self.say(note)
        return measured.after
