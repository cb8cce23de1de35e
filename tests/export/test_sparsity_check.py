"""The 2:4 pattern is proven on the file that ships, however its weights are laid out there."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgeprune import records
from edgeprune.errors import ParityError
from edgeprune.export import stage
from edgeprune.export.sparsity_check import PatternShare, Weight, check_pattern, pattern_share
from edgeprune.models.bundle import deployed
from edgeprune.recipe.schema import ExportTable
from edgeprune.records import Bundle, InputSpec, Source

SPEC = InputSpec(nets.SHAPE, 5, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
Promised = dict[str, tuple[int, ...]]


def model_of(
    op: str, weight: np.ndarray, *before: tuple[str, dict[str, object]], **attributes: int
) -> ModelProto:
    """One node that applies a weight, which passes through other nodes first."""
    value, nodes = "w", []
    for i, (kind, options) in enumerate(before):
        nodes.append(helper.make_node(kind, [value], [f"v{i}"], **options))
        value = f"v{i}"
    operands = ["x", value] if not attributes.pop("first", 0) else [value, "x"]
    nodes.append(helper.make_node(op, operands, ["y"], **attributes))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph)


def only(model: ModelProto) -> Weight:
    (weight,) = pattern_share(model).weights
    return weight


def keep_two(weight: Tensor, axis: int = 1) -> None:
    """Zero the two smallest of every four along an axis, in place; what is left over stays."""
    rows = weight.data.movedim(axis, -1)
    whole = rows.shape[-1] // 4 * 4
    blocks = rows[..., :whole].reshape(*rows.shape[:-1], -1, 4)
    gone = blocks.abs().argsort(-1)[..., :2]
    rows[..., :whole] = blocks.scatter(-1, gone, 0.0).reshape(*rows.shape[:-1], whole)


def patterned(network: nn.Module) -> Promised:
    """Give every layer that has blocks the pattern, in place; the parameters and their shapes."""
    promised: Promised = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LAYERS):
            transposed = isinstance(layer, nn.ConvTranspose2d)
            inputs = layer.in_channels if transposed else layer.weight.shape[1]
            if inputs % 4 == 0:
                keep_two(layer.weight, 0 if transposed else 1)
                promised[f"{name}.weight"] = tuple(layer.weight.shape)
    return promised


def ship(network: nn.Module, out: Path, promised: Promised | None, opset: int = 20) -> records.Reading:
    module = deployed(Bundle(network.eval(), Source("memory"), SPEC)).eval()
    table = ExportTable()
    _, readings, _ = stage.run(
        module, SPEC, out, opset=opset, table=table, meta={}, real=None, pattern=promised
    )
    return readings[-1]


# --------------------------------------------------------------------------------------------- one weight by itself


def test_a_convolution_is_read_along_its_input_channels_for_each_output_and_kernel_position() -> None:
    weight = np.zeros((3, 8, 2, 2), np.float32)
    weight[:, ::2] = 1.0  # two of every four
    assert only(model_of("Conv", weight)) == Weight("w", "Conv", (3, 8, 2, 2), 8, 3 * 2 * 4, 0)
    weight[2, 5, 1, 0] = 1e-30  # the smallest number there is still a number
    found = only(model_of("Conv", weight))
    assert (found.broken, found.first) == (1, "output 2, inputs 4 to 7, kernel position (1, 0)")
    assert found.eligible and not found.holds
    # Along the outputs, or along the kernel, this would be the pattern: along the inputs nothing is zero.
    along_outputs = np.zeros((8, 4, 4, 1), np.float32)
    along_outputs[::2] = 1.0
    assert only(model_of("Conv", along_outputs)).broken == 4 * 4


def test_the_inputs_of_a_grouped_convolution_are_those_of_one_group() -> None:
    weight = np.zeros((8, 4, 1, 1), np.float32)
    weight[:, :2] = 1.0
    assert only(model_of("Conv", weight, group=4)) == Weight("w", "Conv", (8, 4, 1, 1), 4, 8, 0)
    depthwise = only(model_of("Conv", np.ones((8, 1, 3, 3), np.float32), group=8))
    assert (depthwise.blocks, depthwise.eligible, depthwise.holds) == (0, False, False)


def test_no_block_of_a_transposed_convolution_reaches_into_the_next_group() -> None:
    # 12 inputs in two groups of 6: one block and two left over in each.
    weight = np.zeros((12, 2, 1, 1), np.float32)
    weight[[0, 1, 4, 5, 6, 7, 10, 11]] = 1.0
    found = only(model_of("ConvTranspose", weight, group=2))
    assert (found.inputs, found.blocks, found.broken, found.eligible) == (6, 4, 0, False)
    weight[8, 1] = 1.0
    found = only(model_of("ConvTranspose", weight, group=2))
    assert (found.broken, found.first) == (1, "output 1, inputs 0 to 3 of group 1, kernel position (0, 0)")


@pytest.mark.parametrize(
    ("op", "options", "axis"),
    [
        ("Gemm", {"transB": 1}, 1),
        ("Gemm", {}, 0),
        ("Gemm", {"transB": 0}, 0),
        ("Gemm", {"first": 1}, 1),
        ("Gemm", {"first": 1, "transA": 1}, 0),
        ("MatMul", {}, 0),
        ("MatMul", {"first": 1}, 1),
    ],
)
def test_a_matrix_is_read_along_what_the_product_sums(op: str, options: dict[str, int], axis: int) -> None:
    weight = torch.randn(8, 8)
    keep_two(weight, axis)
    assert only(model_of(op, weight.numpy(), **options)).holds
    assert not only(model_of(op, weight.T.numpy().copy(), **options)).holds


def test_a_batch_of_matrices_is_read_matrix_by_matrix() -> None:
    weight = np.zeros((2, 4, 3), np.float32)
    weight[:, 1:3] = 1.0
    assert only(model_of("MatMul", weight)).holds
    weight[1, 0, 2] = 1.0
    assert only(model_of("MatMul", weight)).first == "output 2, inputs 0 to 3, matrix (1,)"


def test_a_weight_is_followed_through_transposes_and_casts_to_the_node_that_applies_it() -> None:
    weight = torch.randn(6, 8)
    keep_two(weight, 1)
    turned = model_of("MatMul", weight.numpy(), ("Transpose", {"perm": [1, 0]}), ("Identity", {}))
    assert only(turned) == Weight("w", "MatMul", (8, 6), 8, 12, 0)
    half = model_of("Gemm", weight.numpy(), ("Cast", {"to": TensorProto.FLOAT16}), transB=1)
    assert only(half).holds
    # A sum of weights is computed while the network runs; nothing is known of its zeros.
    assert pattern_share(model_of("MatMul", weight.numpy(), ("Abs", {}))).weights == ()


def test_reshaped_and_inner_weights_are_found() -> None:
    weight = torch.randn(6, 8)
    keep_two(weight, 1)
    shape = numpy_helper.from_array(np.array([0, -1, 1, 1]), "shape")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight.numpy())),
        helper.make_node("Reshape", ["w", "shape"], ["v"]),
    ]
    inner = helper.make_graph([helper.make_node("Conv", ["x", "v"], ["y"])], "body", [], [])
    nodes.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    (found,) = pattern_share(helper.make_model(helper.make_graph(nodes, "g", [], [], [shape]))).weights
    assert found == Weight("w", "Conv", (6, 8, 1, 1), 8, 12, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 9), st.floats(0.0, 1.0))
def test_the_count_of_broken_blocks_is_that_of_a_plain_loop(
    seed: int, outputs: int, inputs: int, density: float
) -> None:
    weight = (np.random.default_rng(seed).random((outputs, inputs, 2, 1)) < density).astype(np.float32)
    broken = [
        (o, b, k)
        for o in range(outputs)
        for b in range(inputs // 4)
        for k in range(2)
        if np.count_nonzero(weight[o, 4 * b : 4 * b + 4, k, 0]) > 2
    ]
    found = only(model_of("Conv", weight))
    assert (found.blocks, found.broken) == (outputs * (inputs // 4) * 2, len(broken))


# ------------------------------------------------------------------------------------------------- real exported files


@pytest.mark.parametrize(("name", "opset"), [*((name, 20) for name in nets.NETS), ("residual", 13)])
def test_folding_and_transposing_keep_the_pattern_of_every_network(
    name: str, opset: int, tmp_path: Path
) -> None:
    network = nets.build(name)
    promised = patterned(network)
    reading = ship(network, tmp_path / "m.onnx", promised, opset)
    share = pattern_share(onnx.load(tmp_path / "m.onnx"))
    assert {w.name for w in share.holding} == set(promised) != set()
    layers = {n for n, layer in network.named_modules() if isinstance(layer, LAYERS)}
    assert {w.name for w in share.weights} == {f"{layer}.weight" for layer in layers}
    assert (reading.metric, reading.where, reading.artifact) == ("pattern_2:4", "counted", "m.onnx")
    assert reading.value == len(promised) / len(layers)
    assert set(reading.conditions["without"]) == {f"{layer}.weight" for layer in layers} - set(promised)


def test_a_file_that_breaks_the_pattern_names_the_weight_and_is_not_written(tmp_path: Path) -> None:
    network = nets.build("residual")
    promised = patterned(network)
    # One entry of one block, far too small for any image's answer to tell.
    block = network.one[0].weight.data[7, 4:8, 1, 2]
    block[int((block == 0).nonzero()[0])] = 1e-8
    with pytest.raises(ParityError) as found:
        ship(network, tmp_path / "m.onnx", promised)
    assert found.value.exit_code == 5
    assert found.value.message == (
        f"m.onnx breaks the 2:4 pattern in 1 of the {len(promised)} promised weights: 1 of 288 blocks of "
        "one.0.weight (16, 8, 3, 3) have more than 2 entries that are not zero, the first at output 7, inputs 4 to 7, "
        "kernel position (1, 2)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tampered_file_is_caught(tmp_path: Path) -> None:
    network = nets.build("grouped")
    promised = patterned(network)
    ship(network, tmp_path / "m.onnx", promised)
    model = onnx.load(tmp_path / "m.onnx")
    assert "holds the 2:4 pattern in 3 of 4 weights" in check_pattern(
        pattern_share(model), promised, "m.onnx"
    )
    item = next(i for i in model.graph.initializer if i.name == "fc.weight")
    array = numpy_helper.to_array(item).copy()
    array[array == 0] = 0.5
    item.CopyFrom(numpy_helper.from_array(array, item.name))
    with pytest.raises(ParityError, match=r"10 of 10 blocks of fc\.weight \(5, 8\)"):
        check_pattern(pattern_share(model), promised, "m.onnx")


def test_a_layer_that_is_not_in_the_file_or_has_no_blocks_is_no_kept_promise() -> None:
    weight = torch.randn(6, 8)
    keep_two(weight, 1)
    share = pattern_share(model_of("Gemm", weight.numpy(), transB=1))
    # The same entries under another name are taken; a promise of another size, or of two such layers, is not.
    assert check_pattern(share, {"fc.weight": (6, 8)}, "m.onnx").startswith("m.onnx holds")
    for promised in ({"fc.weight": (6, 12)}, {"a.weight": (6, 8), "b.weight": (6, 8)}):
        with pytest.raises(ParityError, match="promised for .*: no weight has that name"):
            check_pattern(share, promised, "m.onnx")
    narrow = pattern_share(model_of("Conv", np.zeros((8, 3, 3, 3), np.float32)))
    with pytest.raises(ParityError, match="has 3 inputs, too few for a block of 4"):
        check_pattern(narrow, {"w": (8, 3, 3, 3)}, "m.onnx")


def test_two_layers_that_share_a_weight_hold_what_was_promised_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(torch.relu(self.b(self.a(x)))).mean((2, 3)))

    network = Twice()
    promised = patterned(network)
    assert set(promised) == {"b.weight", "fc.weight"}
    reading = ship(network, tmp_path / "m.onnx", promised)
    assert reading.n == 3 and reading.conditions["without"] == ["a.weight"]
    # Nothing was promised: nothing is held against it.
    assert ship(network, tmp_path / "m.onnx", None).metric == "output_difference"


def test_the_sentence_counts_what_a_sparse_kernel_might_take() -> None:
    held = Weight("a", "Conv", (8, 8, 1, 1), 8, 16, 0)
    dense, odd = Weight("b", "Conv", (8, 8, 1, 1), 8, 16, 3, "x"), Weight("c", "Conv", (8, 3, 1, 1), 3, 0, 0)
    said = check_pattern(PatternShare((held, dense, odd)), {"a": (8, 8, 1, 1)}, "m.onnx")
    assert said == (
        "m.onnx holds the 2:4 pattern in 1 of 3 weights, all 16 blocks of them; 1 that could hold it does not."
    )
