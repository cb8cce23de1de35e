"""What a quantized or halved ONNX file computes in low precision, and how close its logits are to the float file's."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto
from torch import Tensor

from edgeprune.errors import ParityError, UnsupportedModel, UsageError
from edgeprune.models import reason
from edgeprune.onnx_graph import (
    INT8_OPERATORS,
    ONNX_ERRORS,
    Array,
    Layer,
    QuantizationParameters,
    View,
    layers,
    maker_of,
    open_session,
    operand,
    parameters_of,
    quantized_constant,
    title,
)
from edgeprune.quantize.evaluation import logits_of, sqnr_db
from edgeprune.serialization import scratch_folder

# What an infinite ratio is written as.
MOST_DB = 200.0
# A kernel adds an int32 bias to sums of steps and never reads the scale that the file gives it.
BIAS_TOLERANCE = 1e-3
# Kernels that multiply whole numbers.
INTEGER = frozenset(
    ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
     "QGemm")
)  # fmt: skip
# What ONNX Runtime adds to the name of a node that it moves into its own layout.
_MOVED = re.compile(r"(_token_\d+|_nhwc)+$")
_DAMAGED = "the file is damaged, or was not made by edgeprune: quantize it again"
_SHOWN = 3


@dataclass(frozen=True)
class Verification:
    """What a file was found to be; counts are for one image.

    macs, weights: of all convolutions and matrix products. low_macs, low_weights: of those in the precision. scales:
    entries of the scales of Q/DQ nodes. floats: nodes with weights that stay in float32. runtime_low_macs: of
    `low_macs`, those that ONNX Runtime runs in integer kernels after its own optimization on this machine; None for
    fp16.
    """

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

    sqnr_db: within +-200 dB. agreement: share of images with the same top class. worst: the largest difference as a
    share of the largest logit of the float model.
    """

    sqnr_db: float
    agreement: float
    worst: float
    images: int


def verify(model: ModelProto, precision: str, *, allowed: Collection[str] = ()) -> Verification:
    """Check that a file is in "int8" or "fp16".

    A convolution or matrix product counts as int8 when its data and its weight both come directly from a
    DequantizeLinear of 8 bits; with unsigned activations ONNX Runtime must in fact run it in an integer kernel. It
    counts as fp16 when its data and its weight are float16.

    Args:
        allowed: nodes with weights that may stay in float32.
    """
    view = View(model)
    scheme, scales = check_scales(view) if precision == "int8" else ("", 0)
    try:
        onnx.checker.check_model(model, full_check=True)
    except ONNX_ERRORS as error:
        raise ParityError(f"the file is no valid ONNX: {reason(error)}") from error
    found = tuple(layers(view, precision))
    low = [layer for layer in found if layer.low]
    floats = [layer for layer in found if layer.weights and not layer.low]
    wrong = [f"{layer.name} ({layer.why})" for layer in floats if layer.name not in allowed]
    if wrong:
        raise ParityError(
            f"{len(wrong)} nodes with weights are float32 in a file said to be {precision}: {_first(wrong)}",
            "list them as layers that stay in float32 if that is meant",
        )
    if not sum(layer.macs for layer in low):
        raise ParityError(
            f"nothing of the file is in {precision}: none of its {len(found)} convolutions and matrix products",
            f"ask for --precision fp32, or skip fewer layers of {precision}",
        )
    return Verification(
        macs=sum(layer.macs for layer in found),
        low_macs=sum(layer.macs for layer in low),
        weights=sum(layer.weights for layer in found),
        low_weights=sum(layer.weights for layer in low),
        scales=scales,
        floats=tuple(layer.name for layer in floats),
        runtime_low_macs=_integer_macs(model, found, scheme, allowed) if precision == "int8" else None,
    )


