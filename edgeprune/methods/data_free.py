"""Prune without data: units merged under bounds, or removed by their effect on synthesized images.

Meng, Bai, Teo and Dong, "Supervised Robustness-preserving Data-free Neural Network Pruning" (2022), for convolutional
and residual networks too. `mode` baseline, greedy and stochastic are the paper's: units are merged in small steps by
saliency alone, by a score of the bounded change of the logits, or by that score with simulated annealing. `mode`
reconstruction uses images that were synthesized from the network: units go by backward elimination, and the counts by
the measured change of the outputs. Unlike the paper, both directions of a pair are tried, the bounds are sound, and
the two parts of the score are ranked before they are mixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import UsageError
from edgeprune.methods._base import PruneTask, Survey, SurveyMethod, group_shares
from edgeprune.methods._data_free import progressive
from edgeprune.methods._data_free.impact import input_box
from edgeprune.models import Program, normalized_example, trace
from edgeprune.progress import track
from edgeprune.quantities import check_choice
from edgeprune.records import Group, InputSpec, Masks
from edgeprune.repair import (
    Consumer,
    Order,
    Reader,
    SensitivityProbe,
    affordable,
    consumers_of,
    eliminate,
    losses,
    moments_of_inputs,
    output_scale,
    reads_patches,
)
from edgeprune.structure import losses_of

MODES = ("auto", "reconstruction", *progressive.MODES)
BATCH = 64


@dataclass(frozen=True)
class DataFree(SurveyMethod):
    """mode: auto (reconstruction where the network is repaired on images, else stochastic), or one of MODES.

    score: paper or margin. alpha: share of the widths in the paper's score. step: share of a layer removed per step.
    pool: candidates of a step, times its quota. scaled: merge a unit in proportion to another one.
    """

    mode: str = "auto"
    score: str = "paper"
    alpha: float = 0.75
    step: float = 0.05
    pool: int = 4
    scaled: bool = True

    def survey(self, network: nn.Module, task: PruneTask) -> Survey:
        """The loss of each count: measured on images, or from the saliency of the units."""
        mode = self._mode(task)
        if mode == "reconstruction":
            return _by_reconstruction(network, task)
        squares = {g.name: progressive.single_saliency(network, g).pow(2) for g in task.groups}
        return Survey(losses_of(group_shares(squares)))

    def choose(self, network: nn.Module, task: PruneTask, survey: Survey, kept: Mapping[str, int]) -> Masks:
        """Which units stay; in the paper's modes the others are merged into them, in place."""
        if self._mode(task) == "reconstruction":
            orders: Mapping[str, Order] = survey.detail
            return Masks(channels={g: _without(orders[g], k) for g, k in kept.items()})
        program = trace(network, _example(task))
        rules = progressive.Rules(self._mode(task), self.score, self.alpha, self.step, self.pool, self.scaled)
        thinning = progressive.Thinning(network, program, task.groups, input_box(_spec(task)), rules)
        thinning.run(kept, task.seed)
        task.notes.extend(thinning.notes())
        return Masks(channels=dict(thinning.alive))

    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """|w| times the root mean square of its input, as a share of its output's sum; for single weights.

        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2024), Eq. 1, made comparable
        between outputs and layers. Without images, and for layers whose inputs are not observed, the input counts as
        1.
        """
        units = task.units
        paths = {name: name.rpartition(".")[0] for name in units.shapes}
        layers = {path: network.get_submodule(path) for path in paths.values()}
        layers = {path: layer for path, layer in layers.items() if reads_patches(layer)}
        moments: Mapping[str, Tensor] = {}
        if task.unlabelled is not None:
            images = affordable(task.unlabelled, task.costs.cost({})["macs"])
            moments = moments_of_inputs(_Whole(network, task), layers, images, BATCH)
        out = {}
        for name, norms in units.norms(network).items():
            rows = norms.view(units.shapes[name][0], -1)
            if paths[name] in moments:
                rows = rows * torch.diagonal(moments[paths[name]])[:-1].clamp(min=0).sqrt()
            out[name] = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).flatten()
        return out

    def _mode(self, task: PruneTask) -> str:
        check_choice("data-free: mode", self.mode, MODES)
        check_choice("data-free: score", self.score, progressive.SCORES)
        if not 0 <= self.alpha <= 1 or not 0 < self.step <= 1 or self.pool < 1:
            raise UsageError(
                f"data-free: alpha = {self.alpha} must be in [0, 1], step = {self.step} in (0, 1] and "
                f"pool = {self.pool} at least 1"
            )
        images = task.unlabelled
        if self.mode == "reconstruction" and images is None:
            raise UsageError(
                "data-free: mode 'reconstruction' needs images, and there are none",
                "leave prune.repair at auto or synthetic, or choose mode stochastic",
            )
        if self.mode != "auto":
            return self.mode
        return "stochastic" if images is None else "reconstruction"


def _by_reconstruction(network: nn.Module, task: PruneTask) -> Survey:
    images = task.unlabelled
    assert images is not None, "the mode was checked"
    macs = task.costs.cost({})["macs"]
    images = affordable(images, macs)
    whole = _Whole(network, task)
    readers = {g.name: consumers_of(network, g)[0] for g in task.groups}
    program = trace(network, _example(task))
    layers = {r.path: r.layer for found in readers.values() for r in found}
    moments = moments_of_inputs(whole, layers, images, BATCH)
    orders = {
        group.name: _order(group, readers[group.name], (network, program), moments)
        for group in track(task.groups, len(task.groups), "eliminate units")
    }
    probe = SensitivityProbe(whole, network, program, moments)
    return Survey(losses(probe, task.groups, orders, readers, images, macs), orders)


def _order(
    group: Group, readers: list[Consumer], traced: tuple[nn.Module, Program], moments: Mapping[str, Tensor]
) -> Order:
    network, program = traced
    if not readers:
        saliency = progressive.single_saliency(network, group)
        units = torch.argsort(saliency, stable=True)
        errors = saliency[units].pow(2).cumsum(0).tolist()[:-1]
        return Order(tuple(units.tolist()[:-1]), (0.0, *errors))
    found = []
    for reader in readers:
        weight = reader.layer.get_parameter("weight").detach().flatten(1)
        scaled = weight * output_scale(program, network, reader.path)[:, None]
        found.append(Reader(scaled, moments.get(reader.path), reader.features))
    return eliminate(found)


def _without(order: Order, kept: int) -> Tensor:
    channels = len(order.units) + 1
    keep = torch.ones(channels, dtype=torch.bool)
    keep[list(order.units[: channels - kept])] = False
    return keep


def _example(task: PruneTask) -> Tensor:
    return normalized_example(_spec(task), task.seed)


def _spec(task: PruneTask) -> InputSpec:
    if task.spec is None:
        raise UsageError("data-free needs the shape of the network's input", "give PruneTask.spec")
    return task.spec


class _Whole(nn.Module):
    def __init__(self, network: nn.Module, task: PruneTask) -> None:
        nn.Module.__init__(self)
        self.network = network
        self._logits: Any = task.logits

    def forward(self, x: Tensor) -> Tensor:
        """x: pixels (N, C, H, W). Returns logits (N, K)."""
        return self._logits(self.network, x)
