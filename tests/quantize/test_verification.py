"""The proof says what a file is, and no file that was tampered with passes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import onnx
import onnx_files
import pytest
import quantized_files as files
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgeprune.errors import ParityError, UnsupportedModel
from edgeprune.onnx_graph import View, layers
from edgeprune.quantize.fusion import block_float_fusion
from edgeprune.quantize.verification import verify

# write_net: 3 -> 16 and 16 -> 16 convolutions of 3 x 3 on 8 x 8, of which padding keeps all, and 16 -> 10.
FIRST, SECOND, LAST = 16 * 64 * 27, 16 * 64 * 144, 160
MACS, WEIGHTS = FIRST + SECOND + LAST, 16 * 27 + 16 * 144 + 160
Tamper = Callable[[ModelProto], object]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One network as float32, and quantized in each scheme."""
    path = files.write_net(tmp_path_factory.mktemp("proof"))
    made = {scheme: files.quantize(path, scheme, files.images()) for scheme in ("u8", "s8")}
    return {"fp32": path.read_bytes(), **{name: model.SerializeToString() for name, model in made.items()}}


@pytest.fixture
def u8(stored: dict[str, bytes]) -> ModelProto:
    return onnx.load_from_string(stored["u8"])


@pytest.fixture
def s8(stored: dict[str, bytes]) -> ModelProto:
    return onnx.load_from_string(stored["s8"])


@pytest.fixture
def floats(stored: dict[str, bytes]) -> ModelProto:
    return onnx.load_from_string(stored["fp32"])


def counted(model: ModelProto) -> tuple[int, int]:
    """The multiply-accumulates of a file, and the entries of its weights."""
    found = list(layers(View(model), "fp32"))
    return sum(layer.macs for layer in found), sum(layer.weights for layer in found)


def without_pair(model: ModelProto, value: str) -> None:
    """Take away the QuantizeLinear and DequantizeLinear behind a float value."""
    quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == value)
    restorers = [n for n in model.graph.node if n.input[0] == quantizer.output[0]]
    made = {n.output[0] for n in restorers}
    for node in model.graph.node:
        node.input[:] = [value if name in made else name for name in node.input]
    for node in (quantizer, *restorers):
        model.graph.node.remove(node)


def with_float_weight(model: ModelProto, name: str) -> None:
    weight = files.node_of(model, name).input[1]
    node = files.maker_of(model, weight)
    scale, whole = files.array_of(model, node.input[1]), files.array_of(model, node.input[0])
    model.graph.node.remove(node)
    array = whole.astype(np.float32) * scale.reshape(-1, *[1] * (whole.ndim - 1))
    model.graph.initializer.append(numpy_helper.from_array(array, weight))


def scale_of(value: float, name: str = "relu_scale") -> Tamper:
    return lambda model: files.set_array(model, name, np.full_like(files.array_of(model, name), value))


def one_scale_of(value: float) -> Tamper:
    def tamper(model: ModelProto) -> None:
        scale = files.array_of(model, "block.conv.weight_scale").copy()
        scale[5] = value
        files.set_array(model, "block.conv.weight_scale", scale)

    return tamper


def zero_of(name: str, value: int) -> Tamper:
    def tamper(model: ModelProto) -> None:
        files.set_array(model, name, np.full_like(files.array_of(model, name), value))

    return tamper


def test_an_unsigned_file_is_all_int8_and_runs_as_that(u8: ModelProto) -> None:
    proof = verify(u8, "int8")
    assert (proof.macs, proof.low_macs, proof.runtime_low_macs) == (MACS, MACS, MACS)
    assert (proof.weights, proof.low_weights, proof.floats) == (WEIGHTS, WEIGHTS, ())
    # Those of the weights, one a channel, and one of each Q and DQ of the activations.
    pairs = [n for n in u8.graph.node if n.op_type.endswith("eLinear") and "weight" not in n.name]
    assert proof.scales == 16 + 16 + 10 + len(pairs)


def test_a_signed_file_is_all_int8_and_runs_as_that_in_part(s8: ModelProto) -> None:
    proof = verify(s8, "int8")
    assert (proof.macs, proof.low_macs) == (MACS, MACS)
    assert proof.runtime_low_macs is not None
    assert 0 <= proof.runtime_low_macs <= MACS


