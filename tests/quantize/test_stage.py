"""The quantize stage on small networks: what ships, what is refused, what goes back to float, what survives a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from edgeprune.errors import ParityError, UnsupportedModel, UsageError, WorkdirError
from edgeprune.export import stage
from edgeprune.models.bundle import deployed, from_module
from edgeprune.quantities import limit
from edgeprune.quantize import evaluation, int8, observers, qdq
from edgeprune.quantize import job as job_module
from edgeprune.quantize import stage as stage_module
from edgeprune.quantize.evaluation import can_free_batch, evaluation_set, logits_of
from edgeprune.quantize.job import CalibrationSet, Quantized
from edgeprune.quantize.stage import check_precision, shipped, wants_images
from edgeprune.quantize.verification import verify
from edgeprune.recipe.schema import ExportTable, QuantizeTable
from edgeprune.records import Limit, Reading

ALL = ("fp32", "fp16", "int8")
ONE = QuantizeTable(calibrator="minmax", equalize="off", bias_correction="off")


def exported(folder: Path, module: nn.Module, *, dynamic_batch: bool = False) -> Path:
    bundle = from_module(module, nets.example(), mean=(0.5,) * 3, std=(0.25,) * 3)
    path = folder / "float.onnx"
    table = ExportTable(dynamic_batch=dynamic_batch)
    meta = {"labels": '["a", "b"]'}
    stage.run(deployed(bundle).eval(), bundle.input, path, opset=17, table=table, meta=meta, real=None)
    return path


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("residual"), undecided(nets.build("residual")))


def images(count: int = 40) -> Tensor:
    """Noise round a color of its own for each image."""
    generator = torch.Generator().manual_seed(0)
    colors, noise = (
        torch.rand((count, *size), generator=generator) for size in ((nets.SHAPE[0], 1, 1), nets.SHAPE)
    )
    return (colors + 0.6 * (noise - 0.5)).clamp(0.0, 1.0)


def undecided(module: nn.Module) -> nn.Module:
    """A network whose head has no favorite among the classes, so that images differ in theirs."""
    module.eval()
    with torch.no_grad():
        module.fc.bias -= module((images(200) - 0.5) / 0.25).mean(0)
    return module


def logits(path: Path, pixels: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": x[None].numpy()})[0] for x in pixels])


def labelled(path: Path, count: int = 40) -> CalibrationSet:
    """Images whose labels are what the float file says."""
    pixels = images(count)
    return CalibrationSet(pixels, torch.from_numpy(logits(path, pixels).argmax(1)), "calibration")


def job(
    folder: Path, calibration: CalibrationSet | None, precision: str = "int8", **more: object
) -> job_module.Job:
    first = job_module.Job(ONE, precision, ALL, "u8", calibration, folder / "scratch", lambda _: None)
    return replace(first, **more)


class Clock:
    """A device that has these times for files; it keeps which were asked for."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = seconds, dict[str, Path]()

    def __call__(self, files: Mapping[str, Path]) -> dict[str, Reading]:
        self.asked.update(files)
        assert all(path.is_file() for path in files.values())
        return {
            n: Reading("latency_p50", self.seconds[n], "s", 50, None, "local x86_64", n, {"threads": 1})
            for n in files
        }


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_int8_ships_with_its_proof_its_closeness_and_what_it_is(residual: Path, tmp_path: Path) -> None:
    calibration = labelled(residual)
    result = stage_module.run(residual, tmp_path, job(tmp_path, calibration))
    assert (result.precision, result.file) == ("int8", "model.onnx")
    path = shipped(residual, tmp_path)
    assert path == tmp_path / "model.onnx" and path.stat().st_size < 0.6 * residual.stat().st_size
    assert "QuantizeLinear" in ops(path)
    read = {r.metric: r for r in result.readings}
    assert read["int8_macs"].value == read["int8_weights"].value == read["runtime_int8_macs"].value == 1.0
    sqnr = read["sqnr"].value
    assert sqnr is not None and sqnr > 25.0
    # The reading is what the two files really answer.
    a, b = logits(residual, calibration.images), logits(path, calibration.images)
    assert sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=0.05)
    assert read["agreement_with_float"].value == (a.argmax(1) == b.argmax(1)).mean()
    assert read["quantization_loss"].conditions["float"] == 1.0
    assert stage_module.read(tmp_path) == result


