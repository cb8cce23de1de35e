"""What a budget would remove shrinks while a network trains: multipliers of the constraint |w| <= tau on it.

The deadwood is chosen anew for each epoch. With sigma the rms of a layer's units at the start, its constraint is
|w| / sigma <= tau, and after every optimizer step of learning rate lr its weights shrink by lr / L * sigma * lambda,
where L is the sum of all learning rates: lambda = 1 held throughout moves a weight by one sigma, in a short training
as in a long one. A dual step before each epoch raises lambda by rho / epochs times the mean violation. The first one
comes before training: a training of two epochs would spend one of them on nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.nn import duals
from edgeprune.nn.schedule import share_of_lr
from edgeprune.nn.units import Units
from edgeprune.recipe import TuneTable

TINY = 1e-300

Choose = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Penalty:
    """rho: the dual step. tau: slack, in sigmas. fixed: if more than 0, the multiplier of all, without dual steps.

    per_weight: a multiplier for every unit, not for every layer. cap: the most a multiplier can be.
    """

    rho: float
    tau: float = 0.0
    fixed: float = 0.0
    per_weight: bool = False
    cap: float = 10.0


@dataclass(frozen=True)
class Deadwood:
    """The shrinking of one training; `shrink`, `after_epoch`, `state` and `restore` are hooks of `nn.train.fit`.

    choose: norms -> masks, what would stay. pull: 1 / L. sigma: name -> rms of the norms at the start.
    blocks: of channels, what each owns. gone: name -> bool (n,), the deadwood.
    mass, violation: before each epoch and after the last, the deadwood's share of all norms, and its mean violation.
    """

    network: nn.Module
    units: Units
    choose: Choose
    penalty: Penalty
    epochs: int
    pull: float
    sigma: Mapping[str, float]
    blocks: Mapping[str, duals.Blocks]
    bank: duals.Multipliers
    gone: dict[str, Tensor] = field(default_factory=dict)
    mass: list[float] = field(default_factory=list)
    violation: list[float] = field(default_factory=list)

    def shrink(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """The proximal step of the penalty, after a step of learning rate `lr`."""
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        for name, gone in self.gone.items():
            kappa = lr * self.pull * self.sigma[name] * self.bank.values[name]
            tau = self.penalty.tau * self.sigma[name]
            if name in self.blocks:
                duals.block_shrink_(self.blocks[name], gone, kappa, tau)
                continue
            w = parameters[name]
            # It stays on the network's device until it is chosen anew.
            self.gone[name] = here = gone.to(w.device)
            amount = kappa.view(w.shape).to(w) if kappa.ndim else float(kappa)
            duals.prox_shrink_(w, here.view(w.shape), amount, tau)

    def after_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Choose the deadwood anew, and the dual step of the next epoch."""
        self._look()
        if epoch + 1 < self.epochs:
            self._ascend()

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        gone = {name: each.cpu() for name, each in self.gone.items()}
        return {**self.bank.state(), "gone": gone, "mass": [*self.mass], "violation": [*self.violation]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.bank.restore(state)
        self.gone.update(state["gone"])
        self.mass[:], self.violation[:] = state["mass"], state["violation"]

    def _look(self) -> None:
        norms = self.units.norms(self.network)
        self.gone.update({name: ~stays for name, stays in self.choose(norms).items()})
        total = sum(float(n.sum()) for n in norms.values())
        self.mass.append(sum(float(n[self.gone[name]].sum()) for name, n in norms.items()) / max(total, TINY))
        over, count = self._over(norms), sum(int(gone.sum()) for gone in self.gone.values())
        self.violation.append(sum(float(v.sum()) for v in over.values()) / max(1, count))

    def _ascend(self) -> None:
        over = self._over(self.units.norms(self.network))
        means = {name: v.sum() / max(1, int(self.gone[name].sum())) for name, v in over.items()}
        rho = 0.0 if self.penalty.fixed else self.penalty.rho / self.epochs
        self.bank.update(over if self.penalty.per_weight else means, rho)

    def _over(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By how many sigmas each unit of the deadwood is above the slack: float64 (n,)."""
        tau = self.penalty.tau
        return {n: (v / self.sigma[n] - tau).clamp(min=0) * self.gone[n].cpu() for n, v in norms.items()}


def begin(
    network: nn.Module, units: Units, choose: Choose, penalty: Penalty, *, table: TuneTable, steps: int
) -> Deadwood:
    """Before the first epoch, with the first dual step done.

    Args:
        network: the one that will train, as it is now. choose: norms -> masks, what would stay.
        table: what it trains by. steps: of an epoch.
    """
    total = steps * table.epochs
    reach = table.lr * sum(share_of_lr(step, total) for step in range(total))
    parameters = dict(network.named_parameters(remove_duplicate=False))
    sizes = {name: n if penalty.per_weight else None for name, n in units.sizes.items()}
    deadwood = Deadwood(
        network, units, choose, penalty, table.epochs,
        pull=1 / reach if reach else 0.0,
        sigma={name: max(rms(n), TINY) for name, n in units.norms(network).items()},
        blocks={name: duals.blocks(group, parameters) for name, group in units.groups.items()},
        bank=duals.zeros(sizes, penalty.cap, penalty.fixed),
    )  # fmt: skip
    deadwood._look()
    if table.epochs:
        deadwood._ascend()
    return deadwood


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return float((values**2).mean().sqrt())
