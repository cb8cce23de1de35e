"""Bias correction gives each output the mean that it has in the float model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_files
import onnxruntime
import pytest
import quantized_files as files
import torch
from onnx import ModelProto, helper, numpy_helper

from edgeprune.errors import ParityError
from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize.bias_correction import corrected
from edgeprune.quantize.calibrators import ranges
from edgeprune.quantize.observers import Seen, observe
from edgeprune.quantize.prepare import prepare
from edgeprune.quantize.qdq import quantized
from edgeprune.quantize.verification import closeness, verify

Arrays = dict[str, np.ndarray]
# Powers of two of which int8 keeps no more than one digit beside the largest weight: rounding errors are large.
COARSE = np.array([1.0, 0.0123, -0.0071, 0.0152, -0.0037, 0.0214])


def mean_of(values: list[float]) -> Seen:
    return Seen(0.0, 1.0, np.array([1]), 0.0, 1.0, np.array(values), 1)


def one_layer(folder: Path, node: onnx.NodeProto, tensors: Arrays, shape: list[int], out: list[int]) -> Path:
    arrays = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    return onnx_files.save(folder / "layer.onnx", [node], arrays, list(shape), list(out))


def by_weights_alone(model: ModelProto, bias: str = "float") -> ModelProto:
    """The model with its one weight in int8 for each output channel and the rest in float: nothing else is rounded."""
    copy = ModelProto()
    copy.CopyFrom(model)
    node = copy.graph.node[0]
    weight = numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == node.input[1]))
    axis = (
        1 if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and len(node.attribute) == 0) else 0
    )
    if node.op_type == "ConvTranspose":
        scale = np.full(weight.shape[1], np.abs(weight).max() / 127, np.float32)
    else:
        scale = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(1) / np.float32(127)
    along = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    whole = np.clip(np.rint(weight / along), -127, 127).astype(np.int8)
    for name, array in (("whole", whole), ("step", scale)):
        copy.graph.initializer.append(numpy_helper.from_array(array, name))
    copy.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["whole", "step"], ["w.dq"], "dq", axis=axis)
    )
    copy.graph.node[1].input[1] = "w.dq"
    return copy


def answer(model: ModelProto, image: np.ndarray) -> np.ndarray:
    # Optimized, a linear layer of which the weight alone is quantized gets a kernel that rounds its input as well.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": image})[0]


def conv(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", ["input", "w", "b"], ["logits"], "layer", **attributes)


def gemm(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Gemm", ["input", "w", "b"], ["logits"], "layer", **attributes)


def coarse(*shape: int) -> np.ndarray:
    """Weights of that shape that int8 can't hold well."""
    size = int(np.prod(shape))
    return np.resize(COARSE, size).reshape(shape) * (1 + 0.013 * np.arange(size).reshape(shape))


