"""Training with weights that stay zero."""

from __future__ import annotations

from pathlib import Path

import nets
import torch
from torch import nn

from edgeprune.data.collection import in_memory
from edgeprune.recipe.schema import TuneTable
from edgeprune.structure.units import of_weights
from edgeprune.train.job import TrainingJob
from edgeprune.train.loop import fit
from edgeprune.train.tune import masking_hooks

TABLE = TuneTable(epochs=2, batch=16, augment="off")


def course(folder: Path, **table: object) -> TrainingJob:
    pixels = (nets.example(48) * 255).clamp(0, 255).to(torch.uint8)
    split = in_memory("train", pixels, torch.arange(48) % 5)
    return TrainingJob(split, TuneTable(**{**TABLE.__dict__, **table}), 0, folder)  # type: ignore[arg-type]


def half(network: nn.Module) -> dict[str, torch.Tensor]:
    units = of_weights(network, "weight")
    return {name: torch.arange(n).view(units.shapes[name]) % 2 == 0 for name, n in units.sizes.items()}


def test_what_is_zero_stays_zero_and_the_rest_learns(tmp_path: Path) -> None:
    for optimizer in ("sgd", "adamw"):
        network = nets.build("residual")
        stays = half(network)
        before = {name: p.clone() for name, p in network.named_parameters()}
        with torch.no_grad():
            for name, keep in stays.items():
                network.get_parameter(name).mul_(keep)
        fit(network, course(tmp_path / optimizer, optimizer=optimizer), masking_hooks(network, stays))
        for name, keep in stays.items():
            now = network.get_parameter(name)
            assert bool((now[~keep] == 0).all()), name
            assert bool((now[keep] != before[name][keep]).any()), name


def test_a_parameter_that_does_not_learn_is_left_alone(tmp_path: Path) -> None:
    network = nets.build("plain")
    network.fc.weight.requires_grad_(False)
    stays = half(network)
    with torch.no_grad():
        for name, keep in stays.items():
            network.get_parameter(name).mul_(keep)
    frozen = network.fc.weight.clone()
    fit(network, course(tmp_path), masking_hooks(network, stays))
    assert torch.equal(network.fc.weight, frozen)


def test_nothing_to_hold_changes_nothing(tmp_path: Path) -> None:
    plain, held = nets.build("concat"), nets.build("concat")
    fit(plain, course(tmp_path / "a"))
    fit(held, course(tmp_path / "b"), masking_hooks(held, {}))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), held.parameters(), strict=True))
