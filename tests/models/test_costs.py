"""Multiply-accumulates of all that multiplies, counted as by hand, in torch and in an ONNX file alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.export import stage
from edgeprune.models.bundle import deployed, from_module
from edgeprune.models.costs import cost_model, layer_costs, total_macs, uncounted
from edgeprune.onnx_graph.work import node_macs, work_of
from edgeprune.prune.stage import counted_limits
from edgeprune.recipe.schema import ExportTable
from edgeprune.records import Budget, InputSpec, Limit

SPEC = InputSpec((3, 8, 8), 5)
X = torch.rand(2, 3, 8, 8)
# Sixteen words of twelve numbers come out of the convolution, five logits of as many means.
AROUND = 16 * 12 * 3 * 4 + 12 * 5


class Words(nn.Module):
    """A convolution, something on its (N, 16, 12) words, and logits of their mean."""

    def __init__(self, middle: nn.Module) -> None:
        nn.Module.__init__(self)
        self.conv, self.middle, self.head = nn.Conv2d(3, 12, 2, 2), middle, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


class Do(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        nn.Module.__init__(self)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def heads(x: Tensor) -> Tensor:
    return x.view(len(x), 16, 3, 4).transpose(1, 2)


def attention(_: Any, x: Tensor) -> Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(12, 12), 16 * 144),
    "lstm": (lambda: Do(lambda s, x: s.r(x)[0], r=nn.LSTM(12, 12, batch_first=True)), 16 * 4 * 12 * 24),
    "two ways": (
        lambda: Do(lambda s, x: s.r(x)[0][..., :12], r=nn.LSTM(12, 12, batch_first=True, bidirectional=True)),
        2 * 16 * 4 * 12 * 24,
    ),
    "gru": (lambda: Do(lambda s, x: s.r(x)[0], r=nn.GRU(12, 12, batch_first=True)), 16 * 3 * 12 * 24),
    "attention": (lambda: Do(attention), 2 * 16 * 16 * 12),
    "heads": (
        lambda: Do(lambda s, x: s.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(12, 3, batch_first=True)),
        16 * 12 * 36 + 2 * 16 * 16 * 12 + 16 * 12 * 12,
    ),
    "einsum": (
        lambda: Do(lambda s, x: torch.einsum("ntc,cd->ntd", x, s.w), w=nn.Parameter(torch.rand(12, 12))),
        16 * 144,
    ),
    "parameter": (lambda: Do(lambda s, x: x @ s.w, w=nn.Parameter(torch.rand(12, 12))), 16 * 144),
    "functional": (lambda: Do(lambda s, x: F.linear(x, s.w), w=nn.Parameter(torch.rand(12, 12))), 16 * 144),
    "two activations": (lambda: Do(lambda _, x: x @ (x.transpose(1, 2) @ x)), 2 * 16 * 144),
    "elementwise": (lambda: Do(lambda s, x: x * s.w + x, w=nn.Parameter(torch.rand(12))), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_counted_as_by_hand(kind: str) -> None:
    make, macs = KINDS[kind]
    network = Words(make()).eval()
    assert total_macs(network, X) == AROUND + macs
    assert cost_model(network, (), X).cost({})["macs"] == AROUND + macs
    assert uncounted(network, X) == ()


@pytest.mark.parametrize("kind", ["two ways", "gru", "heads", "einsum", "two activations"])
def test_the_file_is_counted_like_the_network(kind: str, tmp_path: Path) -> None:
    make, macs = KINDS[kind]
    path = tmp_path / "net.onnx"
    bundle = from_module(Words(make()), X)
    stage.run(deployed(bundle), SPEC, path, opset=20, table=ExportTable(), meta={}, real=None)
    assert sum(layer.macs for layer in work_of(path)) == AROUND + macs


def test_a_transposed_convolution_multiplies_its_inputs() -> None:
    network = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3, 2, 1, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    assert [row.macs for row in layer_costs(network, X)] == [3 * 64 * 2 * 9]
    assert total_macs(network, X) == 3 * 64 * 2 * 9


def test_counting_leaves_the_kernels_as_they_were() -> None:
    before = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    total_macs(Words(KINDS["heads"][0]()).eval(), X)
    assert (torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()) == before


def test_a_budget_is_not_held_against_what_can_not_be_counted() -> None:
    network = Words(
        Do(lambda _, x: torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")[..., :12])
    ).eval()
    costs = cost_model(network, (), X)
    assert costs.uncounted == ("aten::_cdist_forward",)
    half = Limit("macs", "share", 0.5, "50 %")
    with pytest.raises(UnsupportedModel, match="aten::_cdist_forward are not known"):
        counted_limits(Budget({"macs": half}), network, costs)
    assert set(counted_limits(Budget({"params": replace(half, metric="params")}), network, costs)) == {
        "params"
    }


SHAPES: dict[str, tuple[int, ...] | None] = {
    "x": (2, 3, 8, 8), "w": (6, 3, 3, 3), "y": (2, 6, 6, 6), "a": (2, 5, 7), "b": (7, 4), "m": (2, 5, 4),
    "q": (2, 9, 12), "k": (2, 11, 12), "v": (2, 11, 12), "o": (2, 9, 12), "?": None,
    "h": (2, 3, 9, 4), "hk": (2, 3, 11, 4), "qkv": (12, 36), "s": (9, 2, 5), "sw": (2, 24, 5), "sr": (2, 24, 6),
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "inputs", "output", "more", "macs"),
    [
        ("Conv", ["x", "w"], "y", {}, 2 * 6 * 36 * 27),
        ("ConvInteger", ["x", "w"], "y", {}, 2 * 6 * 36 * 27),
        ("QLinearConv", ["x", "", "", "w", "", "", "", ""], "y", {}, 2 * 6 * 36 * 27),
        ("ConvTranspose", ["y", "w"], "x", {}, 2 * 6 * 36 * 27),
        ("MatMul", ["a", "b"], "m", {}, 2 * 5 * 7 * 4),
        ("QLinearMatMul", ["a", "", "", "b", "", "", "", ""], "m", {}, 2 * 5 * 7 * 4),
        ("Einsum", ["a", "b"], "m", {"equation": "...c, cd -> ...d"}, 2 * 5 * 7 * 4),
        ("Einsum", ["a"], "m", {"equation": "ntc->nct"}, 0),
        ("LSTM", ["s", "sw", "sr"], "o", {}, 9 * 2 * 2 * 24 * 11),
        ("Attention", ["q", "k", "v"], "o", {}, 2 * 2 * 9 * 11 * 12),
        ("Attention", ["h", "hk", "hk"], "h", {}, 2 * 2 * 3 * 9 * 11 * 4),
        ("MultiHeadAttention", ["q", "k", "v"], "o", {"domain": "com.microsoft"}, 2 * 2 * 9 * 11 * 12),
        ("Attention", ["q", "qkv"], "o", {"domain": "com.microsoft"}, 2 * 9 * 12 * 36 + 2 * 2 * 9 * 9 * 12),
        ("Mul", ["a", "b"], "m", {}, 0),
        ("Conv", ["x", "?"], "y", {}, None),
    ],
)  # fmt: skip
def test_a_node_is_counted_as_by_hand(
    op: str, inputs: list[str], output: str, more: dict[str, Any], macs: int | None
) -> None:
    assert node_macs(helper.make_node(op, inputs, [output], **more), SHAPES.get) == macs


def test_weights_that_are_stored_as_they_are_take_part(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.zeros((12, 5), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")], "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 12])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5])], [weight],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "m.onnx",
    )
    assert [layer.macs for layer in work_of(tmp_path / "m.onnx")] == [60]
