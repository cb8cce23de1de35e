"""FAB: projections onto a plane inside the cube, and the distance to boundaries that are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeprune.attacks._apgd import Task
from edgeprune.attacks._fab import ETA, nearest, onto_plane
from edgeprune.models.queries import lengths

NORMS = ("Linf", "L2")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plane(x: list[float], w: list[float], value: float, norm: str) -> list[float]:
    point, normal = torch.tensor(x).view(1, 1, 1, -1), torch.tensor(w).view(1, 1, 1, -1)
    return onto_plane(point, normal, torch.tensor([value]), norm).flatten().tolist()


# Projections


def test_a_projection_far_from_the_walls_is_the_textbook_formula() -> None:
    # w . change = -value with all changes alike in size (Linf), or along w (L2).
    assert plane([0.5, 0.5], [3.0, -1.0], 0.4, "Linf") == pytest.approx([-0.1, 0.1])
    assert plane([0.5, 0.5], [3.0, -1.0], 0.4, "L2") == pytest.approx([-0.12, 0.04])
    assert plane([0.5, 0.5], [3.0, -1.0], -0.4, "L2") == pytest.approx([0.12, -0.04])


def test_what_a_wall_takes_from_a_pixel_the_others_make_good() -> None:
    # The first pixel has room for 0.05 only: 3 x 0.05 + 1 x 0.25 = 0.4.
    assert plane([0.05, 0.5], [3.0, -1.0], 0.4, "Linf") == pytest.approx([-0.05, 0.25])
    assert plane([0.05, 0.5], [3.0, -1.0], 0.4, "L2") == pytest.approx([-0.05, 0.25])
    assert plane([0.5, 0.5, 0.9], [1.0, 1.0, -2.0], 0.6, "Linf") == pytest.approx([-0.2, -0.2, 0.1])


def test_a_plane_that_the_cube_does_not_reach_gives_the_nearest_corner() -> None:
    for norm in NORMS:
        assert plane([0.25, 0.5], [3.0, -1.0], 9.0, norm) == pytest.approx([-0.25, 0.5])


def test_a_pixel_without_weight_stays_and_without_any_weight_all_do() -> None:
    for norm in NORMS:
        assert plane([0.5, 0.5], [2.0, 0.0], 0.4, norm) == pytest.approx([-0.2, 0.0])
        assert plane([0.5, 0.5], [0.0, 0.0], 0.4, norm) == [0.0, 0.0]
        assert plane([0.5, 0.5], [1.0, 1.0], 0.0, norm) == [0.0, 0.0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_scale_of_the_logits_does_not_matter(norm: str, scale: float) -> None:
    found = plane([0.05, 0.5], [3.0 * scale, -1.0 * scale], 0.4 * scale, norm)
    assert found == pytest.approx([-0.05, 0.25], rel=1e-4)
    assert all(torch.tensor(plane([0.05, 0.5], [3.0 * scale, 1e-38], torch.inf, norm)).isfinite())


def bisected(x: Tensor, w: Tensor, value: float, norm: str) -> Tensor:
    """The same in float64 by bisection: all pixels go the right way, as far as t and the walls allow."""
    sign = w.sign() * (1 if value >= 0 else -1)
    room = torch.where(sign > 0, x, 1 - x)
    rate = w.abs() if norm == "L2" else (w != 0).double()

    def size(t: float) -> Tensor:
        return torch.minimum(t * rate, room)

    low, high = 0.0, 1.0
    while (w.abs() * size(high)).sum() < abs(value) and high < 1e9:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (w.abs() * size(middle)).sum() < abs(value) else (low, middle)
    return -sign * size(high)


@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.integers(1, 60), st.floats(-1.5, 1.5))
@settings(max_examples=150, deadline=None)
def test_a_projection_is_the_shortest_change_that_reaches_the_plane(
    seed: int, norm: str, size: int, share: float
) -> None:
    generator = seeded(seed)
    x = torch.rand(size, generator=generator, dtype=torch.float64).float().double()
    x[torch.rand(size, generator=generator) < 0.2] = 1.0
    w = torch.randn(size, generator=generator).double() ** 3
    w[torch.rand(size, generator=generator) < 0.2] = 0
    reach = (w.abs() * torch.where(w * share > 0, x, 1 - x)).sum()
    value = float(torch.tensor(float(share * reach)).float())
    found = onto_plane(
        x.float().view(1, 1, 1, -1), w.float().view(1, 1, 1, -1), torch.tensor([value]), norm
    ).flatten()
    assert ((x.float() + found) >= -1e-6).all() and ((x.float() + found) <= 1 + 1e-6).all()
    expected = bisected(x, w.float().double(), value, norm)
    assert float((w * found).sum()) == pytest.approx(float((w * expected).sum()), rel=1e-4, abs=1e-5)
    assert float(lengths(found.view(1, -1), norm)) == pytest.approx(
        float(lengths(expected.view(1, -1), norm)), rel=1e-3, abs=1e-5
    )


# The search


def linear(seed: int, classes: int = 4, size: int = 27) -> tuple[Tensor, Tensor]:
    return torch.randn(classes, size, generator=seeded(seed)), torch.randn(
        classes, generator=seeded(seed + 1)
    )


def setting(seed: int) -> tuple[Tensor, Tensor, Task, Tensor]:
    """A linear classifier, images far from the walls, and differences of the weights to the second class."""
    w, b = linear(seed)
    x = torch.rand(6, 3, 3, 3, generator=seeded(seed + 2)) * 0.1 + 0.45
    answer = x.flatten(1) @ w.T + b
    order = answer.argsort(1, descending=True)
    return w, b, Task(x, order[:, 0], order[:, 1]), answer


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_on_a_linear_classifier_it_finds_the_distance_to_the_boundary(norm: str, seed: int) -> None:
    w, b, task, answer = setting(seed)
    found = nearest(lambda x: x.flatten(1) @ w.T + b, task, norm, steps=60)
    others = answer.gather(1, task.y.unsqueeze(1)) - answer
    normals = w[task.y].unsqueeze(1) - w
    dual = normals.abs().sum(2) if norm == "Linf" else normals.norm(dim=2)
    distances = others / dual.clamp_min(1e-9)
    distances.scatter_(1, task.y.unsqueeze(1), torch.inf)
    to_target = distances.gather(1, task.target.unsqueeze(1)).squeeze(1)
    assert to_target.max() < (0.42 if norm == "Linf" else 0.8), "or the walls are in the way"
    assert (found.distance >= distances.amin(1) * (1 - 1e-4)).all(), "no shorter way is there"
    assert (found.distance <= to_target * ETA * 1.01).all()
    assert torch.allclose(lengths(found.images - task.x, norm), found.distance, atol=1e-6)
    assert ((found.images.flatten(1) @ w.T + b).argmax(1) != task.y).all()
    assert found.queries.tolist() == [120] * 6


@pytest.mark.parametrize("norm", NORMS)
def test_the_first_step_goes_onto_the_boundary_and_five_percent_beyond(norm: str) -> None:
    w, b, task, answer = setting(7)
    found = nearest(lambda x: x.flatten(1) @ w.T + b, task, norm, steps=1)
    row = torch.arange(6)
    gap = answer[row, task.y] - answer[row, task.target]
    normal = w[task.y] - w[task.target]
    exact = gap / (normal.abs().sum(1) if norm == "Linf" else normal.norm(dim=1))
    assert torch.allclose(found.distance, ETA * exact, rtol=1e-4)


def curved(x: Tensor) -> Tensor:
    """Class 0 within a distance of 0.2 from the middle of the cube."""
    score = (x - 0.5).flatten(1).square().sum(1) - 0.04
    return torch.stack([-score, score], 1)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_sphere_it_walks_to_the_nearest_point(seed: int) -> None:
    away = torch.randn(5, 1, 2, 3, generator=seeded(seed))
    away = 0.1 * away / lengths(away, "L2").view(-1, 1, 1, 1)
    zeros = torch.zeros(5, dtype=torch.int64)
    task = Task(0.5 + away, zeros, zeros + 1)
    found = nearest(curved, task, "L2", steps=100)
    assert found.distance.tolist() == pytest.approx([0.1] * 5, rel=0.06)


def test_an_image_that_is_near_enough_is_left_in_peace() -> None:
    w, b, task, _ = setting(3)
    seen: list[int] = []

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.flatten(1) @ w.T + b

    everything = nearest(counted, task, "Linf", steps=30)
    middle = float(everything.distance.median()) * 1.03
    seen.clear()
    found = nearest(counted, task, "Linf", steps=30, enough=middle)
    assert torch.equal(found.distance <= middle, everything.distance <= middle)
    assert (found.queries[found.distance <= middle] < 60).all()
    assert (found.queries[found.distance > middle] == 60).all()
    assert sum(seen) == int(found.queries.sum())


def test_where_nothing_is_wrong_nothing_is_found() -> None:
    x = torch.rand(3, 1, 2, 2, generator=seeded())
    zeros = torch.zeros(3, dtype=torch.int64)

    def sure(at: Tensor) -> Tensor:
        return torch.stack([torch.full((len(at),), 9.0), at.flatten(1).sum(1)], 1)

    found = nearest(sure, Task(x, zeros, zeros + 1), "Linf", steps=5)
    assert found.distance.tolist() == [torch.inf] * 3 and torch.equal(found.images, x)


def test_logits_that_are_no_number_end_the_search_for_that_image_alone() -> None:
    x = torch.full((2, 1, 2, 2), 0.4)
    x[1] = 0.45
    zeros = torch.zeros(2, dtype=torch.int64)

    def broken(at: Tensor) -> Tensor:
        total = at.flatten(1).sum(1)
        answer = torch.stack([2 - total, total - 2], 1)
        return torch.where((total > 1.99).unsqueeze(1) & (at[:, :1, 0, 0] > 0.46), torch.nan, answer)

    found = nearest(broken, Task(x, zeros, zeros + 1), "Linf", steps=4, enough=0.2)
    assert found.distance.isfinite().all() and found.images.isfinite().all()


def test_what_only_looks_wrong_is_not_found() -> None:
    x = torch.rand(3, 1, 2, 2, generator=seeded())
    zeros = torch.zeros(3, dtype=torch.int64)
    asked: list[int] = []

    def right(at: Tensor) -> Tensor:
        asked.append(len(at))
        return torch.stack([torch.full((len(at),), 9.0), at.flatten(1).sum(1)], 1)

    def hasty(at: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(at)), torch.ones(len(at))], 1)

    found = nearest(right, Task(x, zeros, zeros + 1), "Linf", steps=3, enough=1.0, look=hasty)
    assert found.distance.tolist() == [torch.inf] * 3 and torch.equal(found.images, x)
    assert asked == [3] * 6, "three slopes, and each time the look is checked"
