"""Lagrange multipliers of a training under constraints, and the shrinkage by their penalties.

The Lagrangian dual framework (Fioretto et al., "Lagrangian Duality for Constrained Deep Learning", 2020): a
constraint g <= 0 adds lambda * max(0, g) to the loss, and after each epoch lambda rises by a step times the mean
violation.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import models
from edgeprune.errors import UsageError
from edgeprune.recipe import TuneTable
from edgeprune.records import Group
from edgeprune.structure import Units
from edgeprune.train import lr_factor


def dual_update(lam: Tensor, violation: Tensor, rho: float, lam_max: float = math.inf) -> Tensor:
    """lambda + rho * max(0, violation), at most `lam_max`; never less than before."""
    if rho < 0 or lam_max < 0:
        raise UsageError(f"a dual step has rho = {rho!r} and lam_max = {lam_max!r}; both must be at least 0")
    risen = lam + rho * violation.clamp(min=0)
    return torch.maximum(lam, risen.clamp(max=lam_max))


def prox_shrink_(w: Tensor, mask: Tensor, kappa: float | Tensor, tau: float = 0.0) -> None:
    """The proximal step of kappa * max(0, |w| - tau) where `mask`, in place: towards zero by kappa, but not past tau.

    With tau = 0 it leaves exact zeros, which a subgradient step would only jump over.

    Args:
        kappa: >= 0, learning rate times multiplier; a number, or float like `w`.
    """
    with torch.no_grad():
        size = w.abs()
        shrunk = torch.sign(w) * torch.maximum(size.clamp(max=tau), size - kappa)
        w.copy_(torch.where(mask, shrunk, w))


@dataclass(frozen=True)
class Blocks:
    """The parameters that each channel of a group owns.

    members: (parameter, axis, entries along the axis int64 (m,), the channel that owns each int64 (m,)).
    sizes: float64 (C,), numbers per channel.
    """

    members: tuple[tuple[nn.Parameter, int, Tensor, Tensor], ...]
    sizes: Tensor


def blocks(group: Group, parameters: Mapping[str, nn.Parameter]) -> Blocks:
    """The blocks of a coupled group, without buffers."""
    members, sizes = [], torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        if member.tensor not in parameters:
            continue
        parameter = parameters[member.tensor]
        owners = torch.tensor([unit for unit, p in enumerate(member.positions) for _ in p], dtype=torch.long)
        where = torch.tensor([q for p in member.positions for q in p], dtype=torch.long)
        members.append((parameter, member.axis, where, owners))
        each = parameter.numel() / parameter.shape[member.axis]
        sizes.index_add_(0, owners, torch.full((len(owners),), each, dtype=torch.float64))
    return Blocks(tuple(members), sizes)


def block_norms(owned: Blocks) -> Tensor:
    """||w_g||_2 / sqrt(|g|) of each channel: float64 (C,), on the CPU."""
    squares = torch.zeros_like(owned.sizes)
    for parameter, axis, where, owners in owned.members:
        axes = [a for a in range(parameter.ndim) if a != axis]
        along = parameter.detach().double().square()
        along = (along.sum(axes) if axes else along).cpu()
        squares.index_add_(0, owners, along[where])
    return (squares / owned.sizes.clamp(min=1)).sqrt()


def block_shrink_(owned: Blocks, chosen: Tensor, kappa: float | Tensor, tau: float = 0.0) -> None:
    """Block soft-threshold, in place: w_g * max(0, 1 - kappa / n_g), with n_g from `block_norms`.

    The proximal step of kappa * |g| * max(0, n_g - tau), the group lasso with its usual weight sqrt(|g|) on ||w_g||_2
    (Yuan and Lin, 2006). A number that belongs to channels of two groups is shrunk by each.

    Args:
        chosen: bool (C,). kappa: >= 0, a number or float64 (C,). tau: norms up to this stay.
    """
    norms = block_norms(owned)
    left = torch.maximum(norms.clamp(max=tau), norms - kappa)
    factors = torch.where(chosen & (norms > 0), left / norms.clamp(min=1e-300), 1.0)
    with torch.no_grad():
        for parameter, axis, where, owners in owned.members:
            along = torch.ones(parameter.shape[axis], dtype=torch.float64)
            along[where] = factors[owners]
            shape = [-1 if a == axis else 1 for a in range(parameter.ndim)]
            parameter.mul_(along.to(parameter).reshape(shape))


@dataclass(frozen=True)
class Multipliers:
    """Named multipliers, each a number or a vector.

    values: name -> float64 () or (n,). history: name -> the (mean) value after each update.
    """

    values: dict[str, Tensor]
    cap: float = math.inf
    history: dict[str, list[float]] = field(default_factory=dict)

    def update(self, violations: Mapping[str, Tensor | float], rho: float | Mapping[str, float]) -> None:
        """One dual step of every multiplier.

        Args:
            violations: name -> a number, or float (n,) like the multiplier; missing names are 0.
        """
        unknown = sorted(set(violations) - set(self.values))
        if unknown:
            raise UsageError(f"no multiplier is named {unknown[0]!r}; there are {', '.join(self.values)}")
        for name, lam in self.values.items():
            found = torch.as_tensor(violations.get(name, 0.0), dtype=torch.float64).cpu()
            if not bool(torch.isfinite(found).all()):
                raise UsageError(f"the violation of {name} is not finite", "lower the learning rate")
            step = rho[name] if isinstance(rho, Mapping) else rho
            self.values[name] = dual_update(lam, found.expand(lam.shape), step, self.cap)
            self.history.setdefault(name, []).append(float(self.values[name].mean()))

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "values": {name: lam.clone() for name, lam in self.values.items()},
            "history": {name: list(curve) for name, curve in self.history.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`."""
        self.values.update({name: lam.clone() for name, lam in state["values"].items()})
        self.history.clear()
        self.history.update({name: list(curve) for name, curve in state["history"].items()})


