"""The network in torch that is read from an ONNX file: it answers as the file does, and gradients pass the rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.export import stage
from edgeprune.models.torch_export import quiet
from edgeprune.onnx_graph.session import open_onnx
from edgeprune.recipe.schema import ExportTable
from edgeprune.records import InputSpec
from edgeprune.robustness.onnx_module.module import to_torch
from edgeprune.robustness.onnx_module.plan import is_quantized

SHAPE = [2, 4, 6, 6]
FLOAT = TensorProto.FLOAT


def model(
    nodes: Sequence[Any], tensors: dict[str, np.ndarray], shape: Sequence[Any] = SHAPE, opset: int = 20
) -> ModelProto:
    """A graph from `x` to `y`, with numbers."""
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 10
    return made


def wide(shape: Sequence[int] = SHAPE, seed: int = 0) -> Tensor:
    """Numbers on both sides of 0, some of them beyond every range here."""
    return 3 * torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def agree(made: ModelProto, x: Tensor, tolerance: float = 2e-6) -> None:
    """ONNX Runtime, which shares no code with torch, is the judge."""
    with torch.no_grad():
        found = to_torch(made)(x)
    wanted = open_onnx(made)(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=tolerance, atol=tolerance)


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# name -> (operator, numbers beside x in the order of the inputs, attributes). "" is an input that is left out.
CASES: dict[str, tuple[str, dict[str, np.ndarray], dict[str, Any]]] = {
    "conv": ("Conv", {"w": random(8, 4, 3, 3), "b": random(8)}, {"pads": [1, 1, 1, 1]}),
    "conv-one-side": ("Conv", {"w": random(8, 4, 3, 3)}, {"pads": [0, 1, 1, 0], "strides": [2, 1]}),
    "conv-same-upper": ("Conv", {"w": random(8, 4, 2, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv-same-lower": ("Conv", {"w": random(8, 4, 2, 3)}, {"auto_pad": "SAME_LOWER"}),
    "conv-groups-dilated": ("Conv", {"w": random(8, 2, 2, 2)}, {"group": 2, "dilations": [2, 2]}),
    "transposed": ("ConvTranspose", {"w": random(4, 3, 3, 3), "b": random(3)}, {"strides": [2, 2], "pads": [1] * 4}),
    "transposed-one-side": (
        "ConvTranspose", {"w": random(4, 3, 3, 3), "b": random(3)},
        {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 1]},
    ),
    "transposed-shape": ("ConvTranspose", {"w": random(4, 3, 3, 3)}, {"strides": [2, 2], "output_shape": [12, 12]}),
    "transposed-groups": ("ConvTranspose", {"w": random(4, 3, 2, 2)}, {"group": 2}),
    "batch-norm": (
        "BatchNormalization",
        {"s": random(4), "b": random(4, seed=2), "m": random(4, seed=3), "v": np.abs(random(4, seed=4))}, {},
    ),
    "instance-norm": ("InstanceNormalization", {"s": random(4), "b": random(4, seed=2)}, {"epsilon": 1e-3}),
    "layer-norm": ("LayerNormalization", {"s": random(6, 6), "b": random(6, 6)}, {"axis": -2}),
    "response-norm": ("LRN", {}, {"size": 3, "alpha": 0.1, "beta": 0.5}),
    "max-pool": ("MaxPool", {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max-pool-one-side": ("MaxPool", {}, {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
    "max-pool-ceil": ("MaxPool", {}, {"kernel_shape": [4, 4], "strides": [3, 3], "ceil_mode": 1}),
    "average-pool": ("AveragePool", {}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "average-pool-padded": (
        "AveragePool", {}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "average-pool-one-side": ("AveragePool", {}, {"kernel_shape": [3, 3], "pads": [0, 0, 1, 2]}),
    "average-pool-same": ("AveragePool", {}, {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "global-average": ("GlobalAveragePool", {}, {}),
    "global-max": ("GlobalMaxPool", {}, {}),
    "matmul": ("MatMul", {"w": random(6, 3)}, {}),
    "relu": ("Relu", {}, {}),
    "leaky-relu": ("LeakyRelu", {}, {"alpha": 0.3}),
    "prelu": ("PRelu", {"s": random(4, 1, 1)}, {}),
    "elu": ("Elu", {}, {"alpha": 0.7}),
    "selu": ("Selu", {}, {}),
    "celu": ("Celu", {}, {"alpha": 0.7}),
    "clip": ("Clip", {"low": np.float32(-1), "high": np.float32(0.5)}, {}),
    "clip-above": ("Clip", {"": np.float32(0), "high": np.float32(0.5)}, {}),
    "sigmoid": ("Sigmoid", {}, {}),
    "hard-sigmoid": ("HardSigmoid", {}, {"alpha": 0.3}),
    "hard-swish": ("HardSwish", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "gelu": ("Gelu", {}, {}),
    "gelu-tanh": ("Gelu", {}, {"approximate": "tanh"}),
    "mish": ("Mish", {}, {}),
    "softplus": ("Softplus", {}, {}),
    "softsign": ("Softsign", {}, {}),
    "erf": ("Erf", {}, {}),
    "softmax": ("Softmax", {}, {"axis": 1}),
    "log-softmax": ("LogSoftmax", {}, {"axis": -1}),
    "hardmax": ("Hardmax", {}, {"axis": 1}),
    "add": ("Add", {"b": random(6)}, {}),
    "div": ("Div", {"b": random(4, 1, 1)}, {}),
    "pow": ("Pow", {"b": np.float32(3)}, {}),
    "min": ("Min", {"b": random(6), "c": random(1)}, {}),
    "fmod": ("Mod", {"b": np.float32(1.7)}, {"fmod": 1}),
    "round": ("Round", {}, {}),
    "reduce-mean": ("ReduceMean", {"axes": numbers(-1, 2)}, {"keepdims": 0}),
    "reduce-all": ("ReduceSum", {}, {}),
    "reduce-nothing": ("ReduceSum", {}, {"noop_with_empty_axes": 1}),
    "reduce-max": ("ReduceMax", {"axes": numbers(1)}, {}),
    "reduce-prod": ("ReduceProd", {"axes": numbers(2, 3)}, {"keepdims": 0}),
    "reduce-l2": ("ReduceL2", {"axes": numbers(1, 2)}, {}),
    "reduce-l1": ("ReduceL1", {"axes": numbers(1)}, {}),
    "reduce-squares": ("ReduceSumSquare", {"axes": numbers(1)}, {}),
    "flatten": ("Flatten", {}, {"axis": -2}),
    "reshape": ("Reshape", {"s": numbers(0, 2, -1, 3)}, {}),
    "transpose": ("Transpose", {}, {}),
    "pad": ("Pad", {"p": numbers(0, 1, 2, 0, 0, 0, 1, 3), "v": np.float32(0.5)}, {}),
    "pad-reflect": ("Pad", {"p": numbers(0, 0, 0, 2, 0, 0, 0, 1)}, {"mode": "reflect"}),
    "pad-edge": ("Pad", {"p": numbers(0, 0, 1, 2, 0, 0, 3, 1)}, {"mode": "edge"}),
    "pad-axes": ("Pad", {"p": numbers(1, 2), "": np.float32(0), "a": numbers(-3)}, {}),
    "slice": ("Slice", {"s": numbers(1, -4), "e": numbers(1000, -1), "a": numbers(1, 3)}, {}),
    "slice-back": ("Slice", {"s": numbers(-1), "e": numbers(-(2**62)), "a": numbers(2), "t": numbers(-2)}, {}),
    "gather": ("Gather", {"i": np.array([[2, -1], [0, 1]], np.int64)}, {"axis": 1}),
    "squeeze": ("Unsqueeze", {"a": numbers(0, -1)}, {}),
    "expand": ("Expand", {"s": numbers(3, 2, 4, 6, 6)}, {}),
    "tile": ("Tile", {"r": numbers(1, 2, 1, 1)}, {}),
    "depth-to-space": ("DepthToSpace", {}, {"blocksize": 2}),
    "depth-to-space-crd": ("DepthToSpace", {}, {"blocksize": 2, "mode": "CRD"}),
    "space-to-depth": ("SpaceToDepth", {}, {"blocksize": 3}),
    "einsum": ("Einsum", {"w": random(6, 5)}, {"equation": "bchw,wk->bkh"}),
    "nearest": ("Resize", {"": np.float32(0), "s": np.array([1, 1, 2, 1.5], np.float32)}, {}),
    "nearest-floor": (
        "Resize", {"": np.float32(0), "s": np.array([1, 1, 2.5, 0.5], np.float32)},
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "linear": ("Resize", {"": np.float32(0), "s": np.array([1, 1, 2, 1.5], np.float32)}, {"mode": "linear"}),
    "linear-corners": (
        "Resize", {"": np.float32(0), " ": np.float32(0), "s": numbers(2, 4, 9, 4)},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_answers_as_onnx_runtime_does(name: str) -> None:
    operator, tensors, attributes = CASES[name]
    given = {key: array for key, array in tensors.items() if key.strip()}
    node = helper.make_node(operator, ["x", *(key.strip() for key in tensors)], ["y"], "node", **attributes)
    agree(model([node], given), wide())


def test_older_operator_sets_say_axes_and_limits_in_attributes() -> None:
    for operator, attributes in (
        ("ReduceMean", {"axes": [2, 3], "keepdims": 0}),
        ("Softmax", {"axis": 2}),
        ("Unsqueeze", {"axes": [0]}),
        ("Clip", {"min": -1.0}),
        ("Pad", {"pads": [0, 0, 1, 1, 0, 0, 0, 0], "value": 2.0}),
    ):
        opset = 10 if operator in ("Clip", "Pad") else 12
        agree(model([helper.make_node(operator, ["x"], ["y"], **attributes)], {}, opset=opset), wide())


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.7}])
def test_swish_of_the_newest_operator_set(attributes: dict[str, Any]) -> None:
    agree(model([helper.make_node("Swish", ["x"], ["y"], **attributes)], {}, opset=24), wide())


def test_sizes_that_the_graph_computes_are_followed() -> None:
    """As torch exports `x.reshape(len(x), -1)[:, ::2]` of a free batch, in parts and put together again."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "zeros"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["size"], axis=0),
        helper.make_node("Reshape", ["x", "size"], ["flat"]),
        helper.make_node("Split", ["flat"], ["a", "b", "c"], axis=1, num_outputs=3),
        helper.make_node("Concat", ["c", "a"], ["ca"], axis=1),
        helper.make_node("Slice", ["ca", "zeros", "end", "ones", "twos"], ["y"]),
    ]
    tensors = {
        "zero": np.array(0, np.int64), "zeros": numbers(0), "rest": numbers(-1), "end": numbers(10**9),
        "ones": numbers(1), "twos": numbers(2),
    }  # fmt: skip
    for rows in (1, 5):
        agree(model(nodes, tensors, ["n", 4, 6, 6]), wide([rows, 4, 6, 6]))


