"""A phone without Python, whose benchmark program tells times alone: the rest is absent, and a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adb_stand_in
import nets
import numpy as np
import pytest
import torch
from onnx_files import Pictures, artifact, write_net
from typer.testing import CliRunner

from edgeprune import targets
from edgeprune.cli.app import app
from edgeprune.devices._base import ShellDevice
from edgeprune.errors import UsageError
from edgeprune.measure import answers, stage
from edgeprune.measure.onnx_outputs import input_of
from edgeprune.recipe.schema import MeasureTable
from edgeprune.records import InputSpec, Reading
from edgeprune.robustness import models_under_attack

WHY = "onnxruntime_perf_test tells the times of whole files alone"
SPEC = InputSpec((3, 8, 8), 10)
TABLE = MeasureTable(iterations=12, seconds=0.5, warmup=12)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShellDevice:
    monkeypatch.setenv("PATH", f"{adb_stand_in.install(tmp_path / 'adb')}:{os.environ['PATH']}")
    return adb_stand_in.native(tmp_path / "built")


def images() -> Pictures:
    return Pictures(np.zeros((4, 3, 8, 8), np.float32), np.zeros(4, np.int64))


def whys(readings: Sequence[Reading]) -> dict[str, str]:
    return {r.metric: str(r.conditions["why"]) for r in readings if r.value is None}


def test_accuracy_on_held_out_images_is_absent_with_the_reason(phone: ShellDevice, tmp_path: Path) -> None:
    files = {"dense": write_net(tmp_path / "dense.onnx"), "compressed": write_net(tmp_path / "model.onnx", 8)}
    wanted = stage.MeasureRequest(SPEC, phone, TABLE, targets.target("local"), images(), lambda _: None)
    found = stage.run(wanted, files, None)
    memory = "onnxruntime_perf_test does not tell memory"
    assert whys(found.before) == {"peak_memory": memory, "clean_accuracy": WHY}
    assert whys(found.after) == {"peak_memory": memory, "clean_accuracy": WHY, "agreement": WHY}
    assert next(r.value for r in found.after if r.metric == "latency_p50") == pytest.approx(0.002)
    alone = stage.run(wanted, {"compressed": files["compressed"]}, None)
    assert "agreement" not in whys(alone.after)


def test_who_needs_answers_is_refused_before_images_are_copied(phone: ShellDevice, tmp_path: Path) -> None:
    file = artifact(write_net(tmp_path / "net.onnx"), (3, 8, 8), 10)
    with pytest.raises(UsageError, match=f"answers no images: {WHY}") as caught:
        answers.accuracy(file, images(), phone, name="net")
    assert "--device local" in caught.value.hint


def test_an_attack_is_judged_here_and_says_so(phone: ShellDevice, tmp_path: Path) -> None:
    net = write_net(tmp_path / "net.onnx")
    here = models_under_attack.of_file("net.onnx", net, tmp_path, "here")
    there = models_under_attack.on_device(
        here, net, input_of(net), models_under_attack.OnDevice(phone, None, tmp_path)
    )
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(there.answers(x), here.answers(x))
    assert there.where == "here"
    assert there.notes[-1] == (
        f"Every verdict is that of ONNX Runtime on this machine, not of {phone.name}: {WHY}."
    )


@pytest.mark.slow
def test_a_run_without_data_and_with_a_latency_budget_gets_to_its_end(
    phone: ShellDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    target = tmp_path / "phone.toml"
    text = (Path(targets.resolve("targets", "android-arm64"))).read_text()
    target.write_text(f"{text}\nbenchmark = {json.dumps(str(tmp_path / 'built'))}\n")
    weights = tmp_path / "residual.pt"
    torch.save(nets.build("residual").state_dict(), weights)
    sets = ["measure.iterations=12", "measure.seconds=0.2", "measure.warmup=1"]
    sets += ["synthesize.images=12", "synthesize.steps=6"]
    argv = ["compress", str(weights), "--arch", f"{nets.__file__}:Residual", "--input", "3x8x8"]
    argv += ["--target", str(target), "--device", phone.name, "--budget", "latency_p50=60 %"]
    argv += ["--precision", "fp32", "-o", str(tmp_path / "run"), "--json"]
    done = CliRunner().invoke(app, [*argv, *(part for line in sets for part in ("--set", line))])
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)["report"]
    absent = {r["metric"]: r["conditions"]["why"] for r in report["after"] if r["value"] is None}
    assert absent["synthetic_agreement"] == absent["synthetic_kl"] == WHY
    notes = " ".join(report["notes"])
    assert (
        "No latency table (" in notes
        and "reports no time of any layer" in notes
        and "Searched by building" in notes
    )
