"""An exported file answers like its module, says what it is, tells nothing of this machine, or is not written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_files import PLAIN, SPEC, ship, texts, wrapped
from onnx import ModelProto
from torch import Tensor, nn

import edgeprune
from edgeprune.errors import ParityError, UnsupportedModel, UsageError
from edgeprune.export import stage, torch_to_onnx
from edgeprune.onnx_graph import cleanup, session
from edgeprune.recipe.schema import ExportTable
from edgeprune.records import Artifact, InputSpec


def answers(file: Path, pixels: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input": pixels.numpy()})[0])


def weighted(network: nn.Module) -> set[str]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return {name for name, part in network.named_modules() if isinstance(part, kinds)}


class Odd(nn.Module):
    """A small network with something strange in the middle."""

    def __init__(self, strange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.strange, self.fc = nn.Conv2d(3, 4, 3), Strange(strange), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.strange(self.conv(x)).mean((2, 3)))


class Strange(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", nets.NETS)
def test_a_file_answers_like_its_module_and_its_nodes_are_called_like_its_layers(
    name: str, tmp_path: Path
) -> None:
    network, out = nets.build(name), tmp_path / "model.onnx"
    artifact, readings, notes = ship(network, out, real=nets.example(4))
    for seed in range(3):
        pixels = nets.example(1, seed=100 + seed)
        wanted = wrapped(network)(pixels).detach().numpy()
        np.testing.assert_allclose(answers(out, pixels), wanted, atol=1e-5)
    model = onnx.load(out)
    applied = [node.name for node in model.graph.node if node.op_type in cleanup.WEIGHTED]
    assert set(applied) == weighted(network) and len(applied) == len(set(applied))
    held = {item.name for item in model.graph.initializer}
    assert {f"{layer}.weight" for layer in weighted(network)} <= held
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert [(r.metric, r.n, r.conditions["inputs"]) for r in readings] == [
        (session.METRIC, 6, "random"),
        (session.METRIC, 4, "real"),
    ]
    assert all(r.value is not None and r.value < 1e-5 for r in readings)
    assert notes == () and artifact.opset == 20


@pytest.mark.parametrize(("opset", "file_version"), [(13, 7), (17, 8), (18, 8), (26, 13)])
def test_the_opset_is_the_one_that_was_asked_for_in_the_oldest_file_version_that_allows_it(
    opset: int, file_version: int, tmp_path: Path
) -> None:
    network, out = nets.build("depthwise"), tmp_path / "model.onnx"
    artifact, readings, notes = ship(network, out, opset=opset)
    model = onnx.load(out)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", opset)]
    assert (artifact.opset, model.ir_version) == (opset, file_version)
    assert {n.name for n in model.graph.node if n.op_type in cleanup.WEIGHTED} == weighted(network)
    assert {f"{layer}.weight" for layer in weighted(network)} <= {
        item.name for item in model.graph.initializer
    }
    assert len(notes) == (0 if opset == 18 else 1)
    assert readings[0].value is not None and readings[0].value < 1e-5


def test_an_old_opset_is_reached_by_conversion_where_onnx_can_convert(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    _, _, notes = ship(network, tmp_path / "model.onnx", opset=17)
    assert notes == ("model.onnx was exported at opset 18 and converted to 17",)
    model = onnx.load(tmp_path / "model.onnx")
    assert [n.name for n in model.graph.node if n.op_type in cleanup.WEIGHTED] == ["0", "3"]
    _, _, notes = ship(nets.build("residual"), tmp_path / "model.onnx", opset=17)
    assert len(notes) == 1 and "TorchScript" in notes[0]


def test_an_opset_that_can_not_be_had_is_refused_with_the_one_that_can(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        ship(Odd(lambda x: torch.special.erfcx(x).chunk(2)[0]), tmp_path / "model.onnx", opset=13)
    assert "opset 13" in refused.value.message

    def never_runs_into_it(x: Tensor) -> Tensor:
        return x if x.sum() > -1e9 else x * 2

    # The TorchScript exporter would take it, and the branch that no test image takes would be lost in silence.
    with pytest.raises(UnsupportedModel, match="data-dependent"):
        ship(Odd(never_runs_into_it), tmp_path / "model.onnx", opset=13)
    for opset in (0, 8, 99):
        with pytest.raises(UsageError, match="between 9 and"):
            ship(nets.build("plain"), tmp_path / "model.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_the_batch_is_one_unless_it_was_asked_to_be_open(tmp_path: Path) -> None:
    network, out = nets.build("residual"), tmp_path / "model.onnx"
    ship(network, out)
    (value,) = onnx.load(out).graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [1, *nets.SHAPE]
    _, readings, _ = ship(network, out, dynamic_batch=True, real=nets.example(2))
    graph = onnx.load(out).graph
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in (*graph.input, *graph.output)] == [
        "batch",
        "batch",
    ]
    assert [r.n for r in readings] == [6 + 6 * 3, 2]
    for batch in (1, 2, 7):
        pixels = nets.example(batch)
        np.testing.assert_allclose(answers(out, pixels), wrapped(network)(pixels).detach().numpy(), atol=1e-5)


@pytest.fixture(scope="module", params=[13, 20])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A file from each of torch's exporters."""
    out = tmp_path_factory.mktemp("shipped") / "model.onnx"
    return ship(nets.build("residual"), out, opset=request.param)[0]