def test_the_file_says_what_it_is_and_keeps_what_the_exported_one_said(
    residual: Path, tmp_path: Path
) -> None:
    stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual)))
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    before = {entry.key: entry.value for entry in onnx.load(residual).metadata_props}
    assert before.items() <= about.items() and "edgeprune.labels" in before
    assert about["edgeprune.precision"] == "int8" and about["edgeprune.scheme"] == "u8"
    assert about["edgeprune.float_parent"] == hashlib.sha256(residual.read_bytes()).hexdigest()
    assert json.loads(about["edgeprune.quantized_with"])["calibrator"] == "minmax"
    assert about["edgeprune.calibrated_on"] == "40 calibration images"


def test_every_calibrator_is_tried_with_and_without_equalization_and_correction(
    residual: Path, tmp_path: Path
) -> None:
    calibration = replace(labelled(residual), labels=None)
    result = stage_module.run(
        residual, tmp_path, job(tmp_path, calibration, table=QuantizeTable(tolerance=1.0))
    )
    tried = [c for c in result.candidates if c["precision"] == "int8"]
    found = {(c["calibrator"], c["equalized"], c["corrected"]) for c in tried}
    assert len(tried) == len(found) == 16
    (chosen,) = [c for c in result.candidates if c["chosen"]]
    assert chosen["calibrator"] == result.choice["calibrator"] and chosen["why_not"] == ""
    for other in tried:
        assert other is chosen or (other["why_not"] and other["sqnr_db"] <= chosen["sqnr_db"])
    assert result.choice["pairs"] == (result.choice["equalized"] and 1)


def test_what_the_recipe_names_is_all_that_is_tried(residual: Path, tmp_path: Path) -> None:
    table = QuantizeTable(calibrator="mse", equalize="on", bias_correction="on")
    result = stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual), table=table))
    (only,) = [c for c in result.candidates if c["precision"] == "int8"]
    assert (only["name"], only["equalized"], only["corrected"]) == (
        "int8 mse, equalized, bias-corrected", True, True,
    )  # fmt: skip


