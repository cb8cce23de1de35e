"""The same stages on a module in memory, for those who write Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgeprune import models, pipeline, recipe
from edgeprune.errors import EdgepruneError, translated_os_errors
from edgeprune.records import Bundle, Report, Verdict


@dataclass(frozen=True)
class Run:
    """A finished run. folder: where everything lies. module: the smaller network, pixels in [0, 1] -> logits."""

    folder: Path
    report: Report
    verdict: Verdict
    module: nn.Module


@translated_os_errors()
def load(path: str | Path, **model: Any) -> Bundle:
    """Load a model file or a run directory as safely as the command line does.

    Raises:
        UsageError: no such file, or an unknown key. ModelError: it can't be loaded, or not safely.

    >>> import edgeprune
    >>> edgeprune.load("no-such-file.pt2")
    Traceback (most recent call last):
    ...
    edgeprune.errors.UsageError: no such file: 'no-such-file.pt2'
    """
    return pipeline.load(recipe.build({}, {"model": {"path": str(path), **model}}).model)


@translated_os_errors()
def compress(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    target: str = "local",
    budget: Mapping[str, str] | None = None,
    data: str | Path | None = None,
    method: str = "auto",
    **more: Any,
) -> Run:
    """Compress a module in memory; it is not changed.

    Args:
        example_inputs: float32 (N, C, H, W) pixels in [0, 1]; only the shape counts.
        target: a name of `edgeprune list targets` or a path.
        budget: metric -> limit, as in {"macs": "50 %"}, which is also what None stands for.
        data: class folders, a tar of them, or an .npz; with None the module is pruned and repaired on images that are
            synthesized from it.
        method: a name of `edgeprune list methods`; "auto" is taylor with training images, data-free without.
        more: output (the run directory), seed, mean and std (the normalization to put inside), trust_run (go
            on from what somebody else left in output), or a table of the recipe, as in tune={"epochs": 2}.

    Raises:
        EdgepruneError: any of its kinds, as the command line's exit codes say.

    >>> import tempfile, torch, edgeprune
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
    ...                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    >>> run = edgeprune.compress(net, torch.rand(1, 3, 16, 16), budget={"macs": "50 %"}, output=tempfile.mkdtemp(),
    ...                          measure={"iterations": 20, "seconds": 1.0})
    >>> macs = {r.artifact: r.value for r in (*run.report.before, *run.report.after) if r.metric == "macs"}
    >>> macs["compressed"] <= 0.5 * macs["dense"], (run.folder / "model.onnx").exists()
    (True, True)
    """
    output = (
        Path(more.pop("output"))
        if "output" in more
        else Path("runs") / f"{type(model).__name__.lower()}-{target}"
    )
    mean, std = tuple(more.pop("mean", ())), tuple(more.pop("std", ()))
    trust_run = bool(more.pop("trust_run", False))
    flags: dict[str, Any] = {"target": target, "budget": dict(budget or {}), **more}
    flags["prune"] = {"method": method, **more.get("prune", {})}
    if data is not None:
        flags["data"] = {"path": str(data), **more.get("data", {})}
    bundle = models.from_module(model, example_inputs, mean=mean, std=std)
    built = recipe.build({}, flags)
    result = pipeline.compress(built, output, log=_quiet, bundle=bundle, trust_run=trust_run)
    if result.trouble is not None:
        raise result.trouble
    if result.exit_code:
        missed = ", ".join(f"{c.metric} {c.limit}" for c in result.verdict.checks if c.status == "fail")
        raise EdgepruneError(f"the run in {result.folder} is complete, but misses its budget: {missed}")
    return Run(result.folder, result.report, result.verdict, models.deployed(result.bundle))


def _quiet(text: str) -> None:
    """A library does not print."""
