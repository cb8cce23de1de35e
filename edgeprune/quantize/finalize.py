"""The file of a precision as it ships: described, proven on its own graph, and compared with the float file."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto

import edgeprune
from edgeprune import onnx_graph
from edgeprune.quantize.calibrators import ranges
from edgeprune.quantize.evaluation import METADATA, FloatBaseline, about
from edgeprune.quantize.fp16 import half
from edgeprune.quantize.fusion import block_float_fusion, check_floats
from edgeprune.quantize.job import Built
from edgeprune.quantize.observers import observe
from edgeprune.quantize.placement import quantizable
from edgeprune.quantize.prepare import prepare
from edgeprune.quantize.qdq import quantized
from edgeprune.quantize.verification import Closeness, Verification, closeness, verify
from edgeprune.records import Reading

# Less of what is int8 in the graph than this done in int8 by ONNX Runtime is worth a word.
FUSED = 0.9
# Fewer calibration images than this are worth a word too.
FEW = 32
ARTIFACT = "compressed"


@dataclass(frozen=True, eq=False)
class Shipped:
    """A finished file. choice: how it was made, as `Quantized.choice` says it. notes: what a reader must know."""

    data: bytes
    choice: dict[str, Any]
    readings: tuple[Reading, ...]
    notes: tuple[str, ...]


def finish(built: Built, floats: FloatBaseline) -> Shipped:
    """Describe the file, prove that it is what it says, and read off how close it is to the float file."""
    model = ModelProto()
    model.CopyFrom(built.model)
    onnx_graph.finish(model, _about(built, floats), producer="edgeprune", version=edgeprune.__version__)
    # Shapes of what is in between follow from the input's; written out they are a tenth of a small file.
    del model.graph.value_info[:]
    weighted = {node.name for node in floats.model.graph.node if node.op_type in onnx_graph.WEIGHTED}
    unquantizable = sorted(weighted - set(quantizable(floats.model)))
    allowed = {*built.fallback, *built.kept, *unquantizable}
    proof = verify(model, built.precision, allowed=sorted(allowed))
    if built.precision == "int8":
        check_floats(model)
    near = closeness(floats.exported, model, floats.panel.pixels[: floats.panel.clean])
    return Shipped(
        model.SerializeToString(deterministic=True), _choice(built, floats, proof, unquantizable),
        _readings(built, floats, proof, near), _notes(built, floats, proof),
    )  # fmt: skip


def _about(built: Built, floats: FloatBaseline) -> dict[str, str]:
    own = {
        "precision": built.precision,
        "float_parent": floats.sha256,
        "quantized_with": json.dumps(dict(built.options), sort_keys=True),
        "float_layers": json.dumps([*built.fallback, *built.kept]),
        "calibrated_on": f"{len(floats.images)} {floats.material.kind} images",
    }
    if "scheme" in built.options:
        own["scheme"] = str(built.options["scheme"])
    return {**about(floats.exported), **{f"{METADATA}{key}": value for key, value in own.items()}}


def _choice(
    built: Built, floats: FloatBaseline, proof: Verification, unquantizable: list[str]
) -> dict[str, Any]:
    return {
        "name": built.name,
        **built.options,
        "kind": floats.material.kind,
        "calibrated_on": len(floats.images),
        "judged_on": floats.panel.clean,
        "fallback": dict(built.fallback),
        "skipped": list(floats.skipped),
        "kept": {node: why for node, why in built.kept.items() if node not in floats.skipped},
        "unquantizable": unquantizable,
        "float_layers": list(proof.floats),
        "scales": proof.scales,
    }


def _readings(
    built: Built, floats: FloatBaseline, proof: Verification, near: Closeness
) -> tuple[Reading, ...]:
    here, kind = f"local {platform.machine()}", built.precision
    on = {"images": floats.material.kind, "name": built.name}
    rows = [
        _share(f"{kind}_macs", proof.low_macs, proof.macs),
        _share(f"{kind}_weights", proof.low_weights, proof.weights),
    ]
    if proof.runtime_low_macs is not None:
        rows.append(_share(f"runtime_{kind}_macs", proof.runtime_low_macs, proof.macs, where=here))
    worst = {**on, "largest_difference": near.worst}
    rows += [
        Reading("sqnr", near.sqnr_db, "dB", near.images, None, here, ARTIFACT, worst),
        Reading("agreement_with_float", near.agreement, "fraction", near.images, None, here, ARTIFACT, on),
    ]
    judged = built.judgement
    if judged.clean_accuracy is not None and floats.panel.labels is not None:
        wanted = floats.panel.judge(floats.panel.logits)
        facts = {
            **on, "float": wanted.clean_accuracy, "quantized": judged.clean_accuracy,
            "robust_float": wanted.robust_accuracy, "robust_quantized": judged.robust_accuracy,
        }  # fmt: skip
        count = floats.panel.clean
        rows.append(Reading("quantization_loss", judged.loss, "fraction", count, None, here, ARTIFACT, facts))
    return tuple(rows)


def _share(metric: str, part: int, whole: int, where: str = "counted") -> Reading:
    facts = {"in": part, "of": whole}
    return Reading(metric, part / whole if whole else 0.0, "fraction", 1, None, where, ARTIFACT, facts)


def _notes(built: Built, floats: FloatBaseline, proof: Verification) -> tuple[str, ...]:
    notes = []
    if built.fallback:
        layers = ", ".join(f"{name} ({100 * error:.3g} %)" for name, error in built.fallback.items())
        many = len(built.fallback) > 1
        notes.append(
            f"{len(built.fallback)} of {len(floats.layers)} layers went back to float, because {built.precision} would "
            f"lose too much with {'them' if many else 'it'}: {layers}; in brackets the error of the logits when that "
            "layer alone is quantized, as a share of their power."
        )
    if built.precision == "fp16" and set(built.kept) - set(floats.skipped):
        rest = {n: why for n, why in built.kept.items() if n not in floats.skipped}
        notes.append("Kept in fp32: " + ", ".join(f"{node} ({why})" for node, why in rest.items()) + ".")
    done = proof.runtime_low_macs
    if done is not None and built.options.get("scheme") == "u8" and done < FUSED * proof.low_macs:
        notes.append(
            f"ONNX Runtime does {100 * done / max(1, proof.macs):.0f} % of the multiply-accumulates in int8 on this "
            f"machine, where {100 * proof.low_macs / max(1, proof.macs):.0f} % are int8 in the file."
        )
    return (*notes, *_notes_of_images(built, floats))


def _notes_of_images(built: Built, floats: FloatBaseline) -> tuple[str, ...]:
    count, kind = len(floats.material.images), floats.material.kind
    if kind == "patterns":
        return (
            f"{built.precision} was checked for overflow on {count} test patterns (flat, ramps, checkerboards), "
            "because there are no images: give --data.",
        )
    if kind == "synthesized":
        return (
            f"The ranges of {built.precision} are those of {count} images that were made from the network itself: "
            "there are no calibration images.",
        )
    if count < FEW:
        found = f"{count} calibration image{'s' if count > 1 else ''}"
        return (f"The ranges of {built.precision} are those of only {found}; {FEW} or more are advised.",)
    return ()


# What the file that ships says of itself besides: scheme, calibrator, the hash of its parent.
ABOUT = 512


def size_of(exported: Path, precision: str, scheme: str) -> int:
    """The bytes that a float file comes to as "int8" or "fp16", every layer that can be in that precision.

    The values of the scales are not those that ship; their number and their bytes are.
    """
    return rough(exported, precision, scheme).ByteSize() + ABOUT


def rough(exported: Path, precision: str, scheme: str) -> onnx.ModelProto:
    """A float file in another precision, with scales of one grey image: as slow and as large as what ships."""
    model = prepare(onnx.load(str(exported)))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    image = torch.full((1, *(int(d.dim_value) for d in dims[1:])), 0.5)
    seen = observe(model, image)
    if precision == "fp16":
        return half(model, seen)[0]
    bounds = ranges(seen, "minmax", symmetric=scheme == "s8")
    made = quantized(model, bounds, scheme)
    block_float_fusion(made)
    return made
