"""What TensorRT would refuse in a file is refused here, by the node's name, and what it takes goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import write_net

from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.export.tensorrt_support import check_for_tensorrt, newest_opset


def quantized(
    *, zero: Any = 0, dtype: Any = np.int8, scale: float = 0.05, opset: int = 18
) -> onnx.ModelProto:
    """input -> Q -> DQ -> Conv with a Q/DQ weight -> Flatten."""
    weights = {
        "scale": np.float32(scale), "zero": np.array(zero, dtype), "w": np.ones((10, 3, 8, 8), np.int8),
        "w.scale": np.full(10, 0.01, np.float32), "w.zero": np.zeros(10, np.int8), "bias": np.zeros(10, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], "in.q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "in.dq"),
        helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["wf"], "conv.weight.dq", axis=0),
        helper.make_node("Conv", ["dq", "wf", "bias"], ["conv"], "conv"),
        helper.make_node("Flatten", ["conv"], ["logits"], "flat"),
    ]
    graph = helper.make_graph(
        nodes, "q", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize("version", ["10.3", "10.13.3.9", "11.4.0"])
def test_symmetric_signed_pairs_go_through(version: str, tmp_path: Path) -> None:
    check_for_tensorrt(quantized(), version)
    check_for_tensorrt(onnx.load(write_net(tmp_path / "net.onnx")), version)


@pytest.mark.parametrize(
    ("version", "opset"),
    [
        ("8.2.1", 13),
        ("8.5", 17),
        ("10.3", 20),
        ("10.9", 22),
        ("10.13.3.9", 24),
        ("10.16", 24),
        ("11.4.0.106", 25),
    ],
)
def test_the_newest_opset_of_each_version_goes_through_and_the_next_does_not(
    version: str, opset: int
) -> None:
    assert newest_opset(version) == opset
    check_for_tensorrt(quantized(opset=opset), version)
    with pytest.raises(UnsupportedModel, match=f"opset {opset + 1}, TensorRT {version} reads 9 to {opset}"):
        check_for_tensorrt(quantized(opset=opset + 1), version)


@pytest.mark.parametrize("version", ["", "7.1", "new", "8"])
def test_an_unknown_version_is_a_usage_error(version: str) -> None:
    with pytest.raises(UsageError, match=r"8\.2 and newer"):
        newest_opset(version)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            lambda: quantized(zero=128, dtype=np.uint8),
            r"in\.q.*QuantizeLinear.*uint8; TensorRT takes signed int8",
        ),
        (lambda: quantized(zero=3), r"zero point of .*in\.q.* is 3; TensorRT takes 0"),
        (lambda: quantized(scale=0.0), r"scale of .*in\.q.* has 0\.0; accepted: finite numbers above 0"),
        (lambda: quantized(scale=float("inf")), r"scale of .*in\.q.* has inf"),
        (lambda: quantized(opset=8), "opset 8"),
    ],
)
def test_scales_and_zero_points_that_it_does_not_take_are_named(
    model: Callable[[], onnx.ModelProto], said: str
) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        check_for_tensorrt(model(), "10.3")


def changed(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = quantized()
    change(model)
    return model


def computed_scale(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Identity", ["scale"], ["made"], "made"))
    model.graph.node[1].input[1] = "made"


def quantized_bias(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10, np.int32), "b"))
    model.graph.node.insert(2, helper.make_node("DequantizeLinear", ["b", "w.scale"], ["bf"], "conv.bias.dq"))
    model.graph.node[4].input[2] = "bf"


def no_zero_point(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[2]


def wide_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float64), "wide"))


def foreign(model: onnx.ModelProto) -> None:
    model.graph.node[3].domain = "com.microsoft"


def integer(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "QLinearConv"


def open_height(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def integers_in(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def computed_axes(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ReduceMean", ["conv", "logits"], ["mean"], "mean"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (computed_scale, r"scale of .*in\.q.* is not a constant"),
        (quantized_bias, r"conv\.bias\.dq.* is a quantized bias"),
        (no_zero_point, r"in\.q.* is quantized to uint8"),
        (wide_weight, "'wide' is float64"),
        (foreign, r"'conv' \(Conv\) is of the domain 'com\.microsoft'"),
        (integer, r"'conv' \(QLinearConv\) is not read"),
        (open_height, "dimension 2 of the input 'input' is open"),
        (integers_in, r"input \(INT64\); accepted: one of float32"),
        (computed_axes, r"axes of 'mean' \(ReduceMean\) are computed"),
    ],
)
def test_what_it_does_not_take_is_named(change: Callable[[onnx.ModelProto], None], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        check_for_tensorrt(changed(change), "11.4")


def test_an_open_batch_and_constants_as_nodes_go_through() -> None:
    model = quantized()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    scale = next(t for t in model.graph.initializer if t.name == "scale")
    model.graph.initializer.remove(scale)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["scale"], "c", value=scale))
    check_for_tensorrt(model, "10.3")
