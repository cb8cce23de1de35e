"""Accuracy, accuracy under attack, and mean loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from image_sets import Answers, Small, same, stripes, weights
from torch import nn

from edgeprune import progress
from edgeprune.data.collection import Split
from edgeprune.data.images import Decoded
from edgeprune.errors import UsageError
from edgeprune.models.inference import modes
from edgeprune.recipe.schema import TuneTable
from edgeprune.train.evaluation import accuracy, mean_loss, robust_accuracy, some
from edgeprune.train.objectives import objective_of
from edgeprune.train.placement import fastest_config


def test_accuracy_counts_and_an_answer_that_is_not_finite_is_wrong() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    answers = torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 1.0], [math.nan, 0.0], [0.0, math.inf]])
    split = Split("test", labels, Decoded(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)))
    module = Answers(lambda x: answers[(x.flatten() * 255).round().long()])
    assert accuracy(module, split, batch=2) == (2, 5)
    assert module.training


def brightness() -> Split:
    """Five gray images of one pixel; class 1 is brighter than 100."""
    values = torch.tensor([90, 99, 102, 105, 140], dtype=torch.uint8).view(5, 1, 1, 1)
    return Split("val", torch.tensor([0, 0, 1, 1, 1]), Decoded(values))


@pytest.mark.parametrize(("eps", "right"), [(1, 5), (3, 3), (6, 2), (20, 1), (60, 0)])
def test_under_attack_those_images_are_right_that_are_further_than_eps_from_the_border(
    eps: int, right: int
) -> None:
    """The border is at 100.5: the images are 10.5, 1.5, 1.5, 4.5 and 39.5 levels away from it."""
    module = Answers(lambda x: 100 * torch.cat([100.5 / 255 - x.flatten(1), x.flatten(1) - 100.5 / 255], 1))
    objective = objective_of(TuneTable(objective="pgd", eps=f"{eps}/255"), None)
    assert robust_accuracy(module, brightness(), objective, seed=0) == (right, 5)


def test_accuracy_without_an_attack_is_accuracy() -> None:
    split, module = stripes(40), Small()
    natural = objective_of(TuneTable(), None)
    assert robust_accuracy(module, split, natural, seed=3) == accuracy(module, split)


def test_attacked_images_are_chosen_by_the_seed_and_the_network_stays_as_it_was() -> None:
    split, module = stripes(60), Small()
    module.bn.eval()
    before, training = weights(module), [layer.training for layer in module.modules()]
    objective = objective_of(TuneTable(objective="fgsm"), None)
    first, second = (robust_accuracy(module, split, objective, seed=1, limit=20) for _ in range(2))
    assert first == second and first[1] == 20
    assert same(weights(module), before)
    assert [layer.training for layer in module.modules()] == training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert some(60, 20, 1).tolist() != some(60, 20, 2).tolist()
    assert len(set(some(60, 20, 1).tolist())) == 20
    assert some(60, 0, 1).tolist() == some(60, 60, 1).tolist() == list(range(60))


def test_mean_loss_is_the_mean_over_images_whatever_the_batch() -> None:
    split = stripes(10)
    images, module = split.take(torch.arange(10)), Small().eval()
    expected = float(nn.functional.cross_entropy(module(images), split.labels).detach())
    for batch in (3, 10, 100):
        assert mean_loss(module, images, split.labels, batch) == pytest.approx(expected, rel=1e-5)


def test_a_network_is_tried_from_fast_to_slow() -> None:
    x = torch.rand(2, 3, 4, 4)
    viewing = Answers(lambda x: x.view(2, -1)[:, :2] @ torch.eye(2))
    assert fastest_config([Small()], x).memory_format == torch.channels_last
    assert fastest_config([Small(), viewing], x).memory_format == torch.contiguous_format
    assert [fastest_config([Small()], x, word).mixed for word in ("fp32", "bf16")] == [False, True]
    with pytest.raises(UsageError, match="'fp61' is not one of auto, fp32, bf16"):
        fastest_config([Small()], x, "fp61")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU changes what auto is")
def test_on_a_cpu_auto_is_float32() -> None:
    assert not fastest_config([Small()], torch.rand(2, 3, 8, 8), "auto").mixed


def test_modes_are_put_back_after_an_error() -> None:
    first, second = Small(), Small().eval()
    first.bn.eval()
    with pytest.raises(KeyError), modes(second, first):
        assert second.drop.training and not first.training
        raise KeyError
    assert first.training and not first.bn.training and not second.drop.training


def test_bars_are_silent_when_nobody_looks_and_shown_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(_slowly(), 3, "letters")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "letters" in err and "left" in err


def _slowly() -> Iterator[int]:
    yield from range(3)
