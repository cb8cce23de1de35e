"""Square: its schedule and its patches in numbers, every query counted, and nothing asked about what is broken."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from edgeprune.attacks._square import margins, search, share_of_pixels
from edgeprune.models.queries import AttackResult
from edgeprune.train.adversarial import Ball

NORMS = ("Linf", "L2")
EPS = {"Linf": 0.1, "L2": 0.5}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorded:
    """A classifier that remembers what it was asked about."""

    def __init__(self, answers: object) -> None:
        self.answers, self.batches = answers, []

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(x.clone())
        return self.answers(x)  # type: ignore[operator]


def stubborn(x: Tensor) -> Tensor:
    """Always right with the same margin: no query is better than the first."""
    return torch.tensor([1.0, 0.0, -1.0]).repeat(len(x), 1)


def sums(threshold: float):
    """Class 0 where the pixels sum to less than a threshold, class 1 beyond."""

    def answers(x: Tensor) -> Tensor:
        score = x.flatten(1).sum(1) - threshold
        return torch.stack([-score, score], 1)

    return answers


def run(answers: object, x: Tensor, norm: str, queries: int, **more: object) -> AttackResult:
    y = torch.zeros(len(x), dtype=torch.int64)
    options = {"first": 0.8, "rescale": False, "generator": seeded(), "advance": lambda _: None, **more}
    return search(answers, x, y, Ball(norm, EPS[norm]), queries=queries, **options)  # type: ignore[arg-type]


def grey(count: int, height: int = 10, width: int = 10) -> Tensor:
    return torch.full((count, 3, height, width), 0.5)


# In numbers


def test_patches_shrink_after_the_queries_of_the_paper() -> None:
    asked = [0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4000, 4001, 6001, 8001, 9999]
    halvings = [0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    for query, halved in zip(asked, halvings, strict=True):
        assert share_of_pixels(query, 10_000, 0.8, False) == 0.8 / 2**halved
        assert share_of_pixels(query, 10_000, 0.8, True) == 0.8 / 2**halved
    assert share_of_pixels(4999, 5000, 0.8, False) == 0.8 / 128, "the standard evaluation's last"
    assert share_of_pixels(4999, 5000, 0.8, True) == 0.8 / 512
    assert [share_of_pixels(q, 100, 0.8, True) for q in (0, 1, 2, 3, 99)] == [0.8, 0.2, 0.2, 0.1, 0.8 / 512]


def test_a_margin_is_the_right_logit_less_the_largest_other() -> None:
    answer = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [1.0, 1.0, 0.0]])
    assert margins(answer, torch.tensor([0, 1, 0])).tolist() == [0.5, -2.0, 0.0]


def test_the_first_query_in_linf_is_vertical_stripes() -> None:
    asked = Recorded(stubborn)
    run(asked, grey(4), "Linf", 1)
    (change,) = (batch - 0.5 for batch in asked.batches)
    assert torch.allclose(change.abs(), torch.full_like(change, 0.1), atol=1e-6)
    assert torch.equal(change, change[:, :, :1].expand_as(change)), "all rows alike"
    assert len({tuple(row.tolist()) for row in change[:, :, 0].reshape(12, 10)}) > 8, (
        "channels and images differ"
    )


def test_a_query_in_linf_moves_one_square_to_the_edge_of_the_ball() -> None:
    asked = Recorded(stubborn)
    run(asked, grey(2), "Linf", 300)
    first = asked.batches[0]
    places = set()
    for query, batch in enumerate(asked.batches[1:]):
        side = max(round((share_of_pixels(query, 300, 0.8, False) * 100) ** 0.5), 1)
        assert torch.allclose((batch - 0.5).abs(), torch.full_like(batch, 0.1), atol=1e-6)
        changed = ((batch - first).abs() > 1e-6).amax((0, 1))
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        if len(rows):
            assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
            places |= {(int(r), int(c)) for r in rows for c in columns}
        patches = batch[changed.expand_as(batch)]
        assert set(patches.sign().tolist()) <= {1.0}
    assert len(places) == 100, "every pixel, the last row and column too"


def test_queries_in_l2_are_eps_long() -> None:
    asked = Recorded(stubborn)
    run(asked, grey(3), "L2", 120)
    for batch in asked.batches:
        assert torch.allclose((batch - 0.5).flatten(1).norm(dim=1), torch.full((3,), 0.5), atol=1e-4)


def test_the_first_query_in_l2_is_five_by_five_tiles_with_halves_of_opposite_sign() -> None:
    asked = Recorded(stubborn)
    run(asked, grey(2, 32, 32), "L2", 1)
    change = asked.batches[0] - 0.5
    assert (change[:, :, 0] == 0).all() and (change[:, :, 31] == 0).all(), "5 tiles of 6 leave a margin of 1"
    tiles = change[:, :, 1:31, 1:31].unfold(2, 6, 6).unfold(3, 6, 6)
    assert tiles.shape[2:4] == (5, 5)
    assert torch.allclose(tiles.square().sum((4, 5)), torch.tensor(0.25 / 75), rtol=1e-3)
    upright = (tiles[..., :3, :].sign() == -tiles[..., 3:, :].sign()).all(-1).all(-1)
    lying = (tiles[..., :3].sign() == -tiles[..., 3:].sign()).all(-1).all(-1)
    assert (upright | lying).all() and upright.any() and lying.any()
    tile = next(t for t in tiles[0, 0].reshape(25, 6, 6) if t[0, 0].sign() == t[0, 5].sign())
    # Half of 3 x 6 around (1, 3): rings at distance 0, 1, 2, 3 sum 1/k^2 from k = 1, 2, 3, 4.
    ratio = [1 + 1 / 4 + 1 / 9 + 1 / 16, 1 / 4 + 1 / 9 + 1 / 16, 1 / 9 + 1 / 16, 1 / 16]
    row = [ratio[d] for d in (3, 2, 1, 0, 1, 2)]
    assert (tile[1] / tile[1, 3]).tolist() == pytest.approx([r / ratio[0] for r in row], rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 9), (14, 14), (5, 32), (33, 7)])
def test_images_of_any_size_are_searched(norm: str, shape: tuple[int, int]) -> None:
    asked = Recorded(stubborn)
    found = run(asked, grey(2, *shape), norm, 25)
    assert found.queries.tolist() == [25, 25]
    for batch in asked.batches:
        assert batch.isfinite().all() and batch.amin() >= 0 and batch.amax() <= 1
        change = (batch - 0.5).flatten(1)
        length = change.abs().amax(1) if norm == "Linf" else change.norm(dim=1)
        assert (length <= EPS[norm] + 1e-6).all()


# The search


@pytest.mark.parametrize("norm", NORMS)
def test_every_query_is_counted_and_nothing_is_asked_about_a_broken_image(norm: str) -> None:
    x = torch.stack([torch.full((3, 10, 10), v) for v in (0.5, 0.48, 0.45, 0.2, 0.5)])
    asked = Recorded(sums(151.0 if norm == "L2" else 155.0))
    told: list[int] = []
    found = run(asked, x, norm, 200, advance=told.append)
    assert sum(len(batch) for batch in asked.batches) == int(found.queries.sum())
    for query, batch in enumerate(asked.batches):
        assert len(batch) == int((found.queries > query).sum())
    assert found.broken.any() and not found.broken.all()
    assert (found.queries[~found.broken] == 200).all() and (found.queries[found.broken] < 200).all()
    for image, broken in zip(found.images, found.broken, strict=True):
        assert bool(asked.answers(image.unsqueeze(0)).argmax(1)) == bool(broken)
    assert sum(told) == 5


@pytest.mark.parametrize("norm", NORMS)
def test_the_best_point_is_kept_and_its_margin_never_rises(norm: str) -> None:
    x = grey(3)
    ends = [sums(1e6)(run(sums(1e6), x, norm, queries).images)[:, 0] - 1e6 for queries in (1, 5, 20, 80, 320)]
    assert all((later <= earlier).all() for earlier, later in pairwise(ends))
    total = run(sums(1e6), x, norm, 600).images.flatten(1).sum(1)
    # The optimum: + eps everywhere, or eps along the diagonal.
    best = 150 + (30.0 if norm == "Linf" else 0.5 * 300**0.5)
    assert (total > 150 + (best - 150) * (0.95 if norm == "Linf" else 0.25)).all()
    assert (total <= best + 1e-3).all()


def test_an_even_tie_that_the_first_class_wins_stands_and_the_search_goes_on() -> None:
    def tied(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2)

    assert run(tied, grey(2), "Linf", 7).queries.tolist() == [7, 7]
    other = search(
        tied,
        grey(2),
        torch.ones(2, dtype=torch.int64),
        Ball("Linf", 0.1),
        queries=7,
        first=0.8,
        rescale=False,
        generator=seeded(),
        advance=lambda _: None,
    )
    assert other.broken.all() and other.queries.tolist() == [1, 1]


def test_an_answer_that_is_no_number_breaks_an_image() -> None:
    def sick(x: Tensor) -> Tensor:
        return torch.where(x[:, :1, 0, 0] > 0.55, torch.nan, stubborn(x))

    found = run(sick, grey(6), "Linf", 40)
    assert found.broken.all() and found.images.isfinite().all()


def test_another_seed_searches_elsewhere_and_the_same_one_in_the_same_places() -> None:
    one, again, other = Recorded(stubborn), Recorded(stubborn), Recorded(stubborn)
    run(one, grey(2), "L2", 10)
    run(again, grey(2), "L2", 10)
    run(other, grey(2), "L2", 10, generator=seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(one.batches, again.batches, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.batches, other.batches, strict=True))
