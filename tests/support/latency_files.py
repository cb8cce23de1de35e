"""Small networks as files, and a device that exists only here: its time is a staircase that is known exactly."""

from __future__ import annotations

import atexit
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import nets
import onnx
from torch import nn

from edgeprune.export import stage
from edgeprune.latency.sampling import ProfiledNetwork, TimingBackend, subject, survey
from edgeprune.models import costs
from edgeprune.models.bundle import deployed, from_module
from edgeprune.recipe.schema import ExportTable
from edgeprune.records import Group
from edgeprune.structure.groups import find_groups, provable_groups

BLOCK = 4
CALL_S = 1e-6


@cache
def folder() -> Path:
    """A folder that is gone when the tests are over."""
    path = mkdtemp(prefix="edgeprune-test-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@cache
def exported(name: str) -> Path:
    """The file of one of the networks, made once."""
    bundle = from_module(nets.build(name), nets.example())
    path = folder() / f"{name}.onnx"
    stage.run(deployed(bundle), bundle.input, path, opset=20, table=ExportTable(), meta={}, real=None)
    return path


@cache
def groups(name: str) -> tuple[Group, ...]:
    network = nets.build(name)
    return provable_groups(network, find_groups(network, nets.example()), nets.example(), 0).groups


@cache
def subject_of(name: str) -> ProfiledNetwork:
    return subject(exported(name), costs.cost_model(nets.build(name), groups(name), nets.example()))


def node_seconds(model: onnx.ModelProto) -> list[tuple[str, float]]:
    """What each node takes on the made-up device: products in blocks of four made channels, and a call."""
    model = onnx.shape_inference.infer_shapes(model)
    graph_ = model.graph
    shapes = {i.name: tuple(i.dims) for i in graph_.initializer}
    for value in (*graph_.input, *graph_.output, *graph_.value_info):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    rows = []
    for node in graph_.node:
        if node.op_type == "Relu":
            continue  # fused into what makes its input
        seconds = CALL_S
        if node.op_type == "Conv":
            made, per, *kernel = shapes[node.input[1]]
            pixels = math.prod(shapes[node.output[0]][2:])
            seconds += 1e-9 * -(-made // BLOCK) * BLOCK * per * math.prod(kernel) * pixels
        rows.append((node.name, seconds))
    return rows


@dataclass
class MadeUp:
    """A device.

    speed: how much slower each call of `time` is than by rights. disturbed: call -> the file that is slow just then.
    calls, files: what was asked of it.
    """

    speed: Sequence[float] = (1.0,)
    disturbed: Mapping[int, str] = field(default_factory=dict)
    fails_at: int = -1
    calls: int = 0
    files: list[str] = field(default_factory=list)

    def time(self, files: Mapping[str, Path]) -> dict[str, float]:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        slower = self.speed[min(self.calls, len(self.speed) - 1)]
        found = {n: slower * sum(s for _, s in node_seconds(onnx.load(p))) for n, p in files.items()}
        if self.calls in self.disturbed:
            found[self.disturbed[self.calls]] *= 1.3
        self.calls += 1
        self.files += list(files)
        return found

    def nodes(self, path: Path) -> list[tuple[str, float]]:
        return node_seconds(onnx.load(path))

    def bench(self, folder: Path, place: str = "made-up") -> TimingBackend:
        return TimingBackend(self.time, self.nodes, place, folder)


def seconds_of(name: str, network: nn.Module) -> float:
    """The made-up device's time of a network that was really cut, by the counts that its layers have."""
    kept = {}
    for group in groups(name):
        layer = network.get_submodule(group.name)
        assert isinstance(layer, nn.Conv2d)
        kept[group.name] = layer.out_channels
    return sum(s for _, s in node_seconds(subject_of(name).resizer.file(kept)))


def latency_model(file: Path, bench: TimingBackend, multiple_of: int = 1) -> Callable[[costs.CostModel], Any]:
    """From the costs of the network in a file, what predicts the time of its cuts; a call runs the survey."""
    return lambda counted: survey(subject(file, counted), bench, multiple_of=multiple_of, floor=0.1)
