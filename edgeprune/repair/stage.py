"""Repair of a cut network without training: its layers are solved, one after the other, to match the dense outputs.

After a cut each layer gets other inputs than it was trained for. Its weights become the ridge least-squares solution
for the dense layer's outputs, from its actual inputs on the same images (He, Zhang and Sun, "Channel Pruning for
Accelerating Very Deep Neural Networks", 2017, section 3.1). Where its output is added to a shortcut, it also corrects
the shortcut's error; before a rectifier, only outputs that pass it count. No labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from edgeprune import train
from edgeprune.data import Split
from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.models import Call, deployed, logits, normalize, normalized_example, trace
from edgeprune.progress import bar
from edgeprune.recipe import PruneTable
from edgeprune.records import Bundle, Reading
from edgeprune.repair.consumers import bias_of
from edgeprune.repair.input_moments import (
    ROWS,
    WIDEST,
    affordable,
    output_rows,
    patches,
    reads_patches,
    width,
)
from edgeprune.repair.least_squares import CutOff, Rows
from edgeprune.repair.paired_execution import (
    Downstream,
    Execution,
    active_mask,
    check_batches,
    check_same_calls,
    downstream_of,
    residual_target,
    run_pairwise,
)
from edgeprune.repair.sensitivity import divergence

# Numbers that the rows of one layer may take.
CELLS = 2**26
CHUNK = 64


@dataclass(frozen=True)
class Repaired:
    """notes: for the report. facts: what was done, in numbers."""

    bundle: Bundle
    notes: tuple[str, ...]
    facts: dict[str, float | int | str]


def repair(dense: Bundle, small: Bundle, images: Tensor, *, seed: int) -> Repaired:
    """Solve the layers of a cut network to match the dense outputs; kept where that reduces the divergence."""
    fixed = deepcopy(small.module).eval()
    example = normalized_example(dense.input, seed)
    try:
        programs = trace(dense.module, example), trace(fixed, example)
        check_same_calls(*programs)
    except UnsupportedModel as error:
        return Repaired(small, (f"The cut network was not repaired: {error}.",), {"layers": 0})
    images = affordable(images, small.plans[-1].macs_before)
    pixels = normalize(images, dense.input)
    several = len(pixels) > 1 and all(
        check_batches(net, p, pixels[:2]) for net, p in zip((dense.module, fixed), programs, strict=True)
    )
    chunks = pixels.split(CHUNK if several else 1)
    before = Execution(deepcopy(dense.module).eval(), programs[0], chunks)
    after = Execution(fixed, programs[1], chunks)
    partner = {b.name: a.name for a, b in zip(programs[0].calls, programs[1].calls, strict=True)}
    partner[programs[1].input] = programs[0].input
    solver = _Solver(before, after, small.plans[-1].tensors, partner)
    with bar(len(programs[0].calls), "repair") as advance:

        def visit(first: Call, second: Call, moved: bool) -> None:
            solver.visit(first, second, moved)
            advance()

        run_pairwise(before, after, visit)
    return accepted(dense, small, fixed, images, solver.errors)


@dataclass
class _Solver:
    """Solves layer after layer while the two networks run. errors: path -> squared error before and after."""

    dense: Execution
    small: Execution
    removed: Removed
    partner: Mapping[str, str]
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def visit(self, first: Call, second: Call, moved: bool) -> None:
        """Solve the layer of a call that gets other inputs than the dense one."""
        if not moved or second.op not in ("conv2d", "linear") or not second.weights:
            return
        path, _, leaf = second.weights[0].rpartition(".")
        layer = self.small.network.get_submodule(path)
        once = len(self.small.program.readers(second.weights[0])) == 1
        if leaf != "weight" or not once or not reads_patches(layer):
            return
        task = _Layer(path, layer, first, second, self._kept(second.weights[0]))
        weight, bias = layer.get_parameter("weight"), bias_of(self.small.program, self.small.network, path)
        level = self._level(task)
        start = torch.cat([weight.detach().flatten(1).T.double(), level[None]])
        rows = self._rows(task, self._subtracted_mean(task))
        solved = rows.solution(start, constant=bias.free)
        old, new = rows.error(start), rows.error(solved)
        if not new < old:
            return
        with torch.no_grad():
            weight.copy_(solved[:-1].T.reshape(weight.shape).to(weight.dtype))
        bias.add(solved[-1] - level)
        self.errors[path] = (old, new)

    def _kept(self, weight: str) -> Tensor:
        gone = {p for axis, positions in self.removed.get(weight, ()) if axis == 0 for p in positions}
        return torch.tensor([i for i in range(len(self.dense.state[weight])) if i not in gone])

    def _level(self, task: _Layer) -> Tensor:
        bias = bias_of(self.small.program, self.small.network, task.path)
        if bias.bias is not None:
            return bias.bias.detach().double()
        if bias.running_mean is None:
            return torch.zeros(len(task.kept), dtype=torch.float64)
        dense = bias_of(self.dense.program, self.dense.network, task.path).running_mean
        assert dense is not None, "the networks make the same calls"
        return dense.double()[task.kept] - bias.running_mean.double()

    def _subtracted_mean(self, task: _Layer) -> Tensor:
        """What the batch-norm after the layer subtracts, (O,); zeros without one."""
        norm = downstream_of(self.dense.program, task.first).norm
        if norm is None:
            return torch.zeros(len(task.kept))
        return self.dense.state[norm.arg("running_mean").name][task.kept]

    def _rows(self, task: _Layer, level: Tensor) -> Rows:
        inputs = self.small.values[task.second.reads[0]]
        outputs = self.dense.values[task.first.name]
        linear = isinstance(task.layer, nn.Linear)
        found = downstream_of(self.small.program, task.second)
        shortcuts = self._shortcuts(task, found)
        if shortcuts is None:
            found = replace(found, rectified=found.rectified and found.total is None)
        padded = task.second.op == "conv2d" and task.second.arg("padding") in ((0, 0), "valid")
        most, total = min(ROWS, CELLS // (width(task.layer) + 1)), sum(len(x) for x in inputs)
        rows = Rows(wide=width(task.layer) > WIDEST)
        for i, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
            target = y.index_select(-1 if linear else 1, task.kept)
            share, shortcut = max(1, most * len(x) // total), None
            if shortcuts is not None:
                shortcut = shortcuts[1][i]
                target = target + residual_target(found, self.small.state, shortcuts[0][i], shortcut)
            edge = active_mask(found, self.small.state, level, shortcut, target.ndim)
            if edge is not None:
                edge = CutOff(output_rows(task.layer, edge.at.expand_as(target), share), edge.side)
            rows.add(
                patches(task.layer, x, share, padded=padded), output_rows(task.layer, target, share), edge
            )
        return rows

    def _shortcuts(self, task: _Layer, found: Downstream) -> tuple[list[Tensor], list[Tensor]] | None:
        """The other value of the sum after the layer, dense and cut; None where it is not computed yet."""
        if found.total is None:
            return None
        dense = self.dense.values.get(self.partner[found.shortcut])
        small = self.small.values.get(found.shortcut)
        if dense is None or small is None:
            return None
        axis = -1 if isinstance(task.layer, nn.Linear) else 1
        dense = [
            a.index_select(axis, task.kept) if a.shape != b.shape else a
            for a, b in zip(dense, small, strict=True)
        ]
        return (dense, small) if all(a.shape == b.shape for a, b in zip(dense, small, strict=True)) else None


Removed = Mapping[str, Sequence[tuple[int, Sequence[int]]]]


@dataclass(frozen=True)
class _Layer:
    """A layer that is solved: its call in the dense and the cut network, the outputs it kept."""

    path: str
    layer: nn.Module
    first: Call
    second: Call
    kept: Tensor


def accepted(
    dense: Bundle, small: Bundle, fixed: nn.Module, images: Tensor, errors: Mapping[str, tuple[float, float]]
) -> Repaired:
    """The repaired network if it is closer to the dense one than the cut network, else that, and the facts."""
    done = replace(small, module=fixed)
    with torch.no_grad():
        expected = _outputs(dense, images)
        before, after = (divergence(expected, _outputs(b, images)) for b in (small, done))
    facts: dict[str, float | int | str] = {
        "layers": len(errors), "images": len(images), "kl before": before, "kl after": after,
        "squared error before": sum(old for old, _ in errors.values()),
        "squared error after": sum(new for _, new in errors.values()),
    }  # fmt: skip
    if not errors:
        note = "There was nothing to repair: no layer that could be solved gets other inputs than before the cut."
        return Repaired(small, (note,), facts)
    if not after < before:
        note = f"The repair was not kept: the outputs are {after:.3g} nats from the dense ones, {before:.3g} before."
        return Repaired(small, (note,), {**facts, "layers": 0})
    return Repaired(
        done,
        (
            f"{len(errors)} layers were solved in closed form on {len(images)} images: the outputs are "
            f"{after:.3g} nats from the dense ones, {before:.3g} before.",
        ),
        facts,
    )


def _outputs(bundle: Bundle, images: Tensor) -> Tensor:
    network = deployed(bundle).eval()
    return torch.cat([logits(network, chunk) for chunk in images.split(CHUNK)])


RESULT_VERSION = 1


def source_of(table: PruneTable, method: str, trainable: bool) -> str:
    """The images that a network is repaired on: "synthetic", "data" or "none".

    "auto" repairs only for the method data-free, which prunes with the same images: training images if there are any.
    """
    if table.repair == "data" and not trainable:
        raise UsageError(
            "prune.repair = 'data' needs training images, and there are none",
            "give --data with a training part (without --data-use evaluate), or --set prune.repair=synthetic",
        )
    if table.granularity != "channel" and table.repair not in ("auto", "none"):
        raise UsageError(
            f"prune.repair = {table.repair!r} is for channels: at granularity {table.granularity!r} no layer is cut",
            "leave it out",
        )
    if table.repair == "auto" and table.granularity != "channel":
        # The images are for choosing alone.
        return "none"
    if table.repair == "auto":
        if method != "data-free":
            return "none"
        return "data" if trainable else "synthetic"
    return table.repair


def run(
    dense: Bundle, small: Bundle, images: Tensor, *, held_out: Split | None, seed: int
) -> tuple[Repaired, tuple[Reading, ...]]:
    """Repair a cut network, and measure its accuracy before and after where there are held-out images."""
    repaired = repair(dense, small, images, seed=seed)
    if held_out is None:
        return repaired, ()
    before = train.reading(deployed(small), held_out, "pruned", {})
    after = train.reading(deployed(repaired.bundle), held_out, "repaired", {"repair": repaired.facts})
    return repaired, (before, after)