def test_a_float_bias_beside_signed_activations_is_as_it_should_be(tmp_path: Path) -> None:
    model = files.quantize(onnx_files.write_one_conv(tmp_path / "m.onnx"), "s8", files.images())
    assert files.array_of(model, files.node_of(model, "fc").input[2]).dtype == np.float32
    assert verify(model, "int8").low_macs == FIRST + LAST


def test_a_float_file_is_none_of_it(floats: ModelProto) -> None:
    with pytest.raises(ParityError, match=r"3 nodes with weights are float32.*stem"):
        verify(floats, "int8")
    with pytest.raises(ParityError, match="nothing of the file is in int8"):
        verify(floats, "int8", allowed=("stem", "block.conv", "fc"))


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["u8", "s8"])
def test_a_scale_that_is_none_is_caught(stored: dict[str, bytes], scheme: str, value: float) -> None:
    model = onnx.load_from_string(stored[scheme])
    scale_of(value)(model)
    with pytest.raises(ParityError, match="the scale of relu_QuantizeLinear .relu_scale. is"):
        verify(model, "int8")


def test_a_scale_of_one_channel_that_is_none_is_caught(u8: ModelProto) -> None:
    one_scale_of(0.0)(u8)
    with pytest.raises(ParityError, match=r"block\.conv\.weight_scale\) is 0\.0 for channel 5"):
        verify(u8, "int8")


def test_a_zero_point_that_was_moved_is_caught(s8: ModelProto) -> None:
    zero_of("relu_zero_point", 3)(s8)
    with pytest.raises(ParityError, match="the zero point of relu_QuantizeLinear is 3; a signed activation"):
        verify(s8, "int8")


@pytest.mark.parametrize("scheme", ["u8", "s8"])
def test_a_zero_point_of_a_weight_that_was_moved_is_caught(stored: dict[str, bytes], scheme: str) -> None:
    model = onnx.load_from_string(stored[scheme])
    zero_of("stem.weight_zero_point", -7)(model)
    with pytest.raises(ParityError, match="stem.weight_DequantizeLinear is -7; a constant must have 0"):
        verify(model, "int8")


@pytest.mark.parametrize("scheme", ["u8", "s8"])
def test_a_weight_that_became_float_is_caught(stored: dict[str, bytes], scheme: str) -> None:
    model = onnx.load_from_string(stored[scheme])
    with_float_weight(model, "block.conv")
    with pytest.raises(ParityError, match=r"1 nodes.*block\.conv \(its weight does not come from a Dequ"):
        verify(model, "int8")
    # ONNX Runtime would take its weight for a forgotten one, and quantize it.
    block_float_fusion(model)
    proof = verify(model, "int8", allowed=("block.conv",))
    assert (proof.floats, proof.low_macs) == (("block.conv",), FIRST + LAST)
    assert proof.low_weights == WEIGHTS - 16 * 144


@pytest.mark.parametrize("scheme", ["u8", "s8"])
def test_a_pair_at_an_input_that_was_removed_is_caught(stored: dict[str, bytes], scheme: str) -> None:
    model = onnx.load_from_string(stored[scheme])
    without_pair(model, "input")
    with pytest.raises(ParityError, match=r"stem \(its data does not come from a DequantizeLinear\)"):
        verify(model, "int8")


def test_a_pair_at_an_output_that_was_removed_is_caught_by_what_the_runtime_does(u8: ModelProto) -> None:
    without_pair(u8, files.node_of(u8, "block.conv").output[0])
    with pytest.raises(ParityError, match=r"ONNX Runtime runs 1 of the int8 nodes in float32: block\.conv"):
        verify(u8, "int8")
    proof = verify(u8, "int8", allowed=("block.conv",))
    assert proof.runtime_low_macs == MACS - SECOND


def test_a_pair_with_two_steps_is_caught(u8: ModelProto) -> None:
    restorer = next(n for n in u8.graph.node if n.name.startswith("relu_DequantizeLinear"))
    u8.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "other"))
    restorer.input[1] = "other"
    with pytest.raises(ParityError, match="are a pair with two steps: scale .* and 0.5"):
        verify(u8, "int8")


