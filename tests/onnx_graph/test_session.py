"""How far two networks are apart is measured where they differ most, and what is no answer is a failure."""

from __future__ import annotations

import nets
import pytest
import torch
from onnx import TensorProto, helper

from edgeprune.errors import ParityError, UnsupportedModel
from edgeprune.onnx_graph import session
from edgeprune.records import InputSpec


def test_the_tolerance_is_a_share_of_the_largest_logit() -> None:
    wanted = {"one": torch.tensor([[0.0, 2.0]]), "two": torch.tensor([[-4.0, 1.0]])}
    inputs = [(name, torch.zeros(1, *nets.SHAPE)) for name in wanted]
    answers = iter(wanted.values()), iter([wanted["one"], torch.tensor([[-4.0, 1.5]])])
    difference = session.compare(lambda _: next(answers[0]), lambda _: next(answers[1]), inputs, "made.onnx")
    assert difference == session.Difference(absolute=0.5, scale=4.0, on="two", images=2, agreeing=2)
    reading = session.check(difference, tolerance=0.125, name="made.onnx", inputs="random", hint="")
    assert (reading.value, reading.n, reading.conditions["same_class"]) == (0.125, 2, 1.0)
    with pytest.raises(
        ParityError, match=r"by 0.5 on two, 0.12 of the largest logit \(4\); at most 0.124 of it"
    ):
        session.check(difference, tolerance=0.124, name="made.onnx", inputs="random", hint="")


def test_answers_of_another_shape_are_a_failure() -> None:
    inputs = [("one", torch.zeros(1, *nets.SHAPE))]
    with pytest.raises(ParityError, match=r"m answers one with shape \(1, 2\), wanted \(1, 3\)"):
        session.compare(lambda _: torch.zeros(1, 3), lambda _: torch.zeros(1, 2), inputs, "m")


def test_what_onnx_runtime_can_not_load_or_run_is_refused_in_its_words() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    for kind, domain in (("Relu", ""), ("Nonsense", "nowhere")):
        graph = helper.make_graph(
            [helper.make_node(kind, ["x"], ["y"], domain=domain)],
            "g",
            [value],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        )
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        if kind == "Relu":
            network = session.open_onnx(model)
            assert torch.equal(network(torch.tensor([[-1.0, 2.0]])), torch.tensor([[0.0, 2.0]]))
            with pytest.raises(UnsupportedModel, match="can't run the model"):
                network(torch.zeros(1, 3))
        else:
            with pytest.raises(UnsupportedModel, match="can't load the model: .*Nonsense"):
                session.open_onnx(model)


def test_probes_fill_the_range_of_the_input_and_are_the_same_each_time() -> None:
    spec = InputSpec((1, 4, 4), 2, low=-1.0, high=3.0)
    first, again = list(session.probes(spec, 7, batch=2)), list(session.probes(spec, 7, batch=2))
    assert len({name for name, _ in first}) == len(first) >= 4
    for (_, pixels), (_, same) in zip(first, again, strict=True):
        assert pixels.shape == (2, 1, 4, 4) and torch.equal(pixels, same)
        assert float(pixels.min()) >= -1.0 and float(pixels.max()) <= 3.0
    assert {float(v) for _, pixels in first[:2] for v in pixels.unique()} == {-1.0, 3.0}
