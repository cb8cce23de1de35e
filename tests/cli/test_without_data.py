"""A model and nothing else: images are synthesized, the cut is repaired on them, and no accuracy is claimed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nets
import paths
import pytest
import torch
from typer.testing import CliRunner

from edgeprune.cli.app import app

ARCH = f"{paths.NETS}:Residual"
QUICK = ["measure.iterations=10", "measure.seconds=0.5", "measure.warmup=1"]
ROUGH = ["synthesize.images=12", "synthesize.steps=6"]
runner = CliRunner()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "residual.pt"
    torch.save(nets.build("residual").state_dict(), path)
    return path


def command(weights: Path, out: Path, *more: str) -> list[str]:
    sets = [part for line in (*QUICK, *ROUGH) for part in ("--set", line)]
    return ["compress", str(weights), "--arch", ARCH, "--input", "3x8x8", "-o", str(out), *sets, *more]


def report_of(weights: Path, out: Path, *more: str) -> dict[str, Any]:
    done = runner.invoke(app, command(weights, out, "--json", *more))
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["report"]


def records(out: Path) -> dict[str, int]:
    """Finished stage folder -> when it was finished."""
    found = out.glob("[0-9]-*/*/record.json")
    return {str(p.parent.relative_to(out)): p.stat().st_mtime_ns for p in found}


def stages(out: Path) -> list[str]:
    return sorted(name.partition("/")[0] for name in records(out))


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "residual"
    return out, report_of(weights, out)


def test_every_stage_leaves_its_folder_and_the_file_ships(run: tuple[Path, dict[str, Any]]) -> None:
    out, report = run
    names = ("dense", "synthesize", "prune", "cut", "repair", "tune", "export", "quantize", "measure")
    assert stages(out) == [f"{i}-{name}" for i, name in enumerate(names)]
    macs = {r["artifact"]: r["value"] for r in report["before"] + report["after"] if r["metric"] == "macs"}
    assert macs["compressed"] <= 0.5 * macs["dense"] and (out / "model.onnx").is_file()
    assert "The method is data-free, because there is no training data." in report["notes"]
    assert not (out / "scratch").exists() or not list((out / "scratch").iterdir())


def test_no_accuracy_is_claimed_and_what_is_said_is_marked(run: tuple[Path, dict[str, Any]]) -> None:
    out, report = run
    metrics = {r["metric"] for r in report["before"] + report["after"]}
    assert not metrics & {"clean_accuracy", "robust_accuracy", "agreement"} and report["ledger"] == []
    said = {r["metric"]: r for r in report["after"] if r["metric"].startswith("synthetic")}
    assert set(said) == {"synthetic_agreement", "synthetic_kl"}
    assert said["synthetic_agreement"]["n"] == 12 and said["synthetic_kl"]["value"] >= 0
    assert all(r["conditions"]["images"] == "synthetic" for r in said.values())
    assert any(note.startswith("No accuracy was measured") for note in report["notes"])
    document = (out / "report.md").read_text()
    assert "## Without labels" in document and "synthetic images, not accuracy" in document


def test_the_same_command_gives_the_same_readings_and_repeats_nothing(
    run: tuple[Path, dict[str, Any]], weights: Path
) -> None:
    out, report = run
    before = records(out)
    assert report_of(weights, out) == report and records(out) == before


@pytest.mark.slow
def test_any_method_may_be_repaired_on_synthetic_images(weights: Path, tmp_path: Path) -> None:
    chosen = ("--method", "uniform_random", "--set", "prune.repair=synthetic")
    report = report_of(weights, tmp_path / "run", *chosen)
    assert "1-synthesize" in stages(tmp_path / "run") and "4-repair" in stages(tmp_path / "run")
    assert report["recipe"]["prune"]["method"] == "uniform-random"
    assert any(r["metric"] == "synthetic_agreement" for r in report["after"])


def test_a_repair_with_data_needs_data(weights: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, command(weights, tmp_path / "run", "--set", "prune.repair=data"))
    assert done.exit_code == 2 and "there are none" in done.stderr and "--data" in done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(
    run: tuple[Path, dict[str, Any]], weights: Path, tmp_path: Path
) -> None:
    arguments, out = command(weights, tmp_path / "run"), tmp_path / "run"
    for stage in ("1-synthesize", "4-repair"):
        with subprocess.Popen(
            [sys.executable, "-m", "edgeprune", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            deadline = time.monotonic() + 120
            while not list(out.glob(f"{stage}/*")) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
    report_of(weights, out)
    # Which precision ships is decided by time, of networks as small as this one by chance: before that all is the same.
    (exported, undisturbed) = (next(folder.glob("6-export/*/model.onnx")) for folder in (out, run[0]))
    assert exported.read_bytes() == undisturbed.read_bytes()
    for name in ("weights.safetensors", "plan.json"):
        assert (out / name).read_bytes() == (run[0] / name).read_bytes(), name


def test_the_table_and_the_words_on_the_terminal_mark_what_is_synthetic(
    run: tuple[Path, dict[str, Any]], weights: Path
) -> None:
    done = runner.invoke(app, command(weights, run[0]))
    assert done.exit_code == 0, done.output
    assert "On 12 synthetic images (not accuracy;" in done.stdout
    assert "clean_accuracy" not in done.stdout


def test_list_and_help_say_which_method_is_the_default() -> None:
    listed = runner.invoke(app, ["list", "methods"])
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert {"data-free", "magnitude", "taylor", "uniform-random"} <= set(names)
    shown = " ".join(runner.invoke(app, ["compress", "--help"]).stdout.replace("│", " ").split())
    assert "auto is taylor with training images, data-free without" in shown
