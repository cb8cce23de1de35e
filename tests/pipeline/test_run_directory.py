"""The run directory: complete or absent, held by one process, resumed exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeprune import distributed, targets
from edgeprune.errors import ModelError, UsageError, WorkdirError
from edgeprune.models.bundle import load_bundle
from edgeprune.pipeline import run_directory
from edgeprune.pipeline.context import Context, dense_key
from edgeprune.pipeline.run_directory import STAGES, Workdir, check_shipped
from edgeprune.recipe import parse
from edgeprune.recipe.schema import ModelTable
from edgeprune.records import Budget, Bundle, InputSpec, Source
from edgeprune.serialization import sha256


def test_a_stage_that_failed_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    with Workdir(tmp_path / "run") as work:

        def breaks(out: Path) -> None:
            (out / "half").write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work.stage("prune", "k", breaks)
        assert not work.is_done("prune", "k")
    with Workdir(tmp_path / "run") as work:
        done = work.stage("prune", "k", lambda out: (out / "whole").write_text("whole") and None)
        assert (done / "whole").read_text() == "whole" and not (done / "half").exists()


def test_a_finished_stage_is_not_repeated(tmp_path: Path) -> None:
    with Workdir(tmp_path / "run") as work:
        calls = []
        for _ in range(3):
            work.stage("cut", "k", lambda out: calls.append(out) or ((out / "f").write_text("x") and None))
        assert len(calls) == 1


def test_the_key_changes_with_everything_that_goes_in(tmp_path: Path) -> None:
    work = Workdir(tmp_path)
    keys = {
        work.key("cut", 1, "a"),
        work.key("cut", 2, "a"),
        work.key("cut", 1, "b"),
        work.key("tune", 1, "a"),
    }
    assert len(keys) == 4 and work.key("cut", 1, "a") in keys


def test_a_stage_whose_files_were_changed_is_refused_and_says_what_to_delete(tmp_path: Path) -> None:
    with Workdir(tmp_path / "run") as work:
        done = work.stage("cut", "k", lambda out: (out / "plan.json").write_text("{}") and None)
        (done / "plan.json").write_text("{ }")
        with pytest.raises(WorkdirError, match="not what was written") as caught:
            work.stage("cut", "k", lambda out: None)
        assert str(done) in caught.value.hint


def test_a_second_process_is_turned_away_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    hold = "import sys,time; from pathlib import Path; from edgeprune.pipeline.run_directory import Workdir\n"
    hold += f"with Workdir(Path({str(tmp_path / 'run')!r})):\n print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(WorkdirError, match="in use by another"), Workdir(tmp_path / "run"):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with Workdir(tmp_path / "run"):
        pass


def test_a_directory_of_another_model_is_refused_unless_forced(tmp_path: Path) -> None:
    with Workdir(tmp_path / "run") as work:
        work.claim({"path": "a.pt", "sha256": "1"}, {}, again=False)
        work.claim({"path": "a.pt", "sha256": "1"}, {}, again=False)
        with pytest.raises(WorkdirError, match="another model"):
            work.claim({"path": "b.pt", "sha256": "2"}, {}, again=False)
        work.claim({"path": "b.pt", "sha256": "2"}, {"seed": 1}, again=True)
        assert json.loads((tmp_path / "run" / "edgeprune.lock").read_text())["seed"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\x00"])
def test_a_corrupt_lock_file_is_an_error_of_the_directory(tmp_path: Path, text: str) -> None:
    with Workdir(tmp_path / "run") as work:
        (work.root / "edgeprune.lock").write_text(text)
        with pytest.raises(WorkdirError, match="corrupt"):
            work.claim({"path": "a.pt"}, {}, again=False)


def test_forcing_a_stage_forgets_it_and_all_later_ones(tmp_path: Path) -> None:
    with Workdir(tmp_path / "run") as work:
        for name in STAGES:
            work.stage(name, "k", lambda out: (out / "f").write_text("x") and None)
        work.forget_from("tune")
        assert [n for n in STAGES if work.is_done(n, "k")] == [
            "dense",
            "synthesize",
            "prune",
            "cut",
            "repair",
        ]


def test_a_place_that_is_no_directory_is_an_error_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkdirError, match="can't be used"), Workdir(tmp_path / "file"):
        pass


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], set[str]]:
    """This process is number 1 of 2, and process 0 has no stage done yet; gives what lies in the run directory."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: False)
    run = tmp_path / "run"
    return lambda: {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def test_a_follower_works_where_all_work_and_leaves_nothing_of_its_own(
    tmp_path: Path, following: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "run" / f"{STAGES.index('tune')}-tune" / "k"
    places: list[Path] = []

    def works(out: Path) -> None:
        (out / "weights").write_text("mine")
        places.append(out)

    def process_0_ends() -> None:
        first.mkdir(parents=True)
        (first / "record.json").write_text("{}")

    monkeypatch.setattr(distributed, "barrier", process_0_ends)
    with Workdir(tmp_path / "run") as work:
        assert not work.leads
        places.append(work.scratch("k"))
        places[0].mkdir(parents=True)
        assert work.stage("tune", "k", works, together=True) == first
    assert len(places) == 2 and not any(place.exists() for place in places)
    assert following() == {"5-tune/k/record.json"}


def test_a_follower_leaves_the_other_stages_to_the_first_process(
    tmp_path: Path, following: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "SIGHT_S", 0.0)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    with (
        Workdir(tmp_path / "run") as work,
        pytest.raises(WorkdirError, match="process 1 of 2 does not see") as caught,
    ):
        work.stage("export", "k", lambda out: pytest.fail("it was done here"))
    assert "file system that all machines share" in caught.value.hint and not following()


def test_a_follower_with_other_inputs_is_refused(
    tmp_path: Path, following: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "broadcast_object", lambda keys: {"dense": "1", "prune": "2"})
    with Workdir(tmp_path / "run") as work:
        assert work.agree({"dense": "1", "prune": "2"}) == {"dense": "1", "prune": "2"}
        with pytest.raises(WorkdirError, match="process 1 of 2 would do another prune than process 0"):
            work.agree({"dense": "1", "prune": "3", "cut": "4"})
    assert not following()


def test_editing_the_architecture_or_the_calibration_recipe_makes_old_results_stale(tmp_path: Path) -> None:
    code, calibration = tmp_path / "net.py", tmp_path / "few.toml"
    code.write_text("width = 8\n")
    calibration.write_text("count = 4\n")
    source = Source("state_dict", "w.pt", "1", f"{code}:net?deep=1")
    run = Context(
        parse.build({}, {"data": {"path": "x", "calibration": str(calibration)}}), targets.target("local"), Budget(),
        Workdir(tmp_path), Bundle(None, source, InputSpec((3, 8, 8), 5)), SimpleNamespace(fingerprint="f"), None, print,
    )  # fmt: skip
    before = (dense_key(run), run.data_key)
    assert before == (dense_key(run), run.data_key)
    code.write_text("width = 4\n")
    calibration.write_text("count = 5\n")
    assert dense_key(run) != before[0] and run.data_key != before[1]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "dense.onnx"])
