"""An 8-bit model holds what its float parent held, on the grids that were asked for, and runs fused."""

from __future__ import annotations

import itertools
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnxruntime
import paths
import pytest
import quantized_files
import torch
from float_models import attributes, exported, floats, initializers, kinds, model_of, pictures, residual
from onnx import ModelProto, helper
from PIL import Image

from edgeprune.errors import UnsupportedModel
from edgeprune.models import architectures
from edgeprune.models.bundle import deployed
from edgeprune.onnx_graph import cleanup
from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize.calibrators import ranges
from edgeprune.quantize.observers import observe
from edgeprune.quantize.placement import quantizable
from edgeprune.quantize.prepare import prepare
from edgeprune.quantize.qdq import quantized
from edgeprune.quantize.verification import optimized, verify
from edgeprune.records import Bundle, InputSpec, Source
from edgeprune.robustness.onnx_module.module import to_torch

SCHEMES = ("u8", "s8")


def built(
    model: ModelProto, scheme: str = "u8", *, images: torch.Tensor | None = None, skip: tuple[str, ...] = ()
) -> ModelProto:
    seen = observe(model, pictures(8) if images is None else images)
    made = quantized(model, ranges(seen, "minmax", symmetric=scheme == "s8"), scheme, skip=skip)
    onnx.checker.check_model(made, full_check=True)
    return made


def network(name: str) -> tuple[ModelProto, torch.Tensor]:
    """One of the small networks with its normalization, prepared, and images for it."""

    spec = InputSpec(nets.SHAPE, 5, (0.48, 0.45, 0.4), (0.22, 0.23, 0.24))
    images = torch.rand((16, *nets.SHAPE), generator=torch.Generator().manual_seed(5))
    return prepare(
        exported(deployed(Bundle(nets.build(name), Source("memory"), spec)), (1, *nets.SHAPE))
    ), images


def as_runtime_sees_it(model: ModelProto, folder: Path) -> dict[str, int]:
    """The kinds of nodes that ONNX Runtime runs, after its own optimization."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(folder / "optimized.onnx"))


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def answers(model: ModelProto, images: torch.Tensor) -> torch.Tensor:
    run = open_onnx(model)
    return torch.cat([run(image[None]) for image in images])


def stored(model: ModelProto, node_name: str, place: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The whole numbers, the scales and the axis behind an input of a node."""
    node = next(node for node in model.graph.node if node.name == node_name)
    back = next(n for n in model.graph.node if node.input[place] in n.output)
    assert back.op_type == "DequantizeLinear"
    known = initializers(model.graph)
    return known[back.input[0]], known[back.input[1]], int(attributes(back).get("axis", 1))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", list(nets.NETS))
@pytest.mark.filterwarnings("ignore")
def test_networks_of_every_kind_keep_their_answers(name: str, scheme: str) -> None:
    model, images = network(name)
    made = built(model, scheme, images=images)
    assert sqnr(answers(model, images), answers(made, images)) > 30
    assert made.ByteSize() < model.ByteSize()
    assert set(quantizable(model)) <= {node.name for node in made.graph.node}


