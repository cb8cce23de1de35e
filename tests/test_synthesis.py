"""Images made from a network: what they match, that they repeat themselves, and that an interruption loses nothing."""

from __future__ import annotations

from pathlib import Path

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.nn import checkpoint, synthesis
from edgeprune.nn.synthesis import amount, synthesize
from edgeprune.records import InputSpec

SPEC = InputSpec(nets.SHAPE, 5)


def made(
    network: nn.Module, seed: int = 0, steps: int = 12, scratch: Path | None = None
) -> synthesis.Synthesis:
    return synthesize(network, SPEC, images=10, steps=steps, seed=seed, scratch=scratch)


def test_the_amount_follows_the_cost_unless_it_is_told() -> None:
    assert amount(41e6, 0, 0) == (256, 100)
    assert amount(4.1e9, 0, 0) == (16, 20)
    assert amount(1e12, 0, 0) == (synthesis.LEAST_IMAGES, synthesis.LEAST_STEPS)
    assert amount(1e12, 7, 3) == (7, 3)


def test_images_are_in_range_repeat_themselves_and_leave_the_network_alone() -> None:
    network = nets.build("residual")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    first, again, other = made(network), made(network), made(network, seed=1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.shape == (10, *nets.SHAPE) and first.images.dtype == torch.float32
    assert float(first.images.min()) >= 0 and float(first.images.max()) <= 1
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def test_the_range_is_the_inputs_own() -> None:
    spec = InputSpec(nets.SHAPE, 5, low=-2.0, high=3.0)
    images = synthesize(nets.build("plain"), spec, images=4, steps=3, seed=0, scratch=None).images
    assert -2 <= float(images.min()) < 0 and 1 < float(images.max()) <= 3


def test_batch_norm_sees_what_it_remembers() -> None:
    """Statistics of real inputs are put into the network; the images come nearer to them than the noise was."""
    network = nets.build("plain")
    target = 0.3 + 0.2 * torch.randn(64, *nets.SHAPE, generator=torch.Generator().manual_seed(1))
    network.train()
    for norm in (network.a[1], network.b[1]):
        norm.momentum = 1.0
    with torch.no_grad():
        network(target)
    found = made(network.eval(), steps=60)
    assert float(found.facts["distance after"]) < 0.5 * float(found.facts["distance before"])
    assert "batch-norm layers remember" in found.notes[0]


def test_without_batch_norm_images_are_moved_towards_classes_and_it_is_said() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    found = made(network, steps=60)
    assert (network(found.images).argmax(1) == torch.arange(10) % 5).float().mean() > 0.7
    assert "no batch-norm" in found.notes[0]


def test_an_interrupted_synthesis_ends_with_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nets.build("plain")
    whole = made(network, scratch=None)
    saved = checkpoint.Checkpoint.save
    count = 0

    def save(self: checkpoint.Checkpoint, *given: object) -> None:
        nonlocal count
        saved(self, *given)  # type: ignore[arg-type]
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        made(network, scratch=tmp_path)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", saved)
    steps: list[int] = []
    loss = synthesis._Task._loss

    def counted(self: synthesis._Task, free: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        steps.append(1)
        return loss(self, free, classes)

    monkeypatch.setattr(synthesis._Task, "_loss", counted)
    assert torch.equal(made(network, scratch=tmp_path).images, whole.images)
    assert 0 < len(steps) < 12


def test_the_state_of_another_network_is_not_gone_on_from(tmp_path: Path) -> None:
    made(nets.build("plain"), scratch=tmp_path)
    other = nets.build("plain", seed=4)
    assert torch.equal(made(other, scratch=tmp_path).images, made(other).images)


def test_a_network_of_nan_says_so() -> None:
    network = nets.build("plain")
    with torch.no_grad():
        network.fc.weight.fill_(float("nan"))
        network.a[0].weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="no finite gradient"):
        made(network)