def test_a_shipped_file_is_the_one_that_the_report_was_made_of(tmp_path: Path, name: str) -> None:
    files = ("model.onnx", "model.pt2", "dense.onnx")
    for file in files:
        (tmp_path / file).write_bytes(b"as it was proven")
    report = {"environment": {"files": {file: sha256(tmp_path / file) for file in files}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    check_shipped(tmp_path)
    (tmp_path / name).write_bytes(b"as it was qroven")
    with pytest.raises(UsageError, match=name) as caught:
        check_shipped(tmp_path)
    assert sha256(tmp_path / name) in caught.value.message
    assert report["environment"]["files"][name] in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"environment": 3}', '{"environment": {"files": [1]}}', "[" * 9999]
)
def test_a_report_that_names_no_files_vouches_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UsageError, match=r"model.onnx|does not say which files"):
        check_shipped(tmp_path)


def forged(folder: Path, name: str, content: str) -> None:
    """Change a file of a finished stage together with its record."""
    (folder / name).write_text(content)
    record = json.loads((folder / "record.json").read_text())
    record["files"][name] = sha256(folder / name)
    (folder / "record.json").write_text(json.dumps(record))


def finished(run: Path, stage: str = "tune", content: str = "own", *, trusted: bool = False) -> Path:
    with Workdir(run, 1, trusted=trusted) as work:
        return work.stage(stage, "k", lambda out: (out / "f").write_text(content) and None)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_changed_together_with_its_record_is_refused(tmp_path: Path, stage: str) -> None:
    forged(finished(tmp_path, stage), "f", "forged")
    with pytest.raises(WorkdirError, match="changed together with its record") as caught:
        finished(tmp_path, stage)
    assert "--trust-run" in caught.value.hint


