"""What a run leaves behind is enough to rebuild the network in a fresh process, and a wrong file is noticed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edgeprune
from edgeprune import serialization
from edgeprune.errors import ModelError, ParityError
from edgeprune.export import reload, stage
from edgeprune.models import architectures, surgery
from edgeprune.models.bundle import deployed
from edgeprune.onnx_graph import session
from edgeprune.records import Bundle, InputSpec, Plan, Reading, Source

SPEC = InputSpec((3, 8, 8), 5, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
ARCHITECTURE = """
from torch import nn

print("a user's file may print when it is imported")

def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )
"""


def plan(network: nn.Module, gone: tuple[int, ...]) -> Plan:
    """Cut output channels of the first convolution, and what belongs to them."""
    first = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    tensors = {name: ((0, gone),) for name in ("0.weight", "0.bias", *first)} | {"3.weight": ((1, gone),)}
    attributes = surgery.cut(network, tensors)
    return Plan({"0": gone}, tensors, attributes, {}, params=1, macs=2, params_before=3, macs_before=4)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Cut twice, after loading a state dict into an architecture of the user's own; statistics are lively."""
    folder = tmp_path / "own code"
    folder.mkdir()
    (folder / "network.py").write_text(ARCHITECTURE)
    torch.manual_seed(0)
    network = architectures.architecture(f"{folder / 'network.py'}:small").eval()
    norm = network.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(norm.running_mean)
    torch.save(network.state_dict(), folder / "weights.pt")
    digest = sha256((folder / "weights.pt").read_bytes()).hexdigest()
    source = Source("state_dict", str(folder / "weights.pt"), digest, f"{folder / 'network.py'}:small")
    plans = (plan(network, (1, 5)), plan(network, (0,)))
    return Bundle(network, source, SPEC, plans, labels=("a", "b", "c", "d", "e"))


