"""The file of a precision as it ships: with metadata, verified on its own graph, and compared with the float file."""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto

from edgeprune import onnx_graph
from edgeprune.quantize.calibrators import ranges
from edgeprune.quantize.evaluation import METADATA, FloatBaseline, metadata_of
from edgeprune.quantize.fp16 import half
from edgeprune.quantize.fusion import block_float_fusion
from edgeprune.quantize.job import Built
from edgeprune.quantize.observers import observe
from edgeprune.quantize.placement import quantizable
from edgeprune.quantize.prepare import prepare
from edgeprune.quantize.qdq import quantized
from edgeprune.quantize.verification import Verification, closeness, verify
from edgeprune.records import Reading

# A note says when ONNX Runtime does less than this share of the file's int8 work in int8,
FUSED = 0.9
# and when there are fewer calibration images than this.
FEW = 32
ARTIFACT = "compressed"
# Bytes of the metadata that `finish` adds: scheme, calibrator, the hash of its parent.
METADATA_BYTES = 512


@dataclass(frozen=True, eq=False)
class Shipped:
    """A finished file. choice: how it was made, for `Quantized.choice`."""

    data: bytes
    choice: dict[str, Any]
    readings: tuple[Reading, ...]
    notes: tuple[str, ...]


def finish(built: Built, floats: FloatBaseline) -> Shipped:
    """Add metadata, verify the file, and measure how close its logits are to the float file's."""
    model = onnx_graph.copied(built.model)
    onnx_graph.finish(model, _metadata(built, floats))
    # Inferred shapes follow from the input's; stored they are a tenth of a small file.
    del model.graph.value_info[:]
    weighted = {node.name for node in floats.model.graph.node if node.op_type in onnx_graph.WEIGHTED}
    unquantizable = sorted(weighted - set(quantizable(floats.model)))
    found = verify(model, built.precision, allowed={*built.fallback, *built.kept, *unquantizable})
    choice = {
        "name": built.name,
        **built.options,
        "kind": floats.calibration.kind,
        "calibrated_on": len(floats.images),
        "judged_on": floats.evaluation.clean,
        "fallback": dict(built.fallback),
        "skipped": list(floats.skipped),
        "kept": {node: why for node, why in built.kept.items() if node not in floats.skipped},
        "unquantizable": unquantizable,
        "float_layers": list(found.floats),
        "scales": found.scales,
    }
    readings = (*_shares(built.precision, found), *_losses(built, floats, model))
    data = model.SerializeToString(deterministic=True)
    return Shipped(data, choice, readings, (*_notes(built, floats, found), *_image_notes(built, floats)))


def _metadata(built: Built, floats: FloatBaseline) -> dict[str, str]:
    own = {
        "precision": built.precision,
        "float_parent": floats.sha256,
        "quantized_with": json.dumps(dict(built.options), sort_keys=True),
        "float_layers": json.dumps([*built.fallback, *built.kept]),
        "calibrated_on": f"{len(floats.images)} {floats.calibration.kind} images",
    }
    if "scheme" in built.options:
        own["scheme"] = str(built.options["scheme"])
    return {**metadata_of(floats.exported), **{f"{METADATA}{key}": value for key, value in own.items()}}


def _shares(precision: str, found: Verification) -> list[Reading]:
    parts = [
        (f"{precision}_macs", found.low_macs, found.macs, "counted"),
        (f"{precision}_weights", found.low_weights, found.weights, "counted"),
    ]
    if found.runtime_low_macs is not None:
        here = f"local {platform.machine()}"
        parts.append((f"runtime_{precision}_macs", found.runtime_low_macs, found.macs, here))
    return [
        Reading(
            metric,
            part / whole if whole else 0.0,
            "fraction",
            1,
            None,
            where,
            ARTIFACT,
            {"in": part, "of": whole},
        )
        for metric, part, whole, where in parts
    ]


def _losses(built: Built, floats: FloatBaseline, model: ModelProto) -> list[Reading]:
    evaluation, judged = floats.evaluation, built.judgement
    near = closeness(floats.exported, model, evaluation.images[: evaluation.clean])
    here, on = f"local {platform.machine()}", {"images": floats.calibration.kind, "name": built.name}
    worst = {**on, "largest_difference": near.worst}
    readings = [
        Reading("sqnr", near.sqnr_db, "dB", near.images, None, here, ARTIFACT, worst),
        Reading("agreement_with_float", near.agreement, "fraction", near.images, None, here, ARTIFACT, on),
    ]
    if judged.clean_accuracy is not None:
        own = evaluation.own
        facts = {
            **on, "float": own.clean_accuracy, "quantized": judged.clean_accuracy,
            "robust_float": own.robust_accuracy, "robust_quantized": judged.robust_accuracy,
        }  # fmt: skip
        count = evaluation.clean
        readings.append(
            Reading("quantization_loss", judged.loss, "fraction", count, None, here, ARTIFACT, facts)
        )
    return readings


def _notes(built: Built, floats: FloatBaseline, found: Verification) -> list[str]:
    notes: list[str] = []
    if built.fallback:
        layers = ", ".join(f"{name} ({100 * error:.3g} %)" for name, error in built.fallback.items())
        many = len(built.fallback) > 1
        notes.append(
            f"{len(built.fallback)} of {len(floats.layers)} layers went back to float, because {built.precision} would "
            f"lose too much with {'them' if many else 'it'}: {layers}; in brackets the error of the logits when that "
            "layer alone is quantized, as a share of their power."
        )
    rest = [f"{node} ({why})" for node, why in built.kept.items() if node not in floats.skipped]
    if built.precision == "fp16" and rest:
        notes.append(f"Kept in fp32: {', '.join(rest)}.")
    done = found.runtime_low_macs
    if done is not None and built.options.get("scheme") == "u8" and done < FUSED * found.low_macs:
        notes.append(
            f"ONNX Runtime does {100 * done / max(1, found.macs):.0f} % of the multiply-accumulates in int8 on this "
            f"machine, where {100 * found.low_macs / max(1, found.macs):.0f} % are int8 in the file."
        )
    return notes


def _image_notes(built: Built, floats: FloatBaseline) -> list[str]:
    count, kind = len(floats.calibration.images), floats.calibration.kind
    if kind == "patterns":
        return [
            f"{built.precision} was checked for overflow on {count} test patterns (flat, ramps, checkerboards), "
            "because there are no images: give --data."
        ]
    if kind == "synthesized":
        return [
            f"The ranges of {built.precision} are those of {count} images that were made from the network itself: "
            "there are no calibration images."
        ]
    if count < FEW:
        images = f"{count} calibration image{'s' if count > 1 else ''}"
        return [f"The ranges of {built.precision} are those of only {images}; {FEW} or more are advised."]
    return []


def size_of(exported: Path, precision: str, scheme: str) -> int:
    """The bytes of a float file as "int8" or "fp16", every layer that can be in that precision.

    The values of the scales are not those that ship; their number and their bytes are.
    """
    return rough(exported, precision, scheme).ByteSize() + METADATA_BYTES


def rough(exported: Path, precision: str, scheme: str) -> ModelProto:
    """A float file in another precision, with scales of one grey image: as slow and as large as what ships."""
    model = prepare(onnx.load(str(exported)))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    seen = observe(model, torch.full((1, *(int(d.dim_value) for d in dims[1:])), 0.5))
    if precision == "fp16":
        return half(model, seen)[0]
    made = quantized(model, ranges(seen, "minmax", symmetric=scheme == "s8"), scheme)
    block_float_fusion(made)
    return made