def _integer_macs(model: ModelProto, found: Sequence[Layer], scheme: str, allowed: Collection[str]) -> int:
    integer = in_integers(model, found)
    quantized = [layer.name for layer in integer if layer.weights and not layer.low]
    if quantized:
        raise ParityError(
            f"ONNX Runtime quantizes layers that were meant to stay float: {', '.join(quantized)}",
            "this should not happen; please report it with the version of ONNX Runtime",
        )
    slow = [layer.name for layer in found if layer.low and layer.weights and layer not in integer]
    floats = [name for name in slow if name not in allowed]
    # Signed activations are for other runtimes: ONNX Runtime on x86 fuses some of them only.
    if scheme == "u8" and floats:
        raise ParityError(
            f"ONNX Runtime runs {len(floats)} of the int8 nodes in float32: {_first(floats)}",
            "each needs Q/DQ at its inputs and, but for a ReLU, right after it; or list them in quantize.skip",
        )
    return sum(layer.macs for layer in integer if layer.low)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def closeness(floats: ModelProto, model: ModelProto, images: Tensor) -> Closeness:
    """Compare the logits of two files for images (N, C, H, W)."""
    if not len(images):
        raise UsageError("closeness needs at least one image, got none")
    reference = _finite_logits(floats, images, "the float model")
    logits = _finite_logits(model, images, "the quantized model")
    if reference.shape != logits.shape:
        raise ParityError(
            f"the logits of the quantized model have shape {logits.shape}, those of the float one {reference.shape}"
        )
    largest, worst = float(np.abs(reference).max()), float(np.abs(reference - logits).max())
    return Closeness(
        sqnr_db=min(MOST_DB, max(-MOST_DB, sqnr_db(reference, logits))),
        agreement=float((reference.argmax(1) == logits.argmax(1)).mean()),
        worst=worst / largest if largest > 0 else worst,
        images=len(images),
    )


def _finite_logits(model: ModelProto, images: Tensor, name: str) -> Array:
    logits = logits_of(model, images).astype(np.float64)
    broken = int((~np.isfinite(logits)).any(1).sum())
    if broken:
        raise ParityError(f"the logits of {name} are NaN or infinite for {broken} of {len(images)} images")
    return logits


def in_integers(model: ModelProto, found: Sequence[Layer]) -> list[Layer]:
    """The layers that ONNX Runtime runs in integer kernels, according to the graph that it would run."""
    graph = optimized(model).graph
    nodes = [node for node in graph.node if node.op_type in INTEGER]
    names = {_MOVED.sub("", node.name) for node in nodes}
    stored = {name for node in nodes for name in node.input}
    return [layer for layer in found if layer.name in names or (layer.stored and layer.stored in stored)]


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


def check_scales(view: View) -> tuple[str, int]:
    """Check every QuantizeLinear and DequantizeLinear of an int8 file.

    Returns:
        The scheme, "u8" or "s8" ("" when no activation is quantized), and the number of scale entries.
    """
    steps: list[tuple[NodeProto, QuantizationParameters, bool]] = []
    kinds: dict[str, str] = {}
    for node in view.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in ("", "ai.onnx"):
            continue
        stored, step = quantized_constant(view, node), _step(view, node)
        _check_scale(node, step)
        if stored is None:
            kinds.setdefault(step.zero.dtype.name, title(node))
        steps.append((node, step, stored is not None))
    scheme = _scheme(kinds)
    for node, step, constant in steps:
        _check_zero(node, step, constant=constant, scheme=scheme)
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


def _check_zero(node: NodeProto, step: QuantizationParameters, *, constant: bool, scheme: str) -> None:
    """Weights are int8 and biases int32, both with zero point 0, as signed activations."""
    if constant and step.zero.dtype.name not in ("int8", "int32"):
        raise ParityError(
            f"{title(node)} has a constant of {step.zero.dtype}; accepted: int8, and int32 for a bias"
        )
    if (constant or scheme == "s8") and step.zero.any():
        value, what = step.zero[step.zero != 0].flat[0], "a constant" if constant else "a signed activation"
        raise ParityError(f"the zero point of {title(node)} is {value!s}; {what} must have 0", _DAMAGED)


def _scheme(kinds: dict[str, str]) -> str:
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
    # At the input a normalization may be part of the rounding, with a step and a zero for each channel of the pixels.
    if rounding is None or rounding.input[0] in view.inputs:
        return
    before = _step(view, rounding)
    alike = np.array_equal(before.scale, step.scale) and np.array_equal(before.zero, step.zero)
    if not alike or (step.scale.size > 1 and before.axis != step.axis):
        raise ParityError(
            f"{title(rounding)} and {title(node)} are a pair with two steps: scale {_brief(before)} and {_brief(step)}",
            _DAMAGED,
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
    scales = (_step(view, data).scale * _step(view, weight).scale).ravel().astype(np.float64)
    given, scales = np.broadcast_arrays(_step(view, maker).scale.ravel().astype(np.float64), scales)
    far = np.abs(given - scales) > BIAS_TOLERANCE * scales
    if far.any():
        place = int(np.argmax(far))
        raise ParityError(
            f"the bias of {title(node)} has scale {given[place]:.6g} for channel {place}; that of its input times that "
            f"of its weight is {scales[place]:.6g}",
            _DAMAGED,
        )


def _brief(step: QuantizationParameters) -> str:
    shown = f"{step.scale.ravel()[0]:.6g}" if step.scale.size == 1 else f"of {step.scale.size} channels"
    return f"{shown}, zero point {step.zero.ravel()[0]!s}"
