"""Which ONNX files are taken to be measured: whole ones, whose quantization means something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import ParityError, UsageError
from edgeprune.stages.evaluate_file import input_of


def quantized(scale: float) -> onnx.ModelProto:
    """(1, 1, 2, 2) -> quantize, dequantize, flatten -> (1, 4)."""
    constants = {"scale": np.float32(scale), "zero": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="in/Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="in/DQ"),
        helper.make_node("Flatten", ["d"], ["y"], name="flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -0.1])
def test_a_scale_that_means_nothing_is_refused_with_the_node(scale: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized(scale), path)
    with pytest.raises(ParityError, match="QuantizeLinear 'in/Q'") as caught:
        input_of(path)
    assert "finite and above 0" in caught.value.message


def test_a_whole_file_says_what_it_eats_and_an_empty_one_that_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized(0.1), path)
    assert input_of(path).shape == (1, 2, 2)
    assert input_of(path).classes == 4
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="no graph in it"):
        input_of(path)


def flat(shape: list[int | str] | None, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """(n, 1, 2, 2) -> flatten -> (n, 4), with this shape of the output in the file."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Flatten", ["x"], ["y"], name="flat")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(0, np.int64), "zero")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    made.ir_version = 10
    return made


@pytest.mark.parametrize("shape", [["n", "k"], ["n", 4], None])
def test_a_file_that_leaves_the_number_of_classes_open_is_asked(
    shape: list[int | str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(flat(shape), path)
    assert (input_of(path).shape, input_of(path).classes) == ((1, 2, 2), 4)


def test_a_file_that_leaves_it_open_and_does_not_answer_is_refused_with_what_it_does(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(flat(["n", "k"], [helper.make_node("NoSuchThing", ["x"], ["y"])]), path)
    with pytest.raises(UsageError, match="does not say how many classes") as caught:
        input_of(path)
    assert "(N, classes)" in caught.value.hint
    onnx.save(flat(None, [helper.make_node("Identity", ["x"], ["y"])]), path)
    with pytest.raises(UsageError, match=r"it answers 1 of its images with \(1, 1, 2, 2\)"):
        input_of(path)
