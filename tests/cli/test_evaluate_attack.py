"""`edgeprune evaluate --attack`: of a file, a run and a model; tests in pairs, the gate, the recipe."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import paths
import pytest
import torch
from onnx import helper, numpy_helper
from reports import check, plain_report, reading
from typer.testing import CliRunner

from edgeprune import confidence, serialization
from edgeprune.cli.app import app
from edgeprune.data.collection import in_memory
from edgeprune.errors import UsageError
from edgeprune.export import stage
from edgeprune.measure import evaluate
from edgeprune.models.bundle import deployed, load_bundle
from edgeprune.onnx_graph.index import freed
from edgeprune.pipeline import evaluation
from edgeprune.pipeline.run_directory import PUBLISHED, own_scratch
from edgeprune.recipe import parse, schema
from edgeprune.recipe.schema import ExportTable, ModelTable
from edgeprune.records import Report
from edgeprune.robustness.models_under_attack import HARMLESS, open_file
from edgeprune.serialization import sha256

runner = CliRunner()
ARCH = f"{paths.NETS}:Plain"
FLAGS = ["--arch", ARCH, "--input", "3x8x8"]
QUICK = ["--eps", "1/255", "--limit", "10"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images with the classes that it gives them, and a directory like that of a finished run."""
    folder = tmp_path_factory.mktemp("made")
    network, rng = nets.build("plain"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (80, 8, 8, 3), np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        network.fc.bias -= network(x).mean(0)
        labels = network(x).argmax(1).numpy()
    torch.save(network.state_dict(), folder / "plain.pt")
    np.savez(folder / "data.npz", x=pixels, y=labels)
    run = folder / "run"
    run.mkdir()
    bundle = load_bundle(ModelTable(path=str(folder / "plain.pt"), arch=ARCH, input="3x8x8"))
    table = ExportTable()
    stage.run(deployed(bundle), bundle.input, run / "model.onnx", opset=18, table=table, meta={}, real=None)
    stage.save_modules(bundle, run)
    model = {"path": str(folder / "plain.pt"), "arch": ARCH, "input": "3x8x8"}
    (run / "recipe.toml").write_text(parse.to_toml(parse.build({"model": model}, {})))
    (run / "edgeprune.lock").write_text(json.dumps({"model": {"sha256": bundle.source.sha256}}))
    told(run, plain_report([], []))
    return folder


def told(run: Path, report: Report) -> None:
    """A report of the files as they are."""
    files = {name: sha256(run / name) for name in PUBLISHED if (run / name).exists()}
    serialization.write(run / "report.json", replace(report, environment={"files": files}))


def evaluated(*arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.chdir(folder)
    done = runner.invoke(app, ["evaluate", *arguments, "--data", str(folder / "data.npz"), "--json"])
    assert done.exit_code == 0, done.output
    assert not (folder / "runs").exists() and not (folder / "run" / "scratch").exists()
    return json.loads(done.stdout)["readings"]


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks of few steps under the names of the standard evaluation."""
    from edgeprune import plugins

    options = {
        "apgd-ce": {"steps": 5},
        "apgd-t": {"steps": 5, "classes": 2},
        "fab-t": {"steps": 3, "classes": 2},
        "square": {"queries": 30},
    }
    build = plugins.build
    monkeypatch.setattr(
        plugins, "build", lambda family, name, given: build(family, name, options.get(name, given))
    )


def test_a_model_a_run_and_a_file_are_attacked_each_in_its_way(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    model = evaluated(
        "plain.pt", *FLAGS, "--attack", "standard", *QUICK, folder=made, monkeypatch=monkeypatch
    )
    run = evaluated(
        "run", "--arch", ARCH, "--attack", "standard", *QUICK, folder=made, monkeypatch=monkeypatch
    )
    file = evaluated("run/model.onnx", "--attack", "standard", *QUICK, folder=made, monkeypatch=monkeypatch)
    found = [{r["metric"]: r for r in rows} for rows in (model, run, file)]
    how = [rows["robust_accuracy"]["conditions"]["gradients"] for rows in found]
    assert how[0] == "white box"
    assert how[1] == "white box on the torch network, replayed on the file"
    assert how[2] == "white box on the file's own graph in torch, replayed on the file"
    assert [list(rows["robust_accuracy"]["conditions"]["broken"]) for rows in found] == [
        ["clean", "apgd-ce", "apgd-t", "fab-t", "square"],
        ["clean", "apgd-ce", "apgd-ce-to-the-end", "apgd-ce-from-dense", "apgd-t", "fab-t", "square"],
        ["clean", "apgd-ce", "apgd-ce-to-the-end", "apgd-t", "fab-t", "square"],
    ]
    for rows in found:
        robust = rows["robust_accuracy"]
        assert rows["clean_accuracy"]["value"] == 1.0 and robust["n"] == 10
        assert robust["spread"] == list(confidence.binomial(robust["conditions"]["right"], 10))
    worst = [rows["robust_accuracy"]["value"] for rows in found]
    assert worst[1] <= worst[0] < 1 and worst[1] <= worst[2] < 1


def test_of_a_run_with_an_int8_file_the_reading_says_what_transferred_images_alone_leave(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "data.npz", tmp_path)
    model = onnx.load(made / "run" / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "input" else name for name in node.input]
    pair = [
        helper.make_node("QuantizeLinear", ["input", "step", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["pixels"], "dequantize"),
    ]
    nodes = [*pair, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 / 64, np.float32), "step"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), "zero"))
    onnx.save(model, tmp_path / "run" / "model.onnx")
    told(tmp_path / "run", plain_report([], []))
    pgd = ["run", "--trust-run", "--attack", "pgd", "--eps", "2/255", "--limit", "30"]
    rows = {r["metric"]: r for r in evaluated(*pgd, folder=tmp_path, monkeypatch=monkeypatch)}
    robust = rows["robust_accuracy"]["conditions"]
    assert robust["gradients"].startswith(
        "white box on the torch network and on its straight-through surrogate"
    )
    assert list(robust["broken"]) == [
        "clean", "pgd", "pgd-to-the-end", "pgd-from-dense", "pgd-straight-through", "pgd-to-the-end-straight-through",
    ]  # fmt: skip
    alone = robust["transfer_only"]
    assert alone["right"] == robust["right"] + sum(list(robust["broken"].values())[4:])
    done = runner.invoke(app, ["evaluate", *pgd, "--data", "data.npz"])
    assert f"leave {100 * alone['value']:.1f} % standing" in " ".join(done.stdout.split())


def test_a_run_whose_model_is_gone_says_that_transfer_was_not_tried(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "data.npz", tmp_path)
    text = (tmp_path / "run" / "recipe.toml").read_text()
    for change, says in (
        (
            lambda: (tmp_path / "run" / "recipe.toml").write_text(text.replace("plain.pt", "gone.pt")),
            "no such file",
        ),
        (lambda: (tmp_path / "run" / "edgeprune.lock").write_text('{"model": {"sha256": "0"}}'), "gone.pt"),
        ((tmp_path / "run" / "edgeprune.lock").unlink, "can't be read"),
    ):
        change()
        rows = evaluated(
            "run", "--arch", ARCH, "--attack", "standard", *QUICK, folder=tmp_path, monkeypatch=monkeypatch
        )
        robust = next(r for r in rows if r["metric"] == "robust_accuracy")
        assert "dense model were not tried" in robust["conditions"]["notes"][0]
        assert says in robust["conditions"]["notes"][0]
        assert "apgd-ce-from-dense" not in robust["conditions"]["broken"]


class _Runs:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("names", ["trust_pickle", "arch", "allow_class"])
@pytest.mark.parametrize("command", ["evaluate", "profile"])
def test_code_that_only_the_recipe_of_a_run_names_is_not_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "run", tmp_path / "run")
    file, table = tmp_path / "dense.pt", {"path": str(tmp_path / "dense.pt"), "input": "3x8x8"}
    file.write_bytes(pickle.dumps(_Runs()))
    if names == "arch":
        shutil.copy(made / "plain.pt", file)
        (tmp_path / "x.py").write_text("import os\nos.mkdir('ran')\nnet = None\n")
    more = {"trust_pickle": True, "arch": f"{tmp_path / 'x.py'}:net", "allow_class": ["os.mkdir"]}
    text = parse.to_toml(parse.build({"model": {**table, names: more[names]}}, {}))
    (tmp_path / "run" / "recipe.toml").write_text(text)
    (tmp_path / "run" / "edgeprune.lock").write_text(json.dumps({"model": {"sha256": sha256(file)}}))
    quick = ["--set", "measure.iterations=10", "--set", "measure.seconds=0.1"] if command == "profile" else []
    arguments = [command, "run", "--data", str(made / "data.npz"), "--attack", "fgsm", *QUICK, *quick]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 4 and not (tmp_path / "ran").exists(), done.output
    assert f"recipe.toml says {names} = " in done.stderr and "--trust-run" in done.stderr
    if command == "evaluate" and names != "allow_class":
        assert runner.invoke(app, [*arguments, "--trust-run"]).exit_code == 0
        assert (tmp_path / "ran").exists()


def test_of_architectures_only_bare_names_of_the_two_packages_are_harmless() -> None:
    for arch in ("", "timm:resnet18.a1_in1k", "torchvision:resnet18?num_classes=10", "timm:x?in_chans=1"):
        assert HARMLESS.fullmatch(arch), arch
    for arch in (
        "x.py:f",
        "os:system",
        "timm:x?checkpoint_path=/f",
        "timm:x?num_classes=9999999",
        "timm:hf-hub:a/b",
    ):
        assert not HARMLESS.fullmatch(arch), arch


def test_verdicts_of_an_attack_that_somebody_else_left_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch" / "attack-1"
    own_scratch(scratch)
    (scratch / "state.json").write_text("own")
    own_scratch(scratch)
    assert (scratch / "state.json").exists()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    own_scratch(scratch)
    assert not (scratch / "state.json").exists()


def test_in_a_terminal_the_attacks_and_the_warnings_are_said_in_words(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    arguments = ["evaluate", "plain.pt", *FLAGS, "--data", "data.npz", "--attack", "fgsm", *QUICK]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "fgsm, Linf eps 1/255, white box." in done.stdout and "survived" in done.stdout
    assert "10 of 10 images are right without an attack" in done.stderr
    facts = {"flags": ["odd"], "notes": ["so"]}
    lines = evaluation.warnings((reading("clean_accuracy", 1.0, conditions=facts),))
    assert lines == ["note: so", "WARNING: odd"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run/model.onnx", "--attack", "standard", "--eps", "8"], "did you mean 8/255?"),
        (["run/model.onnx", "--attack", "standard", "--eps", "8 px"], "'8 px' is not a quantity"),
        (["run/model.onnx", "--attack", "pdg"], "did you mean 'pgd'?"),
        (["run/model.onnx", "--attack", "standard", "--limit", "-1"], "--limit -1"),
        (["run/model.onnx", "--attack", "standard", "--set", "attack.norm=L1"], "Linf, L2"),
        (["run", "--attack", "pgd", "--set", "attack.step=3"], "did you mean 'steps'?"),
    ],
)
def test_what_can_not_be_attacked_is_answered_with_what_to_do(
    made: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(made)
    done = runner.invoke(app, ["evaluate", *arguments, "--data", "data.npz"])
    assert done.exit_code == 2, done.output
    assert says in done.stderr and "Traceback" not in done.output


def test_labels_that_are_no_classes_of_the_file_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    pixels = np.zeros((12, 8, 8, 3), np.uint8)
    for labels, says in (({"y": np.arange(12)}, "the model has 5 outputs"), ({}, "y")):
        np.savez(tmp_path / "odd.npz", x=pixels, **labels)
        arguments = [
            "evaluate",
            "run",
            "--data",
            str(tmp_path / "odd.npz"),
            "--attack",
            "fgsm",
            "--trust-run",
        ]
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2 and says in done.stderr, done.output


def test_an_accuracy_that_looks_like_other_images_or_another_normalization_is_doubted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    with np.load(made / "data.npz") as file:
        x, y = file["x"], file["y"]
    np.savez(tmp_path / "turned.npz", x=x, y=(y + 1) % 5)
    np.savez(tmp_path / "some.npz", x=x[y < 3], y=y[y < 3])
    shutil.copytree(made / "run", tmp_path / "run")
    dense = reading("clean_accuracy", 0.5, n=80, artifact="dense", spread=(0.4, 0.6))
    after = reading("clean_accuracy", 0.99, n=80, artifact="compressed", spread=(0.9, 1.0))
    told(tmp_path / "run", plain_report([dense], [after]))

    def lines(*arguments: str) -> str:
        done = runner.invoke(app, ["evaluate", *arguments])
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    turned, right = str(tmp_path / "turned.npz"), str(made / "data.npz")
    assert "better than guessing" not in lines("run", "--data", right)
    said = lines(str(tmp_path / "run"), "--data", turned)
    assert "no better than guessing: look at the normalization (an ONNX file gets pixels in [0, 1]" in said
    assert "and report.json says 99.0 % of 80: these are other images" in said
    said = lines(str(tmp_path / "run"), "--data", turned, "--attack", "fgsm", "--limit", "40", "--arch", ARCH)
    assert said.count("better than guessing") == 1 and "report.json says" in said
    assert "(--mean, --std)" in lines("plain.pt", *FLAGS, "--data", turned)
    said = lines("run/model.onnx", "--data", str(tmp_path / "some.npz"), "--mean", "0,0,0", "--std", "1,1,1")
    assert "The images are of 3 of the 5 classes that model.onnx answers" in said
    assert "--mean and --std were not used" in said


@pytest.mark.parametrize(("right", "word"), [(10, "no better"), (18, "hardly better"), (40, "")])
def test_how_near_to_guessing_an_accuracy_is(right: int, word: str) -> None:
    """With ten classes guessing is right on 10 %; what is doubted ends at 19 %."""
    split = in_memory("test", torch.zeros(100, 3, 8, 8, dtype=torch.uint8), torch.arange(100) % 10)
    given = reading("clean_accuracy", right / 100, n=100, spread=confidence.binomial(right, 100))
    for attacked in (False, True):
        flags = evaluate.guessing(given, split, attacked=attacked).conditions.get("flags", [])
        silent = not word or (attacked and word == "no better")
        assert [f"{word} than guessing" in f for f in flags] == ([] if silent else [True])
    only = in_memory("test", torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9))
    assert evaluate.guessing(given, only) is given


def test_a_report_that_says_nothing_of_the_accuracy_raises_no_doubt(tmp_path: Path) -> None:
    given = reading("clean_accuracy", 0.2, n=100, spread=(0.1, 0.3))
    assert evaluate.reported(given, tmp_path) is given
    serialization.write(tmp_path / "report.json", plain_report([], []))
    assert evaluate.reported(given, tmp_path) is given
    near = reading("clean_accuracy", 0.35, n=100, spread=(0.25, 0.45))
    serialization.write(tmp_path / "report.json", plain_report([], [near]))
    assert evaluate.reported(given, tmp_path) is given


def test_a_file_with_a_fixed_batch_is_asked_many_images_at_a_time_and_answers_the_same(
    made: Path, tmp_path: Path
) -> None:
    answers, fast = open_file(made / "run" / "model.onnx", tmp_path, 1)
    assert fast is not None and not list(tmp_path.iterdir())
    x = nets.example(5)
    torch.testing.assert_close(answers(x), fast(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="no file"):
        open_file(tmp_path / "none.onnx", tmp_path, 1)


@pytest.mark.parametrize("free", [False, True])
def test_on_several_threads_every_image_gets_its_own_answer(free: bool, made: Path, tmp_path: Path) -> None:
    path = made / "run" / "model.onnx"
    if free:
        onnx.save(freed(onnx.load(str(path))), str(tmp_path / "free.onnx"))
        path = tmp_path / "free.onnx"
    answers, fast = open_file(path, tmp_path, 3)
    assert fast is not None
    for count in (1, 2, 5, 9, 160):
        x = torch.rand(count, 3, 8, 8)
        torch.testing.assert_close(fast(x), answers(x), rtol=1e-5, atol=1e-5)
    assert (open_file(path, tmp_path, 1)[1] is None) == free, "one thread gains nothing on a free batch"


def test_the_same_seed_gives_the_same_verdicts_and_the_same_images(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pgd = ["plain.pt", *FLAGS, "--attack", "pgd", "--eps", "1/255", "--limit", "20"]
    first, again = (evaluated(*pgd, folder=made, monkeypatch=monkeypatch) for _ in range(2))
    for rows in (first, again):
        for row in rows:
            row["conditions"].pop("seconds", None)
    assert first == again
    everything = evaluated(*pgd[:-1], "0", folder=made, monkeypatch=monkeypatch)
    assert everything[0]["n"] == 80 and everything[1]["conditions"]["limit"] == 0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 6), (3, 3), (2, 9), (40, 61)])
def test_the_paired_test_is_the_two_sided_binomial_one(gained: int, lost: int) -> None:
    n = gained + lost
    odds = [comb(n, k) / 2**n for k in range(n + 1)]
    exact = sum(p for p in odds if p <= odds[gained] * (1 + 1e-9))
    assert confidence.mcnemar(gained, lost) == pytest.approx(exact, rel=1e-9)
    assert confidence.mcnemar(lost, gained) == confidence.mcnemar(gained, lost)


def test_the_paired_test_on_known_and_on_impossible_counts() -> None:
    assert confidence.mcnemar(0, 5) == 0.0625 and confidence.mcnemar(0, 6) == 0.03125
    assert 0 < confidence.mcnemar(0, 1000) < 1e-300
    with pytest.raises(ValueError, match="at least 0"):
        confidence.mcnemar(-1, 2)


def test_the_gate_reads_an_accuracy_under_attack_with_its_interval() -> None:
    """Undecided while the limit lies inside the interval; in pairs 10 lost and 10 gained of 1000 are +-0.88 pp."""
    worst = reading("robust_accuracy", 0.45, n=500, spread=confidence.binomial(225, 500))
    for text, status in (
        ("40 %", "pass"),
        ("44 %", "inconclusive"),
        ("46 %", "inconclusive"),
        ("50 %", "fail"),
    ):
        assert check(plain_report([], [worst]), "robust_accuracy", text).status == status
    spread = confidence.binomial(450, 1000)
    dense = reading("robust_accuracy", 0.45, spread=spread)
    after = reading("robust_accuracy", 0.45, spread=spread, conditions={"paired": {"gained": 10, "lost": 10}})
    assert check(plain_report([dense], [after]), "robust_accuracy", "-0.9 pp").status == "pass"
    assert check(plain_report([dense], [after]), "robust_accuracy", "-0.85 pp").status == "inconclusive"
    stronger = reading("robust_accuracy", 0.45, spread=spread, conditions={"attack": "standard"})
    weaker = reading("robust_accuracy", 0.45, spread=spread, artifact="dense", conditions={"attack": "fgsm"})
    found = check(plain_report([weaker], [stronger]), "robust_accuracy", "-9 pp")
    assert found.status == "inconclusive" and "not comparable" in found.detail


def test_auto_is_pgd_after_robust_training_and_standard_where_a_robust_accuracy_is_asked_for() -> None:
    def decided(**tables: Any) -> tuple[str, str]:
        table = parse.attack(parse.build({}, tables))
        return table.name, table.eps

    assert decided() == ("none", "8/255")
    assert decided(tune={"objective": "pgd"}) == ("pgd", "8/255")
    assert decided(tune={"objective": "trades", "eps": "4/255"}) == ("pgd", "4/255")
    assert decided(tune={"objective": "pgd", "eps": "4/255"}, attack={"norm": "L2"}) == (
        "pgd",
        "128/255",
    )
    assert decided(budget={"robust_accuracy": "40 %"}) == ("standard", "8/255")
    assert decided(tune={"objective": "pgd"}, attack={"name": "none"}) == ("none", "8/255")
    assert decided(attack={"name": "fgsm", "eps": "1/255"}) == ("fgsm", "1/255")


def test_the_radius_that_people_mean_is_the_one_that_is_used() -> None:
    from edgeprune.quantities import USUAL_EPS, eps_of

    assert {norm: eps_of(text, norm) for norm, text in schema.USUAL_EPS_TEXT.items()} == USUAL_EPS
