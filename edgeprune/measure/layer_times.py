"""Time of each layer: what the runtime really ran, called by the names that the ONNX file has for it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from edgeprune import serialization
from edgeprune.devices import Device
from edgeprune.errors import DeviceError, ModelError, UsageError
from edgeprune.measure.place import held
from edgeprune.onnx_graph import ONNX_ERRORS
from edgeprune.recipe import MeasureTable
from edgeprune.runtimes import NodeTime

RUNTIME = "onnxruntime"
# Runs of a profile: more would not make a clock that ticks in microseconds any finer.
MOST_RUNS = 100
# What ONNX Runtime adds to the names of nodes that it rewrote, behind and, of half precision on a CPU, before.
_REWRITTEN = re.compile(
    r"^InsertedPrecisionFreeCast_(?=.*_nchwc$)|(_nchwc|_bn|_token_\d+|_quant|_QLinear|_fused)+$",
    re.IGNORECASE,
)
_KINDS = ("Conv", "Gemm", "MatMul")
_START_S = 120.0


def per_layer(path: Path, device: Device, table: MeasureTable, *, runtime: str = RUNTIME) -> dict[str, float]:
    """Seconds for one image of each node of the file, the fused ones under the name of the layer that does the work."""
    seconds: dict[str, float] = {}
    for node in node_times(path, device, table, runtime=runtime):
        seconds[node.name] = seconds.get(node.name, 0.0) + node.seconds
    return seconds


def node_times(
    path: Path,
    device: Device,
    table: MeasureTable,
    *,
    name: str = "",
    runtime: str = RUNTIME,
    onnx_file: Path | None = None,
) -> tuple[NodeTime, ...]:
    """Every node that the runtime ran, in order, with its time, multiply-accumulates and bytes.

    `name` is the model's ("dense", "compressed"), for devices with canned readings. Nodes that the runtime put in
    by itself (changes of memory layout) keep the runtime's name. `onnx_file` is what `path` was built from, when that
    is an engine; it has the names.
    """
    request = {"op": "profile", "runtime": runtime, "name": name, "threads": table.threads}
    request["iterations"] = min(table.iterations, MOST_RUNS)
    with held(device, {"model": path}) as paths:
        answer = device.ask({**request, "model": paths["model"]}, timeout_s=_START_S + 30.0 * table.seconds)
    rows = answer.get("nodes")
    if not isinstance(rows, list):
        raise DeviceError(f"the agent on {device.name} answered no nodes: {answer!r:.200}")
    names = _Names(_graph(onnx_file or path))
    nodes = [_node(row, device.name) for row in rows]
    ran = {_plain(node.name) for node in nodes}
    return tuple(replace(node, name=names.find(node, ran)) for node in nodes)


def _graph(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load(path, load_external_data=False).graph
    except ONNX_ERRORS as error:
        raise ModelError(f"{path} is not a readable ONNX file: {error}") from error


def _node(row: Any, device: str) -> NodeTime:
    try:
        node = serialization.from_json(NodeTime, row, "node")
    except UsageError as error:
        raise DeviceError(f"the agent on {device} answered a node that is none: {error.message}") from error
    if min(node.seconds, node.macs, node.bytes) < 0:
        raise DeviceError(f"the agent on {device} answered a node with a number below 0: {row!r:.200}")
    return node


class _Names:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.by_name: Mapping[str, onnx.NodeProto] = {n.name: n for n in graph.node if n.name}
        self.by_output: Mapping[str, onnx.NodeProto] = {o: n for n in graph.node for o in n.output}

    def find(self, node: NodeTime, ran: set[str]) -> str:
        """The layer's name for a node that ran; `ran` has the names of all of them.

        A convolution that took in the activation behind it is called after the activation's output: then the layer
        is the nearest node before it that has the convolution's kind and did not run by itself.
        """
        plain = _plain(node.name)
        # TensorRT joins the names of what it fused: "conv1 + relu1".
        joined = [p for p in plain.split(" + ") if p in self.by_name]
        if len(joined) > 1:
            works = (p for p in joined if _kind(self.by_name[p].op_type) in _KINDS)
            return next(works, joined[0])
        found = self.by_name.get(plain) or self.by_output.get(plain)
        if found is None:
            return node.name
        here: onnx.NodeProto | None = found
        while here is not None and _kind(here.op_type) != _kind(node.op):
            here = self._before(here, ran)
        return (here or found).name or node.name

    def _before(self, node: onnx.NodeProto, ran: set[str]) -> onnx.NodeProto | None:
        for value in node.input:
            maker = self.by_output.get(value)
            if maker is not None and not {maker.name, *maker.output} & ran:
                return maker
        return None


def _plain(name: str) -> str:
    return _REWRITTEN.sub("", name)


def _kind(op: str) -> str:
    """Fused and quantized operators count as what they are made from: FusedConv and QLinearConv are Conv."""
    return next((kind for kind in _KINDS if kind in op), op)