FUSED = {
    "plain": {"QLinearConv": 2, "QGemm": 1},
    "residual": {"QLinearConv": 4, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "grouped": {"QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "concat": {"QLinearConv": 3, "QLinearConcat": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "split": {"QLinearConv": 4, "QLinearConcat": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "depthwise": {"QLinearConv": 6, "QLinearSigmoid": 1, "QLinearMul": 1, "QLinearAdd": 1, "QGemm": 1},
}


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.filterwarnings("ignore")
def test_the_unsigned_scheme_fuses_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    model, images = network(name)
    ran = as_runtime_sees_it(built(model, images=images), tmp_path)
    assert {op: ran.get(op, 0) for op in FUSED[name]} == FUSED[name]
    assert not {"Conv", "FusedConv", "Gemm", "Relu", "Clip", "Sub", "Div"} & set(ran)
    if name != "depthwise":  # its hard-swish has no 8-bit kernel
        assert ran.get("QuantizeLinear") == 1 and "DequantizeLinear" not in ran


def test_padding_and_striding_stay_on_8_bits(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"w": floats(8, 3, 3, 3), "v": floats(16, 8, 1, 1), "fc": floats(5, 16)}
    tensors |= {"start": np.int64([0, 0]), "end": np.int64([99, 99]), "axes": np.int64([2, 3])}
    tensors |= {"step": np.int64([2, 2]), "pads": np.int64([0, 4, 0, 0, 0, 4, 0, 0])}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Slice", ["a", "start", "end", "axes", "step"], ["s"], "stride"),
        helper.make_node("Pad", ["s", "pads"], ["short"], "pad"),
        helper.make_node("Conv", ["a", "v"], ["long"], "b", strides=[2, 2]),
        helper.make_node("Add", ["short", "long"], ["sum"], "add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "fc"], ["out"], "fc", transB=1),
    ]
    model = prepare(model_of(nodes, tensors))
    made = built(model)
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 35
    ran = as_runtime_sees_it(made, tmp_path)
    assert ran["Pad"] == ran["Slice"] == ran["QLinearAdd"] == 1
    assert ran["QuantizeLinear"] == 1 and "DequantizeLinear" not in ran


def test_weights_are_rounded_by_channel_and_biases_to_the_step_of_their_sums() -> None:
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[0, :, 0, 0] = [1.27, -0.5, 0.004]
    weight[1, :, 0, 0] = [-254.0, 1.0, 3.0]
    tensors = {"w": weight, "b": np.float32([0.1, -30.0])}
    nodes = [helper.make_node("Conv", ["input", "w", "b"], ["out"], "conv")]
    model = prepare(model_of(nodes, tensors))
    made = quantized(model, {"input": (0.0, 2.55), "out": (-300.0, 210.0)}, "u8")
    whole, scales, axis = stored(made, "conv", 1)
    assert whole.dtype == np.int8 and axis == 0
    np.testing.assert_allclose(scales, [0.01, 2.0], rtol=1e-6)
    # 0.004 is less than half of the first step; 1.0 / 2 is rounded to even, 3.0 / 2 too.
    assert whole[:, :, 0, 0].tolist() == [[127, -50, 0], [-127, 0, 2]]
    whole, steps, axis = stored(made, "conv", 2)
    assert whole.dtype == np.int32 and axis == 0
    np.testing.assert_allclose(steps, [0.01 * 0.01, 2.0 * 0.01], rtol=1e-6)
    assert whole.tolist() == [1000, -1500]


def test_activations_are_on_the_grid_of_their_range() -> None:
    nodes = [helper.make_node("Conv", ["input", "w"], ["out"], "conv")]
    model = prepare(model_of(nodes, {"w": np.ones((1, 3, 1, 1), np.float32)}))
    bounds = {"input": (-1.0, 4.1), "out": (-2.0, 2.0)}
    for scheme, kind, grids in (
        ("u8", np.uint8, [(0.02, 50), (4 / 255, 128)]),
        ("s8", np.int8, [(4.1 / 127, 0)]),
    ):
        made = quantized(model, bounds, scheme)
        known = initializers(made.graph)
        found = [
            (known[node.input[1]], known[node.input[2]])
            for node in made.graph.node
            if node.op_type == "QuantizeLinear"
        ]
        assert all(zero.dtype == kind for _, zero in found)
        assert [(pytest.approx(float(scale)), int(zero)) for scale, zero in found] == grids


@pytest.mark.parametrize("scheme", SCHEMES)
def test_writing_and_reading_back_is_within_half_a_step(scheme: str) -> None:
    """The identity as a convolution: what comes out went through one grid of activations."""
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "conv"),
        helper.make_node("Conv", ["a", "w"], ["out"], "again"),
    ]
    model = prepare(model_of(nodes, {"w": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)}))
    images = pictures(6) * 3 - 1
    made = built(model, scheme, images=images)
    step = float(images.max() - images.min()) / 255 if scheme == "u8" else float(images.abs().max()) / 127
    # u8 rounds three times (input, middle, output), s8 twice; each by half a step, middles a little more.
    worst = float((answers(made, images) - images).abs().max())
    assert 0 < worst <= 1.6 * step


