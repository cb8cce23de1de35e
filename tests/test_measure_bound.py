"""The certified change of the logits: what it certifies, when it is vacuous, and that nothing ever exceeds it."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.measure.bound import WHERE, bound, certificate
from edgeprune.models.bundle import deployed, from_module
from edgeprune.prune import cut
from edgeprune.records import Bundle, Masks
from edgeprune.structure.groups import find_groups

ANSWERS = np.array([[3.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 5.0, 4.0]], np.float32)


def halved(dense: Bundle) -> Bundle:
    groups = find_groups(dense.module, nets.example()).groups
    masks = Masks(channels={g.name: torch.arange(g.channels) % 2 == 0 for g in groups})
    return cut.run_cut(dense, groups, masks, {}, nets.example())[1]


def test_an_answer_is_certified_when_its_margin_is_more_than_the_change_of_the_difference() -> None:
    """Logit 0 may fall by 0.5 and 1 may rise by 0.25: class 0 needs a margin over 0.75 to class 1, 0.5 to 2."""
    low, high = np.array([-0.5, 0.0, 0.0]), np.array([0.0, 0.25, 0.0])
    reading = certificate(low, high, ANSWERS)
    # Image 0: 3 > 0.75. Image 1: 0.5 < 0.75. Image 2: class 1 can't fall and 2 can't rise, so 1 > 0; 5 > 0.
    assert reading.conditions["certified_share"] == pytest.approx(2 / 3)
    assert (reading.value, reading.n, reading.conditions["vacuous"]) == (0.5, 3, False)
    assert (reading.metric, reading.unit, reading.where) == ("certified_logit_change", "logits", WHERE)
    assert "because" not in reading.conditions


def test_an_equal_shift_of_all_logits_is_no_change_of_a_difference_only_if_it_is_certain() -> None:
    shifted = certificate(np.full(3, 7.0), np.full(3, 7.0), ANSWERS)
    assert (shifted.value, shifted.conditions["certified_share"]) == (7.0, 1.0)
    assert certificate(np.full(3, -7.0), np.full(3, 7.0), ANSWERS).conditions["certified_share"] == 0


def test_a_margin_that_is_just_reached_certifies_nothing_and_the_bound_is_vacuous() -> None:
    reading = certificate(np.array([-1.5, -1.5, -1.5]), np.array([1.5, 1.5, 1.5]), ANSWERS)
    assert (reading.value, reading.conditions["vacuous"], reading.conditions["certified_share"]) == (
        1.5,
        True,
        0.0,
    )
    assert "the nearest is short of it by 0" in reading.conditions["because"]
    wider = certificate(np.full(3, -2.0), np.full(3, 2.0), ANSWERS)
    assert wider.conditions["because"].endswith("the nearest is short of it by 1")


def test_answers_that_are_no_numbers_are_not_certified() -> None:
    nothing = np.zeros(3)
    answers = ANSWERS.copy()
    answers[0, 0] = np.nan
    assert certificate(nothing, nothing, answers).conditions["certified_share"] == pytest.approx(2 / 3)
    assert certificate(nothing, nothing, answers[:1]).conditions["vacuous"] is True


def test_without_images_nothing_is_said_of_what_it_certifies() -> None:
    reading = certificate(np.full(3, -2.0), np.full(3, 1.0), None)
    assert (reading.value, reading.n, reading.conditions) == (2.0, 0, {"classes": 3})


def test_a_bound_beyond_all_numbers_is_none_with_its_reason() -> None:
    reading = certificate(np.full(3, -np.inf), np.full(3, np.inf), ANSWERS)
    assert reading.value is None and "beyond the largest number" in reading.conditions["why"]


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "depthwise", "groupnormed"])
def test_no_logit_of_any_image_changes_by_more_than_the_bound(name: str) -> None:
    dense = from_module(nets.build(name), nets.example(), mean=(0.5,) * 3, std=(0.25,) * 3)
    small = halved(dense)
    x = torch.cat([nets.example(200, seed=2), torch.zeros(1, *nets.SHAPE), torch.ones(1, *nets.SHAPE)])
    with torch.no_grad():
        answers = deployed(dense)(x)
        change = (deployed(small)(x) - answers).abs()
    reading = bound(dense, small, answers.numpy())
    assert reading.value is not None, reading.conditions
    assert float(change.max()) <= reading.value
    assert reading.n == 202 and 0 <= reading.conditions["certified_share"] <= 1


def test_a_network_compared_with_itself_does_not_change_and_everything_is_certified() -> None:
    dense = from_module(nets.build("plain"), nets.example())
    with torch.no_grad():
        answers = deployed(dense)(nets.example(10)).numpy()
    reading = bound(dense, dense, answers)
    assert reading.value == pytest.approx(0, abs=1e-3) and reading.conditions["certified_share"] == 1.0


class Odd(nn.Module):
    """A network with a function that nobody bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.special.bessel_j0(self.conv(x)).mean((2, 3)))


def test_an_operator_that_has_no_bound_is_named_with_its_layer_and_nothing_is_guessed() -> None:
    one, other = (from_module(Odd(), nets.example()) for _ in range(2))
    reading = bound(one, other, np.zeros((4, 5), np.float32))
    assert reading.value is None and "bessel_j0" in reading.conditions["why"]
    assert reading.conditions["images"] == "synthetic"
