"""Devices: what they run, what they say about themselves, and what goes wrong on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from onnx_files import Scripted, write_net

from edgeprune.devices._base import device_from_url
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, MissingDependency, ModelError, UsageError
from edgeprune.measure import latency
from edgeprune.recipe.schema import MeasureTable

TABLE = MeasureTable(iterations=200)
TWO = '{"dense": {"wall_ns": [9000]}, "compressed": {"wall_ns": [9000]}}'


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return {
        "dense": write_net(tmp_path / "dense.onnx", 32),
        "compressed": write_net(tmp_path / "model.onnx", 16),
    }


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"weather": {}}', '{"latency_s": 3}', '{"latency_s": {}}', "[" * 10**5,
        '{"latency_s": {"dense": [NaN]}}',
        '{"latency_s": {"dense": ["x"]}}',
        '{"latency_s": {"dense": [1e300]}}',
        '{"memory_bytes": {"dense": "x"}}',
        '{"facts": {"cores": []}}',
        '{"nodes": {"dense": 1}}',
        '{"classes": true}',
        '{"classes": 1000000}',
        '{"classes": 3, "classes": 4}',
    ],
)  # fmt: skip
def test_a_wrong_file_of_canned_readings_is_refused(
    tmp_path: Path, pair: dict[str, Path], content: str
) -> None:
    (tmp_path / "readings.json").write_text(content)
    with pytest.raises(UsageError, match=r"readings\.json"):
        latency.latency(pair, Fake(str(tmp_path / "readings.json")), TABLE)


def test_a_command_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(DeviceError, match=r"longer than 0\.2 s .*tail -f /dev/null"):
        Local().run(["tail", "-f", "/dev/null"], "", 0.2)


def test_a_command_that_is_not_there_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="can't be started"):
        Local().run([str(tmp_path / "nothing")], "", 5)
    with pytest.raises(DeviceError, match="status 1"):
        Local().check(["sh", "-c", "echo broken >&2; exit 1"])
    with pytest.raises(DeviceError, match="can't be copied"):
        Local().put(tmp_path / "nothing", str(tmp_path / "copy"))
    assert Fake().run(["reboot"], "", 5).status == 127


def test_a_module_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    assert (
        Local()
        .ask({"op": "about", "runtime": "onnxruntime"}, timeout_s=60)["runtime"]
        .startswith("onnxruntime")
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "ftp://jetson",
            "device 'ftp://jetson': accepted are local[://?python=PATH], ssh://[user@]host[:port], adb://[serial]",
        ),
        ("", "accepted are local"),
        ("shh://user:secret@host", "'shh://user:***@host'"),
        ("local:8", "'local:8' is none"),
        ("ssh://", "names no machine"),
    ],
)
def test_a_url_that_names_no_device_is_a_usage_error(url: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        device_from_url(url)
    assert said in caught.value.message
    assert caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


def test_this_machine_says_what_it_is() -> None:
    facts = Local().facts()
    assert facts["cores"] >= 1
    assert facts["machine"]
    assert latency.where(Local()) == f"local {facts['machine']}"


def test_facts_are_numbers_in_base_units_and_what_is_not_said_is_absent() -> None:
    @dataclass(frozen=True)
    class Said(Scripted):
        def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
            return self.answer

    text = (
        "machine=aarch64\nboard=NVIDIA Jetson\ncpu=\nbrand=Apple\nmemory_kb=2000\nclock_khz=1500000\nclock_mhz=1.0\n"
        "temperature=41000\ntemperature=52500\ntemperature=-1\nload=0.25 0.5 1\nflags=fp asimd\ncores=x\nnoise\n"
    )
    assert Said(Answer(0, text, "")).facts() == {
        "machine": "aarch64", "board": "NVIDIA Jetson", "cpu": "Apple", "memory_bytes": 2_048_000, "clock_hz": 1.5e9,
        "temperature_c": 52.5, "load": 0.25, "flags": ["asimd", "fp"],
    }  # fmt: skip
    endless = "9" * 400
    assert (
        Said(Answer(0, f"cores={endless}\nload=-1\nclock_mhz={endless}\ntemperature={endless}\n", "")).facts()
        == {}
    )
    with pytest.raises(DeviceError, match="status 1"):
        Said(Answer(1, "", "no shell")).facts()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            Answer(-11, "", "one\ntwo\nlast words"),
            "killed by signal 11: the-agent; its last words: one | two | last words",
        ),
        (
            Answer(1, "", "Traceback\nMemoryError"),
            "status 1: the-agent; its last words: Traceback | MemoryError",
        ),
        (Answer(0, "not json", ""), "not json"),
        (Answer(0, "[1]", ""), "JSON object"),
        (Answer(3, "{}", "broken"), "status 3"),
        (Answer(0, "{}", ""), "no times for 'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": []}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [1, -1]}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [1, NaN]}}}', ""), "NaN is not a finite number"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [1], "cpu_ns": [1, 2]}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [1], "batch": 0}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [true]}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": ["1"]}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [1e-30]}}}', ""), "'dense'"),
        (Answer(0, f'{{"models": {{"dense": {{"wall_ns": [1{"0" * 290}]}}}}}}', ""), "'dense'"),
        (Answer(0, f'{{"models": {{"dense": {{"wall_ns": [9], "batch": 1{"0" * 99}}}}}}}', ""), "'dense'"),
        (Answer(0, '{"models": {"dense": {"wall_ns": [9], "batch": true}}}', ""), "'dense'"),
        (Answer(0, f'{{"models": {TWO}, "block": "x"}}', ""), "block = 'x'"),
        (Answer(0, f'{{"models": {TWO}, "block": null}}', ""), "block = None"),
        (Answer(0, f'{{"models": {TWO}, "models": {TWO}}}', ""), "'models' stands twice"),
        (Answer(70, '{"error": "odd", "kind": "Strange"}', ""), "odd"),
    ],
)
def test_a_crash_or_nonsense_from_the_device_is_a_device_error(
    pair: dict[str, Path], answer: Answer, said: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        latency.latency(pair, Scripted(answer), TABLE)
    assert said in caught.value.message
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("MissingDependency", MissingDependency), ("ModelError", ModelError), ("UsageError", UsageError)],
)
def test_errors_of_the_agent_keep_their_kind_and_hint(
    pair: dict[str, Path], kind: str, expected: Any
) -> None:
    said = {"error": "no runtime", "kind": kind, "hint": "pip install onnxruntime"}
    with pytest.raises(expected) as caught:
        latency.latency(pair, Scripted(Answer(3, json.dumps(said), "")), TABLE)
    assert caught.value.message == "no runtime (on scripted)"
    assert caught.value.hint == "pip install onnxruntime"