def test_a_bias_in_steps_of_its_own_is_caught(tmp_path: Path) -> None:
    model = files.quantize(onnx_files.write_one_conv(tmp_path / "m.onnx"), "u8", files.images())
    bias = files.maker_of(model, files.node_of(model, "fc").input[2])
    assert verify(model, "int8").low_macs == FIRST + LAST
    files.set_array(model, bias.input[1], files.array_of(model, bias.input[1]) * np.float32(1.5))
    with pytest.raises(
        ParityError, match="the bias of fc has scale .* for channel 0; that of its input times"
    ):
        verify(model, "int8")


def test_the_bias_of_a_layer_that_went_back_to_float_may_stay_quantized(tmp_path: Path) -> None:
    model = files.quantize(onnx_files.write_one_conv(tmp_path / "m.onnx"), "u8", files.images())
    with_float_weight(model, "fc")
    assert verify(model, "int8", allowed=("fc",)).low_macs == FIRST


def test_a_quantized_bias_beside_signed_activations_is_caught(s8: ModelProto) -> None:
    names = ("bias_whole", "bias_step")
    for name, array in zip(names, (np.ones(16, np.int32), np.ones(16, np.float32)), strict=True):
        s8.graph.initializer.append(numpy_helper.from_array(array, name))
    s8.graph.node.insert(0, helper.make_node("DequantizeLinear", [*names], ["bias"], "bias_dq", axis=0))
    files.node_of(s8, "stem").input.append("bias")
    with pytest.raises(ParityError, match="the bias of stem is quantized; beside signed activations"):
        verify(s8, "int8")


def test_activations_quantized_in_two_ways_are_caught(u8: ModelProto) -> None:
    zero = files.array_of(u8, "relu_zero_point")
    files.set_array(u8, "relu_zero_point", np.zeros_like(zero, np.int8))
    with pytest.raises(ParityError, match="activations are quantized in two ways"):
        verify(u8, "int8")


def test_a_weight_of_unsigned_bytes_is_caught(u8: ModelProto) -> None:
    for name in ("stem.weight_quantized", "stem.weight_zero_point"):
        files.set_array(u8, name, np.abs(files.array_of(u8, name)).astype(np.uint8))
    with pytest.raises(
        ParityError, match="stem.weight_DequantizeLinear has a constant of uint8; accepted: int8"
    ):
        verify(u8, "int8")


def test_activations_of_sixteen_bits_are_caught(u8: ModelProto) -> None:
    for item in u8.graph.initializer:
        if item.name.endswith("zero_point") and item.data_type == TensorProto.UINT8:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.uint16), item.name))
    with pytest.raises(ParityError, match="quantizes an activation to uint16; accepted: uint8 or int8"):
        verify(u8, "int8")


def test_a_weight_of_more_than_eight_bits_or_that_is_computed_is_no_int8_weight(s8: ModelProto) -> None:
    for name in ("stem.weight_quantized", "stem.weight_zero_point"):
        files.set_array(s8, name, files.array_of(s8, name).astype(np.int32))
    with pytest.raises(ParityError, match=r"stem \(its weight has not 8 bits\)"):
        verify(s8, "int8")


def test_a_normalization_may_be_part_of_the_rounding_of_the_input(u8: ModelProto) -> None:
    quantizer = files.node_of(u8, "input_QuantizeLinear")
    for name, array in (("of_pixels", np.float32([0.003, 0.004, 0.005])), ("zeros", np.uint8([9, 8, 7]))):
        u8.graph.initializer.append(numpy_helper.from_array(array, name))
    quantizer.input[1:] = ["of_pixels", "zeros"]
    assert verify(u8, "int8").runtime_low_macs == MACS


def test_zero_points_may_be_left_out_where_they_are_zero(s8: ModelProto) -> None:
    before = astuple(verify(s8, "int8"))
    for node in s8.graph.node:
        if node.op_type == "DequantizeLinear":
            del node.input[2:]
    # What ONNX Runtime fuses of signed activations may differ.
    assert astuple(verify(s8, "int8"))[:-1] == before[:-1]


