"""The program that runs on the device: its protocol, and that it measures what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_files import write_one_conv

import edgeprune
from edgeprune.agent import program, resources
from edgeprune.agent import timing as timing_module
from edgeprune.devices.local import Local
from edgeprune.errors import MissingDependency, UsageError
from edgeprune.runtimes._base import NodeTime, Runtime, Session
from edgeprune.runtimes.onnxruntime import OnnxRuntime

ORT = {"runtime": "onnxruntime"}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write_one_conv(tmp_path / "net.onnx")


def start(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeprune.agent"], input=text, capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(edgeprune.__file__).parent.parent,
    )  # fmt: skip


def test_it_answers_one_json_object_on_stdout_and_nothing_else() -> None:
    done = start(json.dumps({"op": "about", **ORT}))
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["python"] == ".".join(str(v) for v in sys.version_info[:3])
    assert answer["runtime"].startswith("onnxruntime ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "code", "kind"),
    [
        ("{", 2, "UsageError"),
        ("[1]", 2, "UsageError"),
        ("[" * 100_000, 2, "UsageError"),
        (json.dumps({"op": "fly", **ORT}), 2, "UsageError"),
        (json.dumps({"op": "memory", "model": "/no/such.onnx", "threads": 1, **ORT}), 4, "ModelError"),
    ],
)
def test_errors_are_answers_with_the_exit_code_of_their_kind(text: str, code: int, kind: str) -> None:
    done = start(text)
    assert done.returncode == code
    answer = json.loads(done.stdout)
    assert answer["kind"] == kind
    assert answer["error"]
    assert "Traceback" not in done.stderr


def test_a_library_that_prints_does_not_spoil_the_answer() -> None:
    code = (
        "import os, sys, edgeprune.agent.program as a\n"
        "a.handle = lambda request: [print('noise'), os.write(1, b'noise'), {'fine': True}][-1]\n"
        "sys.exit(a.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="{}", capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(edgeprune.__file__).parent.parent,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"fine": True}
    assert "noise" in done.stderr


class Recorded(Session):
    """A session that writes down that it ran."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.input_shape = name, log, (2, 3, 4, 4)

    def infer(self, x: Any) -> Any:
        self.log.append(self.name)
        return np.zeros((len(x), 10), np.float32)

    def ready(self, x: Any) -> Any:
        def run() -> None:
            self.infer(x)

        return run


class RecordedRuntime(Runtime):
    """A runtime whose sessions write down that they ran."""

    accepts = ("fp32",)

    def __init__(self) -> None:
        self.log: list[str] = []

    def version(self) -> str:
        return "recorded 1.0"

    def make(self, onnx: Path, out: Path, precision: str) -> None:
        out.write_bytes(onnx.read_bytes())

    def open(self, built: Path, threads: int) -> Session:
        return Recorded(built.name, self.log)

    def profile(self, built: Path, threads: int, runs: int, shape: Any) -> list[NodeTime]:
        return []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedRuntime:
    runtime = RecordedRuntime()
    monkeypatch.setattr(program, "runtime_of", lambda name, options: runtime)
    return runtime


def timing(**change: Any) -> dict[str, Any]:
    request = {
        "op": "time",
        "models": {"a": "A", "b": "B"},
        "threads": 1,
        "warmup": 2,
        "iterations": 10,
        "seconds": 60,
    }
    return {**request, **ORT, **change}


def test_models_take_turns_in_blocks_and_in_changing_order(recorded: RecordedRuntime) -> None:
    program.handle(timing())
    checked, warmed = "AB", "ABAB"
    # each block starts with a run that is not counted
    assert "".join(recorded.log) == checked + warmed + "A" * 6 + "B" * 6 + "B" * 6 + "A" * 6


def test_as_many_runs_are_counted_as_were_asked_for(recorded: RecordedRuntime) -> None:
    answer = program.handle(timing(iterations=13))
    for row in answer["models"].values():
        assert len(row["wall_ns"]) == len(row["cpu_ns"]) == 13
        assert row["batch"] == 2
        assert all(isinstance(v, int) and v > 0 for v in row["wall_ns"])


def test_when_time_is_up_ten_runs_are_still_made(recorded: RecordedRuntime) -> None:
    answer = program.handle(timing(iterations=10**6, seconds=1e-9, warmup=10**6))
    assert len(answer["models"]["a"]["wall_ns"]) == 10
    assert answer["warmup"] == 0


def test_cpu_time_is_left_out_where_other_threads_do_part_of_the_work(recorded: RecordedRuntime) -> None:
    answer = program.handle(timing(threads=2))
    assert answer["models"]["a"]["cpu_ns"] == []
    assert len(answer["models"]["a"]["wall_ns"]) == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": {}}, "models"),
        ({"models": "net.onnx"}, "models"),
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"iterations": "many"}, "iterations"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"shape": [3, 8]}, "shape"),
        ({"runtime": "../evil"}, "runtime"),
        ({"runtime": "nothing_like_it"}, "nothing_like_it"),
        ({"op": "predict"}, "model"),
        ({"op": None}, "operation"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], said: str, net: Path) -> None:
    with pytest.raises(UsageError, match=said):
        program.handle({**timing(models={"a": str(net)}), **change})


def test_memory_grows_by_at_least_the_weights(tmp_path: Path) -> None:
    """2,000,000 more weights of 4 bytes; the images and the activations are the same, but for the channels."""
    added = {}
    for channels in (16, 56_000):
        path = write_one_conv(tmp_path / f"{channels}.onnx", channels=channels, size=1)
        answer = Local().ask({"op": "memory", "model": str(path), "threads": 1, **ORT}, timeout_s=60)
        if answer["peak"] is None:
            pytest.skip(answer["why"])
        assert answer["at_load"] <= answer["peak"]
        added[channels] = answer["peak"]
    more = (56_000 - 16) * (27 + 10) * 4
    assert added[56_000] - added[16] > 0.9 * more


