"""Where a network's inner value is known, ONNX Runtime answers from there on: the same logits, or nothing."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune.attacks._onnx_session import OnnxInference, onnx_inference
from edgeprune.attacks._onnx_tail import tail_at
from edgeprune.attacks._tape import Stale, record
from edgeprune.attacks._tape_rules import Window
from edgeprune.attacks._windows import Asker
from edgeprune.models.queries import as_logits
from edgeprune.models.replicas import on_replicas

# Questions that are worth the time it takes to be ready.
MANY = 10**9


def early() -> nn.Module:
    """Most of its work comes first; then something that mixes all positions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def fast(network: nn.Module, x: Tensor) -> OnnxInference:
    found = onnx_inference(network, x, MANY)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise"])
def test_from_every_place_of_a_tape_it_goes_on_as_the_network_does(name: str) -> None:
    network, x = nets.build(name).eval(), nets.example(4)
    model, tape = fast(network, x).model, record(network, x)
    assert tape.places, "such a network has some"
    found = 0
    for slot in tape.places:
        tail = tail_at(model, tape, slot)
        if tail is not None:
            found += 1
            other = torch.rand(3, *x.shape[1:])
            with torch.no_grad():
                assert torch.allclose(tail(record(network, other).values[slot]), network(other), atol=1e-5)
    assert found >= len(tape.places) // 2


def test_a_value_that_others_pass_by_is_no_place() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            around = torch.relu(self.inside(x)) + x
            return self.out(around.mean((2, 3)))

    network, x = Around().eval(), torch.rand(2, 3, 8, 8)
    tape = record(network, x)
    shapes = [tuple(value.shape) for value in tape.values]
    # The images, the convolution and its relu are passed by; the sum is not.
    sum_ = len(shapes) - 1 - shapes[::-1].index((2, 3, 8, 8))
    assert tape.places == (sum_,)
    assert tail_at(fast(network, x).model, tape, sum_ - 1) is None
    assert tail_at(fast(network, x).model, tape, sum_) is not None


def test_a_model_of_another_network_has_no_such_value() -> None:
    network, x = nets.build("residual").eval(), nets.example(3)
    other = nets.build("residual").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    tape = record(network, x)
    assert tail_at(fast(other, x).model, tape, tape.places[-1]) is None


def test_a_look_that_ends_early_leaves_the_rest_of_the_tape_unknown() -> None:
    network, x = early(), torch.rand(4, 3, 16, 16)
    tape = record(network, x)
    end, window = tape.places[1], Window(3, 6, 5, 8)
    changed = x.clone()
    changed[:, :, 3:6, 5:8] = 0.5
    with torch.no_grad():
        assert torch.allclose(
            tape.look(changed, window, end), record(network, changed).values[end], atol=1e-6
        )
        tape.keep(torch.arange(4))
        again = changed.clone()
        again[:, :, 0:2, 0:2] = 0.1
        found = tape.look(again, Window(0, 2, 0, 2), end)
        assert torch.allclose(found, record(network, again).values[end], atol=1e-6)
        # Of a network whose windows go on behind that end, the rest is needed, and says that it is not known.
        plain = early()[:4].append(early()[5]).append(nn.Flatten())
        tape = record(plain, x)
        tape.look(changed, window, tape.places[0])
        tape.keep(torch.arange(4))
        with pytest.raises(Stale):
            tape.look(again, Window(0, 2, 0, 2))


def test_a_search_by_way_of_the_tail_gets_the_network_s_answers(two_threads: None) -> None:
    network, x = early(), torch.rand(9, 3, 24, 24)
    generator = torch.Generator().manual_seed(0)
    with on_replicas(network, x) as lanes, torch.no_grad():
        asker, kept = Asker(as_logits(lanes), lanes, fast(lanes, x)), x.clone()
        for turn in range(24):
            side = 2 + turn % 2
            top, left = torch.randint(25 - side, (2,), generator=generator).tolist()
            tried = kept.clone()
            tried[:, :, top : top + side, left : left + side] = torch.rand(1, generator=generator)
            answer = asker.look(kept, tried, Window(top, top + side, left, left + side))
            assert torch.allclose(answer, network(tried), atol=1e-5)
            better = torch.rand(len(x), generator=generator) < 0.4
            asker.keep(better)
            kept[better] = tried[better]
        assert all(way.tail is not None for way in asker._ways.values()) and len(asker._ways) == 2
