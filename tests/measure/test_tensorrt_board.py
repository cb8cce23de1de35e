"""A board with TensorRT, measured from here: engines are built there, checked, and everything is read off them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stubs as stubs
from onnx_files import Pictures, Scripted, write_net

from edgeprune import runtimes, targets
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, MissingDependency, ModelError, ParityError
from edgeprune.measure import engines, stage
from edgeprune.recipe.schema import MeasureTable
from edgeprune.records import InputSpec, Plan, Target
from edgeprune.runtimes.engine import cuda, files

TABLE = MeasureTable(iterations=20, warmup=1, seconds=5.0)
SPEC = InputSpec((3, 8, 8), 10)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a user's timings are kept; not this user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> stubs.Gpu:
    found = stubs.Gpu()
    monkeypatch.setattr(runtimes, "load", found.cuda)
    monkeypatch.setattr(cuda, "load", runtimes.load)
    monkeypatch.setitem(sys.modules, "tensorrt", stubs.module("10.3.0", found))
    return found


@pytest.fixture
def orin() -> Target:
    return targets.target("jetson-orin-nano")


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return {
        "dense": write_net(tmp_path / "dense.onnx", 32),
        "compressed": write_net(tmp_path / "model.onnx", 16),
    }


def pictures(count: int) -> Pictures:
    rng = np.random.default_rng(2)
    return Pictures(rng.random((count, 3, 8, 8), dtype=np.float32), rng.integers(0, 10, count))


def wanted(
    target: Target, device: Any, images: Any = None, engines: Path | None = None
) -> stage.MeasureRequest:
    return stage.MeasureRequest(SPEC, device, TABLE, target, images, lambda message: None, engines)


def test_everything_is_read_off_engines_that_were_built_on_the_board(
    gpu: stubs.Gpu, orin: Target, pair: dict[str, Path], tmp_path: Path
) -> None:
    board, kept = stubs.Board(), tmp_path / "engines"
    kept.mkdir()
    plan = Plan({}, {}, {}, {}, 100, 1000, 200, 2000)
    found = stage.run(wanted(orin, board, pictures(40), kept), pair, plan)
    by_metric = {r.metric: r for r in found.after}
    assert by_metric["latency_p50"].value == pytest.approx(250e-6)
    assert by_metric["latency_p50"].where == "ssh://board aarch64"
    conditions = by_metric["latency_p50"].conditions
    assert (conditions["clock"], conditions["runtime"]) == ("cuda events", "tensorrt 10.3.0")
    assert by_metric["size"].value == pair["compressed"].stat().st_size
    assert by_metric["size"].conditions["engine_bytes"] == (kept / "compressed.engine").stat().st_size
    assert by_metric["clean_accuracy"].conditions["runtime"] == "tensorrt"
    assert {"agreement", "peak_memory"} <= set(by_metric)
    assert set(found.times["compressed"]) >= {"stem", "block.conv", "fc"}
    assert {line for line in board.asked if "onnxruntime" in line} == set(), "nothing ran on the board's CPU"
    text = " ".join(found.notes)
    assert "model.onnx (fp32) was built by TensorRT 10.3.0 on Orin; layers that multiply: 3 in fp32." in text
    assert "answers 40 images as ONNX Runtime does" in text
    assert "Nothing has been measured on" not in text
    assert found.notes[0].startswith("Speed: NOT faster: 1.00x")
    assert sorted(p.name for p in kept.iterdir()) == [
        "compressed.engine", "compressed.engine.json", "dense.engine", "dense.engine.json",
    ]  # fmt: skip


def test_the_workspace_is_what_the_board_can_spare(
    gpu: stubs.Gpu, orin: Target, pair: dict[str, Path]
) -> None:
    stage.run(wanted(orin, stubs.Board()), pair, None)
    trt: Any = sys.modules["tensorrt"]
    assert trt.configs[0].pools == {trt.MemoryPoolType.WORKSPACE: 1907 * 2**20}


def test_engines_are_taken_to_the_board_again_and_a_stale_one_is_refused_there(
    gpu: stubs.Gpu, orin: Target, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = stubs.Board()
    engine = engines.built_engines(pair, engines.Place(board, orin, tmp_path))["compressed"]
    images = pictures(5).x
    assert "5 images" in engines.compare(engine, SPEC, images, board)
    monkeypatch.setitem(sys.modules, "tensorrt", stubs.module("10.13.3.9", gpu))
    with pytest.raises(ModelError, match=r"it was built for TensorRT 10\.3\.0, here is 10\.13\.3\.9"):
        engines.compare(engine, SPEC, images, board)


def test_what_tensorrt_timed_is_used_by_the_next_run_on_the_device(
    gpu: stubs.Gpu, orin: Target, pair: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's cache grows by one at each build; another version has one of its own."""
    one = {"dense": pair["dense"]}
    began = []
    for version in ("10.3.0", "10.13.3.9", "10.3.0", "10.13.3.9", "10.3.0"):
        trt = stubs.module(version, gpu)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        stage.run(wanted(orin, stubs.Board()), one, None)
        began.append(bytes(trt.configs[0].cache))
    assert began == [b"", b"", b"+", b"+", b"++"]
    assert sorted(p.suffix for p in (home / ".cache/edgeprune/timings").iterdir()) == [".cache", ".cache"]