def test_memory_is_absent_with_a_reason_where_the_system_does_not_tell(tmp_path: Path, net: Path) -> None:
    request = {"model": str(net), "threads": 1}
    answer = resources.memory_reply(request, OnnxRuntime(), tmp_path)
    assert answer["peak"] is None
    assert "/proc" in answer["why"]


def test_memory_is_absent_when_an_earlier_peak_hides_the_model(tmp_path: Path, net: Path) -> None:
    (tmp_path / "status").write_text("VmHWM:\t500 kB\nVmRSS:\t100 kB\n")
    answer = resources.memory_reply({"model": str(net), "threads": 1}, OnnxRuntime(), tmp_path)
    assert answer["peak"] is None
    assert "clear_refs" in answer["why"]


def test_a_process_that_seems_to_shrink_has_added_nothing(tmp_path: Path, net: Path) -> None:
    (tmp_path / "status").write_text("VmHWM:\t90 kB\nVmRSS:\t100 kB\n")
    answer = resources.memory_reply({"model": str(net), "threads": 1}, OnnxRuntime(), tmp_path)
    assert (answer["peak"], answer["at_load"], answer["baseline"]) == (0, 0, 100 * 1024)


def test_memory_tells_what_of_it_is_private(net: Path) -> None:
    if not Path("/proc/self/smaps_rollup").is_file():
        pytest.skip("the kernel has no smaps_rollup")
    answer = Local().ask({"op": "memory", "model": str(net), "threads": 1, **ORT}, timeout_s=60)
    assert 0 < answer["private_dirty_added"] <= answer["pss_added"]


@pytest.mark.parametrize("batch", [1, 3, "batch"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_predictions_keep_the_order_of_the_images(tmp_path: Path, batch: int | str, workers: int) -> None:
    path = write_one_conv(tmp_path / "net.onnx", batch=batch)
    x = np.random.default_rng(1).random((100, 3, 8, 8), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    request = {
        "op": "predict",
        "model": str(path),
        "x": str(tmp_path / "x.npy"),
        "out": str(tmp_path / "y.npy"),
    }
    assert program.handle({**request, "workers": workers, **ORT}) == {"images": 100, "classes": 10}
    session = OnnxRuntime().open(write_one_conv(tmp_path / "one.onnx", batch=1), 1)
    one_by_one = np.concatenate([session.infer(image[None]) for image in x])
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), one_by_one, atol=1e-5)


def test_no_images_give_no_logits(tmp_path: Path, net: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((0, 3, 8, 8), np.float32))
    request = {
        "op": "predict",
        "model": str(net),
        "x": str(tmp_path / "x.npy"),
        "out": str(tmp_path / "y.npy"),
        **ORT,
    }
    assert program.handle(request) == {"images": 0, "classes": 10}
    assert np.load(tmp_path / "y.npy").shape == (0, 10)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"text"])
def test_images_that_are_no_array_are_refused(tmp_path: Path, net: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.npy"):
        program.handle(
            {
                "op": "predict",
                "model": str(net),
                "x": str(tmp_path / "x.npy"),
                "out": str(tmp_path / "y.npy"),
                **ORT,
            }
        )


def test_a_pickled_array_is_not_loaded(tmp_path: Path, net: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"\.npy"):
        program.handle(
            {
                "op": "predict",
                "model": str(net),
                "x": str(tmp_path / "x.npy"),
                "out": str(tmp_path / "y.npy"),
                **ORT,
            }
        )


def test_a_profile_has_each_node_once_with_its_work(net: Path) -> None:
    nodes = program.handle({"op": "profile", "model": str(net), "threads": 1, "iterations": 20, **ORT})[
        "nodes"
    ]
    work = {node["op"]: node["macs"] for node in nodes}
    assert work["Conv"] == 16 * 8 * 8 * 3 * 9  # out channels x pixels x in channels x kernel
    assert work["Gemm"] == 16 * 10
    assert len({node["name"] for node in nodes}) == len(nodes)
    assert all(node["seconds"] >= 0 and node["bytes"] > 0 for node in nodes)


def test_a_missing_runtime_names_the_pip_line(monkeypatch: pytest.MonkeyPatch, net: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency) as caught:
        program.handle(timing(models={"a": str(net)}))
    assert caught.value.hint == "pip install onnxruntime"


@pytest.mark.parametrize(
    ("cores", "threads", "expected"), [(4, 1, "real-time"), (4, 4, "normal"), (1, 1, "normal")]
)
def test_timing_goes_before_other_work_only_where_that_leaves_it_a_core(
    recorded: RecordedRuntime, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, expected: str
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(timing_module, "cores", lambda: cores)
    monkeypatch.setattr(
        timing_module.os, "sched_setscheduler", lambda pid, policy, param: asked.append(policy), raising=False
    )
    answer = program.handle(timing(threads=threads))
    assert answer["priority"] == expected
    # and gives the place back afterwards
    assert asked == ([os.SCHED_FIFO, os.sched_getscheduler(0)] if expected == "real-time" else [])


def test_where_real_time_is_not_allowed_timing_goes_on(
    recorded: RecordedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(timing_module, "cores", lambda: 4)
    monkeypatch.setattr(timing_module.os, "sched_setscheduler", refuse, raising=False)
    answer = program.handle(timing())
    assert answer["priority"] == "normal"
    assert len(answer["models"]["a"]["wall_ns"]) == 10