def exported(network: nn.Module, path: Path, *, how: str) -> ModelProto:
    """The file of a network, by torch's exporters: the newer one as the export stage uses it, and the older one."""
    if how == "stage":
        stage.run(network, InputSpec(nets.SHAPE, 5), path, opset=20, table=ExportTable(), meta={}, real=None)
        return onnx.load(path)
    axes = {"input": {0: "batch"}} if how == "free" else None
    with quiet():
        torch.onnx.export(
            network,
            (nets.example(2),),
            path,
            input_names=["input"],
            opset_version=17,
            dynamo=False,
            dynamic_axes=axes,
        )
    return onnx.load(path)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in nets.NETS for how in ("free", "fixed")),
        ("depthwise", "stage"),
        ("split", "stage"),
    ],
)
def test_an_exported_network_answers_any_batch_as_its_file_and_has_the_gradients_of_the_network(
    tmp_path: Path, name: str, how: str
) -> None:
    network, x = nets.build(name), nets.example(6)
    made = exported(network, tmp_path / "net.onnx", how=how)
    found, session = to_torch(made), open_onnx(made)
    point, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    answer, wanted = found(point), network(other)
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-5)
    size = {"free": 6, "fixed": 2, "stage": 1}[how]
    asked = torch.cat([session(part) for part in x.split(size)])
    torch.testing.assert_close(answer.detach(), asked, rtol=1e-5, atol=1e-5)
    slopes = [
        torch.autograd.grad(y.logsumexp(1).sum(), at)[0] for y, at in ((answer, point), (wanted, other))
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-6)
    assert not list(found.parameters()) and list(found.buffers()) and not found.training
    last = copy.deepcopy(found).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), answer.detach())


