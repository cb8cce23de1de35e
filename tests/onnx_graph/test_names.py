"""The nodes of an exported file are called like the layers they came from, whatever was done to them on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_files import ship, texts
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from edgeprune.onnx_graph import cleanup


def test_a_layer_that_is_used_twice_has_two_names(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))

    for opset in (16, 20):
        ship(Twice(), tmp_path / "model.onnx", opset=opset)
        nodes = [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type in cleanup.WEIGHTED]
        assert [n.name for n in nodes] == ["conv", "conv@2", "fc"]
        assert nodes[0].input[1] == nodes[1].input[1] == "conv.weight"


def test_layers_named_like_inputs_and_outputs_do_no_harm(tmp_path: Path) -> None:
    class Namesake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.batch, self.logits = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(self.batch(torch.relu(self.input(x))).mean((2, 3)))

    ship(Namesake(), tmp_path / "model.onnx", dynamic_batch=True)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [n.name for n in graph.node if n.op_type in cleanup.WEIGHTED] == ["input", "batch", "logits"]
    assert ([v.name for v in graph.input], [v.name for v in graph.output]) == (["input"], ["logits"])


@pytest.mark.parametrize("opset", [13, 20])
def test_layers_keep_their_names_when_a_flat_forward_calls_them(opset: int, tmp_path: Path) -> None:
    """As in a network read from .pt2: no container runs, and layers of different depth end in the same word."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.block, self.fc = nn.Conv2d(3, 4, 3), nn.Module(), nn.Linear(4, 5)
            self.block.conv1, self.block.bn = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block.bn(self.block.conv1(torch.relu(self.conv1(x))))
            return self.fc(torch.relu(x).mean((2, 3)))

    network = Flat()
    nn.init.normal_(network.block.bn.bias)
    ship(network, tmp_path / "model.onnx", opset=opset)
    graph = onnx.load(tmp_path / "model.onnx").graph
    applied = [node for node in graph.node if node.op_type in cleanup.WEIGHTED]
    assert [node.name for node in applied] == ["conv1", "block.conv1", "fc"]
    assert list(applied[1].input[1:]) == ["block.conv1.weight", "block.conv1.bias"]
    assert applied[1].output[0] == "block.conv1"


@pytest.mark.parametrize("opset", [13, 20])
def test_layers_merged_or_applied_by_others_keep_their_names(opset: int, tmp_path: Path) -> None:
    """A scaled batch-norm merges into its convolution in two steps; a linear layer's weight is used from outside."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), Outside()
            self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.bn(self.conv(x)) * self.scale))

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.rand(4, 4)), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2) @ self.table
            return nn.functional.linear(tokens, self.fc.weight, self.fc.bias).mean(1)

    network = Scaled()
    nn.init.normal_(network.bn.bias)
    ship(network, tmp_path / "model.onnx", opset=opset)
    applied = [
        node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type in cleanup.WEIGHTED
    ]
    assert [node.name for node in applied] == ["conv", "head", "head.fc"]
    assert applied[0].input[1] == "conv.weight"


def with_a_branch() -> ModelProto:
    """If(x > 0) then x * scale else c, with values of the outer graph used inside; and a function; all documented."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    inner = helper.make_tensor_value_info("picked", TensorProto.FLOAT, [1])
    outer = helper.make_tensor_value_info("picked_too", TensorProto.FLOAT, [1])
    yes = helper.make_graph(
        [helper.make_node("Mul", ["twice", "a/scale"], ["picked"], doc_string="/home/me")], "yes", [], [inner]
    )
    no = helper.make_graph([helper.make_node("Identity", ["twice"], ["picked_too"])], "no", [], [outer])
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"], name="/net/block/Add"),
        helper.make_node("Greater", ["x", "zero"], ["positive"], name="/net/block/Greater"),
        helper.make_node("If", ["positive"], ["chosen"], then_branch=yes, else_branch=no, name="/net/If"),
        helper.make_node("Half", ["chosen"], ["y"], domain="ours"),
    ]
    half = helper.make_function(
        "ours", "Half", ["i"], ["o"], [helper.make_node("Add", ["i", "i"], ["o"], doc_string="/home/me")],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    constants = [
        helper.make_tensor("a/scale", TensorProto.FLOAT, [1], [3.0]),
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
    ]
    graph = helper.make_graph(nodes, "graph", [x], [y], constants, doc_string="/home/me/model.py")
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("ours", 1), helper.make_opsetid("unused", 1)]
    model = helper.make_model(
        graph, opset_imports=imports, functions=[half], doc_string="/home/me/model.py", ir_version=10
    )
    for part in (model, graph, model.graph, *model.graph.node, *model.functions, *model.functions[0].node):
        part.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/me/model.py"')
    return model


def test_branches_and_functions_are_cleaned_and_still_answer_the_same(tmp_path: Path) -> None:
    model = with_a_branch()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [np.array([v], np.float32) for v in (-2.0, 5.0)]
    wanted = [session.run(None, {"x": value})[0] for value in inputs]
    cleanup.name_after_layers(model, {"": False, "net": False, "net.block": False}, "net.")
    cleanup.finish(model, {"edgeprune.version": "1"})
    assert "/home/me" not in texts(model) and "stack_trace" not in texts(model)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 20), ("ours", 1)]
    assert [node.name for node in model.graph.node] == ["block.Add", "block.Greater", "If", "Half"]
    assert {item.name for item in model.graph.initializer} == {"a.scale", "zero"}
    cleaned = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for value, answer in zip(inputs, wanted, strict=True):
        np.testing.assert_array_equal(cleaned.run(None, {"x": value})[0], answer)
