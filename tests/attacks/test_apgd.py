"""APGD: the losses in numbers, its checkpoints step by step, and that it reaches optima which are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edgeprune.attacks._apgd import Task, climb, cross_entropies, targeted_dlr, targets
from edgeprune.models.queries import AttackResult
from edgeprune.train.adversarial import Ball

# Steps of 100 after which the step may be halved: 22, then 19, 16, 13, 10, 7, 6 and 6 more.
CHECKPOINTS = (22, 41, 57, 70, 80, 87, 93, 99)
EPS = 0.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def task(x: Tensor) -> Task:
    return Task(x, torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x), dtype=torch.int64))


def second(answer: Tensor, _y: Tensor, _target: Tensor) -> Tensor:
    return answer[:, 1]


def safe(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A classifier of two classes that is always right, whose second logit is what the loss is."""
    return lambda x: torch.stack([torch.full((len(x),), 1e6), score(x)], 1)


def run(score: Callable[[Tensor], Tensor], x: Tensor, ball: Ball, steps: int = 100) -> AttackResult:
    return climb(safe(score), task(x), ball, loss=second, steps=steps, rho=0.75, generator=seeded())


class Script:
    """A loss of one pixel that says at each query what it was told: its value, and its gradient."""

    def __init__(self, values: list[float], gradients: list[float]) -> None:
        self.values, self.gradients, self.seen = values, gradients, []

    def __call__(self, x: Tensor) -> Tensor:
        query = len(self.seen)
        self.seen.append(float(x.detach()))
        change = x.flatten() - x.detach().flatten()
        return self.values[query] + self.gradients[query] * change


def clipped(value: float) -> float:
    """In the ball of EPS around the middle."""
    return min(max(value, 0.5 - EPS), 0.5 + EPS)


# Losses


def test_the_targeted_dlr_loss_in_numbers() -> None:
    answer = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0], [5.0, 3.0, 2.0, 1.0, 0.0], [0.0, 4.0, 1.0, 2.0, 3.0]])
    found = targeted_dlr(answer, labels(0, 0, 0), labels(1, 4, 1))
    assert found.tolist() == pytest.approx([-2 / 3.5, -5 / 3.5, 4 / (4 - 1.5)])


def test_the_targeted_dlr_loss_does_not_change_with_the_scale_of_the_logits_nor_with_a_shift() -> None:
    answer = torch.randn(6, 10, generator=seeded())
    y, target = labels(0, 1, 2, 3, 4, 5), labels(9, 8, 7, 6, 5, 4)
    loss = targeted_dlr(answer, y, target)
    assert torch.allclose(targeted_dlr(answer * 1e4 + 7, y, target), loss, rtol=1e-3)


def test_the_targeted_dlr_loss_of_few_classes_is_the_margin() -> None:
    assert targeted_dlr(torch.tensor([[5.0, 3.0, 2.5]]), labels(0), labels(2)).tolist() == [-2.5]
    assert targeted_dlr(torch.tensor([[1.0, 3.0]]), labels(0), labels(1)).tolist() == [2.0]


def test_the_cross_entropy_is_of_each_image_by_itself() -> None:
    answer = torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]])
    expected = torch.log(torch.tensor([2.0, 4.0]))
    assert torch.allclose(cross_entropies(answer, labels(0, 1), labels(0, 0)), expected)


def test_targets_are_the_likeliest_other_classes_in_order() -> None:
    answer = torch.tensor([[3.0, 9.0, 1.0, 5.0], [3.0, 9.0, 1.0, 5.0]])
    assert targets(answer, labels(1, 0), 9).tolist() == [[3, 0, 2], [1, 3, 2]]
    assert targets(answer, labels(1, 0), 2).tolist() == [[3, 0], [1, 3]]
    assert targets(answer[:, :2], labels(1, 0), 9).tolist() == [[0], [1]]


# Optima


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_on_a_linear_loss_it_reaches_the_end_of_the_ball(norm: str) -> None:
    w = torch.randn(12, generator=seeded(1))
    x = torch.rand(5, 3, 2, 2, generator=seeded(2)) * 0.4 + 0.3
    found = run(lambda at: at.flatten(1) @ w, x, Ball(norm, EPS))
    way = w.sign() if norm == "Linf" else w / w.norm()
    assert torch.allclose(found.images, x + EPS * way.view(1, 3, 2, 2), atol=1e-5)
    assert not found.broken.any() and found.queries.tolist() == [101] * 5


