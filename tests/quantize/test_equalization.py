"""Cross-layer equalization: the paper's formula on numbers worked out by hand, and answers that stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_files
import pytest
import quantized_files as files
import torch
from onnx import ModelProto, helper, numpy_helper

from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize.equalization import equalized
from edgeprune.quantize.observers import Seen

Arrays = dict[str, np.ndarray]


def node(op: str, read: str, made: str, *constants: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, [read, *constants], [made], made, **attributes)


def graph(
    path: Path, nodes: list[onnx.NodeProto], tensors: Arrays, shape: list[int], out: list[int]
) -> ModelProto:
    arrays = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    return onnx.load(onnx_files.save(path / "m.onnx", nodes, arrays, list(shape), list(out)))


def two_convolutions(path: Path, between: list[onnx.NodeProto], **more: np.ndarray) -> ModelProto:
    """Two 1 x 1 convolutions of two channels, with the ranges 1, 4 and 16, 1 between them."""
    first, last = (
        node("Conv", "input", "a", "a.w", "a.b"),
        node("Conv", between[-1].output[0], "logits", "b.w"),
    )
    tensors = {
        "a.w": np.array([[1.0, -0.5], [2.0, -4.0]]).reshape(2, 2, 1, 1),
        "a.b": np.array([3.0, 5.0]),
        "b.w": np.array([[-16.0, 1.0], [8.0, 0.5]]).reshape(2, 2, 1, 1),
        **more,
    }
    return graph(path, [first, *between, last], tensors, [1, 2, 4, 4], [1, 2, 4, 4])


def weights(model: ModelProto) -> Arrays:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def answers(model: ModelProto, images: torch.Tensor) -> torch.Tensor:
    network = open_onnx(model)
    return torch.cat([network(image[None]) for image in images])


def noise(shape: tuple[int, ...], count: int = 8) -> torch.Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))


def seen(high: float, counts: list[int], mean: list[float] | None = None) -> Seen:
    return Seen(0.0, high, np.array(counts), 0.0, high, np.array(mean or [0.0]), sum(counts))


def test_two_layers_get_the_factors_of_the_paper(tmp_path: Path) -> None:
    after, pairs = equalized(two_convolutions(tmp_path, [node("Relu", "a", "r")]))
    # r1 = 1, 4 and r2 = 16, 1: s = sqrt(r1 r2) / r2 = 1/4, 2.
    assert pairs == 1
    found = weights(after)
    assert np.allclose(found["a.w"].reshape(2, 2), [[4.0, -2.0], [1.0, -2.0]])
    assert np.allclose(found["a.b"], [12.0, 2.5])
    assert np.allclose(found["b.w"].reshape(2, 2), [[-4.0, 2.0], [2.0, 1.0]])


def test_the_model_that_was_given_stays_as_it_is(tmp_path: Path) -> None:
    model = two_convolutions(tmp_path, [node("Relu", "a", "r")])
    before = model.SerializeToString()
    equalized(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "between",
    [
        [node("LeakyRelu", "a", "r", alpha=0.1)],
        [node("PRelu", "a", "r", "slope")],
        [node("MaxPool", "a", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), node("Relu", "p", "r")],
        [node("Relu", "a", "p"), node("AveragePool", "p", "r", kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        [node("Clip", "a", "r", "zero")],
        [node("Pad", "a", "p", "around"), node("MaxPool", "p", "r", kernel_shape=[3, 3])],
    ],
    ids=lambda nodes: "-".join(n.op_type for n in nodes),
)
def test_what_commutes_with_a_factor_does_not_block(tmp_path: Path, between: list[onnx.NodeProto]) -> None:
    model = two_convolutions(
        tmp_path, between, slope=np.array([0.2, -0.3]).reshape(2, 1, 1), zero=np.array(0.0)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "around"))
    after, pairs = equalized(model)
    assert pairs == 1
    x = noise((2, 4, 4))
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "between",
    [
        [node("HardSwish", "a", "r")],
        [node("Sigmoid", "a", "r")],
        [node("Add", "a", "r", "a.b")],
        [node("Clip", "a", "r", "zero", "six")],
        [node("Clip", "a", "r", "six")],
        [node("Transpose", "a", "r", perm=[0, 1, 3, 2])],
        [node("ReduceMean", "a", "r", "channel_axis")],
        [node("Pad", "a", "r", "more_channels")],
        [node("Pad", "a", "r", "nothing", "six")],
        [node("Reshape", "a", "r", "other_way")],
    ],
    ids=lambda nodes: "-".join(n.op_type for n in nodes),
)
def test_what_does_not_commute_blocks(tmp_path: Path, between: list[onnx.NodeProto]) -> None:
    whole = {"channel_axis": [1], "more_channels": [0, 1, 0, 0, 0, 0, 0, 0], "nothing": [0] * 8}
    whole["other_way"] = [1, 4, 2, 4]
    model = two_convolutions(tmp_path, between, zero=np.array(0.0), six=np.array(6.0))
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in whole.items())
    after, pairs = equalized(model)
    assert pairs == 0
    assert weights(after)["a.w"].ravel().tolist() == [1.0, -0.5, 2.0, -4.0]


def test_a_channel_that_two_nodes_read_or_that_is_an_output_is_left_alone(tmp_path: Path) -> None:
    model = two_convolutions(tmp_path, [node("Relu", "a", "r")])
    model.graph.output.append(helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [1, 2, 4, 4]))
    assert equalized(model)[1] == 0
    twice = two_convolutions(tmp_path, [node("Relu", "a", "r")])
    twice.graph.node.append(node("Abs", "r", "other"))
    assert equalized(twice)[1] == 0


def test_a_weight_that_two_layers_share_is_left_alone(tmp_path: Path) -> None:
    model = two_convolutions(tmp_path, [node("Relu", "a", "r")])
    model.graph.node[2].input[1] = "a.w"
    assert equalized(model)[1] == 0


def test_a_channel_without_weights_stays(tmp_path: Path) -> None:
    dead = np.array([[0.0, 0.0], [2.0, -4.0]]).reshape(2, 2, 1, 1)
    after, _ = equalized(two_convolutions(tmp_path, [node("Relu", "a", "r")], **{"a.w": dead}))
    assert weights(after)["a.w"][0].tolist() == dead[0].tolist()
    assert weights(after)["a.b"][0] == 3.0
    assert np.isfinite(weights(after)["b.w"]).all()


def test_a_ceiling_that_was_never_reached_becomes_a_relu(tmp_path: Path) -> None:
    clip = [node("Clip", "a", "r", "zero", "six")]
    model = two_convolutions(tmp_path, clip, zero=np.array(0.0), six=np.array(6.0))
    after, pairs = equalized(model, {"a": seen(5.0, [7, 3])})
    assert pairs == 1
    assert [n.op_type for n in after.graph.node] == ["Conv", "Relu", "Conv"]


def test_a_ceiling_that_acts_stays(tmp_path: Path) -> None:
    clip = [node("Clip", "a", "r", "zero", "six")]
    model = two_convolutions(tmp_path, clip, zero=np.array(0.0), six=np.array(6.0))
    # A hundredth of the values is above 6, which is more than a thousandth.
    after, pairs = equalized(model, {"a": seen(12.0, [99, 1])})
    assert pairs == 0
    assert after.graph.node[1].op_type == "Clip"


def test_a_depthwise_layer_ends_with_the_ranges_of_its_neighbours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spread = 10.0 ** rng.uniform(-2, 2, 6)
    tensors = {
        "a.w": rng.standard_normal((6, 3, 1, 1)) * spread.reshape(-1, 1, 1, 1),
        "d.w": rng.standard_normal((6, 1, 3, 3)) / spread.reshape(-1, 1, 1, 1) ** 2,
        "d.b": rng.standard_normal(6),
        "c.w": rng.standard_normal((4, 6, 1, 1)) * spread.reshape(1, -1, 1, 1) ** 0.5,
    }
    nodes = [
        node("Conv", "input", "a", "a.w"), node("Relu", "a", "ra"),
        node("Conv", "ra", "d", "d.w", "d.b", group=6, pads=[1, 1, 1, 1]), node("Relu", "d", "rd"),
        node("Conv", "rd", "logits", "c.w"),
    ]  # fmt: skip
    model = graph(tmp_path, nodes, tensors, [1, 3, 5, 5], [1, 4, 5, 5])
    after, pairs = equalized(model)
    found = weights(after)
    ranges = [
        np.abs(found["a.w"]).reshape(6, -1).max(1),
        np.abs(found["d.w"]).reshape(6, -1).max(1),
        np.abs(found["c.w"]).max((0, 2, 3)),
    ]
    assert pairs == 2
    assert np.allclose(ranges[0], ranges[1], rtol=1e-2)
    assert np.allclose(ranges[1], ranges[2], rtol=1e-2)
    x = noise((3, 5, 5))
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-4, atol=1e-4)


def test_a_mean_over_all_positions_passes_factors_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.w": rng.standard_normal((3, 2, 1, 1)) * np.array([1.0, 10.0, 100.0]).reshape(-1, 1, 1, 1),
        "fc.w": rng.standard_normal((3, 5)),
    }
    nodes = [
        node("Conv", "input", "a", "a.w"), node("Relu", "a", "r"), node("ReduceMean", "r", "m", "axes", keepdims=0),
        node("MatMul", "m", "logits", "fc.w"),
    ]  # fmt: skip
    model = graph(tmp_path, nodes, tensors, [1, 2, 2, 2], [1, 5])
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, -2]), "axes"))
    after, pairs = equalized(model)
    x = noise((2, 2, 2))
    assert pairs == 1
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-4, atol=1e-3)


def test_layers_that_can_not_be_followed_are_left_alone(tmp_path: Path) -> None:
    tensors = {
        "a.w": np.ones((2, 2, 1, 1)),
        "b.w": np.ones((4, 3)),
        "c.w": np.ones((1, 2, 3, 3)),
        "d.w": np.ones((4, 2)),
    }
    # A MatMul on the last axis of images, one with a weight for each channel, and a Gemm that turns its data.
    wide = [node("Conv", "input", "a", "a.w"), node("MatMul", "a", "logits", "b.w")]
    each = [
        node("Conv", "input", "a", "a.w"),
        node("MatMul", "a", "r", "b.w"),
        node("MatMul", "r", "logits", "c.w"),
    ]
    turned = [
        node("Conv", "input", "a", "a.w"), node("Flatten", "a", "f"), node("Relu", "f", "r"),
        node("Gemm", "r", "logits", "d.w", transA=1),
    ]  # fmt: skip
    for nodes, shape, out in (
        (wide, [1, 2, 4, 4], [1, 2, 4, 3]), (each, [1, 2, 4, 4], [1, 2, 4, 3]), (turned, [4, 2, 2, 2], [8, 2]),
    ):  # fmt: skip
        assert equalized(graph(tmp_path, nodes, tensors, shape, out))[1] == 0


def test_flattened_channels_of_a_linear_layer_are_scaled_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.w": rng.standard_normal((3, 2, 1, 1)) * np.array([1.0, 10.0, 100.0]).reshape(-1, 1, 1, 1),
        "fc.w": rng.standard_normal((5, 12)),
        "fc.b": rng.standard_normal(5),
    }
    nodes = [
        node("Conv", "input", "a", "a.w"), node("Relu", "a", "r"), node("Flatten", "r", "f"),
        node("Gemm", "f", "logits", "fc.w", "fc.b", transB=1),
    ]  # fmt: skip
    model = graph(tmp_path, nodes, tensors, [1, 2, 2, 2], [1, 5])
    after, pairs = equalized(model)
    factors = weights(after)["fc.w"] / tensors["fc.w"]
    assert pairs == 1
    assert np.allclose(factors.reshape(5, 3, 4), factors.reshape(5, 3, 4)[:1, :, :1], rtol=1e-5)
    x = noise((2, 2, 2))
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-4, atol=1e-3)


def test_groups_and_transposed_convolutions_are_scaled_in_their_own_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    uneven_rows = 10.0 ** rng.uniform(-1, 2, (8, 1, 1, 1))
    tensors = {
        "a.w": rng.standard_normal((8, 2, 1, 1)) * uneven_rows,
        "a.b": rng.standard_normal(8),
        "g.w": rng.standard_normal((6, 4, 3, 3)),
        "t.w": rng.standard_normal((6, 2, 2, 2)) * 10.0 ** rng.uniform(-1, 2, (6, 2, 1, 1)),
        "t.b": rng.standard_normal(4),
        "c.w": rng.standard_normal((3, 4, 1, 1)),
    }
    nodes = [
        node("Conv", "input", "a", "a.w", "a.b"), node("Relu", "a", "ra"),
        node("Conv", "ra", "g", "g.w", group=2, pads=[1, 1, 1, 1]), node("Relu", "g", "rg"),
        node("ConvTranspose", "rg", "t", "t.w", "t.b", group=2, strides=[2, 2]), node("Relu", "t", "rt"),
        node("Conv", "rt", "logits", "c.w"),
    ]  # fmt: skip
    model = graph(tmp_path, nodes, tensors, [1, 2, 4, 4], [1, 3, 8, 8])
    after, pairs = equalized(model)
    x = noise((2, 4, 4))
    assert pairs == 3
    assert not np.allclose(weights(after)["t.w"], tensors["t.w"], rtol=0.1)
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-4, atol=1e-1)


def test_linear_layers_are_pairs_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.w": rng.standard_normal((4, 6)) * 10.0 ** rng.uniform(-1, 2, 6), "a.b": rng.standard_normal(6),
        "b.w": rng.standard_normal((6, 3)), "c.w": rng.standard_normal((3, 3)),
    }  # fmt: skip
    nodes = [
        node("Flatten", "input", "f"), node("Gemm", "f", "a", "a.w", "a.b"), node("Relu", "a", "ra"),
        node("MatMul", "ra", "b", "b.w"), node("Relu", "b", "rb"), node("MatMul", "rb", "logits", "c.w"),
    ]  # fmt: skip
    model = graph(tmp_path, nodes, tensors, [1, 4, 1, 1], [1, 3])
    after, pairs = equalized(model)
    assert pairs == 1
    x = noise((4, 1, 1))
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-4, atol=1e-3)


def test_a_network_with_gates_answers_as_before(tmp_path: Path) -> None:
    model = onnx.load(files.write_gated(tmp_path))
    after, pairs = equalized(model)
    # From the squeezing to the exciting layer, and from the last convolution to the linear layer.
    assert pairs == 2
    x = noise((3, 8, 8))
    assert torch.allclose(answers(model, x), answers(after, x), rtol=1e-3, atol=1e-4)
    onnx.checker.check_model(after, full_check=True)