@pytest.fixture
def run(bundle: Bundle, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    stage.save_modules(bundle, folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in this process: as fresh as the files are concerned, and quicker."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(options["input"]))
        return subprocess.CompletedProcess(command, reload.main(), "", "")

    monkeypatch.setattr(stage.subprocess, "run", run)


def values(readings: tuple[Reading, ...]) -> dict[str, float | None]:
    return {reading.artifact: reading.value for reading in readings}


def test_a_fresh_process_rebuilds_a_cut_network_both_ways(
    run: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The user's directory holds files called like modules of the standard library.
    for name in ("json", "random", "statistics"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')")
    monkeypatch.chdir(tmp_path)
    readings = stage.check_reload(run, SPEC, deployed(bundle))
    assert set(values(readings)) == {"plan.json and weights.safetensors", "model.pt2"}
    assert all(r.value is not None and r.value <= 1e-6 and r.n == 6 for r in readings)


def test_a_network_from_memory_is_rebuilt_from_its_program_alone(bundle: Bundle, tmp_path: Path) -> None:
    stage.save_modules(replace(bundle, source=Source("memory")), tmp_path)
    missing, found = stage.check_reload(tmp_path, SPEC, deployed(bundle))
    assert missing.value is None and "came from memory" in missing.conditions["why"]
    assert (found.artifact, found.metric) == ("model.pt2", session.METRIC)
    assert found.value is not None and found.value <= 1e-6


def test_the_plan_file_says_how_to_rebuild_the_network(run: Path, bundle: Bundle) -> None:
    known = serialization.read(reload.PlanFile, run / "plan.json")
    assert known == reload.PlanFile(edgeprune.__version__, bundle.source, SPEC, bundle.plans, bundle.labels)
    raw = json.loads((run / "plan.json").read_text())
    assert list(raw) == ["edgeprune", "source", "input", "plans", "labels"]
    assert [p["removed"] for p in raw["plans"]] == [{"0": [1, 5]}, {"0": [0]}]
    assert load_file(run / "weights.safetensors")["0.weight"].shape == (5, 3, 3, 3)


def test_the_program_has_an_open_batch_where_the_network_allows_it(
    run: Path, bundle: Bundle, tmp_path: Path
) -> None:
    program = torch.export.load(run / "model.pt2").module()
    for batch in (1, 2, 5):
        pixels = torch.rand(batch, *SPEC.shape)
        torch.testing.assert_close(program(pixels), deployed(bundle)(pixels))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(1, 192))

    stage.save_modules(Bundle(Fixed(), Source("memory"), SPEC), tmp_path)
    fixed = torch.export.load(tmp_path / "model.pt2")
    assert fixed.example_inputs is not None and fixed.example_inputs[0][0].shape == (1, *SPEC.shape)


def test_the_program_tells_nothing_of_the_machine_it_was_made_on(run: Path) -> None:
    with zipfile.ZipFile(run / "model.pt2") as archive:
        text = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert len(text) > 1000
    for private in (str(run), str(Path.cwd()), sys.prefix, ".py", "stack_trace"):
        assert private.encode() not in text


def test_weights_that_layers_share_are_written_for_each(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 5))
    network[2].weight = network[1].weight
    stage.save_modules(Bundle(network.eval(), Source("memory"), SPEC), tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(weights["1.weight"], weights["2.weight"])
    assert set(weights) == set(network.state_dict())


@pytest.mark.usefixtures("here")
def test_weights_that_are_not_the_networks_are_noticed(run: Path, bundle: Bundle) -> None:
    weights = load_file(run / "weights.safetensors")
    weights["6.bias"] += 0.01
    save_file(weights, run / "weights.safetensors")
    with pytest.raises(ParityError, match=r"plan.json and weights.safetensors differs from the network"):
        stage.check_reload(run, SPEC, deployed(bundle))


@pytest.mark.usefixtures("here")
def test_a_program_that_is_not_the_networks_is_noticed(run: Path, bundle: Bundle) -> None:
    other = architectures.architecture(bundle.source.arch).eval()
    with pytest.raises(ParityError, match="differs from the network"):
        stage.check_reload(run, SPEC, deployed(replace(bundle, module=other)))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda run, own: (own / "network.py").unlink(),
            "plan.json and weights.safetensors: --arch: no file",
        ),
        (
            lambda run, own: (own / "network.py").write_text(ARCHITECTURE.replace("8", "7")),
            "plan.json and weights",
        ),
        (lambda run, own: (run / "model.pt2").unlink(), "model.pt2: "),
        (lambda run, own: (run / "model.pt2").write_bytes(b"PK nothing"), "model.pt2: "),
    ],
    ids=["no code", "other code", "no program", "broken program"],
)
def test_what_can_not_be_rebuilt_says_from_which_file_and_why(
    spoil, words, run: Path, bundle: Bundle
) -> None:
    spoil(run, Path(bundle.source.path).parent)
    with pytest.raises(ModelError) as refused:
        stage.check_reload(run, SPEC, deployed(bundle))
    assert "a fresh process can't rebuild the network from" in refused.value.message
    assert words in refused.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"edgeprune": "1"}', '{"edgeprune": 1}'])
def test_a_broken_plan_file_is_named(text: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ModelError, match=r"plan\.json is not a"):
        stage.check_reload(tmp_path, SPEC, deployed(bundle))


def test_a_process_that_dies_or_hangs_is_a_model_error(
    run: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, stderr, words in (
        (3, "", "status 3"),
        (1, "Traceback\nValueError: all wrong\n", "ValueError: all wrong"),
    ):
        done = subprocess.CompletedProcess([], status, "", stderr)
        monkeypatch.setattr(stage.subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(ModelError, match=words):
            stage.check_reload(run, SPEC, deployed(bundle))

    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(stage.subprocess, "run", hang)
    with pytest.raises(ModelError, match="did not rebuild the network in"):
        stage.check_reload(run, SPEC, deployed(bundle))
