"""Several processes as one team: real ones, two of them, as torchrun starts them, and what one of them does alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import paths
import pytest
import torch
from typer.testing import CliRunner

from edgeprune import distributed, serialization
from edgeprune.cli.app import app, main
from edgeprune.pipeline.run_directory import Workdir
from edgeprune.records import Report

# Each process leaves what it came to in a file of its own number.
LEAVE = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from edgeprune import distributed as team
torch.set_num_threads(1)
def leave(**found):
    Path({folder!r}, f"{{team.launch().rank}}.json").write_text(json.dumps(found))
"""


def torchrun(*arguments: str, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine; an error of one ends all, with its exit code in the text."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=seconds, check=False
    )


def script(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(LEAVE.format(tests=str(paths.SUPPORT), folder=str(folder)) + code, encoding="utf-8")
    return torchrun(str(path))


def left(folder: Path) -> list[dict[str, Any]]:
    """What process 0 and process 1 came to."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


COLLECTIVES = """
store = team.start()
r = team.rank()
strided = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last) * r
tensors = [torch.tensor([1.0, 5.0]) * (r + 1), strided, torch.tensor(3.0, dtype=torch.float64) + r, torch.zeros(0)]
needs = torch.nn.Parameter(torch.full((2,), float(r)))
team.all_reduce_mean_([*tensors, needs])
transposed = torch.arange(6).view(2, 3).t() + 10 * r
handed_back = team.broadcast_(transposed) is transposed
told = team.broadcast_object({"of": r, "keys": ["a", r]})

from types import SimpleNamespace
from edgeprune.pipeline import intermediates as building
from edgeprune.prune.budget_search import Probe
building.measured_limits = lambda run, dense: {"latency_p50": Probe(2.0 + r, lambda network: 7.0 * (network + r))}
shared = building.shared_probes(SimpleNamespace(work=SimpleNamespace(leads=r == 0)), Path())["latency_p50"]
probed = [shared.dense, shared.read(3)]
team.barrier()
size = team.size()
import torch._inductor
team.stop(store)
threads = [Path("/proc/self/task", task, "comm").read_text() for task in os.listdir("/proc/self/task")]
leave(rank=r, size=size, means=[t.flatten().tolist() for t in tensors], parameter=needs.tolist(),
      layout=strided.is_contiguous(memory_format=torch.channels_last), same=transposed.tolist(),
      handed_back=handed_back, told=told, probed=probed, after=[team.rank(), team.size()],
      threads=[name for name in threads if "gloo" in name])
"""


def test_means_copies_and_words_are_the_same_in_every_process(tmp_path: Path) -> None:
    done = script(tmp_path, COLLECTIVES)
    assert done.returncode == 0, done.stderr
    first, second = left(tmp_path)
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first == second
    assert first["size"] == 2 and first["after"] == [0, 1]
    assert first["means"] == [[1.5, 7.5], [i / 2 for i in range(24)], [3.5], []]
    assert first["parameter"] == [0.5, 0.5]
    assert first["layout"], "the tensors stay where and as they lie in memory"
    assert first["same"] == [[0, 3], [1, 4], [2, 5]] and first["handed_back"]
    assert first["told"] == {"of": 0, "keys": ["a", 0]}
    assert first["probed"] == [2.0, 21.0], "only process 0 measures"
    assert not first["threads"], "they would abort the interpreter when it ends"


ENDING = """
team.COURTESY = timedelta(seconds=1)
def work():
    print("words of", team.rank())
    team.barrier()
    if team.rank() == 1:
        raise ValueError("process 1 has failed")
    team.barrier()
    return 0
