"""An estimate of the latency on a machine that is not there: the roofline of its facts, and how well that fits here.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009: a layer takes as long as
its arithmetic at peak or its traffic at full bandwidth, whichever is longer. A start-up time of each layer is added.
No kernel reaches both peaks, so the same formula is held against layers that were timed on this machine, with this
machine's own peaks; what it is wrong by here is said beside every estimate, and is its interval.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune import confidence
from edgeprune.devices import Device
from edgeprune.errors import MissingDependency, UsageError
from edgeprune.measure.latency import latency
from edgeprune.measure.layer_times import node_times
from edgeprune.measure.place import place
from edgeprune.onnx_graph import WIDTH, Work, work_of
from edgeprune.quantities import check_choice
from edgeprune.recipe import MeasureTable
from edgeprune.records import METRICS, Reading, Target
from edgeprune.runtimes import NodeTime
from edgeprune.serialization import scratch_folder

# Start-up of a layer: of a node in ONNX Runtime, measured on a Zen 4 core; of a kernel in a CUDA graph of TensorRT, the
# order of magnitude that NVIDIA gives for Orin, not measured.
OVERHEAD_S = {"onnxruntime": 0.5e-6, "tensorrt": 3e-6}
_ELSE_S = 1e-6
# Layers shorter than this are all overhead, and timed to a microsecond: they tell nothing of the formula.
LEAST_S = 5e-6
LEAST_LAYERS = 5
_IR, _OPSET = 9, 18


@dataclass(frozen=True)
class Roof:
    """What bounds a layer: operations and bytes in a second, and the start-up of each layer in s."""

    peak: float
    bandwidth: float
    overhead_s: float

    def seconds(self, macs: int, moved: float) -> float:
        """How long a layer of so many multiply-accumulates and bytes takes at least."""
        return max(2.0 * macs / self.peak, moved / self.bandwidth) + self.overhead_s


@dataclass(frozen=True)
class Validation:
    """How the formula fitted layers that were timed.

    error: median over the layers of |estimate / measured - 1|. low, high: of measured / estimate, between which 80 %
    of the layers lie. network: the same ratio of all layers together. n: how many layers; where: the machine.
    """

    error: float
    low: float
    high: float
    network: float
    n: int
    where: str


def estimate(
    layers: Path | Sequence[Work],
    target: Target,
    precision: str,
    *,
    validation: Validation | None = None,
    unheld: str = "the same formula was not held against a machine",
) -> Reading:
    """The latency of one image on a target, from its facts alone.

    latency_p50 with `where` "estimated: roofline of TARGET"; without a value where the target's facts lack a peak.
    """
    check_choice("precision", precision, WIDTH)
    rows = work_of(layers) if isinstance(layers, Path) else tuple(layers)
    if not rows:
        raise UsageError("there are no layers to estimate")
    metric, where = METRICS["latency_p50"], f"estimated: roofline of {target.name}"
    conditions: dict[str, Any] = {
        "precision": precision, "layers": len(rows), "runtime": target.runtime,
        "validation": asdict(validation) if validation else f"none: {unheld}",
    }  # fmt: skip
    peak = target.peak.get(precision, 0.0)
    if not (peak > 0 and target.bandwidth > 0):
        lacking = "its peak in " + precision if peak <= 0 else "its bandwidth"
        conditions["why"] = f"the facts of {target.name} do not say {lacking}"
        return Reading(metric.name, None, metric.unit, 0, None, where, "compressed", conditions)
    roof = Roof(peak, target.bandwidth, _overhead(target))
    value = sum(roof.seconds(row.macs, row.numbers * WIDTH[precision]) for row in rows)
    conditions |= {"roof": asdict(roof), "share": _shares(rows, roof, WIDTH[precision])}
    # Where layers took a factor more or less than the formula says here, they may there.
    spread = (value * validation.low, value * validation.high) if validation else None
    return Reading(metric.name, value, metric.unit, 0, spread, where, "compressed", conditions)


def validated(
    files: Mapping[str, Path], device: Device, table: MeasureTable
) -> tuple[Validation | None, str]:
    """`validate`, and why there is no validation or ""; a device without ONNX Runtime is a reason, and no error."""
    try:
        fit = validate(files, device, table)
    except MissingDependency as error:
        return None, f"no layers were timed here: {error.message}"
    return fit, "" if fit else "too few layers here take long enough to hold it against"


def validate(files: Mapping[str, Path], device: Device, table: MeasureTable) -> Validation | None:
    """Compare the formula with layers timed on a device, in fp32, with the device's own roof.

    None where fewer than LEAST_LAYERS layers take long enough, or the processor is emulated.
    """
    there = place(device)
    if there.emulated:
        return None
    roof = roof_of(device, table)
    nodes = [n for name, path in files.items() for n in node_times(path, device, table, name=name)]
    return fitted(nodes, roof, there.where)


def fitted(nodes: Sequence[NodeTime], roof: Roof, where: str) -> Validation | None:
    """How a roof fits nodes that were timed; None where there are too few."""
    pairs = [
        (roof.seconds(n.macs, n.bytes), n.seconds) for n in nodes if n.seconds >= LEAST_S and n.bytes > 0
    ]
    if len(pairs) < LEAST_LAYERS:
        return None
    ratios = sorted(measured / estimated for estimated, measured in pairs)
    return Validation(
        error=statistics.median(abs(estimated / measured - 1.0) for estimated, measured in pairs),
        low=confidence.quantile(ratios, 0.1), high=confidence.quantile(ratios, 0.9),
        network=sum(m for _, m in pairs) / sum(e for e, _ in pairs), n=len(pairs), where=where,
    )  # fmt: skip


def roof_of(device: Device, table: MeasureTable) -> Roof:
    """The roof of a device, measured: a large convolution, a pass over much memory, and many small nodes."""
    with scratch_folder() as folder:
        files = {
            "dense": _convolution(folder / "convolution.onnx"),
            "traffic": _pointwise(folder / "traffic.onnx", 1, _LARGE),
            "nodes": _pointwise(folder / "nodes.onnx", _NODES, 4),
            "node": _pointwise(folder / "node.onnx", 1, 4),
        }
        found = latency(files, device, table)
    times = {name: rows[0].value or 0.0 for name, rows in found.readings.items()}
    convolution = work_of_convolution()
    moved = 2.0 * 4 * _LARGE**2
    overhead = max(0.0, (times["nodes"] - times["node"]) / (_NODES - 1))
    return Roof(2.0 * convolution / times["dense"], moved / times["traffic"], overhead)


_LARGE, _NODES, _CHANNELS, _SIDE = 2048, 65, 128, 56


def work_of_convolution() -> int:
    """Multiply-accumulates of the convolution that `roof_of` times."""
    return _CHANNELS * _CHANNELS * 9 * _SIDE * _SIDE


def _overhead(target: Target) -> float:
    said = target.setup.get("layer_overhead_s")
    return float(said) if isinstance(said, (int, float)) else OVERHEAD_S.get(target.runtime, _ELSE_S)


def _shares(rows: Sequence[Work], roof: Roof, width: int) -> dict[str, float]:
    arithmetic = [2.0 * row.macs / roof.peak for row in rows]
    memory = [row.numbers * width / roof.bandwidth for row in rows]
    busy = [(a, 0.0) if a >= m else (0.0, m) for a, m in zip(arithmetic, memory, strict=True)]
    parts = {
        "arithmetic": sum(a for a, _ in busy), "memory": sum(m for _, m in busy),
        "overhead": roof.overhead_s * len(rows),
    }  # fmt: skip
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}


def _convolution(path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["conv"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["logits"], "flat"),
    ]
    shape = [1, _CHANNELS, _SIDE, _SIDE]
    return _saved(path, nodes, shape, [1, _CHANNELS], [numpy_helper.from_array(weight, "weight")])


def _pointwise(path: Path, count: int, side: int) -> Path:
    """So many nodes in a row over side x side numbers, of kinds that ONNX Runtime does not fuse with each other."""
    kinds = ("Sigmoid", "Neg")
    names = ["input", *(f"value{i}" for i in range(count - 1)), "last"]
    nodes = [
        helper.make_node(kinds[i % 2] if count > 1 else "Neg", [names[i]], [names[i + 1]], f"node{i}")
        for i in range(count)
    ]
    nodes.append(helper.make_node("Flatten", ["last"], ["logits"], "flat"))
    return _saved(path, nodes, [1, 1, side, side], [1, side * side], [])


def _saved(
    path: Path, nodes: list[onnx.NodeProto], shape: list[int], out: list[int], weights: list[onnx.TensorProto]
) -> Path:
    graph = helper.make_graph(
        nodes, "roof", [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, out)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR
    onnx.save(model, path)
    return path
