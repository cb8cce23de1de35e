"""Ridge least squares of a layer: through moments, through the rows themselves, and behind a rectifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgeprune.repair.least_squares import CutOff, Rows


def problem(rows: int, width: int = 6, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x: float32 (rows, F + 1), the constant last. y: float32 (rows, O). start: float64 (F + 1, O)."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width + 1, generator=generator)
    x[:, -1] = 1
    y = torch.randn(rows, outputs, generator=generator) + 2
    start = torch.randn(width + 1, outputs, generator=generator, dtype=torch.float64)
    return x, y, start


def filled(x: Tensor, y: Tensor, edge: CutOff | None = None, *, wide: bool = False, parts: int = 3) -> Rows:
    rows = Rows(wide=wide)
    at = edge.at.expand_as(y).tensor_split(parts) if edge else [None] * parts
    for a, b, c in zip(x.tensor_split(parts), y.tensor_split(parts), at, strict=True):
        rows.add(a, b, CutOff(c, edge.side) if edge and c is not None else None)
    return rows


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("count", [4, 20, 90])
def test_the_rows_themselves_give_the_solution_of_their_moments(count: int, constant: bool) -> None:
    """With fewer rows than unknowns, with a few more and with many more."""
    x, y, start = problem(count)
    plain = filled(x, y).solution(start, constant=constant)
    wide = filled(x, y, wide=True).solution(start, constant=constant)
    # The products are added up in float32 on the one way, in float64 on the other.
    torch.testing.assert_close(wide, plain, rtol=1e-4, atol=1e-4)
    assert constant or torch.equal(wide[-1], start[-1])


@pytest.mark.parametrize("wide", [False, True])
def test_what_can_be_answered_is_answered(wide: bool) -> None:
    x, _, start = problem(400)
    truth = torch.randn(7, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rows = filled(x, (x.double() @ truth).float(), wide=wide)
    found = rows.solution(start, constant=True)
    # The ridge of 1e-4 leaves about that share of the way from the start.
    assert float((found - truth).abs().max()) < 1e-3 * float((start - truth).abs().max())
    assert rows.error(found) < 1e-6 * rows.error(start)


def test_the_error_is_the_mean_square_of_an_output() -> None:
    x, y, start = problem(31)
    expected = float((x.double() @ start - y).pow(2).mean())
    for wide in (False, True):
        assert filled(x, y, wide=wide).error(start) == pytest.approx(expected, rel=1e-5)


def test_parts_of_rows_are_as_good_as_all_at_once() -> None:
    x, y, start = problem(40)
    one, five = (filled(x, y, parts=p) for p in (1, 5))
    torch.testing.assert_close(
        one.solution(start, constant=True), five.solution(start, constant=True), rtol=1e-5, atol=1e-6
    )


def test_what_is_beyond_the_edge_is_cut_off() -> None:
    edge = CutOff(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([1.0, -1.0, 0.0]))
    answers = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert edge.clips(answers).tolist() == [[True, False, False], [False, True, False]]
    assert edge.clipped(answers).tolist() == [[1, 0, 0], [2, 1, 2]]


def rectified(answers: Tensor, scale: Tensor, level: Tensor, shift: Tensor) -> Tensor:
    """What a batch-norm and a ReLU make of answers."""
    return torch.relu((answers - level) * scale + shift)


@pytest.mark.parametrize("wide", [False, True])
def test_the_error_counts_what_gets_through(wide: bool) -> None:
    x, y, start = problem(50)
    scale, level = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, 1.0, 2.0])
    shift = torch.tensor([0.25, -1.0, 0.0])
    edge = CutOff((level - shift / scale)[None], scale.sign())
    found, wanted = (rectified(a, scale, level, shift) for a in ((x.double() @ start).float(), y))
    expected = float(((found - wanted) / scale).pow(2).mean())
    assert filled(x, y, edge, wide=wide).error(start) == pytest.approx(expected, rel=1e-4)


def test_behind_a_rectifier_only_what_gets_through_is_fitted() -> None:
    """Half of the wanted answers are cut off, and are no linear function of the inputs."""
    generator = torch.Generator().manual_seed(0)
    x, _, start = problem(600)
    truth = torch.randn(7, 3, generator=generator)
    y = x @ truth
    hidden = y < 0
    y[hidden] -= 20 * torch.rand(int(hidden.sum()), generator=generator)
    edge = CutOff(torch.zeros(1, 3), torch.ones(3))
    plain = filled(x, y).solution(start, constant=True)
    rows = filled(x, y, edge)
    found = rows.solution(start, constant=True)
    assert rows.error(found) < 0.2 * rows.error(plain)
    assert float((torch.relu(x @ found.float()) - torch.relu(y)).pow(2).mean()) == pytest.approx(
        rows.error(found), rel=1e-4
    )


@pytest.mark.parametrize("seed", range(5))
def test_behind_a_rectifier_the_solution_is_never_worse_than_the_plain_one(seed: int) -> None:
    x, y, start = problem(40 + seed)
    edge = CutOff(torch.full((1, 3), 2.0), torch.tensor([1.0, -1.0, 0.0]))
    rows = filled(x, y, edge)
    plain = filled(x, y).solution(start, constant=True)
    assert rows.error(rows.solution(start, constant=True)) <= rows.error(plain)


def test_an_edge_that_hides_nothing_changes_nothing() -> None:
    x, y, start = problem(40)
    none = CutOff(torch.full((1, 3), -1e3), torch.ones(3))
    torch.testing.assert_close(
        filled(x, y, none).solution(start, constant=True),
        filled(x, y).solution(start, constant=True),
        rtol=1e-5,
        atol=1e-6,
    )