def test_the_input_is_normalized_by_its_quantization_and_zero_padding_stays_zero() -> None:
    tensors = {
        "mean": np.float32([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1),
        "std": np.float32([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1),
        "w": floats(8, 3, 3, 3), "b": floats(8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["s"], "sub"),
        helper.make_node("Div", ["s", "std"], ["n"], "div"),
        helper.make_node("Conv", ["n", "w", "b"], ["out"], "conv", pads=[1] * 4),
    ]
    model = prepare(model_of(nodes, tensors))
    images = pictures(16)
    images[0], images[1] = 0.0, 1.0
    made = built(model, images=images)
    assert {"Sub", "Div"} & set(kinds(made)) == set()
    wanted, got = answers(model, images), answers(made, images)
    # Wherever zeros are padded, and wherever not, the error is that of one step of the output and no bias.
    step = float(wanted.max() - wanted.min()) / 255
    inside = np.s_[:, :, 1:-1, 1:-1]
    for part in (np.s_[:], inside):
        assert float((wanted - got)[part].abs().mean()) < step
        assert float((wanted - got)[part].mean().abs()) < 0.1 * step
    # The signed scheme has no zero points, so it can't.
    assert {"Sub", "Div"} <= set(kinds(built(model, "s8", images=images)))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_first_convolution_of_any_grouping_takes_the_shift_of_each_channel_back(groups: int) -> None:
    tensors = {
        "mean": np.float32([0.1, 0.5, 0.77]).reshape(1, 3, 1, 1),
        "w": np.abs(floats(6, 3 // groups, 1, 1)), "b": floats(6),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["s"], "sub"),
        helper.make_node("Conv", ["s", "w", "b"], ["out"], "conv", group=groups),
    ]
    model = prepare(model_of(nodes, tensors))
    images = pictures(64)
    made = built(model, images=images)
    wanted, got = answers(model, images), answers(made, images)
    step = float(wanted.max() - wanted.min()) / 255
    assert float((wanted - got).mean((0, 2, 3)).abs().max()) < 0.15 * step


@pytest.mark.parametrize(
    ("nodes", "tensors"),
    [
        # Another node reads the normalized pixels as float.
        (
            [
                helper.make_node("Sub", ["input", "c"], ["n"], "sub"),
                helper.make_node("Conv", ["n", "w"], ["a"], "conv"),
                helper.make_node("Exp", ["n"], ["e"], "exp"),
                helper.make_node("Mul", ["a", "e"], ["out"], "mul"),
            ],
            {"c": np.float32(0.5)},
        ),
        # A different mean at each position.
        (
            [
                helper.make_node("Sub", ["input", "c"], ["n"], "sub"),
                helper.make_node("Conv", ["n", "w"], ["out"], "conv"),
            ],
            {"c": floats(1, 3, 6, 6)},
        ),
        # The constant minus the pixel.
        (
            [
                helper.make_node("Sub", ["c", "input"], ["n"], "sub"),
                helper.make_node("Conv", ["n", "w"], ["out"], "conv"),
            ],
            {"c": np.float32(1.0)},
        ),
        # Upside down: scales are positive.
        (
            [
                helper.make_node("Mul", ["input", "c"], ["n"], "mul"),
                helper.make_node("Conv", ["n", "w"], ["out"], "conv"),
            ],
            {"c": np.float32(-1.0)},
        ),
    ],
)
def test_what_is_no_normalization_by_channel_stays_float(nodes: list[Any], tensors: dict[str, Any]) -> None:
    model = prepare(model_of(nodes, tensors | {"w": floats(3, 3, 1, 1)}))
    made = built(model)
    assert nodes[0].op_type in kinds(made)
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


def test_an_activation_goes_only_if_clipping_to_the_range_does_the_same() -> None:
    def made(kind: str, low: float, high: float) -> set[str]:
        tensors = {
            "w": floats(4, 3, 1, 1),
            "v": floats(4, 4, 1, 1),
            "low": np.float32(0),
            "high": np.float32(6),
        }
        limits = ["low", "high"] if kind == "Clip" else []
        nodes = [
            helper.make_node("Conv", ["input", "w"], ["a"], "a"),
            helper.make_node(kind, ["a", *limits], ["r"], "act"),
            helper.make_node("Conv", ["r", "v"], ["out"], "b"),
        ]
        model = prepare(model_of(nodes, tensors))
        bounds = {"input": (0.0, 1.0), "a": (-9.0, 9.0), "r": (low, high), "out": (-9.0, 9.0)}
        return set(kinds(quantized(model, bounds, "u8"))) & {"Relu", "Clip"}

    assert made("Relu", 0.0, 4.0) == set()
    assert made("Relu", -1.0, 4.0) == {"Relu"}
    assert made("Clip", 0.0, 6.0) == made("Clip", 0.0, 4.0) == set()
    assert made("Clip", 0.0, 7.0) == {"Clip"}


def test_a_convolution_that_others_read_before_its_activation_keeps_both(tmp_path: Path) -> None:
    tensors = {"w": floats(4, 3, 1, 1), "v": floats(4, 4, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "v"], ["c"], "b"),
        helper.make_node("Add", ["c", "a"], ["s"], "add"),
        helper.make_node("Conv", ["s", "v"], ["out"], "again"),
    ]
    model = prepare(model_of(nodes, tensors))
    made = built(model)
    assert kinds(made)["Relu"] == 1
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30
    assert as_runtime_sees_it(made, tmp_path)["QLinearConv"] == 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_skipped_layers_stay_float_to_the_bit(scheme: str) -> None:
    model = residual()
    assert quantizable(model) == ("a", "c", "out")
    made = built(model, scheme, skip=("c",))
    node = next(node for node in made.graph.node if node.name == "c")
    np.testing.assert_array_equal(initializers(made.graph)[node.input[1]], initializers(model.graph)["v"])
    assert stored(made, "a", 1)[0].dtype == stored(made, "out", 1)[0].dtype == np.int8
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


def test_a_sum_can_be_skipped_too() -> None:
    made = built(residual(), skip=("s",))
    view = {name: node for node in made.graph.node for name in node.output}
    add = next(node for node in made.graph.node if node.name == "s")
    readers = [node.op_type for node in made.graph.node if add.output[0] in node.input]
    assert {view[name].op_type for name in add.input} == {"DequantizeLinear"}
    assert readers == ["GlobalAveragePool"], "what follows it computes in float up to the next layer"


def test_the_signed_scheme_has_zero_points_of_zero_float_biases_and_fusable_sums() -> None:
    made = built(residual(), "s8")
    known = initializers(made.graph)
    view = {name: node for node in made.graph.node for name in node.output}
    for node in made.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert known[node.input[2]].dtype == np.int8 and not known[node.input[2]].any()
            assert (known[node.input[1]] > 0).all()
    conv = next(node for node in made.graph.node if node.name == "a")
    assert known[conv.input[2]].dtype == np.float32
    add = next(node for node in made.graph.node if node.name == "s")
    # The convolution's own branch stays float and fuses with the sum, the other one is 8 bits.
    assert [view[name].op_type for name in add.input] == ["Conv", "DequantizeLinear"]
    assert "Relu" in kinds(made)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weight", ["zero", "zero channel", "constant", "one value"])
def test_layers_of_zeros_and_of_constants_are_finite_and_right(scheme: str, weight: str) -> None:
    first = floats(8, 3, 3, 3)
    first[...] = {"zero": 0.0, "zero channel": first, "constant": 0.25, "one value": 0.0}[weight]
    if weight == "zero channel":
        first[3] = 0
    if weight == "one value":
        first[0, 0, 0, 0] = 1e-20
    tensors = {"w": first, "b": floats(8), "v": floats(4, 8, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "v"], ["out"], "b"),
    ]
    model = prepare(model_of(nodes, tensors))
    made = built(model, scheme)
    for name, value in initializers(made.graph).items():
        assert np.isfinite(value.astype(np.float64)).all(), name
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


@pytest.mark.parametrize("scheme", SCHEMES)
def test_images_of_one_color_and_of_nothing_calibrate(scheme: str) -> None:
    for value in (0.0, 0.5):
        made = built(residual(), scheme, images=torch.full((4, 3, 6, 6), value))
        assert bool(torch.isfinite(answers(made, pictures(2))).all())


def test_a_huge_bias_beside_tiny_weights_does_not_overflow() -> None:
    tensors = {"w": floats(4, 3, 1, 1) * np.float32(1e-9), "b": np.float32([100.0, -100.0, 1.0, 0.0])}
    model = prepare(model_of([helper.make_node("Conv", ["input", "w", "b"], ["out"], "a")], tensors))
    made = built(model)
    assert np.abs(stored(made, "a", 2)[0]).max() <= 2**30
    wanted, got = answers(model, pictures(4)), answers(made, pictures(4))
    assert float((wanted - got).abs().max()) <= 200 / 255


def test_a_weight_that_two_layers_share_is_right_for_both_and_for_a_float_one() -> None:
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "a"),
        helper.make_node("Conv", ["a", "w"], ["b"], "b"),
        helper.make_node("Conv", ["b", "w"], ["out"], "c"),
    ]
    model = prepare(model_of(nodes, {"w": floats(3, 3, 1, 1)}))
    made = built(model, skip=("c",))
    assert Counter(v.dtype.name for v in initializers(made.graph).values() if v.ndim == 4) == {
        "int8": 1, "float32": 1,
    }  # fmt: skip
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