def test_a_file_that_mixes_its_one_image_with_other_axes_goes_through_image_by_image() -> None:
    """The batch is turned behind the channels and the first axis then has a fixed number of them."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]),
        helper.make_node("Reshape", ["t", "shape"], ["r"]),
        helper.make_node("ReduceSum", ["r", "axis"], ["s"], keepdims=0),
        helper.make_node("MatMul", ["s", "w"], ["p"]),
        helper.make_node("Unsqueeze", ["p", "axis"], ["y"]),
    ]
    tensors = {"shape": numbers(4, 36), "axis": numbers(0), "w": random(36, 3)}
    made, x = model(nodes, tensors, [1, 4, 6, 6]), wide([3, 4, 6, 6])
    wanted = torch.cat([open_onnx(made)(image[None]) for image in x])
    torch.testing.assert_close(to_torch(made)(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_fixed_batch_of_several_images_is_filled_up() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    made = model(nodes, {"shape": numbers(2, 144), "w": random(144, 3)}, [2, 4, 6, 6])
    x = wide([5, 4, 6, 6])
    wanted = torch.cat([open_onnx(made)(x[i : i + 2]) for i in (0, 2)])
    torch.testing.assert_close(to_torch(made)(x)[:4], wanted, rtol=1e-5, atol=1e-5)
    assert to_torch(made)(x).shape == (5, 3)


def test_a_token_that_the_file_holds_for_one_image_is_there_for_each() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Concat", ["token", "r"], ["c"], axis=1),
        helper.make_node("ReduceSum", ["c", "axis"], ["y"], keepdims=0),
    ]
    tensors = {"shape": numbers(1, 4, 36), "token": random(1, 1, 36), "axis": numbers(1)}
    made, x = model(nodes, tensors, [1, 4, 6, 6]), wide([3, 4, 6, 6])
    wanted = torch.cat([open_onnx(made)(image[None]) for image in x])
    torch.testing.assert_close(to_torch(made)(x), wanted, rtol=1e-5, atol=1e-5)


def test_values_that_are_needed_no_more_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("Relu", [f"v{i}" if i else "x"], [f"v{i + 1}"]) for i in range(20)]
    nodes.append(helper.make_node("Add", ["v20", "x"], ["y"]))
    found, alive, most = to_torch(model(nodes, {})), 0, 0
    import weakref

    def seen(_layer: Any, _given: Any, made: Tensor) -> None:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        weakref.finalize(made, gone)

    def gone() -> None:
        nonlocal alive
        alive -= 1

    for layer in found.modules():
        if layer is not found and not list(layer.children()):
            layer.register_forward_hook(seen)
    with torch.no_grad():
        found(wide())
    assert 1 < most <= 3


QUANTIZED: dict[str, tuple[Any, int, int]] = {
    "uint8": (np.uint8, 0, 255),
    "int8": (np.int8, -128, 127),
    "uint16": (np.uint16, 0, 65535),
    "int16": (np.int16, -32768, 32767),
}


def pair(kind: str, zero: int, scale: float) -> ModelProto:
    tensors = {"s": np.float32(scale), "z": np.array(zero, QUANTIZED[kind][0])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return model(nodes, tensors, [1, 1, 1, "n"], opset=21)


@pytest.mark.parametrize(
    ("kind", "zero"),
    [("uint8", 0), ("uint8", 90), ("int8", 0), ("int8", -7), ("uint16", 32768), ("int16", 0)],
)
def test_rounding_is_half_to_even_and_ends_are_cut_off_exactly_as_in_onnx_runtime(
    kind: str, zero: int
) -> None:
    """Halves of steps, whole steps and what lies beyond the ends; bit for bit."""
    scale = 0.25
    _, low, high = QUANTIZED[kind]
    edges = torch.tensor([low - zero, high - zero], dtype=torch.float32)
    steps = torch.cat([torch.arange(-12, 12, 0.5), *(e + torch.arange(-3, 3, 0.25) for e in edges)])
    made, x = pair(kind, zero, scale), (steps * scale).view(1, 1, 1, -1)
    point = x.clone().requires_grad_()
    answer = to_torch(made)(point)
    assert torch.equal(answer.detach(), open_onnx(made)(x))
    inside = (steps.round() + zero >= low) & (steps.round() + zero <= high)
    gradient = torch.autograd.grad((answer * 3).sum(), point)[0]
    assert torch.equal(gradient.view(-1), 3.0 * inside), (
        "the identity inside the range, 0 where it is cut off"
    )


def test_without_rounding_the_ends_stay(kind: str = "uint8") -> None:
    made = pair(kind, 10, 0.5)
    x = torch.tensor([-50.0, -5.0, -1.2, 0.3, 100.0, 122.5, 900.0]).view(1, 1, 1, -1)
    found = to_torch(made, rounding=False)(x).view(-1)
    assert found.tolist() == pytest.approx([-5, -5, -1.2, 0.3, 100, 122.5, 122.5])


def test_weights_are_dequantized_once_for_each_channel_and_biases_from_int32() -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "w8": rng.integers(-127, 128, (5, 4, 3, 3)).astype(np.int8), "ws": np.abs(random(5)),
        "wz": np.zeros(5, np.int8),
        "b32": rng.integers(-(2**30), 2**30, 5).astype(np.int32), "bs": np.abs(random(5)) * 1e-9,
        "bz": np.zeros(5, np.int32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=0),
        helper.make_node("DequantizeLinear", ["b32", "bs", "bz"], ["b"], axis=0),
        helper.make_node("Conv", ["x", "w", "b"], ["y"]),
    ]
    made = model(nodes, tensors)
    agree(made, wide(), 1e-4)
    found = to_torch(made)
    assert is_quantized(made) and sorted(b.numel() for b in found.buffers()) == [5, 180]


def test_activations_may_have_a_scale_for_each_channel_and_what_is_between_stays_in_whole_numbers() -> None:
    tensors = {
        "s": np.array([0.1, 0.2, 0.5, 1.0], np.float32), "z": np.array([0, 3, -5, 0], np.int8),
        "t": np.array(0.25, np.float32), "zero": np.array(2, np.int8),
    }  # fmt: skip
    channels = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    agree(model(channels, tensors), wide())
    between = [
        helper.make_node("QuantizeLinear", ["x", "t", "zero"], ["q"]),
        helper.make_node("MaxPool", ["q"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("DequantizeLinear", ["p", "t", "zero"], ["y"]),
    ]
    made = model(between, tensors)
    agree(made, wide())
    x = wide().requires_grad_()
    gradient = torch.autograd.grad(to_torch(made)(x).sum(), x)[0]
    assert float(gradient.sum()) == 2 * 4 * 25, "whole numbers are divided by the scale and multiplied again"
    for rounding in (True, False):
        assert to_torch(made, rounding=rounding)(wide()).shape == (2, 4, 5, 5)


def quantized_file(path: Path, symmetric: bool) -> ModelProto:
    """ONNX Runtime's own quantizer on a small network."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter([{"input": nets.example(2, seed=seed).numpy()} for seed in range(8)])

        def get_next(self) -> Any:
            return next(self.images, None)

    float_path = path / "float.onnx"
    exported(nets.build("residual"), float_path, how="fixed")
    kind = QuantType.QInt8 if symmetric else QuantType.QUInt8
    options = {"ActivationSymmetric": symmetric, "WeightSymmetric": True}
    quantize_static(
        str(float_path), str(path / "int8.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=kind, weight_type=QuantType.QInt8, extra_options=options,
    )  # fmt: skip
    return onnx.load(path / "int8.onnx")


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_file_that_onnx_runtime_quantized_is_answered_alike_and_has_gradients(
    tmp_path: Path, symmetric: bool
) -> None:
    made, x = quantized_file(tmp_path, symmetric), nets.example(16)
    session = open_onnx(made)
    wanted = torch.cat([session(part) for part in x.split(2)])
    found = to_torch(made)(x)
    scale = float(wanted.abs().max())
    assert float((found - wanted).square().mean().sqrt()) < 0.02 * scale
    floats = open_onnx(onnx.load(tmp_path / "float.onnx"))
    exact = torch.cat([floats(part) for part in x.split(2)])
    assert float((found - wanted).abs().mean()) < 0.5 * float((exact - wanted).abs().mean()), (
        "nearer than the float one"
    )
    point = x.clone().requires_grad_()
    network = nets.build("residual")
    gradient = torch.autograd.grad(to_torch(made)(point)[:, 0].sum(), point)[0]
    wanted = torch.autograd.grad(network(point)[:, 0].sum(), point)[0]
    assert float(torch.cosine_similarity(gradient.flatten(), wanted.flatten(), 0)) > 0.9


def test_float16_numbers_are_computed_in_float32() -> None:
    tensors = {"w": random(8, 4, 3, 3).astype(np.float16)}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=FLOAT),
    ]
    agree(model(nodes, tensors), wide(), 2e-2)


