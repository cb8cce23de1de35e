"""The demo's own model and data: real images, a network that learned them, files that the pipeline reads."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import paths
import pytest
import torch
from sklearn.datasets import load_digits

from edgeprune.data.collection import Data, open_data
from edgeprune.errors import MissingDependency
from edgeprune.pipeline import demonstration
from edgeprune.recipe.schema import DataTable
from edgeprune.records import InputSpec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demonstration.prepare(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def data(made: tuple[Path, Path]) -> Data:
    return open_data(
        DataTable(path=str(made[1])), InputSpec((1, demonstration.SIZE, demonstration.SIZE), 10), 0
    )


def test_the_demo_network_knows_digits_that_it_never_saw(made: tuple[Path, Path], data: Data) -> None:
    network = torch.export.load(made[0]).module()
    with torch.no_grad():
        answers = torch.cat([network(x).argmax(1) for x, _ in data.held_out.batches(7)])
    assert float((answers == data.held_out.labels).float().mean()) >= 0.97


def test_the_demo_data_are_all_digits_in_two_parts(data: Data) -> None:
    assert data.train is not None and not data.notes
    assert len(data.train) + len(data.held_out) == len(load_digits().target) == 1797
    share = data.held_out.labels.bincount() / torch.from_numpy(load_digits().target).bincount()
    assert torch.allclose(share, torch.tensor(0.25), atol=0.01)
    first, second = (
        {image.numpy().tobytes() for image in split.take(torch.arange(len(split)))}
        for split in (data.train, data.held_out)
    )
    assert not first & second


def test_the_demo_pixels_are_the_scanned_ones_made_larger() -> None:
    pixels, labels = demonstration.digits()
    scanned = load_digits()
    assert pixels.dtype == np.uint8 and pixels.shape == (1797, 16, 16)
    assert np.array_equal(labels, scanned.target)
    blocks = pixels.reshape(-1, 8, 2, 8, 2).mean((2, 4))
    correlation = np.corrcoef(blocks.ravel(), scanned.images.ravel())[0, 1]
    assert correlation > 0.97 and pixels.min() == 0 and pixels.max() == 255


def test_the_demo_without_scikit_learn_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **more: object) -> object:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency) as caught:
        demonstration.digits()
    assert caught.value.hint == "pip install scikit-learn"


def test_the_example_architecture_takes_the_trained_weights(shared: Path) -> None:
    import importlib.util

    path = paths.ROOT / "examples" / "resnet20_cifar10.py"
    spec = importlib.util.spec_from_file_location("resnet20_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    network = example.resnet20()
    network.load_state_dict(torch.load(shared / "models" / "resnet20-cifar10-clean.pt", weights_only=True))
    assert sum(p.numel() for p in network.parameters()) == 269_722
    table = DataTable(path=str(shared / "data" / "cifar10-jpeg.tar.xz"), use="evaluate")
    data = open_data(table, InputSpec((3, 32, 32), 10), 0)
    held_out = data.held_out
    assert held_out.labels.bincount().tolist() == [500] * 10 and data.train is None
    assert data.labels[:3] == ("airplane", "automobile", "bird")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    some = torch.arange(0, 5000, 10)
    x = (held_out.take(some) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        right = int((network.eval()(x).argmax(1) == held_out.labels[some]).sum())
    # 87.6 % of all 5,000; of 500 of them, four standard deviations are 6 points.
    assert abs(right / 500 - 0.876) < 0.06


def test_the_example_architecture_is_the_one_of_the_paper() -> None:
    import runpy

    path = paths.ROOT / "examples" / "resnet20_cifar10.py"
    network = runpy.run_path(str(path))["resnet20"](classes=7)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19
    assert [c.out_channels for c in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
