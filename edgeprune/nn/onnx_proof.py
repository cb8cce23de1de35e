"""Proof of what a quantized or halved ONNX file is: what runs in low precision, and how close its answers are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from edgeprune.errors import ParityError, UsageError
from edgeprune.nn.capture import reason
from edgeprune.nn.onnx_file import ONNX_ERRORS
from edgeprune.nn.onnx_proof_layers import Layer, layers
from edgeprune.nn.onnx_proof_runtime import in_integers
from edgeprune.nn.onnx_proof_steps import check_steps
from edgeprune.nn.onnx_view import View
from edgeprune.nn.parity import Network, open_onnx

PRECISIONS = ("fp32", "fp16", "int8")
BATCH = 32
# What a ratio of 0 (answers that are the same to the last bit) or of infinity is written as.
MOST_DB = 200.0
_SHOWN = 3


@dataclass(frozen=True)
class Proof:
    """What a file was found to be; counts are for one image.

    macs: of all convolutions and matrix products. low_macs: of those in `precision`. weights, low_weights: entries
    of the weights that they apply, and of those in `precision`. scales: how many scale entries of Q/DQ nodes were
    looked at. floats: nodes with weights that stay in float32. runtime_low_macs: of `low_macs`, those that ONNX
    Runtime runs in integer kernels after its own optimization on this machine; None for other precisions than int8.
    """

    precision: str
    macs: int
    low_macs: int
    weights: int
    low_weights: int
    scales: int
    floats: tuple[str, ...]
    runtime_low_macs: int | None


@dataclass(frozen=True)
class Closeness:
    """How close a file's logits are to those of the float model.

    sqnr_db: signal to quantization noise over all logits, 10 log10(sum f^2 / sum (f - q)^2), within +-200 dB.
    agreement: share of images with the same top class. worst: the largest difference as a share of the largest logit
    of the float model. images: how many were compared.
    """

    sqnr_db: float
    agreement: float
    worst: float
    images: int


def prove(model: ModelProto, precision: str, *, allowed: Collection[str] = ()) -> Proof:
    """Look whether a file is what it is said to be.

    In an int8 file a convolution or matrix product counts as int8 when its data and its weight both come straight
    from a DequantizeLinear of 8 bits; with unsigned activations ONNX Runtime must in fact run it in an integer kernel.
    In an fp16 file it counts when its data and its weight are float16.

    Args:
        model: with explicit Q/DQ, or converted to float16.
        precision: "int8", "fp16" or "fp32" (nothing is low then, and only the counts are of use).
        allowed: nodes with weights that may stay in float32.

    Raises:
        UsageError: no such precision.
        ParityError: the file is no valid ONNX; a scale is not finite or not above 0; zero points or types are none
            that the scheme has; a Q/DQ pair or a bias disagrees about a scale; a node with weights is float32 and not
            in `allowed`; ONNX Runtime runs one in float32; nothing is in the precision at all.
        UnsupportedModel: the shape of a product can't be inferred, or ONNX Runtime can't load the file.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    view = View(model)
    scheme, scales = check_steps(view) if precision == "int8" else ("", 0)
    _check_valid(model)
    found = tuple(layers(view, precision))
    floats = tuple(layer.name for layer in found if layer.weights and not layer.low)
    low = tuple(layer for layer in found if layer.low)
    runtime = None
    if precision != "fp32":
        _check_floats([layer for layer in found if layer.name in floats], precision, allowed)
        if not sum(layer.macs for layer in low):
            raise ParityError(
                f"nothing of the file is in {precision}: none of its {len(found)} convolutions and matrix products",
                f"ask for --precision fp32, or skip fewer layers of {precision}",
            )
    if precision == "int8":
        runs = in_integers(model, low)
        _check_runtime([layer for layer in low if layer.weights and layer not in runs], scheme, allowed)
        runtime = sum(layer.macs for layer in runs)
    return Proof(
        precision=precision,
        macs=sum(layer.macs for layer in found),
        low_macs=sum(layer.macs for layer in low),
        weights=sum(layer.weights for layer in found),
        low_weights=sum(layer.weights for layer in low),
        scales=scales,
        floats=floats,
        runtime_low_macs=runtime,
    )


def closeness(floats: ModelProto, model: ModelProto, images: Tensor) -> Closeness:
    """Compare what two files answer, run by ONNX Runtime on this CPU.

    Args:
        floats: the reference.
        model: what was made from it.
        images: float32 (N, C, H, W), at least one.

    Raises:
        UsageError: no images.
        ParityError: an answer of either holds NaN or infinity, or they have different shapes.
        UnsupportedModel: ONNX Runtime can't load or run one of them.
    """
    if not len(images):
        raise UsageError("closeness needs at least one image, got none")
    wanted = _answers(open_onnx(floats), floats, images, "the float model")
    got = _answers(open_onnx(model), model, images, "the quantized model")
    if wanted.shape != got.shape:
        raise ParityError(
            f"the quantized model answers with shape {tuple(got.shape)}, the float one with {tuple(wanted.shape)}"
        )
    noise = wanted - got
    largest, worst = float(wanted.abs().max()), float(noise.abs().max())
    return Closeness(
        sqnr_db=_decibel(float(wanted.square().sum()), float(noise.square().sum())),
        agreement=float((wanted.argmax(1) == got.argmax(1)).double().mean()),
        worst=worst / largest if largest > 0 else worst,
        images=len(images),
    )


def _check_valid(model: ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except ONNX_ERRORS as error:
        raise ParityError(f"the file is no valid ONNX: {reason(error)}") from error


def _check_floats(floats: Sequence[Layer], precision: str, allowed: Collection[str]) -> None:
    wrong = [layer for layer in floats if layer.name not in allowed]
    if wrong:
        raise ParityError(
            f"{len(wrong)} nodes with weights are float32 in a file said to be {precision}: "
            f"{_some([f'{layer.name} ({layer.why})' for layer in wrong])}",
            "list them as layers that stay in float32 if that is meant",
        )


def _check_runtime(slow: Sequence[Layer], scheme: str, allowed: Collection[str]) -> None:
    # Signed activations are for other runtimes: ONNX Runtime on x86 fuses some of them only.
    wrong = [layer.name for layer in slow if layer.name not in allowed]
    if scheme == "u8" and wrong:
        raise ParityError(
            f"ONNX Runtime runs {len(wrong)} of the int8 nodes in float32: {_some(wrong)}",
            "each needs Q/DQ at its inputs and, but for a ReLU, right behind it; or list them in quantize.skip",
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _answers(network: Network, model: ModelProto, images: Tensor, name: str) -> Tensor:
    logits = torch.cat([network(batch) for batch in _batches(model, images)])[: len(images)].double()
    if not bool(torch.isfinite(logits).all()):
        broken = int((~torch.isfinite(logits)).any(1).sum())
        raise ParityError(f"{name} answers {broken} of {len(images)} images with NaN or infinity")
    return logits


def _batches(model: ModelProto, images: Tensor) -> Iterator[Tensor]:
    """The images in batches that the model takes; the last one filled up with its last image."""
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    size = first.dim_value if first.HasField("dim_value") else 0
    for batch in images.split(size or BATCH):
        missing = size - len(batch)
        yield torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing > 0 else batch


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0.0:
        return MOST_DB
    if signal <= 0.0:
        return -MOST_DB
    return max(-MOST_DB, min(MOST_DB, 10.0 * math.log10(signal / noise)))
