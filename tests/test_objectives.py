"""Losses worked by hand, and what counts as a network's answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import (
    Answers,
    Small,
    same,
    stripes,
    weights,
)
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.nn import objectives
from edgeprune.nn.calling import logits
from edgeprune.nn.train import accuracy, fit
from edgeprune.recipe import TuneTable

TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)


def test_auxiliary_outputs_of_the_training_mode_are_left_aside(tmp_path: Path) -> None:
    class Auxiliary(Small):
        """Two heads while training, as torchvision's inception_v3 and googlenet have."""

        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            answer = Small.forward(self, x)
            return (answer, answer * math.nan) if self.training else answer

    plain, auxiliary = Small(), Auxiliary()
    fit(plain, stripes(), TABLE, seed=0, scratch=tmp_path / "a")
    fit(auxiliary, stripes(), TABLE, seed=0, scratch=tmp_path / "b")
    assert same(weights(plain), weights(auxiliary))


def test_the_main_answer_is_found_in_tuples_and_mappings() -> None:
    x, wanted = torch.rand(3, 3, 8, 8), torch.rand(3, 5)
    for answer in (
        wanted,
        (wanted, None),
        [wanted],
        {"out": wanted, "aux": 1},
        {"loss": 0, "logits": wanted},
    ):
        assert logits(Answers(lambda _, answer=answer: answer), x) is wanted
    for answer, found in (
        (None, "NoneType"),
        (torch.rand(3), "shape (3,)"),
        (torch.rand(4, 5), "shape (4, 5)"),
        ((), "tuple"),
    ):
        with pytest.raises(ModelError) as caught:
            logits(Answers(lambda _, answer=answer: answer), x)
        assert found in caught.value.message


def test_a_network_that_fails_is_an_error_with_the_batch_and_the_mode() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("shape mismatch inside")

    with pytest.raises(ModelError, match=r"batch \(64, 3, 8, 8\) in evaluation mode: shape mismatch inside"):
        accuracy(Answers(fail), stripes())


def test_distillation_numbers_worked_by_hand() -> None:
    teacher, student, y = (
        torch.tensor([[2.0, 1.0, 0.0]]).double(),
        torch.ones(1, 3).double(),
        torch.tensor([0]),
    )
    assert torch.softmax(teacher, 1)[0].tolist() == pytest.approx([0.66524, 0.24473, 0.09003], abs=5e-6)
    at_1 = objectives.distillation(student, teacher, y, 1.0, 1.0)
    at_4 = objectives.distillation(student, teacher, y, 1.0, 4.0)
    assert float(at_1) == pytest.approx(0.266217, abs=1e-6)
    assert float(at_4) == pytest.approx(0.328202, abs=1e-6)
    half = objectives.distillation(student, teacher, y, 0.5, 4.0)
    assert float(half) == pytest.approx(0.5 * math.log(3) + 0.5 * 0.328202, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 8.0))
def test_distillation_is_least_at_the_teacher_and_without_weight_is_cross_entropy(
    seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 4, 5, generator=generator)
    y = torch.randint(0, 5, (4,), generator=generator)
    assert float(objectives.distillation(teacher + 3.0, teacher, y, 1.0, temperature)) == pytest.approx(
        0, abs=1e-4
    )
    assert float(objectives.distillation(student, teacher, y, 1.0, temperature)) > 0
    plain = nn.functional.cross_entropy(student, y)
    assert torch.allclose(objectives.distillation(student, teacher, y, 0.0, temperature), plain)


def test_no_gradient_flows_into_the_teacher() -> None:
    teacher, student = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    objectives.distillation(student, teacher, torch.tensor([0, 1]), 0.5, 4.0).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("name", ["fgsm", "pgd", "trades", "nothing"])
def test_objectives_of_other_versions_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="accepted: natural"):
        fit(Small(), stripes(), replace(TABLE, objective=name), seed=0, scratch=tmp_path)
    assert objectives.objective("natural") is objectives.natural
