"""Files at channel counts that nobody cut: they must be as the file of the really cut network, but for the weights."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path

import latency_files
import nets
import onnx
import pytest
import torch
from torch import nn

from edgeprune.errors import ModelError, UnsupportedModel
from edgeprune.latency.resized_graph import resizer
from edgeprune.latency.sampling import subject
from edgeprune.latency.segments import attribute_times, network_key, segments_of
from edgeprune.models import costs, surgery
from edgeprune.runtimes.onnxruntime import OnnxRuntime

NAMES = ("residual", "depthwise", "grouped", "concat", "split", "groupnormed")


def drawn(name: str, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    return {g.name: draw.randint(1, g.channels) for g in latency_files.groups(name)}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_shaped_as_in_the_network_that_was_really_cut(name: str) -> None:
    source = latency_files.subject_of(name).resizer
    for seed in range(3):
        kept = drawn(name, seed)
        small = deepcopy(nets.build(name))
        masks = {g.name: torch.arange(g.channels) < kept[g.name] for g in latency_files.groups(name)}
        surgery.cut(small, surgery.removed_positions(latency_files.groups(name), masks))
        model = source.file(kept)
        shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
        for node in model.graph.node:
            layer = small.get_submodule(node.name) if node.op_type in ("Conv", "Gemm") else None
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                assert shapes[node.input[1]] == tuple(layer.weight.shape), node.name


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_runs_the_file_and_its_answer_is_a_number(name: str, tmp_path: Path) -> None:
    onnx.save(latency_files.subject_of(name).resizer.file(drawn(name, 5)), tmp_path / "m.onnx")
    session = OnnxRuntime().open(tmp_path / "m.onnx", 1)
    answer = session(session.image(nets.SHAPE))
    assert answer.shape == (1, 5) and bool((abs(answer) < 1e6).all())


def test_the_dense_counts_give_the_shapes_of_the_file_itself() -> None:
    source = latency_files.subject_of("split").resizer
    shapes = source.shaped({})
    assert all(source.shapes[name] == shape for name, shape in shapes.items() if name in source.shapes)


def test_a_single_layer_is_a_file_of_its_own_with_nothing_behind_it(tmp_path: Path) -> None:
    source = latency_files.subject_of("residual").resizer
    for layer, reads, makes in (("one.0", 8, 16), ("fc", 8, 5)):
        model = source.layer({}, layer)
        onnx.save(model, tmp_path / "layer.onnx")
        assert [n.op_type for n in model.graph.node if n.name == layer] in (["Conv"], ["Gemm"])
        session = OnnxRuntime().open(tmp_path / "layer.onnx", 1)
        image = session.image(None)
        assert image.shape[1] == reads and session.infer(image).shape[1] == makes


@pytest.mark.parametrize("name", NAMES)
def test_each_node_is_in_one_part_and_times_are_charged_whole(name: str) -> None:
    network = latency_files.subject_of(name)
    model = network.resizer.model
    constants = set(network.resizer.constants)
    nodes = [n.name for n in model.graph.node if not set(n.output) & constants]
    assert sorted(n for part in network.segments for n in part.nodes) == sorted(nodes)
    ran = [(name_, 1.0 + i) for i, name_ in enumerate(nodes)]
    with_reorders = [row for pair in ran for row in (("ReorderInput_token_3", 0.25), pair)]
    spent = attribute_times(network.segments, [*with_reorders, ("ReorderOutput", 0.5)])
    assert sum(spent) == pytest.approx(sum(s for _, s in ran) + 0.25 * len(ran) + 0.5)


def test_what_a_runtime_puts_in_is_charged_to_the_part_behind_it_and_renamed_nodes_to_their_own() -> None:
    found = latency_files.subject_of("residual").segments
    place = {part.layer: i for i, part in enumerate(found)}
    spent = attribute_times(found, [("stem.0_nchwc", 1.0), ("ReorderOutput", 2.0), ("one.0_bn_nchwc", 4.0)])
    assert spent[place["stem.0"]] == 1.0 and spent[place["one.0"]] == 6.0 and sum(spent) == 7.0


def test_a_residual_sum_belongs_to_the_branch_that_ends_last() -> None:
    found = {part.layer: part for part in latency_files.subject_of("residual").segments}
    assert found["two"].nodes == ("two", "Add", "Relu")
    assert found["one.0"].nodes == ("one.0", "one.2.Relu")
    assert found["two"].signature.endswith("8x8 8x8 Add Relu")


def test_widths_follow_all_groups_that_are_joined() -> None:
    network = latency_files.subject_of("concat")
    part = next(p for p in network.segments if p.layer == "c.0")
    kept = dict(network.channels)
    assert part.widths(kept) == (16, 8)
    (first, second, third) = (g for g in kept)
    assert part.widths({**kept, first: 2, second: 3, third: 4}) == (5, 4)


def test_networks_that_cost_the_same_have_one_key_and_others_have_not() -> None:
    network, other = latency_files.subject_of("residual"), latency_files.subject_of("concat")
    again = segments_of(network.resizer)
    assert network_key(again, network.channels) == network.key != other.key


def test_a_graph_with_branches_is_refused_by_name() -> None:
    model = onnx.load(latency_files.exported("plain"))
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node[1].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
    cost = costs.cost_model(nets.build("plain"), latency_files.groups("plain"), nets.example())
    with pytest.raises(UnsupportedModel):
        resizer(model, cost)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x08\xff\xff")
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        subject(tmp_path / "x.onnx", latency_files.subject_of("plain").resizer.costs)