def test_the_same_inputs_give_the_same_bytes(residual: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        stage_module.run(
            residual, tmp_path / name, job(tmp_path / name, labelled(residual), table=QuantizeTable())
        )
    one, two = (tmp_path / name / "model.onnx" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_that_was_killed_goes_on_without_a_second_pass_and_gives_the_same_bytes(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, table = labelled(residual), QuantizeTable()
    stage_module.run(residual, tmp_path / "whole", job(tmp_path / "whole", calibration, table=table))
    made: list[object] = []
    real = qdq.quantized

    def killed(*given: object, **more: object) -> ModelProto:
        made.append(given)
        if len(made) == 6:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(int8, "quantized", killed)
    with pytest.raises(KeyboardInterrupt):
        stage_module.run(residual, tmp_path, job(tmp_path, calibration, table=table))
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "quantized.json").exists()

    def never(*_: object, **__: object) -> dict[str, observers.Seen]:
        raise AssertionError("a second pass over the images")

    monkeypatch.setattr(observers, "observe", never)
    stage_module.run(residual, tmp_path, job(tmp_path, calibration, table=table))
    # 5 candidates were kept; the other 11 are built, and the chosen one once more.
    assert len(made) == 6 + 11 + 1
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


def test_other_images_in_the_same_scratch_start_anew(residual: Path, tmp_path: Path) -> None:
    first = job(tmp_path, labelled(residual))
    stage_module.run(residual, tmp_path / "a", first)
    brighter = CalibrationSet(images() * 0.5, None, "calibration")
    stage_module.run(residual, tmp_path / "b", replace(first, calibration=brighter))
    stage_module.run(
        residual, tmp_path / "c", replace(first, calibration=brighter, scratch=tmp_path / "other")
    )
    a, b, c = ((tmp_path / name / "model.onnx").read_bytes() for name in "abc")
    assert b == c != a


class Loud(nn.Module):
    """Each row of `loud` has one huge weight, for a channel that is always zero: the others are nothing on 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.loud = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        with torch.no_grad():
            self.first.bias[0] = -100.0
            self.loud.weight[:, 0] = 4000.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.loud(torch.relu(self.first(x))))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return exported(tmp_path_factory.mktemp("loud"), undecided(Loud()))


def test_the_layer_that_loses_goes_back_to_float_alone_and_is_reported(loud: Path, tmp_path: Path) -> None:
    table = replace(ONE, tolerance=0.15)
    result = stage_module.run(loud, tmp_path, job(tmp_path, labelled(loud, 200), table=table))
    assert list(result.choice["fallback"]) == ["loud"]
    assert result.choice["fallback"]["loud"] > 0.01
    assert result.choice["float_layers"] == ["loud"]
    share = next(r.value for r in result.readings if r.metric == "int8_macs")
    assert share is not None and 0.5 < share < 1.0
    assert any("1 of 4 layers went back to float" in note and "loud" in note for note in result.notes)
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(about["edgeprune.float_layers"]) == ["loud"]
    weights = {t.name: t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert weights["loud.weight"] == onnx.TensorProto.FLOAT
    assert weights["last.weight"] == onnx.TensorProto.INT8


def test_a_tolerance_that_can_not_be_reached_is_exit_5_for_int8_and_fp32_for_auto(
    residual: Path, tmp_path: Path
) -> None:
    # Labels that half of the float file's answers miss, and no layer of the file may lose a single one of the rest.
    calibration = CalibrationSet(images(), None, "calibration")
    table = replace(ONE, tolerance=0.0)
    crude = {"ranges": lambda seen, *_, **__: {name: (-0.01, 0.01) for name in seen}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "ranges", crude["ranges"])
        with pytest.raises(ParityError, match=r"loses [\d.]+ points of agreement") as error:
            stage_module.run(residual, tmp_path / "a", job(tmp_path / "a", calibration, table=table))
        assert error.value.exit_code == 5 and "--set quantize.tolerance=0." in error.value.hint
        assert not (tmp_path / "a" / "model.onnx").exists()
        asked = job(
            tmp_path / "b", calibration, "auto", table=table, precisions=("fp32", "int8"), timer=Clock()
        )
        result = stage_module.run(residual, tmp_path / "b", asked)
    assert (result.precision, result.file) == ("fp32", "")
    assert any("int8 does not ship" in note and "points of agreement" in note for note in result.notes)
    assert [c["precision"] for c in result.candidates if c["chosen"]] == ["fp32"]
    # The hint's tolerance is one that is accepted.
    accepted = float(error.value.hint.split("quantize.tolerance=")[1].split(",")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "ranges", crude["ranges"])
        wider = replace(table, tolerance=accepted)
        assert stage_module.run(residual, tmp_path / "c", job(tmp_path / "c", calibration, table=wider)).file


def test_auto_ships_int8_where_it_is_faster(residual: Path, tmp_path: Path) -> None:
    clock = Clock(fp32=2e-3, int8=1e-3, fp16=1.9e-3)
    result = stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual), "auto", timer=clock))
    assert (result.precision, result.file) == ("int8", "model.onnx")
    assert set(clock.asked) == {"fp32", "int8", "fp16"} and clock.asked["fp32"] == residual
    assert "QuantizeLinear" in ops(clock.asked["int8"])
    by_name = {c["precision"]: c for c in result.candidates}
    assert by_name["fp16"]["why_not"] == "slower: 1.9 ms, int8 1 ms on local x86_64, 1 thread"
    assert by_name["fp32"]["size_bytes"] == residual.stat().st_size and by_name["int8"]["latency_s"] == 1e-3


def test_auto_says_that_int8_is_slower_and_does_not_ship_it(residual: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"of an older run")
    clock = Clock(fp32=0.76e-3, int8=1e-3)
    asked = job(tmp_path, labelled(residual), "auto", timer=clock, precisions=("fp32", "int8"))
    result = stage_module.run(residual, tmp_path, asked)
    assert (result.precision, result.file, result.readings) == ("fp32", "", ())
    assert shipped(residual, tmp_path) == residual
    assert result.notes == ("int8 does not ship: slower: 1 ms, fp32 760 us on local x86_64, 1 thread.",)


def test_int8_that_was_asked_for_ships_though_it_is_slower_and_a_note_says_so(
    residual: Path, tmp_path: Path
) -> None:
    clock = Clock(fp32=0.76e-3, int8=1e-3)
    result = stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual), timer=clock))
    assert result.precision == "int8"
    assert any("slower than fp32 here, 1 ms against 760 us on local x86_64" in n for n in result.notes)


def test_auto_without_a_device_keeps_fp32_and_says_what_to_do(residual: Path, tmp_path: Path) -> None:
    result = stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual), "auto"))
    assert (result.precision, result.candidates) == ("fp32", ())
    (note,) = result.notes
    assert "--device" in note and "--precision int8" in note


def test_auto_without_a_device_still_meets_a_budget_of_size(residual: Path, tmp_path: Path) -> None:
    limits: dict[str, Limit] = {"size": limit("size", "60 %")}
    asked = job(
        tmp_path, labelled(residual), "auto", limits=limits, dense=residual, precisions=("fp32", "int8")
    )
    result = stage_module.run(residual, tmp_path, asked)
    assert result.precision == "int8"
    assert result.candidates[0]["why_not"] == "misses the budget of size, which int8 meets"


def test_auto_without_images_leaves_int8_out(residual: Path, tmp_path: Path) -> None:
    clock = Clock(fp32=2e-3, fp16=1e-3)
    result = stage_module.run(residual, tmp_path, job(tmp_path, None, "auto", timer=clock))
    assert result.precision == "fp16" and set(clock.asked) == {"fp32", "fp16"}
    assert any(note.startswith("int8 was not built") and "--data" in note for note in result.notes)
    assert any("test patterns" in note for note in result.notes)


def test_auto_where_the_target_takes_fp32_alone_builds_nothing(residual: Path, tmp_path: Path) -> None:
    asked = job(tmp_path, labelled(residual), "auto", precisions=("fp32",), timer=Clock())
    assert stage_module.run(residual, tmp_path, asked).notes == ()


def test_fp32_that_was_asked_for_is_left_as_it_is(residual: Path, tmp_path: Path) -> None:
    result = stage_module.run(residual, tmp_path, job(tmp_path, None, "fp32"))
    assert result == Quantized("fp32", "", {}, (), (), ())
    assert shipped(residual, tmp_path) == residual


def test_fp16_ships_at_half_the_weights_and_answers_alike(residual: Path, tmp_path: Path) -> None:
    calibration = labelled(residual)
    result = stage_module.run(residual, tmp_path, job(tmp_path, calibration, "fp16"))
    path = shipped(residual, tmp_path)
    kinds = {t.data_type for t in onnx.load(path).graph.initializer if t.name.endswith("weight")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    read = {r.metric: r.value for r in result.readings}
    assert read["fp16_macs"] == read["fp16_weights"] == 1.0 and (read["sqnr"] or 0) > 50.0
    np.testing.assert_allclose(
        logits(path, calibration.images), logits(residual, calibration.images), atol=0.02
    )


def test_robust_accuracy_decides_with_clean_accuracy(residual: Path, tmp_path: Path) -> None:
    calibration = labelled(residual)
    assert calibration.labels is not None
    noisy = (
        calibration.images[:20]
        + 0.2 * torch.randn((20, *nets.SHAPE), generator=torch.Generator().manual_seed(1))
    ).clamp(0, 1)
    given = replace(calibration, adversarial=noisy)
    result = stage_module.run(residual, tmp_path, job(tmp_path, given))
    wanted = (logits(residual, noisy).argmax(1) == calibration.labels[:20].numpy()).mean()
    own = (logits(tmp_path / "model.onnx", noisy).argmax(1) == calibration.labels[:20].numpy()).mean()
    facts = next(r.conditions for r in result.readings if r.metric == "quantization_loss")
    assert (facts["robust_float"], facts["robust_quantized"]) == (wanted, own)
    mine = next(c for c in result.candidates if c["precision"] == "int8")
    assert mine["robust_accuracy"] == own


def test_signed_activations_where_the_target_wants_them(residual: Path, tmp_path: Path) -> None:
    stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual), scheme="s8"))
    model = onnx.load(tmp_path / "model.onnx")
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    steps = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert steps and all(arrays[n.input[2]].dtype == np.int8 and not arrays[n.input[2]].any() for n in steps)
    stage_module.run(
        residual, tmp_path / "u8",
        job(tmp_path / "u8", labelled(residual), scheme="s8", table=replace(ONE, scheme="u8")),
    )  # fmt: skip
    assert "edgeprune.scheme" in {
        e.key: e.value for e in onnx.load(tmp_path / "u8/model.onnx").metadata_props
    }


def test_a_layer_to_skip_stays_float_and_is_no_silent_fallback(residual: Path, tmp_path: Path) -> None:
    table = replace(ONE, skip=("down*",))
    result = stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual), table=table))
    assert result.choice["skipped"] == result.choice["float_layers"] == ["down.0"]
    assert result.choice["fallback"] == {}
    with pytest.raises(UsageError, match=r"quantize.skip names 'dawn\*'"):
        stage_module.run(
            residual, tmp_path, job(tmp_path, labelled(residual), table=replace(ONE, skip=("dawn*",)))
        )


def test_a_layer_that_became_float_in_silence_is_exit_5(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = qdq.quantized

    def forgetful(*given: object, skip: tuple[str, ...], **more: object) -> ModelProto:
        return real(*given, skip=(*skip, "two"), **more)

    monkeypatch.setattr(int8, "quantized", forgetful)
    with pytest.raises(ParityError, match="two") as error:
        stage_module.run(
            residual, tmp_path, job(tmp_path, labelled(residual), table=replace(ONE, tolerance=1.0))
        )
    assert error.value.exit_code == 5


def test_a_network_with_a_layer_that_can_not_be_int8_ships_with_that_layer_named(tmp_path: Path) -> None:
    path = exported(tmp_path, nets.build("transposed"))
    result = stage_module.run(path, tmp_path, job(tmp_path, labelled(path)))
    assert result.choice["unquantizable"] == result.choice["float_layers"] == ["up"]


def test_a_network_without_any_layer_for_int8_says_so(tmp_path: Path) -> None:
    path = exported(tmp_path, nn.Sequential(nn.AvgPool2d(8), nn.Flatten()).eval())
    with pytest.raises(UnsupportedModel, match="no layer of the network can be int8"):
        stage_module.run(path, tmp_path, job(tmp_path, labelled(path)))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: replace(m, images=m.images[:0], labels=None), "no calibration images"),
        (lambda m: replace(m, images=m.images.double()), r"the model takes float32 \(N, 3, 8, 8\)"),
        (lambda m: replace(m, images=m.images[:, :, :4]), r"are torch.float32 \(40, 3, 4, 8\)"),
        (lambda m: replace(m, labels=m.labels[:3]), "40 calibration images have 3 labels"),
        (
            lambda m: replace(m, images=torch.where(m.images > 0.99, torch.nan, m.images)),
            "hold NaN or infinity",
        ),
        (lambda m: replace(m, labels=None, adversarial=m.images), "attacked images .* no labels"),
    ],
)
def test_images_that_are_none_are_refused(
    spoil: Callable[[CalibrationSet], CalibrationSet], says: str, residual: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        stage_module.run(residual, tmp_path, job(tmp_path, spoil(labelled(residual))))


def test_int8_without_images_is_refused_and_never_made_on_noise(residual: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8 needs images .*random noise would not do") as error:
        stage_module.run(residual, tmp_path, job(tmp_path, None))
    assert "--data" in error.value.hint


def test_few_images_are_enough_but_worth_a_note(residual: Path, tmp_path: Path) -> None:
    result = stage_module.run(residual, tmp_path, job(tmp_path, labelled(residual, 1)))
    assert any("only 1 calibration image;" in note for note in result.notes)
    made = replace(labelled(residual, 40), labels=None, kind="synthesized")
    result = stage_module.run(residual, tmp_path, job(tmp_path, made))
    assert any("made from the network itself" in note for note in result.notes)


def test_a_precision_that_the_target_does_not_take_is_refused(residual: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'fp16' is not one that the target takes; it takes fp32, int8"):
        stage_module.run(residual, tmp_path, job(tmp_path, None, "fp16", precisions=("fp32", "int8")))
    check_precision("auto", ("fp32",))


def test_images_are_wanted_only_where_they_will_be_looked_at() -> None:
    def wants(precision: str, *precisions: str, timed: bool = True, limits: tuple[str, ...] = ()) -> bool:
        return wants_images(precision, precisions, timed=timed, limits=limits)

    assert wants("int8", "fp32", "int8", timed=False) and wants("fp16", "fp32", "fp16")
    assert not wants("fp32", *ALL)
    assert wants("auto", "fp32", "int8") and not wants("auto", "fp32")
    assert not wants("auto", *ALL, timed=False) and wants("auto", *ALL, timed=False, limits=("size",))


def test_what_was_left_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(WorkdirError, match=r"quantized\.json"):
        stage_module.read(tmp_path)


def test_a_batch_of_one_is_freed_for_judging_and_gives_the_same_answers(residual: Path) -> None:
    model, pixels = onnx.load(residual), images(7)
    assert can_free_batch(model, pixels)
    np.testing.assert_allclose(
        logits_of(model, pixels, free=True), logits_of(model, pixels), rtol=1e-4, atol=1e-5
    )


def test_models_are_judged_right_in_any_batch(tmp_path: Path) -> None:
    path = exported(tmp_path, nets.build("residual"), dynamic_batch=True)
    result = stage_module.run(path, tmp_path, job(tmp_path, labelled(path)))
    read = {r.metric: r.value for r in result.readings}
    mine = next(c for c in result.candidates if c["chosen"])
    assert read["agreement_with_float"] == mine["agreement"]
    assert read["sqnr"] == pytest.approx(mine["sqnr_db"], abs=0.5)


def test_test_patterns_lie_in_the_range_of_the_input(residual: Path) -> None:
    found = evaluation.patterns(onnx.load(residual))
    assert found.shape == (16, *nets.SHAPE) and found.dtype == torch.float32
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
    assert len(torch.unique(found.flatten(1), dim=0)) >= 14


def test_a_layer_that_went_back_is_float_in_the_runtime_too(loud: Path, tmp_path: Path) -> None:
    # ONNX Runtime quantizes a float layer between Q/DQ by itself, which here changes nearly all answers.
    table = replace(ONE, skip=("loud",), tolerance=1.0)
    result = stage_module.run(loud, tmp_path, job(tmp_path, labelled(loud, 100), table=table))
    path, pixels = tmp_path / "model.onnx", images(100)
    wanted = logits(loud, pixels).argmax(1)
    assert (logits(path, pixels).argmax(1) == wanted).mean() > 0.85
    bare = onnx.load(path)
    (step,) = [node for node in bare.graph.node if node.op_type == "Max"]
    (layer,) = [node for node in bare.graph.node if step.output[0] in node.input]
    assert layer.name == "loud"
    layer.input[0] = step.input[0]
    bare.graph.node.remove(step)
    assert (logits_of(bare, pixels).argmax(1) == wanted).mean() < 0.5
    with pytest.raises(ParityError, match="quantizes layers that were meant to stay float: loud"):
        verify(bare, "int8", allowed=result.choice["float_layers"])


class Pooled(nn.Sequential):
    """Convolutions with pools between them."""

    def __init__(self) -> None:
        layers = [
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        ]
        rest = [nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, *rest, nn.Linear(8, 5))


class Tokens(nn.Module):
    """Patches that go through linear layers of three dimensions, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.wide, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return self.head(x.mean(1))


def test_a_layer_to_skip_between_pools_is_float_in_the_runtime_too(tmp_path: Path) -> None:
    # ONNX Runtime moves Q and DQ over the pools, and would quantize what then lies between them.
    skip = "3"
    path = exported(tmp_path, Pooled())
    result = stage_module.run(
        path, tmp_path, job(tmp_path, labelled(path), table=replace(ONE, skip=(skip,), tolerance=1.0))
    )
    assert result.precision == "int8" and result.choice["float_layers"] == [skip]
    bare = onnx.load(tmp_path / "model.onnx")
    (step,) = [node for node in bare.graph.node if node.op_type == "Max"]
    (layer,) = [node for node in bare.graph.node if step.output[0] in node.input]
    assert layer.name == skip
    assert {node.op_type for node in bare.graph.node if step.input[0] in node.output} == {"MaxPool"}
    layer.input[0] = step.input[0]
    bare.graph.node.remove(step)
    with pytest.raises(ParityError, match=f"quantizes layers that were meant to stay float: {skip}"):
        verify(bare, "int8", allowed=result.choice["float_layers"])


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_linear_layers_of_three_dimensions_ship_in_int8(dynamic_batch: bool, tmp_path: Path) -> None:
    path = exported(tmp_path, Tokens(), dynamic_batch=dynamic_batch)
    table = QuantizeTable(calibrator="minmax", equalize="on", bias_correction="on", tolerance=1.0)
    result = stage_module.run(path, tmp_path, job(tmp_path, labelled(path), table=table))
    assert result.precision == "int8" and result.choice["float_layers"] == []
    assert next(r.value for r in result.readings if r.metric == "runtime_int8_macs") == 1.0
    assert next(r.value or 0.0 for r in result.readings if r.metric == "sqnr") > 20


def test_a_loss_of_exactly_the_tolerance_is_accepted(residual: Path) -> None:
    model, pixels = onnx.load(residual), images(100)
    seen = evaluation_set(CalibrationSet(pixels, None, "calibration"), model)
    other = seen.logits.copy()
    other[0] = -other[0]
    assert seen.judge(other).agreement == 0.99 and seen.judge(other).loss == 0.01
