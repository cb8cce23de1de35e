"""Networks exported to ONNX files by the export stage."""

from __future__ import annotations

import json
from pathlib import Path

import nets
from onnx import ModelProto
from torch import Tensor, nn

from edgeprune.export import stage
from edgeprune.models.bundle import deployed
from edgeprune.recipe.schema import ExportTable
from edgeprune.records import Artifact, Bundle, InputSpec, Reading, Source

SPEC = InputSpec(nets.SHAPE, 5, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))


PLAIN = InputSpec(nets.SHAPE, 5)


Result = tuple[Artifact, tuple[Reading, ...], tuple[str, ...]]


def wrapped(network: nn.Module, spec: InputSpec = SPEC) -> nn.Module:
    return deployed(Bundle(network.eval(), Source("memory"), spec)).eval()


def ship(
    network: nn.Module,
    out: Path,
    *,
    spec: InputSpec = SPEC,
    opset: int = 20,
    dynamic_batch: bool = False,
    real: Tensor | None = None,
) -> Result:
    table = ExportTable(dynamic_batch=dynamic_batch)
    meta = {"labels": json.dumps(["a", "b"]), "parent": "abc123"}
    return stage.run(wrapped(network, spec), spec, out, opset=opset, table=table, meta=meta, real=real)


def texts(model: ModelProto) -> str:
    """Everything in a model that is not a number."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for item in copy.graph.initializer:
        item.ClearField("raw_data")
    return str(copy)
