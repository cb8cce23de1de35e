"""A model that is made ready for quantizing answers as before and has only what quantization knows."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from float_models import attributes, exported, floats, initializers, kinds, model_of
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize.prepare import prepare


def assert_alike(model: ModelProto, prepared: ModelProto, batch: int = 1) -> None:
    onnx.checker.check_model(prepared, full_check=True)
    generator = torch.Generator().manual_seed(3)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    pixels = torch.rand((batch, *dims[1:]), generator=generator)
    torch.testing.assert_close(open_onnx(prepared)(pixels), open_onnx(model)(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(nets.NETS))
@pytest.mark.filterwarnings("ignore")
def test_networks_of_every_kind_answer_as_before_with_their_batch_norms_folded(name: str) -> None:
    model = exported(nets.build(name), (1, *nets.SHAPE))
    before, prepared = kinds(model), prepare(model)
    assert_alike(model, prepared)
    after = kinds(prepared)
    assert before.get("BatchNormalization", 0) > 0 or name == "groupnormed"
    assert not {"BatchNormalization", "Constant", "Identity", "ReduceMean"} & set(after)
    assert all(node.name for node in prepared.graph.node)
    assert len({node.name for node in prepared.graph.node}) == len(prepared.graph.node)
    known = {value.name for value in (*prepared.graph.value_info, *prepared.graph.output)}
    assert known >= {name for node in prepared.graph.node for name in node.output}


def test_the_model_that_was_given_stays_as_it_was() -> None:
    model = model_of(
        [helper.make_node("Identity", ["input"], ["a"]), helper.make_node("Relu", ["a"], ["out"])], {}
    )
    text = model.SerializeToString()
    prepare(model)
    assert model.SerializeToString() == text


def test_a_batch_norm_is_folded_by_the_formula() -> None:
    norm = {"scale": 2.0, "shift": 3.0, "mean": 5.0, "variance": 4.0}
    tensors = {"w": np.ones((1, 3, 1, 1), np.float32), "b": np.float32([7.0])}
    tensors |= {name: np.float32([value]) for name, value in norm.items()}
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", *norm], ["out"], "norm", epsilon=0.0),
    ]
    prepared = prepare(model_of(nodes, tensors))
    assert kinds(prepared) == {"Conv": 1}
    known = initializers(prepared.graph)
    # factor 2 / sqrt(4) = 1; bias (7 - 5) * 1 + 3
    np.testing.assert_array_equal(known["w"], np.ones((1, 3, 1, 1)))
    np.testing.assert_array_equal(known["b"], [5.0])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_after_a_transposed_convolution_scales_its_outputs_not_its_inputs(groups: int) -> None:
    tensors = {"w": floats(4, 6 // groups, 2, 2), "first": floats(4, 3, 1, 1, seed=1)}
    tensors |= {name: np.abs(floats(6, seed=i)) + 0.5 for i, name in enumerate(("s", "t", "m", "v"))}
    nodes = [
        helper.make_node("Conv", ["input", "first"], ["a"], "first"),
        helper.make_node("ConvTranspose", ["a", "w"], ["b"], "up", group=groups, strides=[2, 2]),
        helper.make_node("BatchNormalization", ["b", "s", "t", "m", "v"], ["out"], "norm"),
    ]
    model = model_of(nodes, tensors)
    prepared = prepare(model)
    assert kinds(prepared) == {"Conv": 1, "ConvTranspose": 1}
    assert_alike(model, prepared)


@pytest.mark.parametrize("how", ["output", "reader", "weight"])
def test_a_batch_norm_stays_where_something_else_needs_what_is_before_it(how: str) -> None:
    tensors = {"w": floats(3, 3, 1, 1)} | {name: np.abs(floats(3)) + 0.5 for name in ("s", "t", "m", "v")}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "s", "t", "m", "v"], ["n"], "norm"),
    ]
    if how == "weight":
        nodes += [helper.make_node("Conv", ["n", "w"], ["out"], "again")]
    elif how == "reader":
        nodes += [helper.make_node("Add", ["n", "c"], ["out"], "add")]
    else:
        nodes += [helper.make_node("Relu", ["n"], ["out"], "relu")]
    model = model_of(nodes, tensors)
    if how == "output":
        model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    prepared = prepare(model)
    assert kinds(prepared)["BatchNormalization"] == 1
    assert_alike(model, prepared)


def test_factors_of_a_gemm_go_into_its_weight_and_bias() -> None:
    tensors = {"w": floats(108, 5), "b": floats(5)}
    nodes = [
        helper.make_node("Flatten", ["input"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w", "b"], ["out"], "fc", alpha=0.5, beta=3.0),
    ]
    model = model_of(nodes, tensors)
    prepared = prepare(model)
    given = attributes(prepared.graph.node[1])
    assert (given["alpha"], given["beta"]) == (1.0, 1.0)
    assert_alike(model, prepared)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_mean_over_all_positions_is_a_global_pool(keepdims: int, opset: int) -> None:
    tensors = {"axes": np.int64([-1, 2])} if opset >= 18 else {}
    given: dict[str, Any] = {} if tensors else {"axes": [2, 3]}
    node = helper.make_node("ReduceMean", ["input", *tensors], ["out"], "mean", keepdims=keepdims, **given)
    model = model_of([node], tensors, opset=opset)
    prepared = prepare(model)
    assert kinds(prepared) == {"GlobalAveragePool": 1} | ({} if keepdims else {"Flatten": 1})
    assert not prepared.graph.initializer
    assert_alike(model, prepared)


def test_other_means_stay() -> None:
    tensors = {"one": np.int64([1]), "rows": np.int64([2])}
    nodes = [
        helper.make_node("ReduceMean", ["input", "one"], ["a"], "channels"),
        helper.make_node("ReduceMean", ["a", "rows"], ["out"], "rows"),
    ]
    assert kinds(prepare(model_of(nodes, tensors))) == {"ReduceMean": 2}


@pytest.mark.parametrize(("kernel", "pads", "pool"), [(6, 0, True), (3, 0, False), (6, 3, False)])
def test_an_average_pool_as_large_as_the_image_is_global(kernel: int, pads: int, pool: bool) -> None:
    node = helper.make_node(
        "AveragePool", ["input"], ["out"], "pool", kernel_shape=[kernel] * 2, pads=[pads] * 4
    )
    model = model_of([node], {})
    prepared = prepare(model)
    assert kinds(prepared) == ({"GlobalAveragePool": 1} if pool else {"AveragePool": 1})
    assert_alike(model, prepared)


def test_a_reshape_of_every_image_to_a_row_takes_any_batch_afterwards() -> None:
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["out"], "rows")]
    model = model_of(nodes, {"shape": np.int64([1, 108])})
    prepared = prepare(model)
    assert kinds(prepared) == {"Flatten": 1}
    assert_alike(model, prepared)


def test_a_reshape_that_mixes_images_or_splits_them_stays() -> None:
    nodes = [
        helper.make_node("Reshape", ["input", "halves"], ["a"], "halves"),
        helper.make_node("Reshape", ["a", "back"], ["out"], "back"),
    ]
    model = model_of(nodes, {"halves": np.int64([2, 54]), "back": np.int64([1, 3, 36])})
    assert kinds(prepare(model)) == {"Reshape": 2}


def test_what_passes_its_input_on_is_gone_and_outputs_keep_their_names() -> None:
    nodes = [
        helper.make_node("Identity", ["input"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Dropout", ["b"], ["c"]),
        helper.make_node("Sigmoid", ["c"], ["d"]),
        helper.make_node("Identity", ["d"], ["out"]),
    ]
    model = model_of(nodes, {})
    prepared = prepare(model)
    assert kinds(prepared) == {"Relu": 1, "Sigmoid": 1}
    assert [value.name for value in prepared.graph.output] == ["out"]
    assert_alike(model, prepared)


def test_an_identity_between_input_and_output_stays_and_so_does_dropout_in_training() -> None:
    nodes = [
        helper.make_node("Identity", ["input"], ["out"]),
        helper.make_node("Dropout", ["input", "ratio", "training"], ["other"]),
    ]
    tensors = {"ratio": np.float32(0.5), "training": np.array(True)}
    assert kinds(prepare(model_of(nodes, tensors))) == {"Identity": 1, "Dropout": 1}


def test_constants_of_every_way_to_write_them_are_initializers() -> None:
    nodes = [
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Constant", [], ["rows"], value_ints=[1, -1]),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.float32([1.0]))),
        helper.make_node("Mul", ["input", "half"], ["a"]),
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("Reshape", ["b", "rows"], ["out"]),
    ]
    model = model_of(nodes, {})
    prepared = prepare(model)
    assert kinds(prepared) == {"Mul": 1, "Add": 1, "Flatten": 1}
    assert set(initializers(prepared.graph)) == {"half", "one"}
    assert_alike(model, prepared)


def test_what_a_branch_reads_is_renamed_in_it_too() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [made])

    nodes = [
        helper.make_node("Identity", ["input"], ["a"], "pass"),
        helper.make_node(
            "If", ["yes"], ["out"], "choose", then_branch=branch("t", "Relu"), else_branch=branch("e", "Abs")
        ),
    ]
    model = model_of(nodes, {"yes": np.array(True)})
    prepared = prepare(model)
    assert kinds(prepared) == {"If": 1}
    assert_alike(model, prepared)


def test_a_model_that_onnx_cannot_make_sense_of_is_refused() -> None:
    model = model_of([helper.make_node("Relu", ["input"], ["out"], "relu")], {})
    del model.opset_import[:]
    with pytest.raises(UnsupportedModel, match="can't infer the shapes"):
        prepare(model)
