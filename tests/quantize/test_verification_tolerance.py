"""How close a quantized file's answers are to the float model's, on numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from onnx import ModelProto, helper

from edgeprune.errors import ParityError, UnsupportedModel, UsageError
from edgeprune.quantize.verification import MOST_DB, closeness


def mirror(path: Path, factor: list[float], batch: int | str = 1) -> ModelProto:
    """A model whose logits are its four pixels times a factor for each."""
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], "flat"),
        helper.make_node("Mul", ["flat", "factor"], ["logits"], "mul"),
    ]
    tensors = {"factor": np.array(factor, np.float32)}
    return onnx.load(onnx_files.save(path / "mirror.onnx", nodes, tensors, [batch, 4, 1, 1], 4))


def test_closeness_is_what_one_computes_by_hand(tmp_path: Path) -> None:
    images = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.9, 0.0]]).reshape(2, 4, 1, 1)
    found = closeness(mirror(tmp_path, [1, 1, 1, 1]), mirror(tmp_path, [1, 0.8, 1, 1]), images)
    # sum f^2 = 1 + 0.25 + 1 + 0.81, sum (f - q)^2 = 0.04; the second image's class changes from 1 to 2.
    assert math.isclose(found.sqnr_db, 10 * math.log10(3.06 / 0.04), rel_tol=1e-5)
    assert (found.agreement, found.images) == (0.5, 2)
    assert math.isclose(found.worst, 0.2, rel_tol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, "N"])
def test_closeness_of_a_model_to_itself_is_perfect_in_any_batch(tmp_path: Path, batch: int | str) -> None:
    model = mirror(tmp_path, [1, 2, 3, 4], batch)
    found = closeness(model, model, torch.rand((5, 4, 1, 1), generator=torch.Generator().manual_seed(0)))
    assert (found.sqnr_db, found.agreement, found.worst, found.images) == (MOST_DB, 1.0, 0.0, 5)


def test_answers_to_a_float_model_that_gives_zeros_are_all_noise(tmp_path: Path) -> None:
    found = closeness(mirror(tmp_path, [0, 0, 0, 0]), mirror(tmp_path, [1, 1, 1, 1]), torch.ones(1, 4, 1, 1))
    assert (found.sqnr_db, found.worst) == (-MOST_DB, 1.0)


def test_closeness_refuses_answers_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match="the logits of the quantized model are NaN or infinite for 2 of 2 images"
    ):
        closeness(mirror(tmp_path, [1] * 4), mirror(tmp_path, [math.nan] * 4), torch.ones(2, 4, 1, 1))
    with pytest.raises(UsageError, match="at least one image"):
        closeness(mirror(tmp_path, [1] * 4), mirror(tmp_path, [1] * 4), torch.ones(0, 4, 1, 1))
    net = onnx.load(onnx_files.write_mirror(tmp_path / "five.onnx", 5))
    with pytest.raises(UnsupportedModel):
        closeness(mirror(tmp_path, [1] * 4), net, torch.ones(1, 4, 1, 1))
    wider = mirror(tmp_path, [1] * 4)
    wider.graph.node.append(helper.make_node("Concat", ["logits", "logits"], ["wide"], "wide", axis=1))
    wider.graph.output[0].name = "wide"
    wider.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    with pytest.raises(
        ParityError, match=r"quantized model have shape \(1, 8\), those of the float one \(1, 4"
    ):
        closeness(mirror(tmp_path, [1] * 4), wider, torch.ones(1, 4, 1, 1))
