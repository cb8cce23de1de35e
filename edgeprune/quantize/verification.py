"""Proof of what a quantized or halved ONNX file is: what runs in low precision, and how close its answers are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from edgeprune.errors import ParityError, UnsupportedModel, UsageError
from edgeprune.models import reason
from edgeprune.onnx_graph import (
    INT8_OPERATORS,
    ONNX_ERRORS,
    Layer,
    Network,
    QuantizationParameters,
    View,
    layers,
    maker_of,
    open_onnx,
    open_session,
    operand,
    parameters_of,
    quantized_constant,
    title,
)
from edgeprune.serialization import scratch_folder

# Kernels that multiply whole numbers.
INTEGER = frozenset(
    ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
     "QGemm")
)  # fmt: skip
# What ONNX Runtime adds to the name of a node that it moves into its own layout.
_MOVED = re.compile(r"(_token_\d+|_nhwc)+$")


def in_integers(model: ModelProto, low: Sequence[Layer]) -> list[Layer]:
    """Those of the layers that ONNX Runtime runs in integer kernels, found in the graph that it would run."""
    graph = optimized(model).graph
    nodes = [node for node in graph.node if node.op_type in INTEGER]
    names = {_MOVED.sub("", node.name) for node in nodes}
    stored = {name for node in nodes for name in node.input}
    return [layer for layer in low if layer.name in names or (layer.stored and layer.stored in stored)]


def optimized(model: ModelProto) -> ModelProto:
    """The graph that ONNX Runtime's CPU provider runs: after all of its optimizations, its own operators included."""
    with scratch_folder() as folder:
        written = folder / "optimized.onnx"
        open_session(model, threads=1, written=written)
        try:
            return onnx.load(written)
        except ONNX_ERRORS as error:
            raise UnsupportedModel(
                f"ONNX Runtime {onnxruntime.__version__} can't load the model: {reason(error)}"
            ) from error


# An int32 bias is added to sums of steps as it is: a kernel never looks at the scale that the file gives it.
BIAS_TOLERANCE = 1e-3
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_DAMAGED = "the file is damaged, or was not made by edgeprune: quantize it again"


def check_scales(view: View) -> tuple[str, int]:
    """Look at every QuantizeLinear and DequantizeLinear of an int8 file.

    Returns:
        The scheme, "u8" or "s8" ("" when no activation is quantized), and how many scale entries there are.
    """
    steps = [
        (node, _step(view, node), _is_constant(view, node))
        for node in view.graph.node
        if node.op_type in _QDQ and node.domain in ("", "ai.onnx")
    ]
    kinds: dict[str, str] = {}
    for node, step, constant in steps:
        _check_scale(node, step)
        if not constant:
            kinds.setdefault(step.zero.dtype.name, title(node))
    scheme = _scheme(kinds)
    for node, step, constant in steps:
        _check_stored(node, step, constant=constant)
        if constant or scheme == "s8":
            _check_zero(node, step, "a constant" if constant else "a signed activation")
        _check_pair(view, node, step)
    for node in view.graph.node:
        if node.op_type in INT8_OPERATORS and operand(node, 2):
            _check_bias(view, node, scheme)
    return scheme, sum(step.scale.size for _, step, _ in steps)


def _step(view: View, node: NodeProto) -> QuantizationParameters:
    step = parameters_of(view, node)
    if step is None:
        raise ParityError(
            f"the scale or the zero point of {title(node)} is computed, not a constant of the file", _DAMAGED
        )
    return step


def _is_constant(view: View, node: NodeProto) -> bool:
    if node.op_type == "QuantizeLinear":
        return view.constant(node.input[0]) is not None
    return quantized_constant(view, node) is not None


def _check_scale(node: NodeProto, step: QuantizationParameters) -> None:
    good = np.isfinite(step.scale) & (step.scale > 0)
    if not good.all():
        place = int(np.argmin(good.ravel()))
        entry = f" for channel {place}" if step.scale.size > 1 else ""
        raise ParityError(
            f"the scale of {title(node)} ({node.input[1]}) is {step.scale.ravel()[place]!s}{entry}; "
            "accepted: finite and above 0",
            _DAMAGED,
        )


