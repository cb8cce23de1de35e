"""The whole pipeline in a few seconds, through the command line; and its text, word for word, as it was agreed on.

`pytest tests/test_tiny.py --write-golden` writes the files of tests/golden anew: look at what changed before you
commit it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import typer
from tiny import COMPRESS, GOLDEN, MODEL, edgeprune, masked, prepare, report
from torch import nn

from edgeprune.cli.app import app
from edgeprune.models import surgery
from edgeprune.records import Plan

COMMANDS = ["", *sorted(getattr(typer.main.get_command(app), "commands"))]  # noqa: B009
FAMILIES = ("methods", "targets", "attacks", "runtimes", "devices", "calibration")
FORMATS = ("text", "json", "markdown", "junit")
RIGHT_AND_WRONG: dict[str, tuple[list[str], int]] = {
    "gate met": (["gate", "run", "--budget", "macs=60 %"], 0),
    "gate broken": (["gate", "run", "--budget", "macs=10 %"], 1),
    "gate without the file": (["gate", "none", "--budget", "macs=10 %"], 2),
    "a metric that is none": (["gate", "run", "--budget", "speed=2"], 2),
    "no such model": (["compress", "none.pt", "--target", "local"], 2),
    "no such target": (["compress", "model.pt", "--target", "moon"], 2),
    "no architecture": (["compress", "model.pt", "--target", "local"], 4),
    "a model that is none": (["compress", "images.npz", "--target", "local"], 4),
    "no such method": ([*COMPRESS, "--method", "wish"], 2),
    "a budget that can't be met": ([*COMPRESS[:-1], "other", "--budget", "params=0.01 %"], 4),
    "evaluate without images": (["evaluate", *MODEL], 2),
    "no such option": (["list", "methods", "--wish"], 2),
    "no such family": (["list", "wishes"], 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    prepare(path)
    done = edgeprune(path, *COMPRESS)
    assert done.exit_code == 0, done.output
    (path / "compress.txt").write_text(done.output, encoding="utf-8")
    return path


def words(name: str) -> Callable[[Path], str]:
    """What a command line says, and its exit code."""

    def said(folder: Path) -> str:
        done = edgeprune(folder, *RIGHT_AND_WRONG[name][0])
        return f"exit {done.exit_code}\n{done.output}"

    return said


def exits(folder: Path) -> str:
    return "".join(f"{name}: {words(name)(folder)}\n" for name in RIGHT_AND_WRONG)


def helps(folder: Path) -> str:
    return "".join(edgeprune(folder, *([c] if c else []), "--help").output for c in COMMANDS)


def lists(folder: Path) -> str:
    return "".join(
        edgeprune(folder, "list", f).output for f in ("methods", "targets", "attacks", "runtimes", "devices")
    )


def verdicts(folder: Path) -> str:
    limits = ["--budget", "macs=60 %", "--budget", "size=1 kB"]
    return "".join(edgeprune(folder, "gate", "run", *limits, "--format", f).output + "\n" for f in FORMATS)


def file(name: str) -> Callable[[Path], str]:
    return lambda folder: (folder / name).read_text(encoding="utf-8")


MADE: dict[str, Callable[[Path], str]] = {
    "compress.txt": file("compress.txt"), "report.md": file("run/report.md"), "report.html": file("run/report.html"),
    "report.json": report, "help.txt": helps, "list.txt": lists, "verdicts.txt": verdicts, "exits.txt": exits,
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_every_word_and_number_is_the_one_that_was_agreed_on(
    folder: Path, name: str, request: pytest.FixtureRequest
) -> None:
    made = masked(MADE[name](folder), folder)
    if request.config.getoption("--write-golden"):
        (GOLDEN / name).write_text(made, encoding="utf-8")
    agreed = (GOLDEN / name).read_text(encoding="utf-8")
    assert made == agreed, "".join(difflib.unified_diff(agreed.splitlines(True), made.splitlines(True), n=1))


@pytest.mark.parametrize("name", RIGHT_AND_WRONG)
def test_every_command_line_ends_with_its_code(folder: Path, name: str) -> None:
    argv, code = RIGHT_AND_WRONG[name]
    assert edgeprune(folder, *argv).exit_code == code


def test_what_ships_is_half_of_the_work_and_answers(folder: Path) -> None:
    read = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    macs = [next(r["value"] for r in read[side] if r["metric"] == "macs") for side in ("before", "after")]
    assert macs[0] == 64 * (27 * 16 + 16 * 9 * 32) + 32 * 4 and macs[1] <= macs[0] / 2
    session = onnxruntime.InferenceSession(folder / "run" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[1] == 4


def test_a_second_start_does_nothing_again(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").glob("[0-9]*/*/record.json")}
    assert before and edgeprune(folder, *COMPRESS).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_puts_its_cut_network_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[object] = []
    replay = surgery.replay

    def counted(network: nn.Module, plan: Plan) -> None:
        cuts.append(plan)
        replay(network, plan)

    monkeypatch.setattr(surgery, "replay", counted)
    prepare(tmp_path)
    done = edgeprune(tmp_path, *COMPRESS, "--set", "attack.name=fgsm", "--set", "tune.epochs=1")
    assert done.exit_code == 0, done.output
    assert len(cuts) == 1
