"""Small labelled image sets and networks for the tests of data, training and repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from edgeprune.data import collection
from edgeprune.data.collection import Data, Split, in_memory, open_data
from edgeprune.errors import UsageError
from edgeprune.recipe.schema import DataTable, TuneTable
from edgeprune.records import InputSpec

SPEC = InputSpec((3, 8, 8), 2)


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8)
    return Image.fromarray(values)


def folder(root: Path, layout: dict[str, int], first_seed: int = 0) -> Path:
    """Class folders with so many PNG images each, all different."""
    seed = first_seed
    for place, count in layout.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture(seed).save(root / place / f"{index:03}.png")
            seed += 1
    return root


def opened(path: Path, use: str = "all", spec: InputSpec = SPEC, seed: int = 0) -> Data:
    return open_data(DataTable(path=str(path), use=use), spec, seed)


def everything(split: collection.Split) -> torch.Tensor:
    return split.take(torch.arange(len(split)))


def content(split: collection.Split | None) -> set[bytes]:
    return set() if split is None else {image.numpy().tobytes() for image in everything(split)}


def refusal(path: Path, **more: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        opened(path, **more)  # type: ignore[arg-type]
    return caught.value


class Small(nn.Module):
    """Convolutions, batch-norm and dropout: everything whose state or chance a resume must carry."""

    def __init__(self, seed: int = 0) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.bn = nn.BatchNorm2d(8)
            self.next = nn.Conv2d(8, 8, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn2(self.next(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Answers(nn.Module):
    """A network that answers what it was told to."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


def stripes(count: int = 64, name: str = "train", seed: int = 0) -> Split:
    """Upright (0) and lying (1) stripes under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    line = torch.arange(8) % 2 * 120
    clean = torch.where(labels.view(-1, 1, 1, 1) == 0, line.view(1, 1, 1, 8), line.view(1, 1, 8, 1))
    noise = torch.randint(0, 120, (count, 3, 8, 8), generator=generator)
    return in_memory(name, (clean + noise).to(torch.uint8), labels)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


PLAIN = TuneTable(epochs=2, lr=0.05, batch=15, distill=0.0)


class Unnormalized(nn.Module):
    """Without batch-norm and dropout the gradient of a batch is the mean of its parts' gradients."""

    def __init__(self, seed: int = 0) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))
