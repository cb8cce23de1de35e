"""The command line as a user meets it: words, exit codes, one JSON object, resume, and a kill at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nets
import numpy as np
import paths
import pytest
import torch
from typer.testing import CliRunner

from edgeprune import serialization
from edgeprune.cli.app import app
from edgeprune.models import architectures
from edgeprune.records import Report
from edgeprune.serialization import sha256

FAST = ["--set", "measure.iterations=20", "--set", "measure.seconds=1.0"]
# Images enough to go through every step, too few and too rough to be good.
ROUGH = ["--set", "synthesize.images=8", "--set", "synthesize.steps=4"]
ARCH = f"{paths.NETS}:Residual"
runner = CliRunner()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "residual.pt"
    torch.save(nets.build("residual").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    shape = (8, 8, 3)
    np.savez(
        path, x_train=rng.integers(0, 256, (100, *shape), np.uint8), y_train=np.arange(100) % 5,
        x_test=rng.integers(0, 256, (50, *shape), np.uint8), y_test=np.arange(50) % 5,
    )  # fmt: skip
    return path


def command(weights: Path, out: Path, *more: str) -> list[str]:
    return [
        "compress",
        str(weights),
        "--arch",
        ARCH,
        "--input",
        "3x8x8",
        "--target",
        "local",
        "-o",
        str(out),
        *FAST,
        *ROUGH,
        *more,
    ]


@pytest.fixture(scope="module")
def run(
    weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("runs") / "residual"
    done = runner.invoke(app, command(weights, out, "--data", str(images), "--epochs", "1", "--json"))
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def readings(report: dict[str, object], side: str) -> dict[str, float]:
    return {r["metric"]: r["value"] for r in report[side]}  # type: ignore[index, attr-defined]


def test_a_run_leaves_everything_that_a_user_takes_away(run: tuple[Path, dict[str, object]]) -> None:
    out, answer = run
    for name in ("model.onnx", "dense.onnx", "model.pt2", "weights.safetensors", "plan.json", "recipe.toml",
                 "report.json", "report.md", "report.html", "edgeprune.lock"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    report = serialization.read(Report, out / "report.json")
    assert serialization.to_json(report) == answer["report"]


def test_the_budget_holds_and_every_metric_of_a_file_was_read(run: tuple[Path, dict[str, object]]) -> None:
    before, after = readings(run[1]["report"], "before"), readings(run[1]["report"], "after")  # type: ignore[arg-type]
    assert after["macs"] <= 0.5 * before["macs"] and after["params"] < before["params"]
    assert after["size"] == (run[0] / "model.onnx").stat().st_size
    for metric in ("latency_p50", "latency_p90", "latency_p99", "peak_memory", "clean_accuracy"):
        assert before[metric] is not None and after[metric] is not None
    assert 0 <= after["agreement"] <= 1


COUNTED = ("params", "macs", "size", "compressed_size", "weight_density", "param_density", "int8_macs",
           "int8_weights", "fp16_macs", "fp16_weights")  # fmt: skip


def test_measured_and_counted_readings_say_which_they_are(run: tuple[Path, dict[str, object]]) -> None:
    for reading in run[1]["report"]["after"]:  # type: ignore[index]
        counted = reading["metric"] in COUNTED
        assert (reading["where"] == "counted") == counted, reading
        if not counted:
            assert reading["where"].startswith("local")


def test_the_ledger_has_the_accuracy_after_every_step(run: tuple[Path, dict[str, object]]) -> None:
    stages = [r["conditions"]["stage"] for r in run[1]["report"]["ledger"]]  # type: ignore[index]
    assert stages == ["pruned", "bn recalibrated", "tuned"]


def test_the_second_time_repeats_no_stage(
    run: tuple[Path, dict[str, object]], weights: Path, images: Path
) -> None:
    out, first = run
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("[0-9]-*/*/record.json")}
    assert len(stamps) == 7
    done = runner.invoke(app, command(weights, out, "--data", str(images), "--epochs", "1", "--json"))
    assert done.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("[0-9]-*/*/record.json")} == stamps
    assert json.loads(done.stdout)["report"] == first["report"]


def test_a_run_whose_files_were_changed_is_neither_evaluated_nor_resumed(
    run: tuple[Path, dict[str, object]], weights: Path, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    model = tmp_path / "run" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    for arguments in (["evaluate", str(model.parent), "--data", str(images)], ["profile", str(model.parent)]):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2 and "sha256" in done.stderr, done.output
        assert sha256(model) in done.stderr and sha256(run[0] / "model.onnx") in done.stderr
    (weight,) = model.parent.glob("5-tune/*/weights.safetensors")
    content = bytearray(weight.read_bytes())
    content[-1] ^= 1
    weight.write_bytes(content)
    record = json.loads((weight.parent / "record.json").read_text())
    record["files"][weight.name] = sha256(weight)
    (weight.parent / "record.json").write_text(json.dumps(record))
    done = runner.invoke(app, command(weights, model.parent, "--data", str(images), "--epochs", "1"))
    assert done.exit_code == 7 and "changed together with its record" in done.stderr, done.output
    shutil.copy(run[0] / "model.onnx", model)
    (model.parent / "model.pt2").write_bytes(b"other")
    done = runner.invoke(app, ["why", str(model.parent)])
    assert done.exit_code == 2 and "model.pt2" in done.stderr, done.output


def test_another_number_of_threads_is_in_the_lock_file_and_told_when_a_run_goes_on(
    run: tuple[Path, dict[str, object]], weights: Path, images: Path, tmp_path: Path, two_threads: None
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    arguments = command(weights, tmp_path / "run", "--data", str(images), "--epochs", "1", "--json")
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert json.loads((tmp_path / "run" / "edgeprune.lock").read_text())["threads"] == 2
    assert report["environment"]["threads"] == 2 and run[1]["report"]["environment"]["threads"] == 1  # type: ignore[index]
    assert any("the 2 thread(s) of this process" in n and "tune with 1" in n for n in report["notes"])


def test_another_option_redoes_only_what_depends_on_it(
    run: tuple[Path, dict[str, object]], weights: Path, images: Path
) -> None:
    out, _ = run
    done = runner.invoke(app, command(weights, out, "--data", str(images), "--epochs", "2", "--json"))
    assert done.exit_code == 0, done.output
    counts = {p.name: len(list(p.iterdir())) for p in out.glob("[0-9]-*")}
    assert counts == {
        "0-dense": 1,
        "2-prune": 1,
        "3-cut": 1,
        "5-tune": 2,
        "6-export": 2,
        "7-quantize": 2,
        "8-measure": 2,
    }


def test_the_pruned_network_can_be_pruned_again_from_its_run_directory(
    run: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    again = ["compress", str(run[0]), "-o", str(tmp_path / "again"), "--json", *FAST, *ROUGH]
    again += ["--budget", "macs=80 %"]
    done = runner.invoke(app, again)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert readings(report, "before")["macs"] == readings(run[1]["report"], "after")["macs"]  # type: ignore[arg-type]
    assert readings(report, "after")["macs"] <= 0.8 * readings(report, "before")["macs"]


@pytest.mark.parametrize("argument", ["", "report.json"])
def test_gate_reads_a_run_or_its_report(run: tuple[Path, dict[str, object]], argument: str) -> None:
    path = str(run[0] / argument)
    assert runner.invoke(app, ["gate", path, "--budget", "macs=50 %"]).exit_code == 0
    assert runner.invoke(app, ["gate", path, "--budget", "macs=10 %"]).exit_code == 1
    assert runner.invoke(app, ["gate", path, "--budget", "energy=1 mJ"]).exit_code == 8
    assert runner.invoke(app, ["gate", path, "--budget", "speed=1"]).exit_code == 2


def test_a_missing_baseline_is_no_failure_and_is_said(
    run: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    done = runner.invoke(
        app, ["gate", str(run[0]), "--budget", "macs=50 %", "--baseline", str(tmp_path / "none.json")]
    )
    assert (done.exit_code == 0 and "none.json" in done.output) or "baseline" in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compress", "nowhere.pt2", "--target", "local"], 2, "nowhere.pt2"),
        (["compress", "x.pt2", "--target", "jetsun"], 2, "did you mean 'jetson'?"),
        (["compress", "x.pt2", "--budget", "speed=2"], 2, "unknown metric 'speed'"),
        (["compress", "x.pt2", "--budget", "macs"], 2, "METRIC=LIMIT"),
        (["compress", "x.pt2", "--method", "tailor"], 2, "did you mean 'taylor'?"),
        (["compress", "x.pt2", "--set", "prune.flor=0.2"], 2, "flor"),
        (["compress", "x.pt2", "--force", "prone"], 2, "did you mean 'prune'?"),
        (["compress", "x.pt2", "--force", "synthesise"], 2, "did you mean 'synthesize'?"),
        (["compress", "x.pt2", "--method", "datafree"], 2, "did you mean 'data-free'?"),
        (["compress", "x.pt2", "--set", "prune.repair=always"], 2, "auto, none, synthetic, data"),
        (["compress", "x.pt2", "--set", "synthesize.image=8"], 2, "did you mean 'images'?"),
        (["compress", "x.pt2", "--epochs", "3"], 2, "needs images"),
        (
            ["compress", "x.pt2", "--target", "raspberry-pi-5", "--precision", "fp16"],
            2,
            "it takes fp32, int8",
        ),
        (["compress", "x.pt2", "--precision", "int4"], 2, "auto, fp32, fp16, int8"),
        (["evaluate", "x.onnx"], 2, "--data"),
        (["evaluate", "x.onnx", "--attack", "fgms"], 2, "fgsm"),
        (["gate", "nowhere"], 2, "budget"),
        (["gate", "nowhere", "--budget", "macs=1 %"], 2, "nowhere"),
        (["list", "method"], 2, "did you mean 'methods'?"),
        (["profile", "nowhere.onnx"], 2, "nowhere.onnx"),
    ],
)
def test_wrong_input_is_answered_with_what_was_found_and_the_right_code(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(app, arguments)
    assert done.exit_code == code, done.output
    assert says in done.stderr and "Traceback" not in done.output
    assert done.stderr.startswith(("error: ", "load: "))


def test_an_impossible_budget_says_how_far_it_got(weights: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, command(weights, tmp_path / "run", "--budget", "macs=1 %"))
    assert done.exit_code == 4 and "the budget can't be met with" in done.stderr and "macs" in done.stderr


def test_an_error_under_json_is_one_object_on_stdout() -> None:
    done = runner.invoke(app, ["compress", "nowhere.pt2", "--json"])
    assert json.loads(done.stdout)["exit_code"] == 2 == done.exit_code


@pytest.mark.slow
def test_size_budgets_hold_for_the_file_itself(weights: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, command(weights, tmp_path / "run", "--budget", "size=60 %", "--json"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "model.onnx").stat().st_size <= 0.6 * (
        tmp_path / "run" / "dense.onnx"
    ).stat().st_size


@pytest.mark.slow
def test_a_jetson_run_says_that_nothing_was_measured_there_and_brings_its_build_script(
    weights: Path, tmp_path: Path
) -> None:
    arguments = command(weights, tmp_path / "run")
    arguments[arguments.index("local")] = "jetson"
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Nothing has been measured on" in done.stdout
    assert os.access(tmp_path / "run" / "build_engine.sh", os.X_OK)


@pytest.mark.slow
def test_evaluation_data_is_never_learned_from(weights: Path, images: Path, tmp_path: Path) -> None:
    """The training part is poisoned: opening it would be an error."""
    with np.load(images) as arrays:
        poisoned = dict(arrays)
    poisoned["x_train"] = np.zeros((1, 2), np.float32)
    np.savez(tmp_path / "poisoned.npz", **poisoned)
    data = ["--data", str(tmp_path / "poisoned.npz"), "--data-use", "evaluate"]
    done = runner.invoke(app, command(weights, tmp_path / "run", *data, "--json"))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert [r["conditions"]["stage"] for r in report["ledger"]] == ["pruned", "repaired"]
    assert readings(report, "after")["clean_accuracy"] is not None


@pytest.mark.slow
def test_any_method_may_be_repaired_on_calibration_images_before_it_is_tuned(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    chosen = ["--data", str(images), "--method", "magnitude", "--set", "prune.repair=data", "--json"]
    done = runner.invoke(app, command(weights, tmp_path / "run", *chosen))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    stages = {r["conditions"]["stage"]: r for r in report["ledger"]}
    assert list(stages) == ["pruned", "repaired", "bn recalibrated"]
    assert stages["repaired"]["conditions"]["repair"]["images"] == 100
    assert not any(r["metric"].startswith("synthetic") for r in report["after"])
    assert not list((tmp_path / "run").glob("1-synthesize"))


def test_evaluate_and_profile_read_the_file_itself(run: tuple[Path, dict[str, object]], images: Path) -> None:
    done = runner.invoke(app, ["evaluate", str(run[0] / "model.onnx"), "--data", str(images), "--json"])
    assert done.exit_code == 0, done.output
    reading = json.loads(done.stdout)["readings"][0]
    assert reading["n"] == 50 and 0 <= reading["spread"][0] <= reading["value"] <= reading["spread"][1] <= 1
    limited = runner.invoke(app, ["evaluate", str(run[0]), "--data", str(images), "--limit", "20", "--json"])
    assert json.loads(limited.stdout)["readings"][0]["n"] == 20
    done = runner.invoke(app, ["profile", str(run[0] / "model.onnx"), "--json", *FAST])
    assert done.exit_code == 0, done.output
    assert {r["metric"] for r in json.loads(done.stdout)["readings"]} >= {
        "size",
        "latency_p50",
        "peak_memory",
    }


def test_why_names_the_layers_and_the_reason(weights: Path) -> None:
    done = runner.invoke(app, ["why", str(weights), "--arch", ARCH, "--input", "3x8x8", "--json", *FAST])
    assert done.exit_code == 0, done.output
    rows = {r["layer"]: r for r in json.loads(done.stdout)["layers"]}
    assert rows["fc"]["why_not"] == "its channels are outputs of the network"
    assert rows["one.0"]["why_not"] == "" and rows["one.0"]["macs"] == 8 * 16 * 9 * 64
    assert sum(r["macs_share"] for r in rows.values()) == pytest.approx(1)
    assert sum(r["time_share"] or 0 for r in rows.values()) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("family", ["methods", "targets", "attacks", "runtimes", "devices", "calibration"])
def test_list_shows_every_member_with_a_line(family: str) -> None:
    done = runner.invoke(app, ["list", family, "--json"])
    assert done.exit_code == 0
    assert all(m["name"] and m["about"] for m in json.loads(done.stdout)[family])


def start(arguments: list[str], stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *arguments], stdout=stdout, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(
    run: tuple[Path, dict[str, object]], weights: Path, images: Path, tmp_path: Path
) -> None:
    arguments = command(weights, tmp_path / "run", "--data", str(images), "--epochs", "1")
    for stage in ("3-cut", "6-export"):
        with start(arguments) as process:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "run").glob(f"{stage}/*")) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
    finished = set((tmp_path / "run").glob("[0-5]-*/[!t]*"))
    stamps = {p: (p / "record.json").stat().st_mtime_ns for p in finished if p.is_dir()}
    assert stamps
    done = runner.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert {p: (p / "record.json").stat().st_mtime_ns for p in stamps} == stamps
    key = next(p for p in (run[0] / "6-export").iterdir() if (p / "model.onnx").exists() and p.name in
               {q.name for q in (tmp_path / "run" / "6-export").iterdir()})  # fmt: skip
    # Which precision ships is a matter of time here; what it is made from is not.
    again = tmp_path / "run" / "6-export" / key.name / "model.onnx"
    assert again.read_bytes() == (key / "model.onnx").read_bytes()
    assert (tmp_path / "run" / "model.onnx").stat().st_size > 0


def test_the_second_of_two_runs_in_one_directory_is_turned_away(weights: Path, tmp_path: Path) -> None:
    arguments = command(weights, tmp_path / "run")
    with start(arguments) as first:
        while not (tmp_path / "run" / ".lock").exists():
            assert first.poll() is None
            time.sleep(0.02)
        second = runner.invoke(app, arguments)
        first.kill()
    assert second.exit_code == 7 and "in use by another" in second.stderr


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_truncated_model_files_are_clear_errors(weights: Path, tmp_path: Path, share: float) -> None:
    data = weights.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(share * len(data))])
    done = runner.invoke(
        app, ["compress", str(path), "--arch", ARCH, "--input", "3x8x8", "-o", str(tmp_path / "run")]
    )
    assert done.exit_code == 4, done.output
    assert done.stderr.count("error: ") == 1 and "bug" not in done.stderr


@pytest.mark.parametrize("spec", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
@pytest.mark.slow
def test_a_model_of_the_zoos_pickled_whole_needs_no_flag_of_its_own(spec: str, tmp_path: Path) -> None:
    torch.save(architectures.architecture(spec), tmp_path / "whole.pt")
    out = ["-o", str(tmp_path / "run"), *FAST, "--method", "magnitude", "--json"]
    done = runner.invoke(app, ["compress", str(tmp_path / "whole.pt"), "--target", "jetson", *out])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert readings(report, "after")["macs"] <= 0.5 * readings(report, "before")["macs"]
    assert len(report["left_out"]) <= 2


def test_an_unknown_option_is_a_usage_error_and_under_json_one_object() -> None:
    with start(["compress", "x.pt2", "--nope", "--json"], subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and json.loads(out)["exit_code"] == 2
    assert err.decode().startswith("error: No such option: --nope")


@pytest.mark.slow
def test_a_budget_on_robust_accuracy_is_minded_when_a_precision_is_made(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    """Candidates are judged on attacked images too, and the file is attacked through its quantization."""
    more = ["--data", str(images), "--precision", "int8", "--budget", "robust_accuracy=-90 pp", "--json"]
    quick = ["--set", "attack.name=pgd", "--set", "attack.limit=8", "--set", "attack.steps=2"]
    loose = ["--set", "quantize.tolerance=1.0", "--set", "quantize.calibrator=minmax"]
    done = runner.invoke(app, command(weights, tmp_path / "run", *more, *quick, *loose))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    tried = report["history"]["precision"]
    assert all(row["robust_accuracy"] is not None for row in tried)
    assert next(row for row in tried if row["chosen"])["precision"] == "int8"
    assert [r["conditions"]["stage"] for r in report["ledger"]][-1] == "quantized"
    robust = next(r for r in report["after"] if r["metric"] == "robust_accuracy")
    assert 0 <= robust["value"] <= robust["conditions"]["transfer_only"]["value"]


def test_a_layer_to_skip_that_is_none_is_refused_before_anything_takes_long(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    wish = ["--data", str(images), "--epochs", "1", "--set", 'quantize.skip=["dawn*"]', "--precision", "int8"]
    done = runner.invoke(app, command(weights, tmp_path / "run", *wish))
    assert done.exit_code == 2 and "quantize.skip names 'dawn*'" in done.stderr
    assert not list((tmp_path / "run").glob("2-prune/*/chosen.json"))


@pytest.mark.slow
def test_a_size_for_a_precision_that_is_not_known_yet_is_that_of_the_floats_and_said(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    done = runner.invoke(
        app, command(weights, tmp_path / "run", "--data", str(images), "--budget", "size=80 %", "--json")
    )
    assert done.exit_code == 0, done.output
    assert any("until its fp32 file" in note for note in json.loads(done.stdout)["report"]["notes"])
