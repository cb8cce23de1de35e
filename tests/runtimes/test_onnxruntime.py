"""ONNX Runtime as a runtime: what it opens, what it refuses, and how it answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import save, write_one_conv

from edgeprune.agent import program
from edgeprune.errors import (
    DeviceError,
    EdgepruneError,
    MissingDependency,
    ModelError,
    NoRoom,
    UnsupportedModel,
    UsageError,
)
from edgeprune.runtimes import onnxruntime
from edgeprune.runtimes.onnxruntime import OnnxRuntime

AGENT = "import sys; from edgeprune.agent.program import main; sys.exit(main())"


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write_one_conv(tmp_path / "net.onnx")


@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_a_corrupt_file_is_a_model_error(tmp_path: Path, net: Path, content: bytes | str) -> None:
    path = tmp_path / "bad.onnx"
    whole = net.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        OnnxRuntime().open(path, 1)


def test_what_onnx_runtime_refuses_it_does_not_also_print_in_colors(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = [
        helper.make_node("Conv", ["input", "weight", "bias"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["logits"]),
    ]
    tensors = {"weight": np.zeros((4, 3, 3, 3), np.float32), "bias": np.zeros(4, np.float32)}
    model = onnx.load(save(tmp_path / "net.onnx", nodes, tensors, [1, 3, 8, 8], [1, 4, 1, 1]))
    bias = model.graph.initializer[1]
    bias.ClearField("float_data")
    bias.raw_data = b"short"
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="can't open"):
        OnnxRuntime().open(tmp_path / "net.onnx", 1)
    assert capfd.readouterr().err == ""


def test_a_model_that_does_not_eat_images_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["input"], ["logits"], "same")
    path = save(tmp_path / "flat.onnx", [node], {}, [1, 10], 10)
    with pytest.raises(UnsupportedModel, match="one float or uint8 tensor"):
        OnnxRuntime().open(path, 1)


def test_a_model_that_does_not_answer_with_logits_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["input"], ["logits"], "relu")
    path = save(tmp_path / "map.onnx", [node], {}, [1, 3, 4, 4], [1, 3, 4, 4])
    session = OnnxRuntime().open(path, 1)
    with pytest.raises(UnsupportedModel, match=r"accepted: \(N, K\)"):
        session(np.zeros((1, 3, 4, 4), np.float32))


def test_a_half_precision_model_eats_and_answers_float32(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["logits"], "flat")]
    path = save(tmp_path / "half.onnx", nodes, {}, [1, 2, 1, 1], 2, TensorProto.FLOAT16)
    logits = OnnxRuntime().open(path, 1)(np.array([[[[0.5]], [[0.25]]]], np.float32))
    assert logits.dtype == np.float32
    assert logits.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    "x", [np.zeros((1, 3, 8, 9), np.float32), np.zeros((3, 8, 8), np.float32), np.zeros((1, 3, 8, 8))]
)
def test_images_of_another_shape_or_type_are_refused(net: Path, x: Any) -> None:
    with pytest.raises(UsageError, match=r"float32 \(N, 3, 8, 8\)"):
        OnnxRuntime().open(net, 1)(x)


def test_free_image_sizes_need_to_be_said(tmp_path: Path) -> None:
    path = write_one_conv(tmp_path / "net.onnx", batch="batch", size="size")  # type: ignore[arg-type]
    session = OnnxRuntime().open(path, 1)
    with pytest.raises(UsageError, match="free dimensions"):
        session.image()
    assert session.image((3, 8, 6)).shape == (1, 3, 8, 6)


def test_the_image_that_is_timed_has_pixels_from_0_to_1(net: Path) -> None:
    x = OnnxRuntime().open(net, 1).image()
    assert x.shape == (1, 3, 8, 8)
    assert 0.0 <= x.min() < 0.1
    assert 0.9 < x.max() < 1.0
    assert x.std() == pytest.approx(12**-0.5, abs=0.02)  # as spread out as uniform noise


def test_building_copies_the_file_and_refuses_what_it_can_not_open(tmp_path: Path, net: Path) -> None:
    runtime = OnnxRuntime()
    assert runtime.build(net, tmp_path / "built.onnx", "fp32").read_bytes() == net.read_bytes()
    assert runtime.build(net, net, "fp32") == net
    with pytest.raises(UsageError, match="fp64"):
        runtime.build(net, tmp_path / "x.onnx", "fp64")
    with pytest.raises(UsageError, match="no file"):
        runtime.build(tmp_path / "none.onnx", tmp_path / "x.onnx", "fp32")
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(ModelError):
        runtime.build(tmp_path / "bad.onnx", tmp_path / "x.onnx", "fp32")
    assert not (tmp_path / "x.onnx").exists()


def profiling(net: Path, iterations: int) -> str:
    """The request for the times of the layers."""
    return json.dumps(
        {"op": "profile", "runtime": "onnxruntime", "model": str(net), "threads": 1, "iterations": iterations}
    )


def test_a_killed_profile_leaves_all_it_wrote_in_the_folder_that_is_removed(
    net: Path, tmp_path: Path
) -> None:
    (net.parent / ".keeper").write_text("1 1\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(elsewhere)},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(profiling(net, 10**8).encode())
    process.stdin.close()
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.rglob("profile*")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert list(net.parent.glob("edgeprune-*/profile*"))
    assert not list(elsewhere.iterdir())


def test_a_profile_leaves_nothing_and_writes_nothing_into_a_folder_of_somebodys_own(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    open_session = onnxruntime.new_session
    seen: list[Path] = []

    def session(path: Path, *, threads: int, profile_to: str = "") -> Any:
        seen.extend([Path(profile_to).parent] if profile_to else [])
        return open_session(path, threads=threads, profile_to=profile_to)

    monkeypatch.setattr(onnxruntime, "new_session", session)
    assert OnnxRuntime().profile(net, 1, 3, None)
    (net.parent / ".keeper").write_text("1 1\n")
    assert OnnxRuntime().profile(net, 1, 3, None)
    assert [folder.parent for folder in seen] == [scratch, net.parent]
    assert not any(folder.exists() for folder in seen)


def test_a_profile_that_is_cut_off_says_where_and_what_to_do(net: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
    done = subprocess.run(
        [sys.executable, "-c", limited + AGENT], input=profiling(net, 20), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert (done.returncode, said["kind"]) == (7, "NoRoom")
    assert "profile of the layers can't be read: a file may not be larger (ulimit -f); " in said["error"]
    assert "3000 bytes were written to /" in said["error"]
    assert said["hint"].startswith("free some space on the disk")


@pytest.mark.parametrize(("free", "why"), [(4095, "the disk is full; 2 bytes"), (2**30, "it is not whole: ")])
def test_a_full_disk_is_told_from_a_profile_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, why: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**30, 0, free))  # type: ignore[attr-defined]
    (tmp_path / "profile.json").write_text("[{")
    with pytest.raises(DeviceError if free > 4095 else NoRoom, match=why) as caught:
        onnxruntime.profile_events(tmp_path / "profile.json")
    assert f"{free} bytes are free there" in caught.value.message
    with pytest.raises(EdgepruneError, match="0 bytes were written"):
        onnxruntime.profile_events(tmp_path / "absent.json")


def test_a_disk_without_room_for_a_folder_is_a_device_error(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(DeviceError, match="no folder can be made for the profile of the layers"):
        OnnxRuntime().profile(net, 1, 3, None)


@pytest.mark.parametrize("managed", [True, False])
def test_where_the_system_forbids_pip_the_hint_makes_an_environment(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, managed: bool
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setenv("HOME", "/home/pi")
    if managed:
        (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    with pytest.raises(MissingDependency) as caught:
        program.handle(json.loads(profiling(net, 1)))
    assert caught.value.hint == (
        "there: /usr/bin/python3 -m venv /home/pi/edge && /home/pi/edge/bin/pip install onnxruntime; "
        "then: --device 'URL?python=/home/pi/edge/bin/python'"
        if managed
        else "pip install onnxruntime"
    )