def test_nodes_may_stand_in_any_order_and_what_nothing_makes_is_named() -> None:
    """ONNX Runtime's own converter to float16 puts the casts of inputs last."""
    nodes = [
        helper.make_node("Add", ["b", "a"], ["y"], "sum"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Neg", ["x"], ["a"]),
    ]
    agree(model(nodes, {}), wide())
    with pytest.raises(UnsupportedModel, match="Add 'sum' of the file needs 'b', which nothing makes"):
        to_torch(model([nodes[0], nodes[2]], {}))


def test_functions_of_the_file_are_looked_into() -> None:
    body = helper.make_function(
        "mine",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    made = model([helper.make_node("Twice", ["x"], ["y"], domain="mine")], {})
    made.functions.append(body)
    made.opset_import.append(helper.make_opsetid("mine", 1))
    agree(made, wide())


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        (
            [helper.make_node("LSTM", ["x", "w", "w"], ["y"], "layer1.rnn", hidden_size=3)],
            "LSTM 'layer1.rnn'",
        ),
        ([helper.make_node("Relu", ["x"], ["y"], "own", domain="com.acme")], "com.acme.Relu 'own'"),
        (
            [helper.make_node("MaxPool", ["x"], ["y", "i"], "pool", kernel_shape=[2, 2])],
            "MaxPool 'pool'.*indices",
        ),
        (
            [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
            r"MatMul 'fc'.*fails in torch on \(2, 4, 6, 6\)",
        ),
        (
            [helper.make_node("MaxPool", ["x"], ["y"], "far", kernel_shape=[2, 2], strides=[2, 2**20])],
            "MaxPool 'far'.*at most 4096",
        ),
        ([helper.make_node("ReduceSum", [""], ["y"], "none")], "ReduceSum 'none'.*input 0 is missing"),
    ],
)
def test_what_is_not_known_or_fails_is_named_with_its_node(nodes: list[Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        to_torch(model(nodes, {"w": random(2, 3)}))


def test_scales_and_types_that_make_no_sense_are_refused() -> None:
    made = pair("int8", 0, 0.5)
    made.graph.node[0].input[2] = ""
    made.graph.node[0].attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT8E4M3FN))
    with pytest.raises(UnsupportedModel, match="it makes FLOAT8E4M3FN"):
        to_torch(made)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UnsupportedModel, match="scale"):
            to_torch(pair("int8", 0, scale))
