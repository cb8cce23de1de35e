"""The examples of docs/architecture.md, run as a reader would run them."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import paths
import pytest
import torch
from onnx_files import write_net
from tiny import COMPRESS, edgeprune, prepare

from edgeprune import targets
from edgeprune.attacks import Attack, Inputs
from edgeprune.devices import Device
from edgeprune.runtimes import Runtime
from edgeprune.train import Ball

PAGE = paths.ROOT / "docs" / "architecture.md"
LONGEST = 40


def examples() -> dict[str, str]:
    """Heading -> the code below it."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^### (.+?)\n.*?^```(?:python|toml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples")
    prepare(path)
    for title, code in examples().items():
        name = f"example_{title.split()[-1]}"
        (path / f"{name}{'.toml' if 'target' in name else '.py'}").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(path))
    yield path  # type: ignore[misc]
    sys.path.remove(str(path))


def made(name: str, *arguments: Any) -> Any:
    """The one class of an example, built."""
    module = import_module(name)
    (cls,) = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)
    return cls(*arguments)


def test_there_is_one_of_each_kind_and_none_is_long() -> None:
    assert list(examples()) == ["A method", "An attack", "A runtime", "A device", "A target"]
    assert all(len(code.splitlines()) <= LONGEST for code in examples().values())


def test_the_method_chooses_what_goes(folder: Path) -> None:
    argv = [
        *COMPRESS,
        "--method",
        "example_method.Slimming",
        "--set",
        "prune.options={power = 2}",
        "-o",
        "slim",
    ]
    done = edgeprune(folder, *argv)
    assert done.exit_code == 0, done.output
    assert "prune: example_method.Slimming, macs 50 %" in done.output


def test_the_attack_stays_in_the_ball(folder: Path) -> None:
    attack, x = made("example_attack"), torch.rand(4, 3, 8, 8)
    ball, y = Ball("Linf", 0.1), torch.zeros(4, dtype=torch.int64)
    assert isinstance(attack, Attack)
    generator = torch.Generator().manual_seed(0)
    given = Inputs(lambda x: x.flatten(1)[:, :3], x, y, ball, generator, print)
    found, queries = attack.perturb(given)
    assert 0.05 < float((found - x).abs().max()) <= 0.1 + 1e-6 and queries.tolist() == [1] * 4


def test_the_runtime_runs_a_file(folder: Path, tmp_path: Path) -> None:
    runtime = made("example_runtime")
    assert isinstance(runtime, Runtime) and runtime.version().endswith("without optimizations")
    built = runtime.build(write_net(tmp_path / "net.onnx", 4), tmp_path / "built.onnx", "fp32")
    assert runtime.open(built, 1)(np.zeros((3, 3, 8, 8), np.float32)).shape == (3, 10)


@pytest.mark.skipif(os.getuid() != 0, reason="chroot needs root")
def test_the_device_runs_commands_and_takes_files(folder: Path, tmp_path: Path) -> None:
    device = made("example_device", "/")
    assert isinstance(device, Device)
    assert device.run(["cat"], "hello", 10.0).stdout == "hello"
    (tmp_path / "here").write_text("x")
    device.put(tmp_path / "here", str(tmp_path / "there"))
    device.get(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back").read_text() == "x" and device.facts()["system"] == "Linux"


def test_the_target_is_read(folder: Path) -> None:
    found = targets.target(str(folder / "example_target.toml"))
    assert found.title == "Our board, 2 GB" and found.multiple_of["int8"] == 16
