"""The same files and the same program on arm64: run by qemu, from a folder, and on a machine behind ssh.

Both need qemu-user-static and the system that `python tests/support/arm64.py build/arm64` makes; the machine
needs root too. Nothing here looks at how long anything takes: under an emulator that says nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arm64
import numpy as np
import pytest
from onnx_files import write_net, write_one_conv
from sshd import Sshd, sshd

from edgeprune.agent import archive
from edgeprune.devices._base import Device, device_from_url
from edgeprune.devices.local import Local

pytestmark = pytest.mark.skipif(bool(arm64.why_not()), reason=arm64.why_not() or "-")
ASK = {"runtime": "onnxruntime", "threads": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "x.npy"
    np.save(path, np.random.default_rng(7).random((6, 3, 8, 8), dtype=np.float32))
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution in int8: quantized pixels, quantized weights, and a sum of products in whole numbers."""
    return write_quantized(tmp_path_factory.mktemp("quantized") / "int8.onnx")


def write_quantized(path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(3)
    weights = rng.integers(-127, 128, (8, 3, 3, 3), dtype=np.int8)
    tensors = {
        "w": weights, "w_scale": np.full(8, 0.01, np.float32), "w_zero": np.zeros(8, np.int8),
        "x_scale": np.float32(1 / 255), "x_zero": np.uint8(0), "fc": rng.standard_normal((8, 10)).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "fc"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "int8", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def on_arm64(request: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Have a request answered by the device half under qemu."""
    (tmp_path / "edgeprune.pyz").write_bytes(archive.pyz())
    done = arm64.python([str(tmp_path / "edgeprune.pyz")], json.dumps(request).encode(), 300)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def logits(request: dict[str, Any], answer: Any) -> Any:
    answer(request)
    return np.load(request["out"])


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-5), ("int8", 1e-5)])
def test_answers_on_arm64_are_those_of_this_machine(
    tmp_path: Path, images: Path, quantized: Path, kind: str, tolerance: float
) -> None:
    """The tolerance is for sums in another order; int8 products are whole numbers and are the same on both."""
    model = quantized if kind == "int8" else write_net(tmp_path / "net.onnx", 8)
    request = {"op": "predict", "model": str(model), "x": str(images), **ASK, "workers": 1}
    there = logits({**request, "out": str(tmp_path / "there.npy")}, lambda r: on_arm64(r, tmp_path))
    here = logits({**request, "out": str(tmp_path / "here.npy")}, lambda r: Local().ask(r, timeout_s=60))
    assert there.shape == (6, 10)
    assert np.abs(here).max() > 0.1
    np.testing.assert_allclose(there, here, atol=tolerance * float(np.abs(here).max()), rtol=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if os.geteuid() != 0:
        pytest.skip("only root may lock an sshd into a folder")
    folder = tmp_path_factory.mktemp("arm64")
    with (
        arm64.locked_in(folder) as (start, more),
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        sshd(folder / "sshd", more=more, environment=arm64.ENVIRONMENT, start=start) as started,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PATH", f"{started.bin}:{os.environ['PATH']}")
        patch.setattr(tempfile, "tempdir", short)
        yield started


@pytest.fixture(scope="module")
def board(server: Sshd) -> Device:
    device = device_from_url(server.url)
    if device.run(["true"], "", 60).status != 0:
        pytest.skip("the kernel here lets nobody run arm64 programs")
    return device


def test_the_machine_behind_ssh_is_an_arm64_that_says_it_is_emulated(board: Device) -> None:
    facts = board.facts()
    assert facts["machine"] == "aarch64"
    assert "asimddp" in facts["flags"]
    assert facts["emulated"] is True
    assert board.where() == f"{board.name} aarch64 (emulated)"


def test_files_and_locks_work_there_with_its_own_programs(board: Device, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)
    with board.exclusively(), board.folder() as folder:
        board.put(tmp_path / "a", f"{folder}/a b")
        board.get(f"{folder}/a b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert board.run(["sh", "-c", "exit 255"], "", 60).status == 255
    assert board.check(["ls", "-A", "/tmp"]) == ""


def test_a_profile_is_taken_there_and_its_times_are_marked(
    board: Device, server: Sshd, tmp_path: Path
) -> None:
    net = write_one_conv(tmp_path / "net.onnx", channels=4)
    images = tmp_path / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(images, x=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), y=np.arange(20) % 10)
    short = ["measure.iterations=10", "measure.seconds=1", "measure.warmup=1"]
    command = [
        sys.executable,
        "-m",
        "edgeprune",
        "profile",
        str(net),
        "--data",
        str(images),
        "--device",
        server.url,
    ]
    command += ["--json", *(word for setting in short for word in ("--set", setting))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    there = {r["metric"]: r for r in json.loads(done.stdout)["readings"]}
    assert there["latency_p50"]["where"] == f"{server.url} aarch64 (emulated)"
    assert there["latency_p50"]["conditions"]["emulated"] is True
    assert there["latency_p50"]["conditions"]["runtime"].startswith("onnxruntime ")
    assert "emulated" in done.stderr
    x, y = (np.load(images)[key] for key in "xy")
    np.save(tmp_path / "x.npy", (x.transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32))
    request = {
        "op": "predict",
        "model": str(net),
        "x": str(tmp_path / "x.npy"),
        "out": str(tmp_path / "y.npy"),
        **ASK,
    }
    here = logits(request, lambda r: Local().ask(r, timeout_s=60))
    assert there["clean_accuracy"]["value"] == np.mean(here.argmax(axis=1) == y), "as on this machine"