def test_a_convolution_that_makes_the_output_is_8_bit_and_the_output_keeps_its_name(tmp_path: Path) -> None:
    model = prepare(
        model_of([helper.make_node("Conv", ["input", "w"], ["out"], "a")], {"w": floats(4, 3, 1, 1)})
    )
    made = built(model)
    assert [value.name for value in made.graph.output] == ["out"]
    assert as_runtime_sees_it(made, tmp_path)["QLinearConv"] == 1


def test_a_matrix_product_and_a_gemm_of_either_orientation_are_8_bit(tmp_path: Path) -> None:
    tensors = {"u": floats(108, 16), "v": floats(16, 16), "w": floats(16, 5), "b": floats(5)}
    nodes = [
        helper.make_node("Flatten", ["input"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "u"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "v"], ["m"], "product"),
        helper.make_node("Gemm", ["m", "w", "b"], ["out"], "last"),
    ]
    model = prepare(model_of(nodes, tensors))
    made = built(model)
    assert [stored(made, name, 1)[2] for name in ("first", "product", "last")] == [1, 1, 1]
    ran = as_runtime_sees_it(made, tmp_path)
    assert ran["QGemm"] == 2 and ran["QLinearMatMul"] == 1 and "Relu" not in ran
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


@pytest.mark.parametrize("bias", ["vector", "row", "activation"])
@pytest.mark.parametrize("shape", [(9, 12), (1, 9, 12), (1, 3, 3, 12)])
def test_a_matrix_product_of_any_rank_with_a_sum_behind_it_is_multiplied_in_integers(
    shape: tuple[int, ...], bias: str
) -> None:
    # ONNX Runtime makes a float Gemm of the product and the sum where nothing stands between them.
    tensors: dict[str, Any] = {"s": np.int64(shape), "w": floats(12, 7), "v": floats(12, 7)}
    tensors |= {"b": floats(7) if bias == "vector" else floats(*(1 for _ in shape[1:]), 7)}
    other = "n" if bias == "activation" else "b"
    nodes = [
        helper.make_node("Reshape", ["input", "s"], ["x"], "reshape"),
        helper.make_node("Softplus", ["x"], ["y"], "softplus"),
        helper.make_node("MatMul", ["y", "w"], ["m"], "first"),
        helper.make_node("MatMul", ["y", "v"], ["n"], "second"),
        helper.make_node("Add", [other, "m"], ["a"], "add"),
        helper.make_node("Mul", ["a", "n"], ["p"], "mul"),
        helper.make_node("Sigmoid", ["p"], ["out"], "sigmoid"),
    ]
    model = prepare(model_of(nodes, tensors))
    made = built(model)
    verify(made, "int8")
    ran = kinds(optimized(made))
    assert ran["MatMulIntegerToFloat"] == 2 and "Gemm" not in ran and "FusedGemm" not in ran
    # No step where ONNX Runtime would not fuse, and none in the other scheme.
    needed = len(shape) == 2 or bias == "vector"
    assert ("Max" in kinds(made)) == needed
    assert "Max" not in kinds(built(model, "s8"))
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30
    run = to_torch(made)
    assert torch.allclose(
        torch.cat([run(x[None]) for x in pictures(4)]), answers(made, pictures(4)), atol=0.02
    )


