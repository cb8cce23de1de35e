"""Bias correction gives each output the mean that it has in the float model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_files
import pytest
import quantized_files as files
import torch
from onnx import ModelProto, helper

from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize.calibrators import ranges
from edgeprune.quantize.observers import Activations, observe
from edgeprune.quantize.prepare import prepare
from edgeprune.quantize.qdq import quantized
from edgeprune.quantize.verification import closeness, verify

PIXELS = torch.from_numpy(files.images(count=64))
# Of numbers between two powers of ten int8 keeps no more than one digit beside the largest weight.
COARSE = np.array([1.0, 0.0123, -0.0071, 0.0152, -0.0037, 0.0214])


def coarse(*shape: int) -> np.ndarray:
    """Weights of that shape that int8 can't hold well."""
    size = int(np.prod(shape))
    return np.resize(COARSE, size).reshape(shape) * (1 + 0.013 * np.arange(size).reshape(shape))


def write(model: ModelProto, seen: Activations, scheme: str, *, correct: bool) -> ModelProto:
    means = {name: item.mean for name, item in seen.items()} if correct else None
    return quantized(model, ranges(seen, "minmax", symmetric=scheme == "s8"), scheme, means=means)


def error_of_means(floats: ModelProto, model: ModelProto, pixels: torch.Tensor = PIXELS) -> float:
    return float((open_onnx(floats)(pixels) - open_onnx(model)(pixels)).mean(0).abs().max())


LAYERS = {
    "convolution": ("Conv", {}, coarse(4, 3, 2, 2), (4, 4, 4)),
    "grouped": ("Conv", {"group": 3}, coarse(6, 1, 2, 2), (6, 4, 4)),
    "linear": ("Gemm", {"transB": 1}, coarse(5, 75), (5,)),
    "linear, transposed": ("Gemm", {}, coarse(75, 5), (5,)),
}


# The output of a convolution is rounded too under u8.
CASES = [*((kind, "s8") for kind in LAYERS), ("linear", "u8"), ("linear, transposed", "u8")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_a_constant_input_gets_the_outputs_of_the_float_layer(
    kind: str, bias: bool, scheme: str, tmp_path: Path
) -> None:
    op, attributes, weight, out = LAYERS[kind]
    tensors = {"w": weight.astype(np.float32)}
    if bias:
        tensors["b"] = np.arange(out[0], dtype=np.float32)
    flat = [helper.make_node("Flatten", ["input"], ["flat"], "flat")] if op == "Gemm" else []
    data = "flat" if flat else "input"
    layer = helper.make_node(op, [data, *tensors], ["logits"], "layer", **attributes)
    path = onnx_files.save(tmp_path / "m.onnx", [*flat, layer], tensors, [1, 3, 5, 5], [1, *out])
    floats = prepare(onnx.load(path))
    # 0.5 and the ends of the range lie on the grids of both schemes, so that nothing but the weight is rounded.
    pixels = torch.full((1, 3, 5, 5), 127 / 255 if scheme == "u8" else 63 / 127)
    edges = torch.stack([torch.ones(3, 5, 5), torch.zeros(3, 5, 5)])
    limits = ranges(observe(floats, edges), "minmax", symmetric=scheme == "s8")
    means = {name: item.mean for name, item in observe(floats, pixels).items()}
    before, after = (quantized(floats, limits, scheme, means=m) for m in (None, means))
    assert error_of_means(floats, before, pixels) > 1e-3
    # An int32 bias has steps of the input's scale times the weights'.
    assert error_of_means(floats, after, pixels) < 1e-4


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pointwise, depthwise, pointwise, linear; weights of one channel up to a hundredfold apart."""
    rng = np.random.default_rng(0)

    def wild(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 0, shape)).astype(np.float32)

    tensors = {
        "a.w": wild(16, 3, 1, 1),
        "d.w": wild(16, 1, 3, 3),
        "c.w": wild(8, 16, 1, 1),
        "fc.w": wild(5, 8),
    }
    tensors |= {"a.b": wild(16), "fc.b": wild(5)}
    nodes = [
        helper.make_node("Conv", ["input", "a.w", "a.b"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["ra"], "ra"),
        helper.make_node("Conv", ["ra", "d.w"], ["d"], "d", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["d"], ["rd"], "rd"),
        helper.make_node("Conv", ["rd", "c.w"], ["c"], "c"),
        helper.make_node("Relu", ["c"], ["rc"], "rc"),
        helper.make_node("GlobalAveragePool", ["rc"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["logits"], "fc", transB=1),
    ]
    return onnx_files.save(tmp_path_factory.mktemp("bias") / "net.onnx", nodes, tensors, ["N", 3, 8, 8], 5)


@pytest.mark.parametrize("scheme", ["u8", "s8"])
def test_the_means_of_a_depthwise_network_come_closer_and_it_stays_int8(depthwise: Path, scheme: str) -> None:
    floats = prepare(onnx.load(depthwise))
    seen = observe(floats, PIXELS)
    before, after = (write(floats, seen, scheme, correct=correct) for correct in (False, True))
    assert verify(after, "int8").low_macs == verify(before, "int8").macs
    assert error_of_means(floats, after) < error_of_means(floats, before)
    assert closeness(floats, after, PIXELS).sqnr_db > closeness(floats, before, PIXELS).sqnr_db


def test_a_missing_bias_is_added_in_the_kind_of_the_scheme(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    seen = observe(floats, PIXELS)
    assert len(files.node_of(floats, "d").input) == 2
    for scheme, kind in (("u8", np.int32), ("s8", np.float32)):
        after = write(floats, seen, scheme, correct=True)
        bias = files.node_of(after, "d").input[2]
        stored = files.maker_of(after, bias).input[0] if scheme == "u8" else bias
        assert stored == "d.bias"
        assert files.array_of(after, stored).dtype == kind
        assert np.any(files.array_of(after, stored))


@pytest.mark.parametrize("scheme", ["u8", "s8"])
def test_means_of_other_values_or_of_something_else_than_the_channels_are_not_used(
    depthwise: Path, scheme: str
) -> None:
    floats = prepare(onnx.load(depthwise))
    limits = ranges(observe(floats, PIXELS), "minmax", symmetric=scheme == "s8")
    plain = quantized(floats, limits, scheme).SerializeToString()
    for means in ({}, {"ra": np.array([1.0]), "flat": np.ones(3)}):
        assert quantized(floats, limits, scheme, means=means).SerializeToString() == plain


def test_a_bias_that_a_float_layer_reads_too_is_corrected_for_the_int8_layer_alone(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    second = onnx.NodeProto()
    second.CopyFrom(files.node_of(floats, "a"))
    second.name, second.output[0] = "other", "other"
    floats.graph.node.insert(1, second)
    seen = observe(floats, PIXELS)
    means = {name: item.mean for name, item in seen.items()}
    after = quantized(floats, ranges(seen, "minmax", symmetric=True), "s8", skip=("other",), means=means)
    assert files.node_of(after, "other").input[2] == "a.b"
    assert np.array_equal(files.array_of(after, "a.b"), files.array_of(floats, "a.b"))
    assert not np.array_equal(
        files.array_of(after, files.node_of(after, "a").input[2]), files.array_of(after, "a.b")
    )
