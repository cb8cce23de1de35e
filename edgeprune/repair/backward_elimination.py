"""Backward elimination: the order in which units of a group go when all that reads it is solved again.

For a linear reader with weights W and input moments H, removing the inputs S and solving for the others costs
tr(W_S (H^-1_SS)^-1 W_S^T) of squared output error, and the solution is W - W_S (H^-1_SS)^-1 H^-1_S: the optimal brain
surgeon (Hassibi and Stork 1993) with blocks of inputs for weights. The cheapest unit over all readers goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to the moments' diagonal, as a share of its mean: they are estimates, and often of less than full rank.
RIDGE = 1e-3
# Units removed between two rankings of the whole group, as a share of it. They are the best of the POOL times as many
# cheapest ones, and go one by one: of two that replace each other only one is cheap.
AT_ONCE = 1 / 64
POOL = 4


@dataclass(frozen=True)
class Reader:
    """One layer that reads a group.

    weight: (O, F), rows scaled by the weight of an output's error. moments: float64 (F + 1, F + 1) with the constant
    last, or None; then `energy` (F,), the mean squares of its inputs, decides alone. features[u]: the inputs that unit
    u owns.
    """

    weight: Tensor
    moments: Tensor | None
    features: tuple[tuple[int, ...], ...]
    energy: Tensor | None = None


@dataclass(frozen=True)
class Order:
    """units: in the order of removal. errors[k]: squared output error when k are removed; errors[0] = 0."""

    units: tuple[int, ...]
    errors: tuple[float, ...]


def eliminate(readers: Sequence[Reader]) -> Order:
    """The order of removal of all units but one, and its errors."""
    count = len(readers[0].features)
    states = [_state(reader) for reader in readers]
    alive = torch.arange(count)
    gone: list[int] = []
    errors = [0.0]
    step = max(1, int(count * AT_ONCE))
    while len(alive) > 1:
        take = min(step, len(alive) - 1)
        pool = alive[torch.argsort(_costs(states, alive), stable=True)[: POOL * take]]
        chosen, added = _one_by_one([state.only(pool) for state in states], len(pool), take)
        for cost in added:
            errors.append(errors[-1] + max(0.0, cost))
        units = pool[chosen]
        gone.extend(units.tolist())
        for state in states:
            state.remove(units)
        alive = alive[~torch.isin(alive, units)]
    return Order(tuple(gone), tuple(errors))


def _one_by_one(states: Sequence[_Solved | _Fixed], count: int, take: int) -> tuple[list[int], list[float]]:
    left, chosen, added = torch.arange(count), list[int](), list[float]()
    for _ in range(take):
        costs = _costs(states, left)
        cheapest = int(torch.argsort(costs, stable=True)[0])
        chosen.append(int(left[cheapest]))
        added.append(float(costs[cheapest]))
        for state in states:
            state.remove(left[[cheapest]])
        left = torch.cat([left[:cheapest], left[cheapest + 1 :]])
    return chosen, added


def _costs(states: Sequence[_Solved | _Fixed], units: Tensor) -> Tensor:
    return torch.stack([state.costs(units) for state in states]).sum(0)


def _state(reader: Reader) -> _Solved | _Fixed:
    index = torch.tensor(reader.features)
    if reader.moments is None:
        energy = reader.energy if reader.energy is not None else torch.ones(reader.weight.shape[1])
        per_input = reader.weight.double().pow(2).sum(0) * energy.double()
        return _Fixed(per_input[index].sum(1))
    ridge = RIDGE * float(reader.moments.diagonal()[:-1].mean())
    damped = reader.moments.clone()
    damped.diagonal()[:-1].add_(max(ridge, 1e-12))
    # Inputs first, so that the rows of a unit lie together.
    weight = torch.cat([reader.weight.double().T, torch.zeros(1, len(reader.weight), dtype=torch.float64)])
    return _Solved(weight, torch.linalg.inv(damped), index)


class _Solved:
    """A reader whose other inputs compensate for those removed."""

    def __init__(self, weight: Tensor, inverse: Tensor, index: Tensor) -> None:
        self._weight, self._inverse, self._index = weight, inverse, index

    def costs(self, units: Tensor) -> Tensor:
        """The squared error that each unit would add: float64 (len(units),)."""
        at = self._index[units]
        blocks = self._inverse[at[:, :, None], at[:, None, :]]
        weights = self._weight[at]
        # tr(W^T B^-1 W) = tr(B^-1 W W^T), which has as few columns as a unit has inputs.
        return torch.linalg.solve(blocks, weights @ weights.mT).diagonal(dim1=1, dim2=2).sum(1)

    def only(self, units: Tensor) -> _Solved:
        """A copy in which only these units can go; the others still compensate."""
        at = self._index[units]
        inputs = at.flatten()
        return _Solved(
            self._weight[inputs],
            self._inverse[inputs[:, None], inputs],
            torch.arange(len(inputs)).view(at.shape),
        )

    def remove(self, units: Tensor) -> None:
        """Remove units and solve for the others."""
        at = self._index[units].flatten()
        rows = self._inverse[at]
        update = torch.linalg.solve(rows[:, at], rows)
        self._weight -= update.T @ self._weight[at]
        self._inverse -= self._inverse[:, at] @ update
        self._weight[at] = 0
        self._inverse[at] = 0
        self._inverse[:, at] = 0
        self._inverse[at, at] = 1


class _Fixed:
    """A reader whose moments are not known: nothing compensates."""

    def __init__(self, costs: Tensor) -> None:
        self._costs = costs

    def costs(self, units: Tensor) -> Tensor:
        """float64 (len(units),)."""
        return self._costs[units]

    def only(self, units: Tensor) -> _Fixed:
        """A copy of these units alone."""
        return _Fixed(self._costs[units])

    def remove(self, units: Tensor) -> None:
        """Nothing to solve."""