def test_what_has_no_8_bit_form_stays_float_between_quantized_layers() -> None:
    tensors = {"w": floats(4, 3, 1, 1), "up": floats(4, 4, 2, 2), "v": floats(4, 4, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "a"),
        helper.make_node("Softplus", ["a"], ["s"], "softplus"),
        helper.make_node("ConvTranspose", ["s", "up"], ["u"], "up", strides=[2, 2]),
        helper.make_node("Conv", ["u", "v"], ["out"], "b"),
    ]
    model = prepare(model_of(nodes, tensors))
    assert quantizable(model) == ("a", "b")
    made = built(model)
    up = next(node for node in made.graph.node if node.name == "up")
    assert initializers(made.graph)[up.input[1]].dtype == np.float32
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


def test_constants_that_are_equal_are_stored_once() -> None:
    made = built(residual())
    values = [(value.dtype.str, value.shape, value.tobytes()) for value in initializers(made.graph).values()]
    assert len(values) == len(set(values))
    assert all(len(name) <= 2 or name in ("w", "v", "b", "fc") for name in initializers(made.graph))


def test_the_float_model_stays_as_it_was_and_the_same_comes_out_again() -> None:
    model = residual()
    text = model.SerializeToString()
    assert built(model).SerializeToString() == built(model).SerializeToString()
    assert model.SerializeToString() == text