def test_a_home_that_can_not_be_written_costs_only_the_timings(
    gpu: stubs.Gpu, orin: Target, pair: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    home.write_text("a file")
    built = engines.built_engines(pair, engines.Place(stubs.Board(), orin, tmp_path))
    assert set(built) == {"dense", "compressed"}


@pytest.mark.parametrize(("offset", "said"), [(1.0, "should be within 5e-03"), (float("nan"), "not finite")])
def test_an_engine_that_answers_otherwise_is_a_parity_error(
    gpu: stubs.Gpu,
    orin: Target,
    pair: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    offset: float,
    said: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stubs.module("10.3.0", gpu, offset=offset))
    with pytest.raises(ParityError, match=said) as error:
        stage.run(wanted(orin, stubs.Board()), pair, None)
    assert error.value.exit_code == 5


def test_a_silent_float_engine_on_the_board_is_a_parity_error(
    gpu: stubs.Gpu, orin: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stubs.module("11.4.0.106", gpu, silent=True))
    files = {"compressed": stubs.write_half(tmp_path / "model.onnx")}
    with pytest.raises(ParityError, match="was to run in fp16, and none of its layers does") as error:
        stage.run(wanted(orin, stubs.Board()), files, None)
    assert error.value.exit_code == 5


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"int8": 52, "fp32": 1}, "52 in int8, 1 in fp32."),
        ({"int8": 52, "closed": 2, "unknown": 1}, "52 in int8, 3 not told."),
        ({"fp32": 1, "closed": 4}, "1 in fp32, 4 not told, so whether it runs in int8 is not known."),
        ({}, "not told, so whether it runs in int8 is not known."),
    ],
)
def test_a_report_says_of_an_engine_what_is_not_told(counts: dict[str, int], said: str) -> None:
    engine = engines.Engine(Path("a.engine"), Path("a.onnx"), "int8", {"layers": counts})
    assert engine.words.endswith(f"; layers that multiply: {said}")


@pytest.mark.parametrize(
    ("precision", "noise", "good"),
    [
        ("fp32", 1e-3, True),
        ("fp32", 0.02, False),
        ("fp16", 0.015, True),
        ("fp16", 0.05, False),
        ("int8", 0.3, False),
    ],
)
def test_how_far_apart_answers_may_be_depends_on_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, noise: float, good: bool
) -> None:
    """Logits of which the largest is 1; the noise turns the class of the images whose two first are alike."""
    expected = np.tile(np.array([[0.5, 0.5001, 1.0, 0.0], [0.9, 1.0, 0.0, 0.0]], np.float32), (8, 1))
    found = expected.copy()
    found[1::2, 0] += noise
    answers = iter([expected, found])
    monkeypatch.setattr(engines, "engine_logits", lambda *given: next(answers))
    engine = engines.Engine(tmp_path / "a.engine", tmp_path / "a.onnx", precision)
    images = np.zeros((16, 3, 8, 8), np.float32)
    if good:
        assert "16 images as ONNX Runtime does" in engines.compare(engine, SPEC, images, Fake())
    else:
        with pytest.raises(ParityError, match=f"in {precision} it should be within"):
            engines.compare(engine, SPEC, images, Fake())


