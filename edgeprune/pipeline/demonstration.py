"""The command `demo`: train a small network on real digits and compress it for this machine."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import recipe as recipe_module
from edgeprune.data import in_memory, stratified
from edgeprune.errors import MissingDependency, ModelError
from edgeprune.pipeline.compression import compress
from edgeprune.pipeline.context import Log, Result
from edgeprune.recipe import TuneTable
from edgeprune.serialization import replace_file
from edgeprune.train import TrainingJob, fit


def demo(output: Path, *, log: Log) -> Result:
    """Train a small network on scikit-learn's digits and compress it for this machine."""
    log("demo: train a small network on 1,797 real digits")
    model, data = prepare(output)
    recipe = recipe_module.build(
        {},
        {
            "target": "local",
            "model": {"path": str(model)},
            "data": {"path": str(data)},
            "budget": {"macs": "50 %"},
            "tune": {"epochs": 2, "augment": "off"},
        },
    )
    return compress(recipe, output / "run", log=log)


SIZE = 16
WIDTHS = (32, 64, 128)
CLASSES = 10
HELD_OUT_SHARE = 0.25
TRAINING = TuneTable(epochs=4, lr=0.05, batch=64, weight_decay=5e-4, distill=0.0, augment="off")


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for gray digits: pixels (N, 1, 16, 16) in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        self.stages = nn.Sequential(
            Block(WIDTHS[0], WIDTHS[0], 1), Block(WIDTHS[0], WIDTHS[1], 2), Block(WIDTHS[1], WIDTHS[2], 2)
        )
        self.classifier = nn.Linear(WIDTHS[2], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 16, 16) to (N, 10)."""
        x = self.stages(functional.relu(self.bn(self.stem(x))))
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def prepare(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Train a network on three quarters of the digits; its `.pt2`, and the `.npz`, whose test part is the rest."""
    x, y = digits()
    learn, hold = stratified(y, HELD_OUT_SHARE, seed)
    data = folder / "digits.npz"
    with replace_file(data) as file:
        np.savez_compressed(file, x_train=x[learn], y_train=y[learn], x_test=x[hold], y_test=y[hold])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsNet()
    train = in_memory("train", torch.from_numpy(x[learn])[:, None], torch.from_numpy(y[learn]))
    fit(network, TrainingJob(train, TRAINING, seed, folder))
    model = folder / "digits.pt2"
    example = torch.zeros(2, 1, SIZE, SIZE)
    try:
        program = torch.export.export(
            network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        with replace_file(model) as file:
            torch.export.save(program, file)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise ModelError(f"the demo's network can't be exported: {error}", "edgeprune doctor") from error
    return model, data


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits that come with scikit-learn: uint8 (N, 16, 16), scaled up from 8x8, and labels int64 (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency(
            "the demo's images come with scikit-learn", "pip install scikit-learn"
        ) from error
    flat, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(np.asarray(flat)).float().view(-1, 1, 8, 8) / 16.0
    large = functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
    pixels = (large[:, 0] * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels, np.asarray(labels).astype(np.int64)