def test_attributes_that_mean_something_are_kept() -> None:
    tensors = {"w": floats(4, 3, 3, 3), "v": floats(4, 1, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "a", pads=[1] * 4, strides=[2, 2], group=1),
        helper.make_node("LeakyRelu", ["a"], ["l"], "leaky", alpha=1.0),
        helper.make_node("Conv", ["l", "v"], ["out"], "b", group=4, dilations=[1, 1], pads=[1] * 4),
    ]
    model = prepare(model_of(nodes, tensors))
    made = built(model)
    found = {node.name: attributes(node) for node in made.graph.node}
    assert found["a"] == {"pads": [1] * 4, "strides": [2, 2]}
    assert found["leaky"] == {"alpha": 1.0}
    assert found["b"] == {"group": 4, "pads": [1] * 4}
    assert sqnr(answers(model, pictures(8)), answers(made, pictures(8))) > 30


def test_nothing_to_quantize_and_a_missing_range_are_refused() -> None:
    model = residual()
    bounds = ranges(observe(model, pictures(4)), "minmax", symmetric=False)
    with pytest.raises(UnsupportedModel, match="no node can be int8"):
        quantized(model, bounds, "u8", skip=("a", "c", "out"))
    with pytest.raises(UnsupportedModel, match="the range of input is not known"):
        quantized(model, {}, "u8")


def test_an_old_opset_and_weights_that_are_not_finite_are_refused() -> None:
    nodes = [helper.make_node("Conv", ["input", "w"], ["out"], "a")]
    bounds = {"input": (0.0, 1.0), "out": (-1.0, 1.0)}
    with pytest.raises(UnsupportedModel, match="needs opset 13, the model has 12"):
        quantized(prepare(model_of(nodes, {"w": floats(4, 3, 1, 1)}, opset=12)), bounds, "u8")
    with pytest.raises(UnsupportedModel, match="w has 1 values that are NaN or infinite, of 12"):
        weight = floats(4, 3, 1, 1)
        weight[1, 1] = np.nan
        quantized(prepare(model_of(nodes, {"w": weight})), bounds, "u8")


@pytest.fixture(scope="module")
def photographs(shared: Path) -> torch.Tensor:
    """The first real images of the archive, float32 (240, 3, 32, 32)."""
    file = shared / "data" / "cifar10-jpeg.tar.xz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    found: list[np.ndarray] = []
    with tarfile.open(file) as archive:
        for member in itertools.islice((member for member in archive if member.isfile()), 240):
            content = archive.extractfile(member)
            assert content is not None
            found.append(np.asarray(Image.open(content).convert("RGB")))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.filterwarnings("ignore")
def test_a_trained_resnet_keeps_its_answers_and_is_no_worse_than_the_runtimes_own_quantizer(
    shared: Path, photographs: torch.Tensor, tmp_path: Path
) -> None:
    weights = shared / "models" / "resnet20-cifar10-clean.pt"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    trained = architectures.architecture(paths.RESNET20)
    trained.load_state_dict(torch.load(weights, weights_only=True))
    spec = InputSpec((3, 32, 32), 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    bundle = Bundle(trained.eval(), Source("memory"), spec)
    model = prepare(cleanup.slim(exported(deployed(bundle), (1, 3, 32, 32))))
    calibrating, held_out = photographs[::3], photographs[1::3]
    made = built(model, images=calibrating)
    onnx.save(model, tmp_path / "float.onnx")
    plain = quantized_files.quantize(tmp_path / "float.onnx", "u8", calibrating.numpy())
    wanted, got = answers(model, held_out), answers(made, held_out)
    assert float((wanted.argmax(1) == got.argmax(1)).float().mean()) > 0.97
    assert sqnr(wanted, got) > max(28.0, sqnr(wanted, answers(plain, held_out)))
    assert made.ByteSize() < min(0.27 * model.ByteSize(), plain.ByteSize())
    ran = as_runtime_sees_it(made, tmp_path)
    assert (ran["QLinearConv"], ran["QLinearAdd"], ran["QGemm"]) == (19, 9, 1)
    assert not {"Conv", "Gemm", "Add", "DequantizeLinear"} & set(ran)
