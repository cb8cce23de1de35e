"""Small ONNX files whose answers are known, images in memory, and devices that say what a test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeprune.devices._base import Device
from edgeprune.devices.fake import Fake
from edgeprune.devices.transport.stream import Answer
from edgeprune.records import Artifact, InputSpec


def save(
    path: Path,
    nodes: list[Any],
    tensors: Mapping[str, Any],
    shape: list[Any],
    out: int | list[Any],
    dtype: int = TensorProto.FLOAT,
) -> Path:
    """Write a graph from `input` of a shape to `logits`: (N, out) when that is a number, else of that shape."""
    weights = [helper.make_tensor(k, TensorProto.FLOAT, v.shape, v.ravel()) for k, v in tensors.items()]
    answer = [shape[0], out] if isinstance(out, int) else out
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info("logits", dtype, answer)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def write_net(path: Path, channels: int = 16) -> Path:
    """Two convolutions with a residual sum, as layers of a network are called; 10 classes."""
    rng = np.random.default_rng(0)
    shapes = {
        "stem.weight": (channels, 3, 3, 3),
        "block.conv.weight": (channels, channels, 3, 3),
        "fc.weight": (10, channels),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["input", "stem.weight"], ["stem"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["stem"], ["relu"], "relu"),
        helper.make_node(
            "Conv", ["relu", "block.conv.weight"], ["block.conv"], "block.conv", pads=[1, 1, 1, 1]
        ),
        helper.make_node("Add", ["block.conv", "relu"], ["block.add"], "block.add"),
        helper.make_node("Relu", ["block.add"], ["block.relu"], "block.relu"),
        helper.make_node("GlobalAveragePool", ["block.relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.weight"], ["logits"], "fc", transB=1),
    ]
    return save(path, nodes, tensors, [1, 3, 8, 8], 10)


def write_one_conv(path: Path, *, channels: int = 16, batch: int | str = 1, size: int = 8) -> Path:
    """conv 3x3 (3 -> channels), relu, global average, fully connected to 10; weights from a fixed seed."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.standard_normal((channels, 3, 3, 3)) * 0.2,
        "fc.weight": rng.standard_normal((10, channels)) * 0.2,
        "fc.bias": rng.standard_normal(10),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    return save(path, nodes, weights, [batch, 3, size, size], 10)


def write_mirror(path: Path, classes: int = 4) -> Path:
    """A model whose logits are its pixels: what it answers is known beforehand."""
    return save(
        path, [helper.make_node("Flatten", ["input"], ["logits"], "flat")], {}, [1, classes, 1, 1], classes
    )


def artifact(path: Path, shape: tuple[int, int, int], classes: int) -> Artifact:
    return Artifact(str(path), "onnx", "fp32", InputSpec(shape, classes), "", path.stat().st_size)


@dataclass(frozen=True)
class Pictures:
    """Held-out images in memory."""

    x: Any
    y: Any
    name: str = "test"

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int) -> Iterator[tuple[Any, Any]]:
        for i in range(0, len(self.y), size):
            yield self.x[i : i + size], self.y[i : i + size]


@dataclass(frozen=True)
class Scripted(Device):
    """A device that gives one answer to the agent's requests and does what else it is told."""

    answer: Answer
    log: list[Sequence[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "scripted"

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        self.log.append(argv)
        return self.answer if argv[-1] == "the-agent" else Fake().run(argv, stdin, timeout_s)

    def put(self, here: Path, there: str) -> None:
        Fake().put(here, there)

    def get(self, there: str, here: Path) -> None:
        Fake().get(there, here)

    def agent(self) -> list[str]:
        return ["the-agent"]


class Mirror(Device):
    """A device on which every model answers with the pixels; writes down how many images it was given at once."""

    def __init__(self, folder: Path) -> None:
        self.sizes: list[int] = []

    @property
    def name(self) -> str:
        return "mirror"

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        if argv != self.agent():
            return Fake().run(argv, stdin, timeout_s)
        request = json.loads(stdin)
        x = np.load(request["x"])
        self.sizes.append(len(x))
        np.save(request["out"], x.reshape(len(x), -1))
        return Answer(0, "{}", "")

    def put(self, here: Path, there: str) -> None:
        Fake().put(here, there)

    def get(self, there: str, here: Path) -> None:
        Fake().get(there, here)

    def agent(self) -> list[str]:
        return ["mirror-agent"]


def timed(
    dense: list[int], compressed: list[int], cpu: tuple[list[int], list[int]] = ([], []), block: int = 5
) -> Answer:
    models = {
        "dense": {"wall_ns": dense, "cpu_ns": cpu[0], "batch": 1},
        "compressed": {"wall_ns": compressed, "cpu_ns": cpu[1], "batch": 1},
    }
    return Answer(
        0, json.dumps({"models": models, "block": block, "warmup": 3, "runtime": "r 1", "load": 0.5}), ""
    )