def test_the_file_tells_nothing_of_the_machine_it_was_made_on(shipped: Artifact) -> None:
    model = onnx.load(shipped.path)
    said = texts(model)
    here = (str(Path(shipped.path).parent), str(Path.cwd()), sys.prefix)
    for private in (*here, ".py", "/", "stack_trace", "pkg.", "forward", "doc_string"):
        assert private not in said
    parts = (*model.graph.node, *model.graph.initializer, *model.graph.value_info, *model.graph.input)
    assert not any(part.metadata_props or part.doc_string for part in parts)


def test_the_file_says_what_it_eats_and_where_it_came_from(shipped: Artifact) -> None:
    model = onnx.load(shipped.path)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["edgeprune.version"] == edgeprune.__version__ == model.producer_version
    assert about["edgeprune.parent"] == "abc123" == shipped.parent
    assert json.loads(about["edgeprune.labels"]) == ["a", "b"]
    assert json.loads(about["edgeprune.normalization"])["mean"] == list(SPEC.mean)
    assert json.loads(about["edgeprune.normalization"])["std"] == list(SPEC.std)
    spec = json.loads(about["edgeprune.input"])
    assert (spec["shape"], spec["low"], spec["high"]) == ([*nets.SHAPE], 0.0, 1.0)


def test_one_whole_file_is_written_and_the_artifact_describes_it(shipped: Artifact) -> None:
    out = Path(shipped.path)
    assert list(out.parent.iterdir()) == [out]
    data = out.read_bytes()
    assert (shipped.sha256, shipped.size_bytes) == (sha256(data).hexdigest(), len(data))
    assert (shipped.format, shipped.precision, shipped.input) == ("onnx", "fp32", SPEC)
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_the_same_module_gives_the_same_bytes_and_nothing_is_printed(
    shipped: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = ship(nets.build("residual"), tmp_path / "again.onnx", opset=shipped.opset)[0]
    assert again.sha256 == shipped.sha256
    assert capfd.readouterr() == ("", "")


def brighter_when_exported(x: Tensor) -> Tensor:
    return x * 1.5 if torch.compiler.is_exporting() else x


def test_a_file_that_answers_differently_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"differs from the network .* by \S+ on (all|uniform|black)"
    ) as found:
        ship(Odd(brighter_when_exported), tmp_path / "model.onnx")
    assert found.value.exit_code == 5 and "export.tolerance" in found.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_differently_on_real_images_only_is_not_written(tmp_path: Path) -> None:
    def strange(x: Tensor) -> Tensor:
        return x.clamp(max=4.0) if torch.compiler.is_exporting() else x

    network = nn.Sequential(Strange(strange), nn.Flatten(), nn.Linear(3 * 64, 5))
    real = nets.example(3)
    real[1] += 9.0
    with pytest.raises(ParityError, match="on real image 1,"):
        ship(network, tmp_path / "model.onnx", spec=PLAIN, real=real)


def test_answers_that_are_not_numbers_are_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="answers all 0 with NaN or infinity"):
        ship(
            nn.Sequential(nn.Flatten(), Strange(torch.log), nn.Linear(192, 5)),
            tmp_path / "m.onnx",
            spec=PLAIN,
        )
    assert list(tmp_path.iterdir()) == []


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x * 2