@pytest.mark.parametrize("seal", ["", "\ud800", None, 3, "0" * 64])
def test_a_record_with_another_seal_is_refused(tmp_path: Path, seal: object) -> None:
    record = finished(tmp_path) / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seal": seal}))
    with pytest.raises(WorkdirError, match="its seal is not of|surrogates not allowed"):
        finished(tmp_path)


def test_a_file_that_no_record_names_and_a_stage_of_another_key_are_refused(tmp_path: Path) -> None:
    done = finished(tmp_path)
    shutil.copytree(done, done.with_name("k2"))
    with Workdir(tmp_path) as work, pytest.raises(WorkdirError, match="of another run"):
        work.stage("tune", "k2", lambda out: None)
    (done / "model.onnx").write_text("slipped in")
    with pytest.raises(WorkdirError, match=r"model.onnx is not what was written"):
        finished(tmp_path)


def test_of_somebody_else_weights_are_kept_when_trusted_and_proofs_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("tune", "export", "measure"):
        finished(tmp_path, stage, "theirs")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    with pytest.raises(WorkdirError, match="was not made by this user"):
        finished(tmp_path, "export")
    found = {
        stage: (finished(tmp_path, stage, "mine", trusted=True) / "f").read_text()
        for stage in ("tune", "export", "measure")
    }
    assert found == {"tune": "theirs", "export": "mine", "measure": "mine"}
    finished(tmp_path, "export")


def test_without_a_home_nothing_is_sealed_and_what_proves_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    for stage, kept in (
        ("tune", "own"),
        ("export", "again"),
    ):  # what trains is kept, what proves is done again
        finished(tmp_path / "run", stage)
        assert (finished(tmp_path / "run", stage, "again") / "f").read_text() == kept


@pytest.mark.parametrize(
    "name", ["recipe.toml", "model.onnx.tmp", "5-tune", "scratch/k/state", "5-tune/tmp-k"]
)
def test_links_and_pipes_in_a_run_directory_are_refused(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (outside / "tmp-mine").mkdir(parents=True)
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    for make, kind in (
        (lambda: path.symlink_to(outside), "a link"),
        (lambda: os.mkfifo(path), "neither a file"),
    ):
        make()
        with pytest.raises(WorkdirError, match=f"{name} is {kind}"):
            finished(tmp_path / "run")
        path.unlink()
    assert (outside / "tmp-mine").is_dir()


def test_what_a_stage_was_made_with_is_known_when_it_is_taken_again(tmp_path: Path) -> None:
    finished(tmp_path)
    with Workdir(tmp_path, 2) as work:
        work.stage("tune", "k", lambda out: pytest.fail("it is done"))
        work.stage("export", "k", lambda out: (out / "f").write_text("x") and None)
    assert work.made_with == {"tune": 1, "export": 2}


def test_of_a_finished_stage_no_scratch_is_left(tmp_path: Path) -> None:
    with Workdir(tmp_path) as work:
        work.stage("tune", "k", lambda out: (work.scratch("k") / "state").write_text("x") and None)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("labels", [5, None, [["a"]]])
def test_a_plan_of_somebody_else_names_classes_or_none(tmp_path: Path, labels: object) -> None:
    for name in ("recipe.toml", "model.pt2"):
        (tmp_path / name).touch()
    for text in (json.dumps({"labels": labels}), '{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ModelError):
            load_bundle(ModelTable(path=str(tmp_path)))
