"""ONNX files that would never be through when a runtime puts their functions in."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import onnx
import pytest
from onnx import FunctionProto, NodeProto, helper

from edgeprune.errors import UnsupportedModel
from edgeprune.onnx_graph.index import opened

OWN = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]


def call(number: int, source: str, result: str) -> NodeProto:
    return helper.make_node(f"f{number}", [source], [result], domain="own")


def function(number: int, *body: NodeProto) -> FunctionProto:
    return helper.make_function("own", f"f{number}", ["a"], ["b"], body, OWN)


def write(path: Path, *functions: FunctionProto) -> Path:
    image = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3, 8, 8]) for name in "xy"]
    graph = helper.make_graph([call(len(functions) - 1, "x", "y")], "g", image[:1], image[1:])
    onnx.save(helper.make_model(graph, functions=functions, opset_imports=OWN, ir_version=9), path)
    return path


def chain(length: int, times: int) -> list[FunctionProto]:
    """Each function calls the one before so many times."""
    names = ["a", *(f"v{i}" for i in range(times - 1)), "b"]
    calls = [[call(n - 1, source, result) for source, result in pairwise(names)] for n in range(1, length)]
    first = function(0, helper.make_node("Relu", ["a"], ["b"]))
    return [first, *(function(n, *body) for n, body in enumerate(calls, 1))]


def test_functions_that_call_others_are_read(tmp_path: Path) -> None:
    assert len(opened(write(tmp_path / "m.onnx", *chain(10, 2))).functions) == 10


@pytest.mark.parametrize("functions", [chain(1000, 1), chain(40, 2), [function(0, call(0, "a", "b"))]])
def test_functions_that_grow_without_end_are_refused(tmp_path: Path, functions: list[FunctionProto]) -> None:
    with pytest.raises(
        UnsupportedModel, match="functions that call each other: more than 1000000 nodes, or 100"
    ):
        opened(write(tmp_path / "m.onnx", *functions))
