"""What ONNX Runtime answers for a network, and a search that asks it: the same verdicts, or none where it differs."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune.attacks import _onnx_session, fab_t, square
from edgeprune.attacks._base import Inputs
from edgeprune.attacks._onnx_session import onnx_inference
from edgeprune.models.replicas import on_replicas
from edgeprune.train.adversarial import Ball

# Questions that are worth the time it takes to be ready.
MANY = 10**9


class Odd(nn.Module):
    """Answers otherwise every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return x.flatten(1)[:, :5] * (1 if self.times % 2 else -1)


def undecided(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network for which every class is as likely as the others, so that little decides; images and its answers."""
    network, x = nets.build("residual").eval(), nets.example(count)
    last = network.get_submodule("fc")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias -= network(x).mean(0)
        return network, x, network(x).argmax(1)


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise"])
def test_it_answers_as_the_network_does_for_any_number_of_images(name: str) -> None:
    network = nets.build(name).eval()
    answers = onnx_inference(network, nets.example(4), MANY)
    assert answers is not None
    for count in (1, 3, 7):
        x = torch.rand(count, *nets.example(1).shape[1:])
        with torch.no_grad():
            assert torch.allclose(answers(x), network(x), atol=1e-5)


def test_on_lanes_it_answers_in_the_order_of_the_images(two_threads: None) -> None:
    network, x = nets.build("residual").eval(), torch.rand(9, *nets.example(1).shape[1:])
    with on_replicas(network, x) as lanes:
        answers = onnx_inference(lanes, x, MANY)
        assert answers is not None
        with torch.no_grad():
            assert torch.allclose(answers(x), network(x), atol=1e-5)


def test_a_network_that_can_not_be_written_down_is_asked_itself() -> None:
    assert onnx_inference(Odd().eval(), nets.example(4), MANY) is None


def test_the_search_comes_to_the_same_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = undecided(12)

    def found(least: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(_onnx_session, "WORTH_FROM", least)
        attack = square.Square(queries=200)
        generator = torch.Generator().manual_seed(3)
        return attack.perturb(Inputs(network, x, y, Ball("Linf", 0.01), generator, lambda _: None))

    (images, queries), (anew, again) = found(1), found(10**9)
    assert queries.tolist() == again.tolist()
    assert torch.allclose(images, anew, atol=1e-6)
    with torch.no_grad():
        assert 0 < int((network(images).argmax(1) != y).sum()) < 12, "or nothing was compared"


def test_the_boundary_is_searched_to_the_same_end_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = undecided(8)
    ready: list[bool] = []

    def found(least: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(_onnx_session, "WORTH_FROM", least)
        attack, generator = fab_t.FabT(classes=3, steps=20), torch.Generator().manual_seed(0)
        ready.append(_onnx_session.alone(network, x, 8 * 3 * 20) is not None)
        return attack.perturb(Inputs(network, x, y, Ball("Linf", 0.02), generator, lambda _: None))

    (images, queries), (anew, again) = found(1), found(10**9)
    assert ready == [True, False]
    assert queries.tolist() == again.tolist()
    assert torch.allclose(images, anew, atol=1e-5)
    assert 0 < int((queries == queries.max()).sum()) < 8, "or nothing was compared"


def test_a_network_that_takes_a_branch_by_what_it_sees_is_asked_itself() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] * (2 if bool(x.mean() > 0.1) else 1)

    assert onnx_inference(Branch().eval(), nets.example(4), MANY) is None, (
        "one exporter would follow a branch and not say so"
    )


def test_few_questions_and_what_is_no_network_are_left_alone() -> None:
    network, x = nets.build("plain").eval(), nets.example(2)
    assert onnx_inference(network, x, _onnx_session.WORTH_FROM - 1) is None
    assert onnx_inference(network.forward, x, MANY) is None
    assert onnx_inference(network, x, _onnx_session.WORTH_FROM) is not None
