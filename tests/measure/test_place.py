"""When a machine is the target: another one that was named for it, or this one where its device tree says so."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from onnx_files import write_net
from reports import budget, check, plain_report, reading

from edgeprune import targets
from edgeprune.devices._base import Device
from edgeprune.devices.fake import Fake
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import MissingDependency
from edgeprune.gate import verdict as verdict_module
from edgeprune.host import machine
from edgeprune.measure import roofline, stage
from edgeprune.measure.place import on_target
from edgeprune.pipeline import intermediates
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.run_directory import Workdir
from edgeprune.recipe import parse
from edgeprune.recipe.schema import MeasureTable
from edgeprune.records import Bundle, InputSpec, Plan, Source, Target

# What /proc/device-tree/model says.
MODELS = {
    "jetson-orin-nano": (
        "NVIDIA Jetson Orin Nano Developer Kit",
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    ),
    "jetson-orin-nx": ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit",),
    "jetson-agx-orin": ("NVIDIA Jetson AGX Orin Developer Kit",),
    "jetson-xavier-nx": ("NVIDIA Jetson Xavier NX Developer Kit",),
    "jetson-nano": ("NVIDIA Jetson Nano Developer Kit",),
    "raspberry-pi-4": ("Raspberry Pi 4 Model B Rev 1.5",),
    "raspberry-pi-5": ("Raspberry Pi 5 Model B Rev 1.0",),
}
SPEC = InputSpec((3, 8, 8), 10)
PLAN = Plan({}, {}, {}, {}, 100, 1000, 200, 2000)


@dataclass(frozen=True)
class Here(Device):
    """This machine, with canned readings and a board that a test says."""

    board: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "local"

    def facts(self) -> dict[str, Any]:
        return {**Fake().facts(), "board": self.board, **self.more}

    def run(self, argv: Any, stdin: str, timeout_s: float) -> Answer:
        return Fake().run(argv, stdin, timeout_s)

    def put(self, here: Path, there: str) -> None:
        Fake().put(here, there)

    def get(self, there: str, here: Path) -> None:
        Fake().get(there, here)

    def agent(self) -> list[str]:
        return Fake().agent()


@pytest.mark.parametrize("name", MODELS)
def test_a_board_is_its_own_target_and_no_other(name: str) -> None:
    for model in MODELS[name]:
        assert [n for n in MODELS if on_target(targets.target(n), Here(model))] == [name]
        assert not on_target(targets.target(name), Here(model, {"emulated": True}))


def test_this_machine_is_the_target_local_and_another_one_that_was_named_is_any() -> None:
    assert on_target(targets.target("local"), Here())
    assert on_target(targets.target("jetson"), Fake())
    assert not on_target(targets.target("jetson"), Here())
    assert not on_target(targets.target("android-arm64"), Here("Pixel")), "a target without a board"


def test_a_container_is_told_its_board_by_a_file(tmp_path: Path) -> None:
    """As `docker run -v /proc/device-tree/model:/tmp/nv_jetson_model` does it."""
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert "/proc/device-tree/model /tmp/nv_jetson_model" in machine.FACTS
    script = machine.FACTS.replace("/proc/device-tree/model", str(tmp_path / "none"))
    script = script.replace("/tmp/nv_jetson_model", str(tmp_path / "model"))
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert machine.parse(said)["board"] == "NVIDIA Jetson Orin Nano Developer Kit"


def pair(folder: Path) -> dict[str, Path]:
    names = {"dense": ("dense.onnx", 32), "compressed": ("model.onnx", 16)}
    return {name: write_net(folder / file, width) for name, (file, width) in names.items()}


@pytest.mark.parametrize("board", ["NVIDIA Jetson Orin Nano Developer Kit", ""])
def test_readings_of_the_board_itself_say_so_and_the_gate_believes_them(board: str, tmp_path: Path) -> None:
    target, said = targets.target("jetson"), f"Nothing has been measured on {targets.target('jetson').title}"
    wanted = stage.MeasureRequest(SPEC, Here(board), MeasureTable(), target, None, lambda _: None)
    found = stage.run(wanted, pair(tmp_path), PLAN)
    marked = {r.metric for r in found.after if r.conditions.get("on_target") is True}
    timed = {"latency_p50", "latency_p90", "latency_p99", "peak_memory"}
    assert marked == (timed if board else set())
    assert any(note.startswith(said) for note in found.notes) is not bool(board)
    made = plain_report(list(found.before), list(found.after), "jetson-orin-nano")
    assert ("not on jetson" in check(made, "latency_p50", "1 s").detail) is not bool(board)


def test_readings_for_this_machine_need_no_mark(tmp_path: Path) -> None:
    wanted = stage.MeasureRequest(SPEC, Here(), MeasureTable(), targets.target("local"), None, lambda _: None)
    found = stage.run(wanted, pair(tmp_path), PLAN)
    assert not [r for r in found.after if "on_target" in r.conditions]


def test_a_measurement_on_the_target_goes_before_an_estimate_and_that_before_another_machine() -> None:
    guess = reading("latency_p50", 0.2, where="estimated: roofline", spread=(0.1, 0.3))
    here = reading("latency_p50", 0.5)
    itself = replace(here, conditions={"on_target": True})
    far = replace(here, where="ssh://board aarch64")
    allowed = replace(budget(latency_p50="1 s"), allow_estimates=True)

    def value(*readings: Any) -> float | None:
        made = plain_report([], list(readings), "jetson-orin-nano")
        return verdict_module.run(made, allowed, None, baseline_missing=False).checks[0].value

    assert value(here, guess) == value(guess, here) == 0.2
    assert value(itself, guess) == value(guess, itself) == 0.5
    assert value(far, guess) == value(guess, far) == 0.5
    assert value(guess, replace(far, conditions={"emulated": True})) == 0.2


def run_of(folder: Path, target: Target, device: Any) -> Context:
    made = parse.build({}, {"target": "jetson"})
    model = Bundle(None, Source("pt2", "net.pt2", "1"), SPEC)  # type: ignore[arg-type]
    return Context(made, target, parse.budget(made), Workdir(folder), model, None, device, lambda _: None)


def without_onnxruntime(*_: Any, **__: Any) -> Any:
    raise MissingDependency("ONNX Runtime can't be imported", "pip install onnxruntime")


def test_an_estimate_that_can_not_be_validated_says_so_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "latency", without_onnxruntime)
    target = targets.target("jetson")
    found, (note,) = intermediates.estimates(run_of(tmp_path, target, Here()), pair(tmp_path))
    assert note.endswith("not validated: no layers were timed here: ONNX Runtime can't be imported).")
    guess = found["compressed"]
    assert guess.value and guess.spread is None
    assert guess.conditions["validation"] == "none: no layers were timed here: ONNX Runtime can't be imported"
    allowed = replace(budget(latency_p50="1 s"), allow_estimates=True)
    made = plain_report([], [guess], "jetson-orin-nano")
    verdict = verdict_module.run(made, allowed, None, baseline_missing=False)
    assert (verdict.exit_code, "ONNX Runtime can't be imported" in verdict.checks[0].detail) == (8, True)


def test_the_target_itself_needs_no_estimate(tmp_path: Path) -> None:
    board = Here("NVIDIA Jetson Orin Nano Developer Kit")
    run = run_of(tmp_path, targets.target("jetson"), board)
    assert run.decisions.on_target and intermediates.estimates(run, {}) == ({}, ())
    assert not run_of(tmp_path, targets.target("jetson"), Here()).decisions.on_target