team.run_on_all_ranks(work)
"""


def test_a_follower_that_fails_alone_says_so_and_takes_the_others_with_it(tmp_path: Path) -> None:
    done = script(tmp_path, ENDING)
    assert done.returncode != 0 and "ValueError: process 1 has failed" in done.stderr
    assert "words of 0" in done.stdout and "words of 1" not in done.stdout
    assert "another process of the group has ended" in done.stderr or "SIGTERM" in done.stderr


def test_without_torchrun_a_process_is_its_own_team(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor([1.0, 2.0])
    distributed.all_reduce_mean_([tensor])
    distributed.barrier()
    assert distributed.start() is None and (distributed.rank(), distributed.size()) == (0, 1)
    assert (
        distributed.broadcast_(tensor) is tensor
        and tensor.tolist() == [1, 2]
        and distributed.broadcast_object("a") == "a"
    )
    assert distributed.run_on_all_ranks(lambda: 4) == 4
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.launch() == distributed.Launch(), "a cluster that sets only these two starts no team"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.launch() == distributed.Launch(3, 4, 1, 2)
    assert (distributed.rank(), distributed.size()) == (0, 1), "nobody has started it"


CHOICES = """
import hashlib
import nets
from edgeprune import plugins
from edgeprune.models import bundle
from edgeprune.data.collection import in_memory
from edgeprune.recipe.schema import PruneTable; from edgeprune.recipe.schema import TuneTable
from edgeprune.records import Budget; from edgeprune.records import Limit
from edgeprune.prune import stage as prune
store = team.start()
pixels = torch.randint(0, 256, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
split = in_memory("train", pixels, torch.arange(48) % 5)
network = nets.build("plain")
found = {{}}
for method in plugins.names("methods"):
    if prune.trains(PruneTable(), method):
        for granularity in ("channel", "weight"):
            material = prune.PruningInputs(
                split.take(torch.arange(48)), split.labels, {{}}, 1, 0, train=split,
                table=TuneTable(epochs=2, batch=16, objective="fgsm"),
                scratch=Path({folder!r}, f"{{team.rank()}} {{method}} {{granularity}}"),
            )
            limit = Limit("params", "share", 0.5, "50 %")
            chosen = prune.run(
                bundle.from_module(network, torch.rand(1, 3, 8, 8)), PruneTable(method, granularity),
                Budget({{"params": limit}}), material,
            )
            digest = hashlib.sha256()
            for name, tensor in sorted({{**chosen.masks.channels, **chosen.masks.weights, **chosen.edited}}.items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
            kept = sum(int(keep.sum()) for keep in (*chosen.masks.channels.values(), *chosen.masks.weights.values()))
            found[f"{{method}} {{granularity}}"] = [digest.hexdigest(), kept, len(chosen.edited)]
team.stop(store)
leave(**found)
"""


def test_methods_that_train_leave_the_same_masks_and_weights_in_every_process(tmp_path: Path) -> None:
    done = script(tmp_path, CHOICES.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    first, second = left(tmp_path)
    assert set(first) >= {f"{m} {g}" for m in ("sap", "dnr", "deadwooding") for g in ("channel", "weight")}
    assert first == second
    assert all(kept and edited for _, kept, edited in first.values())
    assert not [path for path in tmp_path.glob("1 */**/*") if path.is_file()], "only process 0 keeps anything"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of `compress` for a tiny network and tiny data."""
    folder = tmp_path_factory.mktemp("team")
    torch.save(nets.build("plain").state_dict(), folder / "plain.pt")
    rng = np.random.default_rng(0)
    shape = (8, 8, 3)
    np.savez(
        folder / "images.npz", x_train=rng.integers(0, 256, (60, *shape), np.uint8), y_train=np.arange(60) % 5,
        x_test=rng.integers(0, 256, (30, *shape), np.uint8), y_test=np.arange(30) % 5,
    )  # fmt: skip
    arch = f"{paths.NETS}:{type(nets.build('plain')).__name__}"
    return [
        "-m", "edgeprune", "compress", str(folder / "plain.pt"), "--arch", arch, "--input", "3x8x8",
        "--data", str(folder / "images.npz"), "--set", "tune.batch=16",
        "--set", "measure.iterations=10", "--set", "measure.seconds=0.2",
    ]  # fmt: skip


def stamps(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.glob("[0-9]-*/*/record.json")}


@pytest.mark.slow
def test_compress_in_two_processes_leaves_one_run_that_any_later_start_finds_done(
    model: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [*model, "-o", str(run), "--epochs", "1", "--json"]
    done = torchrun(*words, "--method", "dnr", "--budget", "params=50 %")
    assert done.returncode == 0, done.stderr
    report = serialization.read(Report, run / "report.json")
    assert json.loads(done.stdout)["report"] == serialization.to_json(report), "one object, of process 0"
    assert done.stderr.count("prune: ") == 1 and len(stamps(run)) == 7
    before = stamps(run)
    done = torchrun(*words, "--method", "taylor")
    assert done.returncode == 0, done.stderr
    assert before.items() <= stamps(run).items() and len(stamps(run)) == 13, (
        "all but the dense model is another"
    )
    report = serialization.read(Report, run / "report.json")
    assert [r.conditions["stage"] for r in report.ledger] == ["pruned", "bn recalibrated", "tuned"]
    assert not list(run.glob("[0-9]-*/tmp-*")) and not list(run.glob("scratch/*"))
    before = stamps(run)
    alone = CliRunner().invoke(app, [*words[2:], "--method", "taylor"])
    assert alone.exit_code == 0, alone.output
    assert stamps(run) == before and json.loads(alone.stdout)["report"] == serialization.to_json(report)


def test_an_error_of_the_first_process_is_said_once_and_ends_with_its_exit_code(
    model: list[str], tmp_path: Path
) -> None:
    with Workdir(tmp_path / "run"):
        done = torchrun(*model, "-o", str(tmp_path / "run"))
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "is in use by another edgeprune" in done.stderr and "exitcode  : 7" in done.stderr


@pytest.mark.parametrize("words", [["list", "methods"], ["compress", "--no-such-option"], ["gate"], []])
def test_what_is_not_done_together_only_the_first_process_does(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["edgeprune", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and capsys.readouterr() == ("", "")