def test_an_engine_that_changed_on_the_way_is_noticed(
    gpu: stubs.Gpu, orin: Target, pair: dict[str, Path], tmp_path: Path
) -> None:
    class Lossy(stubs.Board):
        def get(self, there: str, here: Path) -> None:
            stubs.Board.get(self, there, here)
            if here.suffix == ".engine":
                here.write_bytes(here.read_bytes()[:-1])

    with pytest.raises(ParityError, match="is not the one that was built there"):
        engines.built_engines(pair, engines.Place(Lossy(), orin, tmp_path))


@pytest.mark.parametrize("answer", [{"built": "x"}, {"facts": 7}])
def test_a_board_that_builds_nonsense_is_a_device_error(
    orin: Target, pair: dict[str, Path], tmp_path: Path, answer: dict[str, Any]
) -> None:
    device = Scripted(Answer(0, json.dumps(answer), ""))
    with pytest.raises(DeviceError, match="built 'dense' and answered"):
        engines.built_engines(pair, engines.Place(device, orin, tmp_path))


def test_a_board_without_tensorrt_is_measured_on_its_cpu_and_that_is_said(
    orin: Target, pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = stage.run(wanted(orin, stubs.Board()), pair, None)
    assert found.after[2].conditions["runtime"].startswith("onnxruntime")
    note = next(n for n in found.notes if "not of its GPU" in n)
    assert (
        note.startswith("Times are of ONNX Runtime on the CPU of ssh://board")
        and "python3-libnvinfer" in note
    )


def test_a_board_with_an_old_tensorrt_is_measured_on_its_cpu_and_that_is_said(
    gpu: stubs.Gpu, orin: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stubs.module("8.5.2", gpu))
    runtime, notes = engines.choose(orin, stubs.Board())
    assert runtime == "onnxruntime"
    assert "it has tensorrt 8.5.2, and engines are built from Python with 10.3 or newer" in notes[0]


def test_the_runtime_is_the_targets_where_the_device_has_it(gpu: stubs.Gpu, orin: Target) -> None:
    assert engines.choose(orin, stubs.Board()) == ("tensorrt", ())
    assert engines.choose(orin, Fake()) == ("onnxruntime", ())
    assert engines.choose(targets.target("local"), stubs.Board()) == ("onnxruntime", ())


def test_this_machine_without_tensorrt_is_said_to_be_measured_without_it(
    orin: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise MissingDependency("TensorRT's Python package can't be imported", "sudo apt install it")

    monkeypatch.setattr(Local, "ask", missing)
    runtime, (note,) = engines.choose(orin, Local())
    assert runtime == "onnxruntime"
    assert note == (
        "Times are of ONNX Runtime on the CPU of this machine, not of TensorRT: TensorRT's Python package can't be "
        "imported; sudo apt install it."
    )
    for name in ("local", "raspberry-pi-5"):
        assert engines.choose(targets.target(name), Local()) == ("onnxruntime", ())


def test_the_precision_is_read_from_the_file(tmp_path: Path, pair: dict[str, Path]) -> None:
    assert engines.precision_of(pair["dense"]) == "fp32"
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        engines.precision_of(tmp_path / "bad.onnx")


def test_what_lies_beside_an_engine_travels_with_it(tmp_path: Path) -> None:
    from edgeprune.measure.place import held

    files.write(tmp_path / "it's an engine.engine", b"data", {})
    with held(Fake(), {"a": tmp_path / "it's an engine.engine"}) as paths:
        assert files.beside(Path(paths["a"])).is_file()
        folder = Path(paths["a"]).parent
    assert not folder.exists()
