"""The phone behind adb: what adb says, and ONNX Runtime's benchmark program where there is no Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import adb_stand_in
import pytest
from onnx_files import write_net, write_one_conv

from edgeprune.devices import _ort_perf_test
from edgeprune.devices._base import Device, device_from_url
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, MissingDependency, ModelError, UsageError
from edgeprune.measure import latency
from edgeprune.recipe.schema import MeasureTable

# As the sources of ONNX Runtime write it: the folder of the model, seconds with six digits, bytes, %, number; then the
# statistics.
ROWS = """models,0.0105,36696064,96,0
models,0.0102016,36696064,96,1
a, b,1.85739e-05,36700160,97,2

Min Latency: 1.85739e-05 s
P50 Latency: 0.0102016 s
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that says what the stand-in does; its phone is on the path."""
    folder = tmp_path / "adb"
    monkeypatch.setenv("PATH", f"{adb_stand_in.install(folder)}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(
    ("serial", "words"),
    [
        ("", ["adb", "shell", "-T", "exec true"]),
        ("emulator-5554", ["adb", "-s", "emulator-5554", "shell", "-T", "exec true"]),
        ("192.168.1.9:5555", ["adb", "-s", "192.168.1.9:5555", "shell", "-T", "exec true"]),
        ("adb-x._adb-tls-connect._tcp", ["adb", "-s", "adb-x._adb-tls-connect._tcp", "shell", "-T", "exec true"]),
    ],
)  # fmt: skip
def test_a_serial_number_becomes_words_for_adb(serial: str, words: list[str]) -> None:
    device: Any = device_from_url(f"adb://{serial}")
    assert device.name == f"adb://{serial}"
    assert device.line.attach(["true"]) == words


@pytest.mark.parametrize(
    "serial", ["-s", "a b", "a;b", "$(id)", "`id`", "a'b", "a\nb", "a/b", "user@host", "?x=1"]
)
def test_a_hostile_serial_number_is_refused(serial: str) -> None:
    with pytest.raises(UsageError, match="not a serial number"):
        device_from_url(f"adb://{serial}")


@pytest.mark.parametrize(
    ("fault", "what", "fix"),
    [
        ("error: no devices/emulators found", "no phone is connected", "USB debugging"),
        (
            "error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set",
            "not allowed this",
            "unlock it",
        ),
        ("error: device still authorizing", "not allowed this", "unlock it"),
        ("error: more than one device/emulator", "several are connected", "--device adb://SERIAL"),
        ("error: device offline", "offline", "reconnect"),
        ("error: target doesn't support PTY args -Tt", "older than 7", "newer phone"),
        ("error: closed", "error: closed", "adb devices -l"),
    ],
)
def test_what_adb_says_comes_with_what_to_do(
    phone: Path, tmp_path: Path, fault: str, what: str, fix: str
) -> None:
    (phone / "fault").write_text(f"{fault}\n")
    device = device_from_url("adb://")
    for act in (
        device.facts,
        lambda: device.put(Path(__file__), "/x"),
        lambda: device.get("/x", tmp_path / "x"),
        lambda: device.folder().__enter__(),
    ):
        with pytest.raises(DeviceError) as caught:
            act()
        assert what in caught.value.message
        assert fix in caught.value.hint


def test_a_serial_number_that_is_not_connected_is_named(phone: Path) -> None:
    with pytest.raises(DeviceError, match="device 'nope' not found") as caught:
        device_from_url("adb://nope").facts()
    assert "adb devices" in caught.value.hint


def test_a_machine_without_adb_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    device = device_from_url("adb://")
    for act in (device.facts, lambda: device.put(Path(__file__), "/x")):
        with pytest.raises(DeviceError, match="no adb on this machine") as caught:
            act()
        assert caught.value.hint == "sudo apt install adb"


def test_a_full_phone_keeps_no_part_of_a_file(phone: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(1000))
    (phone / "full").write_text("")
    device = device_from_url("adb://")
    with device.folder() as folder:
        with pytest.raises(DeviceError, match="No space left") as caught:
            device.put(tmp_path / "model", f"{folder}/model")
        assert "free some space on the phone" in caught.value.hint
        assert device.check(["ls", folder]) == ""


def test_a_phone_without_python_names_both_ways_out(phone: Path) -> None:
    (phone / "only").mkdir()
    for name in ("sh", "cat", "head", "wc", "mktemp", "rm"):
        (phone / "only" / name).symlink_to(f"/usr/bin/{name}")
    stand_in = phone / "bin" / "adb"
    stand_in.write_text(stand_in.read_text().replace("export TMPDIR", f"PATH={phone}/only\nexport TMPDIR", 1))
    with pytest.raises(MissingDependency, match="adb:// has no python3") as caught:
        device_from_url("adb://").ask({"op": "about", "runtime": "onnxruntime"}, timeout_s=60)
    assert "benchmark" in caught.value.hint and "Termux" in caught.value.hint
    assert "sudo" not in caught.value.hint and "?python=" not in caught.value.hint


def test_pip_is_no_way_to_onnx_runtime_on_a_phone() -> None:
    phone = device_from_url("adb://")
    said = {"error": "no onnxruntime", "kind": "MissingDependency", "hint": "pip install onnxruntime"}
    with pytest.raises(MissingDependency, match="no onnxruntime") as caught:
        phone.told(phone.agent(), Answer(3, json.dumps(said), ""))
    assert "benchmark" in caught.value.hint and "-m pip" not in caught.value.hint


def test_rows_of_a_result_file_become_seconds() -> None:
    assert _ort_perf_test.samples(ROWS) == [0.0105, 0.0102016, 1.85739e-05]


@pytest.mark.parametrize(
    "rows",
    [
        "",
        "\nP50 Latency: 1 s\n",
        "m,nan,1,1,0\n",
        "m,0,1,1,0\n",
        "m,-1,1,1,0\n",
        "m,x,1,1,0\n",
        "m,1e300,1,1,0\n",
        "m,\u0660.\u0665,1,1,0\n",
        "m,0_1,1,1,0\n",
    ],
)
def test_a_result_file_without_times_is_a_device_error(rows: str) -> None:
    with pytest.raises(DeviceError, match="wrote no times"):
        _ort_perf_test.samples(rows)


@pytest.fixture
def native(phone: Path, tmp_path: Path) -> Device:
    """A phone with the benchmark program."""
    return adb_stand_in.native(tmp_path / "built")


def test_the_benchmark_program_times_models_in_turns(native: Device, phone: Path, tmp_path: Path) -> None:
    files = {"dense": write_net(tmp_path / "dense.onnx"), "compressed": write_net(tmp_path / "model.onnx")}
    with native.holding(files) as paths:
        request = {"op": "time", "runtime": "onnxruntime", "models": paths, "threads": 2, "iterations": 48}
        answer = native.ask({**request, "warmup": 12, "seconds": 10.0}, timeout_s=60)
    assert answer["models"]["dense"]["wall_ns"] == [4_000_000] * 48, (
        "the first run of a process is not counted"
    )
    assert answer["models"]["compressed"]["wall_ns"] == [2_000_000] * 48
    assert (answer["stopped"], answer["block"], answer["clock"]) == ("iterations", 4, "wall")
    calls = (phone / "calls").read_text().splitlines()
    assert ["dense" in call for call in calls[2:8]] == [True, False, False, True, True, False]
    assert all(" -I -m times -r " in call and " -x 2 -o 99 " in call for call in calls)
    assert not list((phone / "phone").iterdir()), "nothing is left there"


def test_the_benchmark_program_stops_when_its_time_is_up(native: Device, phone: Path, tmp_path: Path) -> None:
    with native.holding({"dense": write_net(tmp_path / "dense.onnx")}) as paths:
        request = {"op": "time", "runtime": "onnxruntime", "models": paths, "threads": 1, "iterations": 10**6}
        answer = native.ask({**request, "warmup": 0, "seconds": 0.55}, timeout_s=60)
    # 0.55 s in 12 rounds of runs that take up to 9 ms: 5 in each.
    assert len(answer["models"]["dense"]["wall_ns"]) == 60
    assert answer["stopped"] == "seconds"


def test_a_slow_and_a_fast_model_are_compared_round_by_round(native: Device, tmp_path: Path) -> None:
    files = {"dense": write_net(tmp_path / "slow.onnx"), "compressed": write_net(tmp_path / "model.onnx")}
    timed = latency.latency(files, native, MeasureTable(iterations=1000, seconds=0.9, warmup=12))
    # 0.9 s of each, in 12 rounds of 20 and 9 ms: 5 of each in a round.
    assert {name: len(times) for name, times in timed.samples.items()} == {"dense": 60, "compressed": 60}
    ratio = timed.ratios["wall"]
    assert ratio.n == _ort_perf_test.ROUNDS >= latency.LEAST_BLOCKS
    assert ratio.value == pytest.approx(10.0)


def test_the_time_of_a_file_with_a_batch_is_that_of_one_image(native: Device, tmp_path: Path) -> None:
    files = {f"b{n}": write_one_conv(tmp_path / f"m{n}.onnx", batch=n) for n in (1, 8)}
    files["free"] = write_one_conv(tmp_path / "m.onnx", batch="N")
    timed = latency.latency(files, native, MeasureTable(iterations=12, seconds=1.0, warmup=12))
    rows = {name: readings[0] for name, readings in timed.readings.items()}
    assert {name: row.value for name, row in rows.items()} == pytest.approx(
        {"b1": 0.002, "b8": 0.00025, "free": 0.002}
    )
    assert [row.conditions["batch"] for row in rows.values()] == [1, 8, 1]


def test_a_file_that_is_no_onnx_is_not_taken_for_one_image(native: Device, tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_bytes(b"ORTM")
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        latency.latency({"a": tmp_path / "model.ort"}, native, MeasureTable(iterations=12, seconds=1.0))


def test_a_benchmark_program_that_leaves_runs_out_is_a_device_error(native: Device, tmp_path: Path) -> None:
    request = {"op": "time", "threads": 1, "iterations": 12, "warmup": 0, "seconds": 1.0}
    with (
        native.holding({"dense": write_net(tmp_path / "few.onnx")}) as models,
        pytest.raises(DeviceError, match="wrote 4 times of 5 runs"),
    ):
        native.ask({**request, "models": models}, timeout_s=60)


def test_what_the_benchmark_program_does_not_tell_is_absent_and_says_why(native: Device) -> None:
    ask = {"runtime": "onnxruntime"}
    assert native.ask({"op": "about", **ask}, timeout_s=60)["cores"] == os.cpu_count()
    memory = native.ask({"op": "memory", **ask}, timeout_s=60, env={"A": "b"})
    assert (memory["peak"], memory["why"]) == (None, "onnxruntime_perf_test does not tell memory")
    assert native.ask({"op": "energy", **ask}, timeout_s=60)["joule"] is None
    assert native.ask({"op": "profile", **ask}, timeout_s=60)["nodes"] == []
    with pytest.raises(UsageError, match="latency alone"):
        native.ask({"op": "predict", **ask}, timeout_s=60)


def test_a_benchmark_program_that_fails_says_its_last_words(native: Device, tmp_path: Path) -> None:
    with native.holding({"dense": write_net(tmp_path / "broken.onnx")}) as paths:
        request = {"op": "time", "models": paths, "threads": 1, "iterations": 40, "warmup": 0, "seconds": 1.0}
        with pytest.raises(DeviceError, match=r"status 1: Invalid model \(on adb://"):
            native.ask(request, timeout_s=60)


def test_a_benchmark_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match="no onnxruntime_perf_test at") as caught:
            device_from_url("adb://", {"benchmark": str(path)})
        assert "[setup]" in caught.value.hint


def test_a_request_is_answered_as_the_agent_would() -> None:
    answer = _ort_perf_test.respond(
        json.dumps({"op": "fly"}), "/x", lambda argv, limit: pytest.fail("nothing to run")
    )
    assert answer.status == 2
    assert json.loads(answer.stdout)["kind"] == "UsageError"