LAYERS = {
    "convolution": (conv(), coarse(4, 3, 2, 2), 4, (1, 3, 5, 5), (1, 4, 4, 4)),
    "grouped": (conv(group=2), coarse(4, 2, 2, 2), 4, (1, 4, 5, 5), (1, 4, 4, 4)),
    "depthwise": (conv(group=4), coarse(4, 1, 3, 3), 4, (1, 4, 5, 5), (1, 4, 3, 3)),
    "transposed": (
        helper.make_node("ConvTranspose", ["input", "w", "b"], ["logits"], "layer", strides=[2, 2], group=2),
        coarse(4, 2, 1, 1).repeat(2, 2).repeat(2, 3), 4, (1, 4, 3, 3), (1, 4, 6, 6),
    ),
    "linear": (gemm(transB=1), coarse(5, 6), 5, (1, 6), (1, 5)),
    "linear, turned": (gemm(), coarse(6, 5), 5, (1, 6), (1, 5)),
    "linear, with factors": (gemm(transB=1, alpha=0.5, beta=2.0), coarse(5, 6), 5, (1, 6), (1, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_constant_input_it_is_exact(tmp_path: Path, kind: str) -> None:
    node, weight, outputs, shape, out = LAYERS[kind]
    path = one_layer(tmp_path, node, {"w": weight, "b": np.arange(outputs)}, list(shape), list(out))
    floats = onnx.load(path)
    model = by_weights_alone(floats)
    mean = 0.3 + np.arange(shape[1]) / 7
    image = np.broadcast_to(mean.reshape(1, -1, *[1] * (len(shape) - 2)), shape).astype(np.float32).copy()
    wanted = answer(floats, image)
    after = answer(corrected(model, floats, {"input": mean_of(mean.tolist())}), image)
    assert np.abs(answer(model, image) - wanted).max() > 1e-3
    assert np.allclose(after, wanted, atol=1e-5)


def test_doing_it_twice_changes_nothing_more(tmp_path: Path) -> None:
    node, weight, outputs, shape, out = LAYERS["convolution"]
    floats = onnx.load(
        one_layer(tmp_path, node, {"w": weight, "b": np.arange(outputs)}, list(shape), list(out))
    )
    seen = {"input": mean_of([0.3, 0.4, 0.5])}
    once = corrected(by_weights_alone(floats), floats, seen)
    assert corrected(once, floats, seen).SerializeToString() == once.SerializeToString()


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


PIXELS = torch.from_numpy(files.images(count=64))


@pytest.mark.parametrize("scheme", ["u8", "s8"])
@pytest.mark.parametrize("maker", ["edgeprune", "onnxruntime"])
def test_a_file_stays_what_it_was_and_its_means_come_closer(depthwise: Path, scheme: str, maker: str) -> None:
    floats = prepare(onnx.load(depthwise))
    seen = observe(floats, PIXELS)
    if maker == "edgeprune":
        model = quantized(floats, ranges(seen, "minmax", symmetric=scheme == "s8"), scheme)
    else:
        model = files.quantize(depthwise, scheme, PIXELS.numpy())
    after = corrected(model, floats, seen)
    assert verify(after, "int8").low_macs == verify(model, "int8").macs
    assert error_of_means(floats, after) < error_of_means(floats, model)


def error_of_means(floats: ModelProto, model: ModelProto) -> float:
    return float((open_onnx(floats)(PIXELS) - open_onnx(model)(PIXELS)).mean(0).abs().max())


def test_a_missing_bias_is_added_in_the_kind_of_the_scheme(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    seen = observe(floats, PIXELS)
    for scheme, kind in (("u8", np.int32), ("s8", np.float32)):
        model = files.quantize(depthwise, scheme, PIXELS.numpy())
        assert len(files.node_of(model, "d").input) == 2
        bias = files.node_of(corrected(model, floats, seen), "d").input[2]
        after = corrected(model, floats, seen)
        stored = files.maker_of(after, bias).input[0] if scheme == "u8" else bias
        assert files.array_of(after, stored).dtype == kind
        assert np.any(files.array_of(after, stored))


def test_what_was_given_stays_as_it_is(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    model = files.quantize(depthwise, "u8", PIXELS.numpy())
    before = model.SerializeToString()
    corrected(model, floats, observe(floats, PIXELS))
    assert model.SerializeToString() == before


def test_a_layer_whose_input_was_not_seen_or_that_is_float_stays(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    model = files.quantize(depthwise, "u8", PIXELS.numpy())
    assert corrected(model, floats, {}).SerializeToString() == model.SerializeToString()
    assert (
        corrected(floats, floats, observe(floats, PIXELS)).SerializeToString() == floats.SerializeToString()
    )


def test_means_of_something_else_than_the_channels_are_not_used(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    model = files.quantize(depthwise, "u8", PIXELS.numpy())
    assert corrected(model, floats, {"ra": mean_of([1.0])}).SerializeToString() == model.SerializeToString()


def test_a_bias_that_two_layers_share_is_corrected_for_each(tmp_path: Path) -> None:
    node, weight, outputs, shape, out = LAYERS["depthwise"]
    floats = onnx.load(
        one_layer(tmp_path, node, {"w": weight, "b": np.arange(outputs)}, list(shape), list(out))
    )
    second = onnx.NodeProto()
    second.CopyFrom(node)
    second.name, second.output[0] = "other", "other"
    floats.graph.node.append(second)
    model = by_weights_alone(floats)
    # The second layer of the quantized model stays float, and so does the bias that it reads.
    after = corrected(model, floats, {"input": mean_of([0.3, 0.4, 0.5, 0.6])})
    assert files.node_of(after, "other").input[2] == "b"
    assert files.array_of(after, "b").tolist() == [0, 1, 2, 3]
    assert files.node_of(after, "layer").input[2] == "b.corrected"


def test_a_bias_that_is_computed_or_of_another_type_stays(tmp_path: Path) -> None:
    node, weight, outputs, shape, out = LAYERS["convolution"]
    floats = onnx.load(
        one_layer(tmp_path, node, {"w": weight, "b": np.arange(outputs)}, list(shape), list(out))
    )
    model = by_weights_alone(floats)
    model.graph.node.insert(1, helper.make_node("Abs", ["b"], ["computed"], "abs"))
    files.node_of(model, "layer").input[2] = "computed"
    assert (
        corrected(model, floats, {"input": mean_of([0.5] * 3)}).SerializeToString()
        == model.SerializeToString()
    )


def test_a_weight_that_is_rounded_when_the_file_is_loaded_counts_as_what_it_becomes(tmp_path: Path) -> None:
    node, weight, outputs, shape, out = LAYERS["depthwise"]
    floats = onnx.load(
        one_layer(tmp_path, node, {"w": weight, "b": np.arange(outputs)}, list(shape), list(out))
    )
    stored = by_weights_alone(floats)
    rounded = ModelProto()
    rounded.CopyFrom(stored)
    rounded.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int8), "zero"))
    rounded.graph.node.insert(
        0, helper.make_node("QuantizeLinear", ["w", "step", "zero"], ["q"], "q", axis=0)
    )
    files.node_of(rounded, "dq").input[:] = ["q", "step"]
    seen = {"input": mean_of([0.3, 0.4, 0.5, 0.6])}
    biases = [files.array_of(corrected(m, floats, seen), "b") for m in (stored, rounded)]
    assert np.array_equal(*biases)
    assert not np.array_equal(biases[0], np.arange(4))


def test_weights_of_another_model_are_an_error(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    model = files.quantize(depthwise, "u8", PIXELS.numpy())
    files.set_array(floats, "a.w", np.zeros((16, 3, 3, 3), np.float32))
    with pytest.raises(
        ParityError, match=r"the weight of a is \(16, 3, 1, 1\) in the quantized model and \(16, 3"
    ):
        corrected(model, floats, {"input": mean_of([0.5] * 3)})


def test_a_depthwise_network_gets_closer(depthwise: Path) -> None:
    floats = prepare(onnx.load(depthwise))
    seen = observe(floats, PIXELS)
    model = quantized(floats, ranges(seen, "minmax", symmetric=False), "u8")
    before, after = (closeness(floats, m, PIXELS).sqnr_db for m in (model, corrected(model, floats, seen)))
    assert after > before