def zeros(sizes: Mapping[str, int | None], cap: float = math.inf, start: float = 0.0) -> Multipliers:
    """Multipliers that begin at `start`: a vector of each size, or a number where the size is None."""
    values = {
        name: torch.full(() if n is None else (n,), start, dtype=torch.float64) for name, n in sizes.items()
    }
    return Multipliers(values, cap)


TINY = 1e-300

Choose = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Penalty:
    """rho: the dual step. tau: slack, in sigmas. fixed: if more than 0, a constant multiplier without dual steps."""

    rho: float
    tau: float = 0.0
    fixed: float = 0.0
    per_weight: bool = False
    cap: float = 10.0


@dataclass(frozen=True)
class Deadwood:
    """The shrinkage of one training; `shrink`, `after_epoch`, `state` and `restore` are hooks of `train.loop.fit`.

    choose: norms -> masks of what would stay. pull: 1 / L. sigma: name -> rms of the norms at the start. gone: name ->
    bool (n,), the deadwood. mass, violation: before each epoch and after the last, its share of all norms, and its
    mean violation.
    """

    network: nn.Module
    units: Units
    choose: Choose
    penalty: Penalty
    epochs: int
    pull: float
    sigma: Mapping[str, float]
    blocks: Mapping[str, Blocks]
    bank: Multipliers
    gone: dict[str, Tensor] = field(default_factory=dict)
    mass: list[float] = field(default_factory=list)
    violation: list[float] = field(default_factory=list)

    def shrink(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """The proximal step of the penalty, after an optimizer step."""
        parameters = models.tensors(self.network)
        for name, gone in self.gone.items():
            kappa = lr * self.pull * self.sigma[name] * self.bank.values[name]
            tau = self.penalty.tau * self.sigma[name]
            if name in self.blocks:
                block_shrink_(self.blocks[name], gone, kappa, tau)
                continue
            w = parameters[name]
            # It stays on the network's device until it is chosen anew.
            self.gone[name] = here = gone.to(w.device)
            amount = kappa.view(w.shape).to(w) if kappa.ndim else float(kappa)
            prox_shrink_(w, here.view(w.shape), amount, tau)

    def after_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Choose the deadwood of the next epoch, and the dual step."""
        self._record()
        if epoch + 1 < self.epochs:
            self._ascend()

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        gone = {name: each.cpu() for name, each in self.gone.items()}
        return {**self.bank.state(), "gone": gone, "mass": [*self.mass], "violation": [*self.violation]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.bank.restore(state)
        self.gone.update(state["gone"])
        self.mass[:], self.violation[:] = state["mass"], state["violation"]

    def _record(self) -> None:
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
        """By how many sigmas each unit of the deadwood exceeds the slack: float64 (n,)."""
        tau = self.penalty.tau
        return {n: (v / self.sigma[n] - tau).clamp(min=0) * self.gone[n].cpu() for n, v in norms.items()}


def begin(
    network: nn.Module, units: Units, choose: Choose, penalty: Penalty, *, table: TuneTable, steps: int
) -> Deadwood:
    """The state before the first epoch, after the first dual step."""
    total = steps * table.epochs
    reach = table.lr * sum(lr_factor(step, total) for step in range(total))
    parameters = dict(network.named_parameters(remove_duplicate=False))
    sizes = {name: n if penalty.per_weight else None for name, n in units.sizes.items()}
    deadwood = Deadwood(
        network, units, choose, penalty, table.epochs,
        pull=1 / reach if reach else 0.0,
        sigma={name: max(rms(n), TINY) for name, n in units.norms(network).items()},
        blocks={name: blocks(group, parameters) for name, group in units.groups.items()},
        bank=zeros(sizes, penalty.cap, penalty.fixed),
    )  # fmt: skip
    deadwood._record()
    if table.epochs:
        deadwood._ascend()
    return deadwood


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return float((values**2).mean().sqrt())
