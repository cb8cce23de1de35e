"""Conversion to float16: typed cleanly, close to the float model, and float32 where the numbers ask for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_files
import quantized_files as files
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize.fp16 import half
from edgeprune.quantize.observers import Seen, observe
from edgeprune.quantize.prepare import prepare
from edgeprune.quantize.verification import closeness, verify

PIXELS = torch.from_numpy(files.images(count=16))
Nodes = list[onnx.NodeProto]


def seen(low: float, high: float) -> Seen:
    return Seen(low, high, np.array([1]), low, high, np.array([0.0]), 1)


def graph(
    folder: Path, nodes: Nodes, tensors: dict[str, np.ndarray], shape: list[int], out: list[int]
) -> ModelProto:
    arrays = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    return prepare(onnx.load(onnx_files.save(folder / "m.onnx", nodes, arrays, list(shape), list(out))))


def net(folder: Path) -> ModelProto:
    return prepare(onnx.load(files.write_net(folder)))


def types_of(model: ModelProto) -> dict[str, int]:
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values}


def casts(model: ModelProto) -> list[tuple[str, int]]:
    return [(n.input[0], n.attribute[0].i) for n in model.graph.node if n.op_type == "Cast"]


def test_the_whole_graph_is_float16_between_two_casts(tmp_path: Path) -> None:
    floats = net(tmp_path)
    model, kept = half(floats, observe(floats, PIXELS))
    assert kept == {}
    assert casts(model) == [("input", TensorProto.FLOAT16), ("logits.fp16", TensorProto.FLOAT)]
    assert {i.data_type for i in model.graph.initializer} == {TensorProto.FLOAT16}
    types = types_of(model)
    assert types["input"] == types["logits"] == TensorProto.FLOAT
    assert {kind for name, kind in types.items() if name not in ("input", "logits")} == {TensorProto.FLOAT16}
    proof = verify(model, "fp16")
    assert proof.low_macs == proof.macs
    # float16 keeps 11 bits: 60 dB and more.
    assert closeness(floats, model, PIXELS).sqnr_db > 55
    assert len(model.SerializeToString()) < 0.7 * len(floats.SerializeToString())


def test_the_model_that_was_given_stays_as_it_is(tmp_path: Path) -> None:
    floats = net(tmp_path)
    before = floats.SerializeToString()
    half(floats, observe(floats, PIXELS))
    assert floats.SerializeToString() == before


def test_nodes_that_are_skipped_stay_float32_with_casts_around_them(tmp_path: Path) -> None:
    floats = net(tmp_path)
    model, kept = half(floats, observe(floats, PIXELS), skip=("block.conv",))
    assert kept == {"block.conv": "asked for"}
    assert ("relu", TensorProto.FLOAT) in casts(model)
    assert ("block.conv", TensorProto.FLOAT16) in casts(model)
    assert files.array_of(model, "block.conv.weight").dtype == np.float32
    proof = verify(model, "fp16", allowed=kept)
    assert proof.floats == ("block.conv",)


def test_a_network_with_gates_answers_alike_in_float16(tmp_path: Path) -> None:
    floats = prepare(onnx.load(files.write_gated(tmp_path)))
    model, kept = half(floats, observe(floats, PIXELS))
    assert kept == {"n": "InstanceNormalization loses digits in float16"}
    assert closeness(floats, model, PIXELS).sqnr_db > 50
    proof = verify(model, "fp16")
    assert proof.low_macs == proof.macs


def test_what_overflows_stays_float32_until_it_is_small_again(tmp_path: Path) -> None:
    one = np.eye(4).reshape(4, 4, 1, 1)
    nodes = [
        helper.make_node("Conv", ["input", "up"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["r"], "r"),
        helper.make_node("Conv", ["r", "down"], ["b"], "b"),
        helper.make_node("Conv", ["b", "one"], ["logits"], "c"),
    ]
    tensors = {"up": 1e4 * one, "down": 1e-3 * one, "one": one}
    floats = graph(tmp_path, nodes, tensors, [1, 4, 2, 2], [1, 4, 2, 2])
    images = torch.full((2, 4, 2, 2), 10.0)
    model, kept = half(floats, observe(floats, images))
    assert list(kept) == ["a", "r", "b"]
    assert "a reached 1e+05; float16 ends at 65504" in kept["a"]
    # ONNX Runtime leaves out a Cast and the one that takes it back, where no kernel is float16: it would see nothing.
    (answer,) = ReferenceEvaluator(model).run(None, {"input": images[:1].numpy()})
    assert np.allclose(answer, 100.0, rtol=1e-3)
    blind, none = half(floats, {})
    assert none == {}
    with np.errstate(all="ignore"):
        (answer,) = ReferenceEvaluator(blind).run(None, {"input": images[:1].numpy()})
    assert not np.isfinite(answer).any()


def test_half_of_what_float16_holds_is_the_limit(tmp_path: Path) -> None:
    floats = net(tmp_path)
    assert half(floats, {"relu": seen(0.0, 32000.0)})[1] == {}
    assert list(half(floats, {"relu": seen(0.0, 33000.0)})[1]) == ["relu", "block.conv", "block.add"]
    assert list(half(floats, {"stem": seen(-33000.0, 1.0)})[1]) == ["stem", "relu"]


def test_what_never_rises_above_the_smallest_normal_number_stays_float32(tmp_path: Path) -> None:
    floats = net(tmp_path)
    _, kept = half(floats, {"stem": seen(-1e-5, 2e-5)})
    assert list(kept) == ["stem", "relu"]
    assert "stem never rose above 2e-05; float16 loses digits below 6.1e-05" in kept["stem"]
    assert half(floats, {"stem": seen(0.0, 0.0)})[1] == {}


def test_a_sum_of_many_large_numbers_stays_float32(tmp_path: Path) -> None:
    floats = net(tmp_path)
    assert half(floats, {"block.relu": seen(0.0, 500.0)})[1] == {}
    _, kept = half(floats, {"block.relu": seen(0.0, 600.0)})
    assert kept == {"pool": "GlobalAveragePool sums 64 entries of up to 600; float16 ends at 65504"}


def test_weights_that_float16_does_not_hold_stay_float32(tmp_path: Path) -> None:
    floats = net(tmp_path)
    small, large = (files.array_of(floats, n).copy() for n in ("stem.weight", "fc.weight"))
    files.set_array(floats, "stem.weight", (small * 1e-7).astype(np.float32))
    large[3, 5] = 1e5
    files.set_array(floats, "fc.weight", large)
    model, kept = half(floats, {})
    assert list(kept) == ["stem", "fc"]
    assert "rounding stem.weight (at most" in kept["stem"]
    assert kept["fc"] == "fc.weight holds 1e+05; float16 ends at 65504"
    assert files.array_of(model, "fc.weight").dtype == np.float32
    seen_too, kept = half(floats, observe(floats, PIXELS))
    assert "pool" in kept
    assert closeness(floats, seen_too, PIXELS).sqnr_db > 50


def test_zeros_of_a_pruned_weight_cost_nothing(tmp_path: Path) -> None:
    floats = net(tmp_path)
    weight = files.array_of(floats, "block.conv.weight").copy()
    weight.ravel()[:2000] = 0.0
    files.set_array(floats, "block.conv.weight", weight)
    assert half(floats, {})[1] == {}
    files.set_array(floats, "block.conv.weight", np.zeros_like(weight))
    assert half(floats, {})[1] == {}


def test_what_exponentiates_stays_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], "flat"),
        helper.make_node("Softmax", ["flat"], ["logits"], "soft"),
    ]
    floats = graph(tmp_path, nodes, {}, [1, 4, 1, 1], [1, 4])
    model, kept = half(floats, {})
    assert kept == {"soft": "Softmax loses digits in float16"}
    assert casts(model) == [("input", TensorProto.FLOAT16), ("flat", TensorProto.FLOAT)]


def test_operators_without_a_float16_form_stay_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MelWeightMatrix", ["bins", "length", "rate", "low", "high"], ["mel"], "mel"),
        helper.make_node("RandomNormal", [], ["noise"], "noise", shape=[1, 4], scale=0.0),
        helper.make_node("Flatten", ["input"], ["flat"], "flat"),
        helper.make_node("Add", ["flat", "noise"], ["noisy"], "noisy"),
        helper.make_node("Gelu", ["noisy"], ["gelu"], "gelu", domain="com.microsoft"),
        helper.make_node("ReduceMean", ["mel"], ["mean"], "mean", keepdims=0),
        helper.make_node("Mul", ["gelu", "mean"], ["logits"], "mul"),
    ]
    tensors = {"low": np.float32(0), "high": np.float32(4)}
    floats = onnx.load(onnx_files.save(tmp_path / "m.onnx", nodes, tensors, [1, 4, 1, 1], [1, 4]))
    floats.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    whole = {"bins": np.int64(4), "length": np.int64(8), "rate": np.int64(16)}
    floats.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in whole.items())
    model, kept = half(floats, {})
    # What comes out of an operator that onnx does not know has no known type, so its reader stays as it was too.
    assert kept["gelu"] == "Gelu is no standard operator"
    assert kept["mul"] == "the type of gelu is not known"
    assert kept["noise"] == "RandomNormal makes float32 of its own"
    assert kept["mel"] == "MelWeightMatrix makes float32 of its own"
    # ONNX Runtime looks at all types when it loads a model; to run this one would need real parameters.
    open_onnx(model)


def test_constant_nodes_and_the_values_they_fill_with_are_converted(tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.float32([0.5]))
    nodes = [
        helper.make_node("Constant", [], ["c"], "c", value_float=0.25),
        helper.make_node("Shape", ["input"], ["shape"], "shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["halves"], "halves", value=value),
        helper.make_node("AveragePool", ["halves"], ["pool"], "pool", kernel_shape=[1, 1]),
        helper.make_node("Mul", ["pool", "c"], ["m"], "m"),
        helper.make_node("Add", ["m", "input"], ["logits"], "add"),
    ]
    floats = onnx.load(onnx_files.save(tmp_path / "m.onnx", nodes, {}, [1, 4, 2, 2], [1, 4, 2, 2]))
    model, kept = half(floats, {"halves": seen(0.5, 0.5)})
    assert kept == {}
    assert files.array_of(model, "c").dtype == np.float16
    x = torch.rand(1, 4, 2, 2)
    assert torch.allclose(open_onnx(model)(x), x + 0.125, atol=1e-3)


def test_a_constant_that_both_types_read_is_stored_in_both(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], "c", value=numpy_helper.from_array(np.float32([0.3]))),
        helper.make_node("Mul", ["input", "c"], ["m"], "m"),
        helper.make_node("Add", ["m", "c"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["logits"], "r"),
    ]
    floats = graph(tmp_path, nodes, {}, [1, 4, 1, 1], [1, 4, 1, 1])
    model, _ = half(floats, {}, skip=("a",))
    kinds = {item.name: item.data_type for item in model.graph.initializer}
    assert kinds == {"c": TensorProto.FLOAT16, "c.fp32": TensorProto.FLOAT}
    x = torch.rand(1, 4, 1, 1)
    assert torch.allclose(open_onnx(model)(x), open_onnx(floats)(x), rtol=2e-3)


def test_inputs_that_onnx_has_in_float32_only_stay_that(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Resize", ["input", "", "scales"], ["big"], "resize", mode="nearest"),
        helper.make_node("Relu", ["big"], ["logits"], "r"),
    ]
    floats = graph(tmp_path, nodes, {"scales": np.array([1, 1, 2, 2])}, [1, 4, 2, 2], [1, 4, 4, 4])
    model, kept = half(floats, {})
    assert kept == {}
    assert files.array_of(model, "scales").dtype == np.float32
    x = torch.rand(1, 4, 2, 2)
    assert torch.allclose(open_onnx(model)(x), open_onnx(floats)(x), rtol=2e-3)


def test_types_that_nodes_name_themselves_are_changed_with_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["input"], ["shape"], "shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], "zeros"),
        helper.make_node("Cast", ["shape"], ["sizes"], "sizes", to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["sizes"], ["sum"], "sum", keepdims=0),
        helper.make_node("Add", ["zeros", "sum"], ["wide"], "wide"),
        helper.make_node("Add", ["wide", "input"], ["logits"], "add"),
    ]
    floats = graph(tmp_path, nodes, {}, [1, 4, 2, 2], [1, 4, 2, 2])
    model, kept = half(floats, {})
    assert kept == {}
    assert files.node_of(model, "sizes").attribute[0].i == TensorProto.FLOAT16
    x = torch.rand(1, 4, 2, 2)
    assert torch.allclose(open_onnx(model)(x), open_onnx(floats)(x), rtol=2e-3)


def test_a_node_with_a_graph_inside_stays_float32_and_so_does_what_it_reads(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branches = {
        name: helper.make_graph([helper.make_node(op, ["r", "w"], ["inner"], op)], name, [], [value])
        for name, op in (("then_branch", "Add"), ("else_branch", "Mul"))
    }
    nodes = [
        helper.make_node("Relu", ["input"], ["r"], "r"),
        helper.make_node("Constant", [], ["yes"], "yes", value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["chosen"], "if", **branches),
        helper.make_node("Mul", ["chosen", "w"], ["logits"], "mul"),
    ]
    floats = graph(tmp_path, nodes, {"w": np.array([0.3])}, [1, 4, 2, 2], [1, 4, 2, 2])
    model, kept = half(floats, {})
    assert kept == {"r": "read inside of if", "if": "If holds a graph of its own"}
    x = torch.rand(1, 4, 2, 2)
    assert torch.allclose(open_onnx(model)(x), open_onnx(floats)(x), rtol=2e-3)


def test_an_output_that_is_read_inside_too_keeps_its_name_and_type(tmp_path: Path) -> None:
    floats = net(tmp_path)
    floats.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, [1, 16, 8, 8]))
    model, _ = half(floats, observe(floats, PIXELS))
    assert [v.name for v in model.graph.output] == ["logits", "relu"]
    assert types_of(model)["relu"] == TensorProto.FLOAT
    assert closeness(floats, model, PIXELS).sqnr_db > 50