def test_on_a_linear_loss_it_reaches_the_corner_that_the_pixels_allow() -> None:
    w = torch.randn(12, generator=seeded(1))
    x = torch.rand(5, 3, 2, 2, generator=seeded(2)).round()
    found = run(lambda at: at.flatten(1) @ w, x, Ball("Linf", EPS))
    assert torch.allclose(found.images, (x + EPS * w.sign().view(1, 3, 2, 2)).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("away", [0.03, 0.5])
def test_on_a_quadratic_loss_it_reaches_the_optimum_inside_or_at_the_edge_of_the_ball(
    norm: str, away: float
) -> None:
    x = torch.full((4, 1, 3, 4), 0.5)
    top = x + away * (torch.rand(x.shape, generator=seeded(3)) - 0.5)
    ball = Ball(norm, EPS)
    found = run(lambda at: -(at - top).flatten(1).square().sum(1), x, ball)
    assert torch.allclose(found.images, ball.project(top, x), atol=0.02 * EPS)


# Checkpoints


def test_without_progress_the_step_is_halved_at_every_checkpoint_and_the_walk_goes_back_to_the_best() -> None:
    # Only the first point has a slope; what pulls later ones is what was kept with the best point, the first.
    script = Script([0.0] * 101, [1.0] + [0.0] * 100)
    run(script, torch.full((1, 1, 1, 1), 0.5), Ball("Linf", EPS))
    seen, size = script.seen, 2 * EPS
    assert len(seen) == 101
    assert seen[1] == pytest.approx(clipped(seen[0] + size)), "the first step has no momentum"
    before, at = seen[0], seen[1]
    for query in range(2, 101):
        step = 0.0
        if query - 1 in CHECKPOINTS:
            size, at = size / 2, seen[0]
            step = clipped(at + size) - at
        assert seen[query] == pytest.approx(clipped(at + 0.75 * step + 0.25 * (at - before)), abs=1e-6), query
        before, at = at, seen[query]


def test_with_a_loss_that_always_rises_the_step_stays() -> None:
    queries = (30, 60, 98)
    script = Script([float(k) for k in range(101)], [1.0 if k in queries else -1.0 for k in range(101)])
    run(script, torch.full((1, 1, 1, 1), 0.5), Ball("Linf", EPS))
    for query in queries:
        assert script.seen[query] == pytest.approx(0.5 - EPS)
        assert script.seen[query + 1] == pytest.approx(0.5 - EPS + 0.75 * 2 * EPS), "the whole ball's width"


@pytest.mark.parametrize(("rises", "size"), [(12, EPS), (13, 2 * EPS)])
def test_three_quarters_of_the_period_must_rise_for_the_step_to_stay(rises: int, size: float) -> None:
    # The third period has 16 steps, 42 to 57: falls first, then rises to new heights.
    changes = [0.0] + [1.0] * 41 + [-1.0] * (16 - rises) + [10.0] * rises + [1.0] * 43
    values = torch.tensor(changes).cumsum(0).tolist()
    script = Script(values, [1.0 if k == 57 else -1.0 for k in range(101)])
    run(script, torch.full((1, 1, 1, 1), 0.5), Ball("Linf", EPS))
    assert script.seen[58] == pytest.approx(0.5 - EPS + 0.75 * size)


def test_rises_that_lead_nowhere_new_halve_the_step_every_other_time() -> None:
    # From the second checkpoint on the loss rises in every step but one, and never to what it was at the beginning.
    values = [1000.0 - k for k in range(42)] + [float(k) for k in range(59)]
    script = Script(values, [1.0] + [0.0] * 100)
    run(script, torch.full((1, 1, 1, 1), 0.5), Ball("Linf", EPS))
    sizes, size = [], 2 * EPS
    for halves, checkpoint in zip([1, 1, 0, 1, 0, 1, 0, 1], CHECKPOINTS, strict=True):
        back = bool(halves)
        size = size / 2 if back else size
        at = script.seen[0] if back else script.seen[checkpoint]
        step = clipped(at + size) - at if back else 0.0
        expected = clipped(at + 0.75 * step + 0.25 * (at - script.seen[checkpoint - 1]))
        sizes.append(script.seen[checkpoint + 1] == pytest.approx(expected, abs=1e-6))
    assert sizes == [True] * 8


# What is broken


def linear(x: Tensor) -> Tensor:
    """Class 0 where the sum of the pixels is less than 6.5 (of 12)."""
    score = x.flatten(1).sum(1) - 6.5
    return torch.stack([-score, score], 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_broken_image_is_the_first_point_that_was_wrong_and_is_not_asked_about_again(norm: str) -> None:
    x = torch.cat([torch.full((1, 3, 2, 2), 0.53), torch.full((1, 3, 2, 2), 0.2)])
    seen: list[int] = []

    def counted(at: Tensor) -> Tensor:
        seen.append(len(at))
        return linear(at)

    found = climb(
        counted, task(x), Ball(norm, EPS), loss=cross_entropies, steps=20, rho=0.75, generator=seeded(1)
    )
    assert found.broken.tolist() == [True, False]
    assert linear(found.images).argmax(1).tolist() == [1, 0]
    assert found.queries[1] == 21 and 1 <= found.queries[0] <= 3
    assert sum(seen) == int(found.queries.sum())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_that_others_break_changes_nothing_for_the_image_that_stands(norm: str) -> None:
    # Of 16 pixels: torch draws normal numbers by sixteens, so the first image starts at the same point.
    stands, breaks = torch.full((1, 1, 4, 4), 0.3), torch.full((3, 1, 4, 4), 0.53)

    def wavy(x: Tensor) -> Tensor:
        score = x.flatten(1).sum(1) - 8.67
        return torch.stack([(20 * x).sin().flatten(1).sum(1) * 0.1 - score, score], 1)

    def walk(x: Tensor) -> AttackResult:
        return climb(
            wavy, task(x), Ball(norm, EPS), loss=cross_entropies, steps=40, rho=0.75, generator=seeded(2)
        )

    together, alone = walk(torch.cat([stands, breaks])), walk(stands)
    assert together.broken.tolist() == [False, True, True, True]
    assert torch.allclose(together.images[:1], alone.images, atol=1e-6)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    x = torch.full((1, 1, 1, 1), 0.5)
    script = Script([9.0, 1.0, 2.0, 9.0, 5.0, 9.0], [1.0, -1.0, 1.0, -1.0, 1.0, 0.0])

    def no_nines(answer: Tensor, _y: Tensor, _target: Tensor) -> Tensor:
        return torch.where(answer[:, 1] == 9, torch.nan, answer[:, 1])

    found = climb(
        safe(script), task(x), Ball("Linf", EPS), loss=no_nines, steps=5, rho=0.75, generator=seeded()
    )
    assert float(found.images) == pytest.approx(script.seen[4])
