"""The stage that makes images from the network: what it hands on, what it refuses, and when it runs at all."""

from __future__ import annotations

from pathlib import Path

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune.data import synthesis
from edgeprune.data.synthesis import Synthesis
from edgeprune.errors import ModelError, WorkdirError
from edgeprune.models.bundle import from_module
from edgeprune.recipe.schema import SynthesizeTable
from edgeprune.records import InputSpec

TABLE = SynthesizeTable(images=6, steps=3)


def answering(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> list[dict[str, object]]:
    """The maker of images is replaced by one that gives these; what it was asked for is kept."""
    asked: list[dict[str, object]] = []

    def make(network: nn.Module, spec: InputSpec, **wanted: object) -> Synthesis:
        asked.append({"network": network, "spec": spec, **wanted})
        return Synthesis(images, ("a note",), {"loss": 0.25, "images": len(images), "kind": "bn"})

    monkeypatch.setattr(synthesis, "synthesize", make)
    return asked


def test_the_images_are_made_from_the_network_as_it_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = from_module(nets.build("residual"), nets.example(), mean=(0.5,) * 3, std=(0.25,) * 3)
    asked = answering(monkeypatch, nets.example(6))
    made = synthesis.run(bundle, TABLE, 7, tmp_path / "scratch")
    (wanted,) = asked
    assert (wanted["images"], wanted["steps"], wanted["seed"]) == (6, 3, 7)
    assert wanted["spec"] == bundle.input and (tmp_path / "scratch").is_dir()
    network = wanted["network"]
    assert isinstance(network, nn.Module)
    x = nets.example(2)
    torch.testing.assert_close(network(x), bundle.module((x - 0.5) / 0.25))
    assert torch.equal(made.images, nets.example(6))


def test_images_notes_and_facts_survive_the_disk(tmp_path: Path) -> None:
    made = Synthesis(nets.example(5), ("one", "two"), {"loss": 0.25, "images": 5, "kind": "bn"})
    synthesis.write(made, tmp_path)
    again = synthesis.read(tmp_path)
    assert torch.equal(again.images, made.images) and again.images.dtype == torch.float32
    assert (again.notes, again.facts) == (made.notes, made.facts)
    (tmp_path / "images.safetensors").write_bytes(b"half")
    with pytest.raises(WorkdirError, match=r"images\.safetensors can't be read"):
        synthesis.read(tmp_path)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (
            nets.example(2).double(),
            r"are torch.float64 \(2, 3, 8, 8\); the network takes float32 \(N, 3, 8, 8\)",
        ),
        (nets.example(2)[:, :1], r"\(2, 1, 8, 8\)"),
        (nets.example(2)[:0], r"\(0, 3, 8, 8\)"),
        (nets.example(2) * 0 + 1.5, "values from 1.5 to 1.5; the input's are from 0 to 1"),
        (nets.example(2) - 1, "the input's are from 0 to 1"),
        (nets.example(2) * float("nan"), "values from nan to nan"),
    ],
)
def test_what_is_no_image_of_the_network_is_refused(
    images: Tensor, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, images)
    with pytest.raises(ModelError, match=says):
        synthesis.run(from_module(nets.build("plain"), nets.example()), TABLE, 0, tmp_path)


def test_the_real_maker_gives_images_of_the_network_and_the_same_ones_again(tmp_path: Path) -> None:
    bundle = from_module(nets.build("residual"), nets.example())
    before = {k: v.clone() for k, v in bundle.module.state_dict().items()}
    one, two = (synthesis.run(bundle, TABLE, 0, tmp_path / name) for name in ("a", "b"))
    assert one.images.shape == (6, 3, 8, 8) and torch.equal(one.images, two.images)
    assert not torch.equal(one.images, synthesis.run(bundle, TABLE, 1, tmp_path / "c").images)
    assert all(torch.equal(v, before[k]) for k, v in bundle.module.state_dict().items())
