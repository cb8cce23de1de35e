"""Training within a budget: masks are applied after every step and rewired after every epoch.

Dynamic network rewiring (Kundu et al. 2021) with its dynamic L2 term, as hooks of the training loop.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import models
from edgeprune.methods._dnr.rewiring import (
    ROUNDING,
    ChannelBudget,
    Rewired,
    magnitude,
    normalized,
    pruning_rate,
    rewire,
    rewire_blocks,
    rewire_channels,
)
from edgeprune.structure import Units, drop_smallest
from edgeprune.train import Hooks, momentum

REGULARIZERS = ("proximal", "admm", "none")
# In training a removed channel is only unread: its filter still computes, so its readers have a momentum.
READERS = ("consumer",)


@dataclass(frozen=True)
class Plan:
    """How a network is rewired; the fields are the options of `DNR`."""

    epochs: int
    rate: float = 0.5
    until: float = 1.0
    regularizer: str = "proximal"
    rho: float = 1e-4
    revive_value: bool = False

    @property
    def regularizes(self) -> bool:
        """Whether the loss has a dynamic term."""
        return self.regularizer != "none" and self.rho > 0

    def rate_after(self, epoch: int) -> float:
        """The share that is traded after an epoch (counted from 0); nothing after the last one."""
        if epoch + 1 >= self.epochs or self.until <= 0:
            return 0.0
        return pruning_rate(self.rate, epoch, self.until * self.epochs)


@dataclass
class SparseTraining:
    """The masks of a network in training.

    masks: name of a unit -> bool (n,). floors: the least of each, for weights. budget: for channels. settings: what
    else the training depends on, as text. anchors, duals: Z and U of the dynamic term, for each masked parameter.
    record: per epoch its number, how many units were removed and grown after it, and the density of each layer in it.
    """

    network: nn.Module
    units: Units
    plan: Plan
    masks: dict[str, Tensor]
    floors: Mapping[str, int] = field(default_factory=dict)
    budget: ChannelBudget | None = None
    settings: str = ""
    anchors: dict[str, Tensor] = field(default_factory=dict)
    duals: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    gone: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = models.tensors(self.network)
        names = dict.fromkeys(self.units.sizes)
        if self.units.granularity == "channel":
            members = [member for group in self.units.groups.values() for member in group.members]
            names = dict.fromkeys(member.tensor for member in members if member.role in READERS)
        self.weights = {name: named[name] for name in names}
        self.record = {"epochs": [], "removed": [], "grown": [], "density": {n: [] for n in self.units.sizes}}
        if self.budget is not None:
            # What rounding to levels left of the budget is spent before the first step.
            norms = self.scores(self.weights)
            sizes = {name: float(n) for name, n in self.units.sizes.items()}
            self.masks = rewire_channels(self.masks, norms, norms, sizes, 0.0, self.budget).masks
        self._zero(self.masks)

    def hooks(
        self, loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor] | None = None
    ) -> Hooks:
        """The hooks of the training loop."""
        return Hooks(
            loss=loss, penalty=self.penalty if self.plan.regularizes else None, after_step=self.after_step,
            after_epoch=self.after_epoch, state=self.state, restore=self.restore,
        )  # fmt: skip

    def penalty(self) -> Tensor:
        """rho / 2 sum |W - Z + U|^2, with Z and U constants; 0 in the first epoch, which has no Z yet."""
        total = next(iter(self.weights.values())).new_zeros(())
        for name, anchor in self.anchors.items():
            away = self.weights[name] - anchor
            total = total + (away + self.duals[name] if name in self.duals else away).square().sum()
        return self.plan.rho / 2 * total

    def after_step(self, _optimizer: torch.optim.Optimizer, _lr: float) -> None:
        """Zero what is pruned; its momentum continues."""
        if not self.gone:
            for name, stays in self.units.entries(self.masks, self.network, READERS).items():
                # Laid out as the weight is: twice as fast at every step.
                self.gone[name] = torch.empty_like(self.weights[name], dtype=torch.bool).copy_(~stays)
        with torch.no_grad():
            for name, gone in self.gone.items():
                self.weights[name].masked_fill_(gone, 0)

    def after_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Record, rewire except after the last epoch, and update the anchors."""
        rate = self.plan.rate_after(epoch)
        self.record["epochs"].append(epoch)
        for name, mask in self.masks.items():
            self.record["density"][name].append(float(mask.double().mean()))
        removed = grown = 0
        stayed = self.masks
        if rate > 0 and not all(bool(mask.all()) for mask in self.masks.values()):
            found = self._trade(optimizer, rate)
            removed, grown = sum(found.removed.values()), sum(found.grown.values())
            self.masks, stayed = found.masks, found.stayed
            self._zero(self.masks if self.plan.revive_value else stayed)
        self.record["removed"].append(removed)
        self.record["grown"].append(grown)
        if self.plan.regularizes:
            self._anchor(stayed, self.plan.rate_after(epoch + 1))

    def scores(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What units are ranked by: |value|, or the Frobenius norm of the slices that read a channel.

        Args:
            values: masked parameter -> a number per entry.
        """
        if self.units.granularity != "channel":
            return {name: magnitude(values[name]) for name in self.units.sizes}
        squares = {name: value.detach().double().square() for name, value in values.items()}
        return {name: total.sqrt() for name, total in self.units.sums(squares, READERS).items()}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "plan": f"{self.plan!r} {self.settings}",
            "masks": self.masks,
            "anchors": self.anchors,
            "duals": self.duals,
            "record": self.record,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume; the record never gets shorter, when an earlier epoch's weights come back."""
        self.masks = dict(state["masks"])
        self.anchors, self.duals = dict(state["anchors"]), dict(state["duals"])
        if len(state["record"]["epochs"]) > len(self.record["epochs"]):
            self.record = dict(state["record"])
        self.gone = {}

    def _trade(self, optimizer: torch.optim.Optimizer, rate: float) -> Rewired:
        momenta = {name: momentum(optimizer, weight) for name, weight in self.weights.items()}
        if self.units.granularity == "2:4":
            return rewire_blocks(self.masks, self.weights, momenta, self.units.blocks, rate)
        if self.budget is None:
            return rewire(self.masks, self.weights, momenta, rate, self.floors)
        sums = self.units.sums({name: m.abs() for name, m in momenta.items()}, READERS)
        sizes = self.units.sums({name: torch.ones_like(m) for name, m in momenta.items()}, READERS)
        means = {
            name: float(sums[name][mask].sum() / sizes[name][mask].sum().clamp(min=1))
            for name, mask in self.masks.items()
        }
        shares = normalized(means, {name: int(size.sum()) for name, size in sizes.items()})
        scores, wanted = self.scores(self.weights), self.scores(momenta)
        return rewire_channels(self.masks, scores, wanted, shares, rate, self.budget)

    def _zero(self, masks: Mapping[str, Tensor]) -> None:
        self.units.apply(self.network, masks, READERS)
        self.gone = {}

    def _anchor(self, stayed: Mapping[str, Tensor], rate: float) -> None:
        """Z and U for the next epoch; copies, because an anchor that follows the weights has no gradient."""
        now = {name: weight.detach().clone() for name, weight in self.weights.items()}
        if self.plan.regularizer == "proximal":
            self.anchors = now
            return
        # ADMM: Z projects W + U on all but the weakest, as many as the next rewiring removes, and U adds up what that
        # takes away. What has just grown is left out of the ranking: at zero it would be the weakest by itself.
        active = self.units.entries(self.masks, self.network, READERS)
        lifted = {name: _only(w + self.duals.get(name, 0), active.get(name)) for name, w in now.items()}
        scores = self.scores(lifted)
        left = {
            name: drop_smallest(scores[name], mask, math.floor(rate * int(mask.sum()) + ROUNDING))
            for name, mask in stayed.items()
        }
        stays = self.units.entries(left, self.network, READERS)
        self.anchors = {name: _only(value, stays.get(name)) for name, value in lifted.items()}
        self.duals = {name: value - self.anchors[name] for name, value in lifted.items()}


def _only(value: Tensor, stays: Tensor | None) -> Tensor:
    return value.clone() if stays is None else value.masked_fill(~stays, 0)