@pytest.mark.parametrize(
    ("strange", "words"),
    [
        (branch, ("strange (Strange) ", "data-dependent")),
        (
            lambda x: x * x.max().item() if x.max().item() > 0 else x,
            ("strange (Strange) ", "data-dependent"),
        ),
        (lambda x: x * torch.linalg.svdvals(x).sum(), ("strange (Strange) ", "aten._linalg_svd")),
        (
            lambda x: x[:, :, :1] + x[:, :, :2].expand(1, 4, 7, 6),
            ("strange (Strange) ", "fails on an input"),
        ),
        (lambda x: {}["weights"], ("strange (Strange) ", "KeyError 'weights'")),
    ],
    ids=["branch", "item", "operator", "shape", "key"],
)
def test_what_can_not_be_exported_names_the_layer_and_torchs_reason(
    strange: Callable[[Tensor], Tensor], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        ship(Odd(strange), tmp_path / "model.onnx")
    for word in words:
        assert word in refused.value.message
    assert "Traceback" not in refused.value.message and "\n" not in refused.value.message
    assert refused.value.exit_code == 4 and refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_only_torchs_stricter_tracing_takes_is_exported_too(tmp_path: Path) -> None:
    def through_numpy(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    _, readings, _ = ship(Odd(through_numpy), tmp_path / "model.onnx")
    assert readings[0].value is not None and readings[0].value < 1e-5


def test_other_answers_than_logits_are_refused(tmp_path: Path) -> None:
    network = nets.build("plain")
    with pytest.raises(
        UnsupportedModel, match=r"is a tensor \(1, 5\); accepted: one tensor of logits \(1, 7\)"
    ):
        ship(network, tmp_path / "m.onnx", spec=InputSpec(nets.SHAPE, 7))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.network(x)}

    with pytest.raises(UnsupportedModel, match="is a dict"):
        stage.run(Pair(), PLAIN, tmp_path / "m.onnx", opset=20, table=ExportTable(), meta={}, real=None)


def test_an_open_batch_is_refused_where_the_network_fixes_it(tmp_path: Path) -> None:
    network = Odd(lambda x: x.reshape(1, 4, 36, 1))
    with pytest.raises(UnsupportedModel, match="batch") as refused:
        ship(network, tmp_path / "m.onnx", dynamic_batch=True)
    assert "dynamic_batch" in refused.value.hint
    ship(network, tmp_path / "m.onnx")


def test_a_network_that_does_not_fit_in_one_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_to_onnx, "MAX_BYTES", 1000)
    with pytest.raises(UnsupportedModel, match="one ONNX file holds at most"):
        ship(nets.build("plain"), tmp_path / "m.onnx")
    module = wrapped(nets.build("plain"))
    tensors = (*module.parameters(), *module.buffers())
    monkeypatch.setattr(torch_to_onnx, "MAX_BYTES", sum(t.numel() * t.element_size() for t in tensors))
    with pytest.raises(UnsupportedModel, match=r"m\.onnx would have .* holds at most"):
        ship(nets.build("plain"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def broken_slim(model: ModelProto, **_: object) -> ModelProto:
    raise AssertionError("no such pattern")


def wrong_slim(model: ModelProto, **_: object) -> ModelProto:
    for item in model.graph.initializer:
        if item.name.endswith("fc.weight"):
            array = onnx.numpy_helper.to_array(item) * 2
            item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))
    return model


def no_slim(model: ModelProto, **_: object) -> None:
    return None


def slim_of_another_opset(model: ModelProto, **_: object) -> ModelProto:
    model.opset_import[0].version = 19
    return model


def slim_that_loses_a_node(model: ModelProto, **_: object) -> ModelProto:
    del model.graph.node[3]
    return model


@pytest.mark.parametrize(
    ("slim", "words"),
    [
        (broken_slim, "onnxslim failed: no such pattern"),
        (no_slim, "gave no model"),
        (wrong_slim, "differs from"),
        (slim_of_another_opset, "has opset 19 where 20 was asked for"),
        (slim_that_loses_a_node, "fails onnx's check"),
    ],
)
def test_a_simplification_that_fails_or_changes_answers_is_left_away(
    slim: Callable[..., ModelProto], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup.onnxslim, "slim", slim)
    network = nets.build("residual")
    _, readings, notes = ship(network, tmp_path / "model.onnx")
    assert len(notes) == 1 and "was not simplified" in notes[0] and words in notes[0]
    assert readings[0].value is not None and readings[0].value < 1e-5
    pixels = nets.example()
    wanted = wrapped(network)(pixels).detach().numpy()
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", pixels), wanted, atol=1e-5)
