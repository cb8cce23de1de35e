"""Trials: what a run decides by is timed by the runtime that it measures with in the end, by one who is alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_stubs as stubs
from onnx_files import write_net

from edgeprune import runtimes, targets
from edgeprune.devices._base import Device, device_from_url
from edgeprune.devices.local import Local
from edgeprune.errors import DeviceError, UsageError
from edgeprune.measure.trials import Trials
from edgeprune.pipeline import intermediates
from edgeprune.quantities import limit
from edgeprune.recipe.schema import MeasureTable, PruneTable
from edgeprune.records import Budget
from edgeprune.runtimes.engine import cuda

TABLE = MeasureTable(iterations=20, warmup=1, seconds=2.0)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> stubs.Board:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where what was timed is kept
    gpu = stubs.Gpu()
    monkeypatch.setattr(runtimes, "load", gpu.cuda)
    monkeypatch.setattr(cuda, "load", runtimes.load)
    monkeypatch.setitem(sys.modules, "tensorrt", stubs.module("10.3.0", gpu))
    return stubs.Board()


def trials(board: stubs.Board) -> Trials:
    return Trials(board, targets.target("jetson-orin-nano"), lambda _line: None, 0.0)


def test_on_a_board_with_tensorrt_trials_are_of_engines(board: stubs.Board, tmp_path: Path) -> None:
    files = {
        "dense": write_net(tmp_path / "dense.onnx", 32), "compressed": write_net(tmp_path / "cut.onnx", 16),
    }  # fmt: skip
    there = trials(board)
    timed = there.latency(files, TABLE)
    rows = {name: next(r for r in rows if r.metric == "latency_p50") for name, rows in timed.readings.items()}
    assert {r.conditions["runtime"] for r in rows.values()} == {"tensorrt 10.3.0"}
    assert there.version == "tensorrt 10.3.0"
    names = {node.name for node in there.nodes(files["compressed"], TABLE)}
    assert names >= {"stem", "block.conv", "fc"}, "layers have the names that the file has for them"
    assert not [line for line in board.asked if "onnxruntime" in line], "nothing ran on the board's CPU"


def test_an_engine_is_built_once_while_it_is_asked_for(board: stubs.Board, tmp_path: Path) -> None:
    there = trials(board)
    dense = write_net(tmp_path / "dense.onnx", 32)
    for width in (16, 24):
        there.latency({"dense": dense, "compressed": write_net(tmp_path / f"{width}.onnx", width)}, TABLE)
    assert sum(line.startswith("build") for line in board.asked) == 3
    assert len(list(there._folder.glob("*.engine"))) == 2, "those of other files are gone"
    folder = there._folder
    del there
    assert not folder.exists()


def test_layers_are_timed_by_one_who_is_alone(tmp_path: Path) -> None:
    """While somebody else measures on the machine, neither files nor layers are timed."""
    device = device_from_url("local")
    there = Trials(device_from_url("local"), targets.target("local"), lambda _line: None, 0.0)
    path = write_net(tmp_path / "net.onnx", 8)
    assert there.nodes(path, TABLE)
    with device.exclusively():
        for timing in (lambda: there.nodes(path, TABLE), lambda: there.latency({"net": path}, TABLE)):
            with pytest.raises(DeviceError, match="in use"):
                timing()
        alone = Trials(device, targets.target("local"), lambda _line: None, None)
        assert alone.nodes(path, TABLE), "who holds the device may go on"


class Emulated(Local):
    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "emulated": True}


def run_on(device: Device) -> Any:
    return SimpleNamespace(
        device=device, target=targets.target("local"), log=lambda _line: None,
        decisions=SimpleNamespace(on_target=True, file_share=0.0),
        budget=Budget({"latency_p90": limit("latency_p90", "50 %")}),
        recipe=SimpleNamespace(prune=PruneTable(), measure=TABLE),
    )  # fmt: skip


def test_nothing_is_decided_by_the_times_of_an_emulated_processor(tmp_path: Path) -> None:
    write_net(tmp_path / "dense.onnx", 8)
    with pytest.raises(
        UsageError, match="a budget on latency_p90 can't be held .* its processor is emulated"
    ):
        intermediates.measured_limits(run_on(Emulated()), tmp_path)
    assert intermediates.choice_timer(run_on(Emulated())) is None
    assert intermediates.measured_limits(run_on(Local()), tmp_path)["latency_p90"].dense > 0
    assert intermediates.choice_timer(run_on(Local())) is not None
