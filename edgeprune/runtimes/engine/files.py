"""Engine files: what is written beside one, when it is stale, and which precision its layers really run in."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from edgeprune import serialization
from edgeprune.errors import ModelError, ParityError

SCHEMA = "edgeprune.engine/1"
# What `counted` counts beside precisions: parts that are not opened, and layers without a type.
UNTOLD = ("closed", "unknown")
# What must be here as it was where the engine was built. Orins of all sizes share a name and a compute capability.
_FITS = {
    "tensorrt": "TensorRT {}", "gpu": "the GPU {}", "compute_capability": "compute capability {}",
    "multiprocessors": "{} multiprocessors", "board": "the board {}",
}  # fmt: skip
# What the inspector calls data types: "Half", "FP16", "Row major linear FP16 format", "Int8", "BFloat16", "Float".
_TYPES = (
    ("int8", re.compile(r"int8", re.IGNORECASE)), ("fp8", re.compile(r"fp8|float8", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)), ("fp16", re.compile(r"fp16|half|float16", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float32|float\b|tf32", re.IGNORECASE)),
)  # fmt: skip
_NARROWEST = ("int8", "fp8", "fp16", "bf16", "fp32")
# Layers that multiply: a convolution or a matrix product, as the inspector spells them.
_MULTIPLIES = re.compile(r"conv|gemm|matrix ?multiply|matmul|fullyconnected|fully connected", re.IGNORECASE)
# One node for a whole part of the network, which TensorRT's other compiler made: what is inside is not told.
_CLOSED = re.compile(r"foreign|myelin|kgen", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """A layer of an engine as the inspector tells it.

    precision: the narrowest type of what it multiplies, "" where it is not told. macs: for one run; 0 where unknown.
    """

    name: str
    kind: str
    precision: str
    macs: int

    @property
    def multiplies(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return bool(_MULTIPLIES.search(self.kind))

    @property
    def closed(self) -> bool:
        """Whether it stands for a part of the network that is not told."""
        return bool(_CLOSED.search(self.kind))


def beside(engine: Path) -> Path:
    """Where what is known of an engine is written."""
    return engine.with_name(engine.name + ".json")


def write(engine: Path, data: bytes, facts: Mapping[str, Any]) -> None:
    """Write an engine and what is known of it: each whole or not at all, the engine never with another's facts."""
    full = {"schema": SCHEMA, **facts, "engine": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    with suppress(FileNotFoundError):
        beside(engine).unlink()
    with serialization.replace_file(engine) as file:
        file.write(data)
    serialization.write(beside(engine), full)


def fresh(engine: Path, machine: Mapping[str, Any], onnx: Path | None = None) -> dict[str, Any]:
    """What is known of an engine that this machine may load.

    Args:
        onnx: the file that it should be made from, or None for the one of that name beside it, if there is one.
    """
    facts = _facts(engine)
    for key, what in _FITS.items():
        if key not in facts:
            raise _stale(engine, f"{beside(engine).name} does not say {key}")
        # A container often hides the board's name; the GPU's own numbers are told everywhere.
        told = key != "board" or (facts[key] and machine.get(key))
        if told and facts[key] != machine.get(key):
            raise _stale(engine, f"it was built for {what.format(facts[key])}, here is {machine.get(key)}")
    source = onnx or engine.with_name(str(facts.get("onnx_name") or "?"))
    if source.is_file() and serialization.sha256(source) != facts.get("onnx"):
        raise _stale(engine, f"it was built from another {source.name} than the one that is here now")
    if serialization.sha256(engine) != facts.get("engine"):
        raise _stale(engine, "the file has changed since it was built")
    return facts


def layers(information: str) -> list[Layer]:
    """The layers in the inspector's JSON, of TensorRT 8 to 11; none where it was built to tell names only."""
    try:
        rows = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"what TensorRT's inspector says is not understood: {information!r:.200}") from error
    return [_layer(row) for row in rows if isinstance(row, dict)]


def counted(found: Sequence[Layer]) -> dict[str, int]:
    """How many of the layers that multiply run in which precision, and how many parts are not told (`UNTOLD`)."""
    counts = Counter(layer.precision or "unknown" for layer in found if layer.multiplies and not layer.closed)
    closed = sum(layer.closed for layer in found)
    return {**counts, **({"closed": closed} if closed else {})}


def judge(found: Sequence[Layer], asked: str, engine: str, whole: int) -> None:
    """Hold the layers against the precision that was asked for.

    Parts that are not told are given the benefit of the doubt only where they hold most of what multiplies.
    """
    counts = counted(found)
    dark = sum(counts.pop(key, 0) for key in UNTOLD)
    if asked in ("", "fp32") or not counts or asked in counts:
        return
    if dark and 2 * sum(counts.values()) < whole:
        return
    said = ", ".join(f"{count} in {name}" for name, count in counts.items())
    raise ParityError(
        f"{engine} was to run in {asked}, and none of its layers does: {said}{f', {dark} not told' if dark else ''}",
        f"the ONNX file says the precision: is it the {asked} one, with Q/DQ or half-precision weights?",
    )


def _layer(row: Mapping[str, Any]) -> Layer:
    kind = " ".join(str(row.get(key, "")) for key in ("LayerType", "ParameterType")).strip()
    inputs, outputs = _tensors(row.get("Inputs")), _tensors(row.get("Outputs"))
    weights = row.get("Weights")
    weights = weights if isinstance(weights, dict) else {}
    types = [
        _type(" ".join(str(t.get(k, "")) for k in ("Format/Datatype", "Datatype", "Format"))) for t in inputs
    ]
    types.append(_type(str(weights.get("Type", ""))))
    precision = next((name for name in _NARROWEST if name in types), "")
    count, made = weights.get("Count"), outputs[0].get("Dimensions") if outputs else None
    macs = 0
    if isinstance(count, int) and isinstance(made, list) and len(made) > 1:
        # Every weight of a convolution is used once for each pixel that comes out, of each image.
        macs = count * made[0] * math.prod(made[2:])
    return Layer(str(row.get("Name", "")), kind, precision, macs)


def _tensors(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _type(text: str) -> str:
    return next((name for name, pattern in _TYPES if pattern.search(text)), "")


def _facts(engine: Path) -> dict[str, Any]:
    try:
        facts = json.loads(beside(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _stale(
            engine, f"{beside(engine).name}, which says what it was built for, can't be read: {error}"
        ) from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise _stale(engine, f"{beside(engine).name} does not say {SCHEMA}")
    return facts


def _stale(engine: Path, why: str) -> ModelError:
    return ModelError(f"the engine {engine.name} is not loaded: {why}", "build it again from the ONNX file")