def _check_zero(node: NodeProto, step: QuantizationParameters, what: str) -> None:
    if step.zero.any():
        value = step.zero.ravel()[np.argmax(step.zero.ravel() != 0)]
        raise ParityError(f"the zero point of {title(node)} is {value!s}; {what} must have 0", _DAMAGED)


def _scheme(kinds: dict[str, str]) -> str:
    """The scheme from the types of activations; kinds: type -> the first node that has it."""
    known = {"uint8": "u8", "int8": "s8"}
    for kind, node in kinds.items():
        if kind not in known:
            raise ParityError(f"{node} quantizes an activation to {kind}; accepted: uint8 or int8", _DAMAGED)
    if len(kinds) > 1:
        raise ParityError(
            f"activations are quantized in two ways: {kinds['uint8']} to uint8, {kinds['int8']} to int8",
            _DAMAGED,
        )
    return next((known[kind] for kind in kinds), "")


def _check_pair(view: View, node: NodeProto, step: QuantizationParameters) -> None:
    rounding = maker_of(view, node.input[0], "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
    if rounding is None:
        return
    before = _step(view, rounding)
    # At the input a normalization may be part of the rounding, with a step and a zero for each channel of the pixels.
    if rounding.input[0] in view.inputs:
        return
    alike = np.array_equal(before.scale, step.scale) and np.array_equal(before.zero, step.zero)
    if not alike or (step.scale.size > 1 and before.axis != step.axis):
        raise ParityError(
            f"{title(rounding)} and {title(node)} are a pair with two steps: scale {_brief(before)} and {_brief(step)}",
            _DAMAGED,
        )


def _check_stored(node: NodeProto, step: QuantizationParameters, *, constant: bool) -> None:
    """Weights are int8 and biases int32; anything else is no scheme of ours."""
    if constant and step.zero.dtype.name not in ("int8", "int32"):
        raise ParityError(
            f"{title(node)} has a constant of {step.zero.dtype}; accepted: int8, and int32 for a bias"
        )


def _check_bias(view: View, node: NodeProto, scheme: str) -> None:
    maker = maker_of(view, node.input[2], "DequantizeLinear")
    if maker is None:
        return
    if scheme == "s8":
        raise ParityError(
            f"the bias of {title(node)} is quantized; beside signed activations it must be float32",
            "TensorRT takes no other: quantize the file again with scheme s8",
        )
    data, weight = (maker_of(view, name, "DequantizeLinear") for name in node.input[:2])
    if data is None or weight is None:
        return
    wanted = (_step(view, data).scale * _step(view, weight).scale).ravel().astype(np.float64)
    given = _step(view, maker).scale.ravel().astype(np.float64)
    far = np.abs(given - wanted) > BIAS_TOLERANCE * wanted
    if far.any():
        place = int(np.argmax(far))
        raise ParityError(
            f"the bias of {title(node)} has scale {np.broadcast_to(given, far.shape)[place]:.6g} for channel {place}; "
            f"that of its input times that of its weight is {np.broadcast_to(wanted, far.shape)[place]:.6g}",
            _DAMAGED,
        )


def _brief(step: QuantizationParameters) -> str:
    shown = f"{step.scale.ravel()[0]:.6g}" if step.scale.size == 1 else f"of {step.scale.size} channels"
    return f"{shown}, zero point {step.zero.ravel()[0]!s}"


PRECISIONS = ("fp32", "fp16", "int8")
BATCH = 32
# What a ratio of 0 (answers that are the same to the last bit) or of infinity is written as.
MOST_DB = 200.0
_SHOWN = 3


@dataclass(frozen=True)
class Verification:
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


def verify(model: ModelProto, precision: str, *, allowed: Collection[str] = ()) -> Verification:
    """Look whether a file is what it is said to be.

    In an int8 file a convolution or matrix product counts as int8 when its data and its weight both come straight
    from a DequantizeLinear of 8 bits; with unsigned activations ONNX Runtime must in fact run it in an integer kernel.
    In an fp16 file it counts when its data and its weight are float16.

    Args:
        precision: "int8", "fp16" or "fp32" (nothing is low then, and only the counts are of use).
        allowed: nodes with weights that may stay in float32.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    view = View(model)
    scheme, scales = check_scales(view) if precision == "int8" else ("", 0)
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
    return Verification(
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
    """Compare what two files answer, run by ONNX Runtime on this CPU."""
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
