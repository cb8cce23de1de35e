"""Ridge least squares for one layer, also with the activation after it.

With an activation that is constant on one side, the error after it is reduced by alternating between fixing which
outputs are clipped and solving for the others (Zhang, Zou, He and Sun, "Accelerating Very Deep Convolutional Networks
for Classification and Detection", 2016, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Penalty on moving away from the weights as they were, as a share of the moments' mean diagonal: small where there are
# many more rows than unknowns.
RIDGE, RIDGE_SHORT = 1e-3, 1e-2
SHORT = 4
TURNS = 8


class Ridge:
    """argmin |X W - Y|^2 + ridge * mean(diag X^T X) * |W - start|^2 for any Y, the constant not penalized."""

    def __init__(
        self, moments: Tensor, start: Tensor, keep: Sequence[int] | None, *, constant: bool, ridge: float
    ) -> None:
        width = len(moments) - 1
        used = torch.arange(width) if keep is None else torch.tensor(sorted(keep), dtype=torch.int64)
        index = torch.cat([used, torch.tensor([width])]) if constant else used
        weight = max(ridge * float(moments.diagonal()[:-1].mean()), 1e-12)
        penalty = torch.full((len(index),), weight, dtype=torch.float64)
        if constant:
            penalty[-1] = 0
        self._index, self._start, self._constant = index, start, constant
        self._system = moments[index][:, index] + penalty.diag()
        # Half the work of a general solution; a singular system (an input that is always 0) needs that all the same.
        self._lower, failed = torch.linalg.cholesky_ex(self._system)
        self._general = bool(failed)
        self._added = penalty[:, None] * start[index]
        if not constant:
            self._added = self._added - moments[index][:, [width]] @ start[[width]]

    def solve(self, cross: Tensor) -> Tensor:
        """The weights (F + 1, O) for outputs Y, 0 in unused features. cross: X^T Y, (F + 1, O)."""
        out = torch.zeros_like(self._start)
        target = cross[self._index] + self._added
        if self._general:
            out[self._index] = torch.linalg.solve(self._system, target)
        else:
            out[self._index] = torch.cholesky_solve(target, self._lower)
        if not self._constant:
            out[-1] = self._start[-1]
        return out


@dataclass(frozen=True)
class CutOff:
    """An activation that is constant on one side. at: (n, O) or (1, O), the outputs where it begins.

    side: (O,), 1 where it clips what is below, -1 what is above, 0 nothing.
    """

    at: Tensor
    side: Tensor

    def clips(self, outputs: Tensor) -> Tensor:
        """Which outputs are clipped: bool (n, O)."""
        return (outputs - self.at) * self.side < 0

    def clipped(self, outputs: Tensor) -> Tensor:
        """The outputs after clipping."""
        return torch.where(self.clips(outputs), self.at.expand_as(outputs), outputs)


class Rows:
    """Inputs and target outputs of a layer, row by row."""

    def __init__(self, *, wide: bool) -> None:
        """wide: a layer with more inputs than rows, for which no moments are computed."""
        self._wide = wide
        self._rows: list[tuple[Tensor, Tensor, CutOff | None]] = []

    def add(self, x: Tensor, y: Tensor, cut_off: CutOff | None = None) -> None:
        """More rows. x: (n, F + 1), the constant last. y: (n, O). cut_off: of the activation after the layer."""
        self._rows.append((x, y, cut_off))

    def solution(self, start: Tensor, *, constant: bool) -> Tensor:
        """The best weights near `start`, float64 (F + 1, O)."""
        count = sum(len(x) for x, _, _ in self._rows)
        ridge = RIDGE if count >= SHORT * len(start) else RIDGE_SHORT
        if self._wide:
            return self._dual(start, ridge, constant=constant)
        moments = sum((_gram(x, x) for x, _, _ in self._rows), torch.zeros((), dtype=torch.float64)) / count
        system = Ridge(moments, start, None, constant=constant, ridge=ridge)
        weights = system.solve(self._cross(None) / count)
        if all(cut_off is None for _, _, cut_off in self._rows):
            return weights
        best, least = weights, self.error(weights)
        for _ in range(TURNS):
            weights = system.solve(self._cross(weights) / count)
            error = self.error(weights)
            if error >= least:
                break
            best, least = weights, error
        return best

    def error(self, weights: Tensor) -> float:
        """Mean squared error after the activation."""
        squared, count = 0.0, 0
        for x, y, cut_off in self._rows:
            found = (x.double() @ weights).to(y.dtype) if self._wide else x @ weights.to(x.dtype)
            target = y
            if cut_off is not None:
                found, target = cut_off.clipped(found), cut_off.clipped(y)
            squared += float((found - target).double().pow(2).sum())
            count += y.numel()
        return squared / count

    def _cross(self, weights: Tensor | None) -> Tensor:
        """X^T Y; with weights, without the outputs that are clipped for both them and the target."""
        total = torch.zeros((), dtype=torch.float64)
        for x, y, cut_off in self._rows:
            target = y
            if cut_off is not None and weights is not None:
                found = x @ weights.to(x.dtype)
                free = torch.where(cut_off.clips(found), found, cut_off.at.expand_as(found))
                target = torch.where(cut_off.clips(y), free, y)
            total = total + _gram(x, target)
        return total

    def _dual(self, start: Tensor, ridge: float, *, constant: bool) -> Tensor:
        """The same ridge solution for fewer rows than unknowns, through the rows' own products.

        Means are subtracted from inputs and residuals, because the constant is not penalized.
        """
        x = torch.cat([r[:, :-1].double() for r, _, _ in self._rows])
        missing = torch.cat([a.double() - r.double() @ start for r, a, _ in self._rows])
        penalty = max(ridge * float(x.pow(2).mean()), 1e-12) * len(x)
        middle, level = (t.mean(0) if constant else torch.zeros_like(t[0]) for t in (x, missing))
        x, missing = x - middle, missing - level
        products = x @ x.T
        products.diagonal().add_(penalty)
        change = x.T @ torch.linalg.solve(products, missing)
        return torch.cat([start[:-1] + change, start[-1:] + (level - middle @ change)])


def _gram(x: Tensor, y: Tensor) -> Tensor:
    return sum(
        ((a.T @ b).double() for a, b in zip(x.split(8192), y.split(8192), strict=True)),
        torch.zeros((), dtype=torch.float64),
    )