def test_a_file_that_the_runtime_does_not_take_is_an_error(u8: ModelProto) -> None:
    # Valid to onnx, which knows operators that ONNX Runtime has no kernel for.
    u8.graph.node.append(helper.make_node("Gradient", ["logits"], ["g"], "g", domain="ai.onnx.preview.training",
                                          xs=["logits"], y="logits"))  # fmt: skip
    u8.opset_import.append(helper.make_opsetid("ai.onnx.preview.training", 1))
    u8.graph.output.append(helper.make_tensor_value_info("g", TensorProto.FLOAT, [1, 10]))
    with pytest.raises(UnsupportedModel, match="can't load the model"):
        verify(u8, "int8")


def test_a_scale_that_is_computed_is_caught(u8: ModelProto) -> None:
    u8.graph.node.insert(0, helper.make_node("Abs", ["relu_scale"], ["computed"], "abs"))
    files.node_of(u8, "relu_QuantizeLinear").input[1] = "computed"
    with pytest.raises(ParityError, match="relu_QuantizeLinear is computed"):
        verify(u8, "int8")


def test_a_file_that_is_no_valid_graph_is_caught(floats: ModelProto) -> None:
    files.node_of(floats, "fc").input[0] = "nowhere"
    with pytest.raises(ParityError, match="no valid ONNX"):
        verify(floats, "fp16")


def test_a_float16_weight_with_infinity_is_caught(floats: ModelProto) -> None:
    weights = {item.name: numpy_helper.to_array(item) for item in floats.graph.initializer}
    weights["fc.weight"][0, 0] = 1e30
    del floats.graph.initializer[:]
    with np.errstate(over="ignore"):
        arrays = [numpy_helper.from_array(a.astype(np.float16), n) for n, a in weights.items()]
    floats.graph.initializer.extend(arrays)
    for value in (*floats.graph.input, *floats.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(ParityError, match=r"the weight fc\.weight of fc holds NaN or infinity"):
        verify(floats, "fp16")
    proof = None
    files.set_array(floats, "fc.weight", np.ones((10, 16), np.float16))
    proof = verify(floats, "fp16")
    assert (proof.low_macs, proof.low_weights, proof.floats) == (MACS, WEIGHTS, ())


def test_macs_are_those_of_one_image_whatever_the_batch(tmp_path: Path) -> None:
    found = [
        counted(onnx.load(onnx_files.write_one_conv(tmp_path / "m.onnx", batch=batch)))[0]
        for batch in (1, 4, "N")
    ]
    assert found == [FIRST + LAST] * 3


def test_macs_of_transposed_convolutions_and_products_of_activations(tmp_path: Path) -> None:
    weights = {"t.w": np.ones((6, 2, 2, 2), np.float32)}
    nodes = [
        helper.make_node("ConvTranspose", ["input", "t.w"], ["t"], "t", strides=[2, 2], group=2),
        helper.make_node("MatMul", ["t", "t"], ["logits"], "mm"),
    ]
    model = onnx.load(onnx_files.save(tmp_path / "m.onnx", nodes, weights, [1, 6, 4, 4], [1, 4, 8, 8]))
    # Each of the 6 x 16 inputs meets 2 x 2 x 2 weights; 4 matrices of 8 x 8 times 8 x 8.
    assert counted(model) == (96 * 8 + 4 * 512, 48)


def test_a_shape_that_is_not_known_is_an_error(floats: ModelProto, tmp_path: Path) -> None:
    for dim in floats.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.ClearField("dim_value")
    with pytest.raises(UnsupportedModel, match="the shapes of stem are not known"):
        counted(floats)
    nodes = [
        helper.make_node("Reshape", ["input", "input"], ["any"], "any", domain="nobody.knows"),
        helper.make_node("MatMul", ["any", "any"], ["logits"], "product"),
    ]
    model = onnx.load(onnx_files.save(tmp_path / "m.onnx", nodes, {}, [1, 4], 4))
    model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    with pytest.raises(UnsupportedModel, match="the shapes of product are not known"):
        counted(model)
