"""Engines: built, kept, refused when stale, held against what was asked for, and run; on a GPU that is not there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_stubs as stubs
from onnx import TensorProto, helper
from onnx_files import save, write_net, write_one_conv

from edgeprune import host, plugins, runtimes, serialization
from edgeprune.agent import program, resources
from edgeprune.errors import (
    DeviceError,
    MissingDependency,
    ModelError,
    ParityError,
    UnsupportedModel,
    WorkdirError,
)
from edgeprune.runtimes.engine import cuda, files
from edgeprune.runtimes.onnxruntime import OnnxRuntime
from edgeprune.runtimes.tensorrt import TensorRT

VERSIONS = ("10.3.0", "10.13.3.9", "11.4.0.106")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> stubs.Gpu:
    found = stubs.Gpu()
    monkeypatch.setattr(runtimes, "load", found.cuda)
    monkeypatch.setattr(cuda, "load", runtimes.load)
    return found


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, gpu: stubs.Gpu) -> Any:
    def installed(version: str = "10.3.0", **how: Any) -> Any:
        trt = stubs.module(version, gpu, **how)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return installed


def images(count: int) -> Any:
    return np.random.default_rng(1).random((count, 3, 8, 8), dtype=np.float32)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("batch", [1, 3, "batch"])
def test_an_engine_answers_as_onnx_runtime_does(
    install: Any, tmp_path: Path, version: str, batch: int | str
) -> None:
    install(version)
    file = write_one_conv(tmp_path / "net.onnx", batch=batch)
    session = TensorRT().open(TensorRT().build(file, tmp_path / "net.engine", "fp32"), 1)
    assert session.input_shape == (1 if batch == "batch" else batch, 3, 8, 8)
    expected = OnnxRuntime().open(file, 1)(images(7))
    np.testing.assert_allclose(session(images(7)), expected, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_and_nothing_else_is_set(
    install: Any, tmp_path: Path, version: str
) -> None:
    trt = install(version)
    TensorRT(workspace_mib=300).build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    assert trt.networks[0].flags == 2
    config = trt.configs[0]
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 300 * 2**20}
    assert config.flags == [] and config.profiles == []
    assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert config.builder_optimization_level == 3


def test_the_workspace_is_a_quarter_of_the_gpus_memory_when_nobody_says(install: Any, tmp_path: Path) -> None:
    trt = install()
    TensorRT(sparse=True).build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    assert trt.configs[0].pools == {trt.MemoryPoolType.WORKSPACE: 2 * 2**30}
    assert trt.configs[0].flags == [trt.BuilderFlag.SPARSE_WEIGHTS]


def test_an_open_batch_is_built_for_one_image(install: Any, tmp_path: Path) -> None:
    trt = install()
    TensorRT().build(write_one_conv(tmp_path / "net.onnx", batch="n"), tmp_path / "net.engine", "fp32")
    assert [p.shapes for p in trt.configs[0].profiles] == [{"input": (1, 3, 8, 8)}]


def test_other_open_dimensions_are_refused(install: Any, tmp_path: Path) -> None:
    install()
    node = helper.make_node("Flatten", ["input"], ["logits"], "flat")
    file = save(tmp_path / "net.onnx", [node], {}, [1, 3, "h", "w"], ["n", "k"])
    with pytest.raises(UnsupportedModel, match="only the batch may be open"):
        TensorRT().build(file, tmp_path / "net.engine", "fp32")


def test_what_is_known_of_an_engine_is_written_beside_it(install: Any, tmp_path: Path) -> None:
    install("10.13.3.9")
    file = write_net(tmp_path / "net.onnx")
    engine = TensorRT().build(file, tmp_path / "net.engine", "fp32")
    facts = json.loads((tmp_path / "net.engine.json").read_text())
    known = ("schema", "tensorrt", "gpu", "compute_capability", "onnx_name", "precision", "layers", "cuda")
    assert {key: facts[key] for key in known} == {
        "schema": "edgeprune.engine/1", "tensorrt": "10.13.3.9", "gpu": "Orin", "compute_capability": "8.7",
        "onnx_name": "net.onnx", "precision": "fp32", "layers": {"fp32": 3}, "cuda": "12.6",
    }  # fmt: skip
    assert facts["onnx"] == serialization.sha256(file)
    assert facts["engine"] == serialization.sha256(engine)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_timing_cache_is_read_again_by_the_next_build(install: Any, tmp_path: Path) -> None:
    trt = install()
    for name in ("a", "b"):
        TensorRT().build(write_net(tmp_path / f"{name}.onnx"), tmp_path / f"{name}.engine", "fp32")
    assert [bytes(c.cache) for c in trt.configs] == [b"", b"+"]
    assert (tmp_path / "timing.cache").read_bytes() == b"++"


@pytest.mark.parametrize("found", [b"broken", b"of another GPU"])
def test_a_timing_cache_that_tensorrt_refuses_is_begun_anew(
    install: Any, tmp_path: Path, found: bytes
) -> None:
    install()
    (tmp_path / "timing.cache").write_bytes(found)
    TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    assert (tmp_path / "timing.cache").read_bytes() == b"+"


def test_a_timing_cache_is_written_whole_or_not_at_all(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    engine = TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    real = os.replace

    def full(source: Any, to: Any) -> None:
        if str(to).endswith("timing.cache"):
            raise OSError("No space left on device")
        real(source, to)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WorkdirError, match=r"timing\.cache can't be written: No space left"):
        TensorRT().build(tmp_path / "net.onnx", engine, "fp32")
    assert (tmp_path / "timing.cache").read_bytes() == b"+", "the one before"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("version", "TensorRT 10.3.0, here is 10.13.3.9"),
        ("gpu", "the GPU Orin, here is NVIDIA Thor"),
        ("capability", "compute capability 8.7, here is 11.0"),
        ("multiprocessors", "8 multiprocessors, here is 16"),
        ("board", "the board NVIDIA Jetson Orin Nano, here is NVIDIA Jetson AGX Orin"),
        ("older facts", "net.engine.json does not say multiprocessors"),
        ("onnx", "another net.onnx than the one that is here now"),
        ("engine", "has changed since it was built"),
        ("no facts", "net.engine.json, which says what it was built for, can't be read"),
        ("other facts", "does not say edgeprune.engine/1"),
    ],
)
def test_a_stale_engine_is_refused_with_the_reason(
    install: Any, gpu: stubs.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str
) -> None:
    install("10.3.0")
    monkeypatch.setattr(host, "board", lambda: "NVIDIA Jetson Orin Nano")
    engine = TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    TensorRT().open(engine, 1)
    if change == "version":
        install("10.13.3.9")
    elif change == "gpu":
        gpu.name = "NVIDIA Thor"
    elif change == "capability":
        gpu.capability = (11, 0)
    elif change == "multiprocessors":
        gpu.multiprocessors = 16
    elif change == "board":
        monkeypatch.setattr(host, "board", lambda: "NVIDIA Jetson AGX Orin")
    elif change == "older facts":
        facts = json.loads(files.beside(engine).read_text())
        del facts["multiprocessors"]
        files.beside(engine).write_text(json.dumps(facts))
    elif change == "onnx":
        write_net(tmp_path / "net.onnx", 8)
    elif change == "engine":
        engine.write_bytes(engine.read_bytes() + b" ")
    elif change == "no facts":
        files.beside(engine).unlink()
    else:
        files.beside(engine).write_text("{}")
    with pytest.raises(ModelError) as refused:
        TensorRT().open(engine, 1)
    assert said in refused.value.message
    assert refused.value.hint == "build it again from the ONNX file"


def test_a_board_that_is_told_only_here_or_there_makes_no_engine_stale(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container hides it, the system outside does not."""
    install()
    for there, here in (("NVIDIA Jetson Orin Nano", ""), ("", "NVIDIA Jetson Orin Nano")):
        monkeypatch.setattr(host, "board", lambda name=there: name)
        engine = TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
        monkeypatch.setattr(host, "board", lambda name=here: name)
        assert TensorRT().open(engine, 1).input_shape == (1, 3, 8, 8)


def test_an_engine_of_an_interrupted_write_is_refused(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the engine and its facts, the old facts must not vouch for the new engine."""
    install()
    engine = TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    real = os.replace

    def killed(source: Any, to: Any) -> None:
        if str(to).endswith(".json"):
            raise KeyboardInterrupt
        real(source, to)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        TensorRT().build(tmp_path / "net.onnx", engine, "fp32")
    monkeypatch.undo()
    assert not files.beside(engine).exists()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("asked", ["fp16", "int8"])
def test_a_silent_float_engine_is_a_parity_error_and_is_not_kept(
    install: Any, tmp_path: Path, version: str, asked: str
) -> None:
    install(version, silent=True)
    with pytest.raises(ParityError) as error:
        TensorRT().build(stubs.write_half(tmp_path / "net.onnx"), tmp_path / "net.engine", asked)
    assert error.value.exit_code == 5
    assert error.value.message == f"net.onnx was to run in {asked}, and none of its layers does: 1 in fp32"
    assert not (tmp_path / "net.engine").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_one_closed_part_does_not_hide_a_silent_float_engine(
    install: Any, tmp_path: Path, version: str
) -> None:
    """Two of the three layers that multiply are told, and run in float32."""
    install(version, silent=True, told=2)
    with pytest.raises(ParityError) as error:
        TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "int8")
    assert error.value.exit_code == 5
    assert error.value.message.endswith("none of its layers does: 2 in fp32, 1 not told")
    assert not (tmp_path / "net.engine").exists()


def test_an_engine_that_is_mostly_closed_is_kept(install: Any, tmp_path: Path) -> None:
    """One of the three layers that multiply is told: the others may run in int8."""
    install(silent=True, told=1)
    engine = TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "int8")
    assert json.loads(files.beside(engine).read_text())["layers"] == {"fp32": 1, "closed": 1}


def test_layers_that_were_made_one_are_not_taken_for_closed_parts() -> None:
    rows = [{"Name": "a || b || c", "LayerType": "CaskConvolution", "Inputs": [{"Datatype": "Float"}]}]
    found = files.layers(json.dumps({"Layers": rows}))
    with pytest.raises(ParityError, match="none of its layers does: 1 in fp32$"):
        files.judge(found, "int8", "net.onnx", 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_is_found_in_the_layers(install: Any, tmp_path: Path, version: str) -> None:
    install(version)
    file = stubs.write_half(tmp_path / "net.onnx")
    engine = TensorRT().build(file, tmp_path / "net.engine", "fp16")
    assert json.loads(files.beside(engine).read_text())["layers"] == {"fp16": 1}
    np.testing.assert_allclose(
        TensorRT().open(engine, 1)(images(2)), OnnxRuntime().open(file, 1)(images(2)), atol=0.1
    )


def test_an_operator_that_is_not_there_is_named(install: Any, tmp_path: Path) -> None:
    install("11.4.0.106")
    nodes = [
        helper.make_node("NonZero", ["input"], ["where"], "find.it"),
        helper.make_node("Cast", ["where"], ["logits"], "cast", to=TensorProto.FLOAT),
    ]
    file = save(tmp_path / "net.onnx", nodes, {}, [1, 3, 8, 8], ["n", "k"])
    with pytest.raises(
        UnsupportedModel, match=r"TensorRT 11\.4\.0\.106 can't read net\.onnx: NonZero 'find\.it': no"
    ):
        TensorRT().build(file, tmp_path / "net.engine", "fp32")


def test_a_build_that_fails_says_what_tensorrt_said(install: Any, tmp_path: Path) -> None:
    install(refuses=True)
    with pytest.raises(ModelError) as error:
        TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    assert error.value.message.endswith("net.onnx: Could not find any implementation for node conv")


def test_a_machine_without_a_gpu_is_a_device_error(install: Any, tmp_path: Path) -> None:
    trt = install()

    def none(logger: Any) -> None:
        logger.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = none
    with pytest.raises(DeviceError, match="TensorRT can't start: CUDA initialization failure"):
        TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")


def test_an_engine_that_fails_to_run_is_a_model_error(install: Any, tmp_path: Path) -> None:
    install(broken=True)
    engine = TensorRT().build(write_net(tmp_path / "net.onnx"), tmp_path / "net.engine", "fp32")
    with pytest.raises(ModelError, match="failed to run"):
        TensorRT().open(engine, 1)(images(1))


def test_a_file_that_is_no_engine_is_a_model_error(install: Any, tmp_path: Path) -> None:
    install()
    files.write(tmp_path / "net.engine", b"no engine", {**MACHINE, "onnx_name": "none.onnx", "onnx": ""})
    with pytest.raises(ModelError, match="can't load the engine"):
        TensorRT().open(tmp_path / "net.engine", 1)


MACHINE = {
    "tensorrt": "10.3.0", "gpu": "Orin", "compute_capability": "8.7", "multiprocessors": 8, "board": "",
}  # fmt: skip


def test_without_tensorrt_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    file = write_net(tmp_path / "net.onnx")
    runtime = plugins.build("runtimes", "tensorrt", {})
    tries = (
        runtime.version,
        lambda: runtime.build(file, tmp_path / "net.engine", "fp32"),
        lambda: runtime.open(file, 1),
        lambda: runtime.profile(file, 1, 10, None),
    )
    for attempt in tries:
        with pytest.raises(MissingDependency) as missing:
            attempt()
        assert "sudo apt install python3-libnvinfer" in missing.value.hint


@pytest.mark.parametrize("captures", [True, False])
def test_latency_is_the_time_between_two_events_round_one_graph(
    install: Any, gpu: stubs.Gpu, tmp_path: Path, captures: bool
) -> None:
    """A run takes 250 us by the GPU's clock, whatever the clock on the wall says of this machine."""
    install()
    gpu.captures = captures
    file = write_net(tmp_path / "net.onnx")
    answer = program.handle({
        "op": "time", "runtime": "tensorrt", "models": {"dense": str(file)}, "threads": 1, "warmup": 1,
        "iterations": 10, "seconds": 5,
    })  # fmt: skip
    row = answer["models"]["dense"]
    assert row["wall_ns"] == [250_000] * 10
    assert row["cpu_ns"] == [] and row["batch"] == 1 and row["precision"] == 0.0
    assert (answer["clock"], answer["runtime"]) == ("cuda events", "tensorrt 10.3.0")
    assert ("cudaGraphLaunch" in gpu.calls) is captures
    after = gpu.calls[gpu.calls.index("cudaEventRecord") :]
    assert not {"cudaMemcpyAsync", "cudaMalloc"} & set(after), "transfers and allocations are not timed"


def test_an_onnx_file_is_built_once_and_again_when_it_has_changed(install: Any, tmp_path: Path) -> None:
    trt = install()
    file = write_net(tmp_path / "net.onnx")
    for channels, built in ((16, 1), (16, 1), (8, 2)):
        write_net(file, channels)
        expected = OnnxRuntime().open(file, 1)(images(1))
        np.testing.assert_allclose(TensorRT().open(file, 1)(images(1)), expected, atol=1e-4)
        assert len(trt.configs) == built


def test_every_layer_is_timed_under_its_name_with_its_work(install: Any, tmp_path: Path) -> None:
    install()
    nodes = TensorRT().profile(write_net(tmp_path / "net.onnx"), 1, 10, None)
    assert [n.name for n in nodes][1:] == ["stem + relu", "block.conv + relu", "fc"]
    assert sum(n.seconds for n in nodes) == pytest.approx(250e-6)
    assert [n.macs for n in nodes] == [0, 432 * 64, 432 * 64, 432 * 64]
    assert nodes[1].op == "CaskConvolution"


@pytest.mark.parametrize(("integrated", "more"), [(True, "larger"), (False, "sum")])
def test_memory_has_the_gpus_share(
    install: Any, gpu: stubs.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integrated: bool, more: str
) -> None:
    install()
    gpu.integrated = integrated
    request = {"model": str(write_net(tmp_path / "net.onnx")), "threads": 1}
    values = iter([700, 700, 900, 1500])  # at rest, its highest so far, when opened, in the end
    monkeypatch.setattr(resources, "status", lambda key, process: next(values))
    answer = resources.memory_reply(request, TensorRT(), tmp_path)
    assert answer["gpu"] == (3 * 8 * 8 + 10) * 4
    expected = max(answer["host"], answer["gpu"]) if more == "larger" else answer["host"] + answer["gpu"]
    assert answer["host"] == 800
    assert (answer["peak"], answer["shared"]) == (expected, integrated)


def test_what_cudas_context_takes_is_not_added_by_the_model(
    install: Any, gpu: stubs.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call that asks the GPU makes the context, here of 300 bytes; the model adds 50."""
    install()
    request = {"model": str(write_net(tmp_path / "net.onnx")), "threads": 1}

    def resident(key: str, process: Path) -> int:
        context = 300 if "cudaMemGetInfo" in gpu.calls else 0
        return 700 + context + (50 if "cudaMalloc" in gpu.calls else 0)

    monkeypatch.setattr(resources, "status", resident)
    answer = resources.memory_reply(request, TensorRT(), tmp_path)
    assert (answer["baseline"], answer["host"], answer["at_load"]) == (1000, 50, 50)


def test_memory_that_runs_out_is_said_in_cudas_words(install: Any, gpu: stubs.Gpu, tmp_path: Path) -> None:
    install()
    gpu.free = 100
    with pytest.raises(DeviceError, match=r"cudaMalloc failed with CUDA error 2: out of memory"):
        TensorRT().open(write_net(tmp_path / "net.onnx"), 1)


def test_the_inspectors_json_of_old_and_new_versions_is_read_alike() -> None:
    model = onnx.load_from_string(onnx.ModelProto().SerializeToString())
    model.graph.node.extend(
        [helper.make_node("Conv", [], [], "c"), helper.make_node("QuantizeLinear", [], [], "q")]
    )
    for version in VERSIONS:
        found = files.layers(json.dumps(stubs.information(model, version)))
        assert [(x.name, x.precision, x.macs) for x in found if x.multiplies] == [
            ("c + relu", "int8", 432 * 64)
        ]


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Two wide channel vectorized row major FP16 format", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear FP8 format", "fp8"),
        ("Int32", ""),
    ],
)
def test_data_types_are_known_by_the_inspectors_words(text: str, precision: str) -> None:
    row = {"Name": "c", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": text}], "Outputs": []}
    assert files.layers(json.dumps({"Layers": [row]}))[0].precision == precision


def test_parts_that_are_not_told_are_not_judged() -> None:
    row = {
        "Name": "{ForeignNode[a...b]}",
        "LayerType": "Myelin",
        "Inputs": [{"Datatype": "Float"}],
        "Outputs": [],
    }
    found = files.layers(json.dumps({"Layers": [row]}))
    assert files.counted(found) == {"closed": 1}
    files.judge(found, "int8", "net.onnx", 1)
    files.judge(files.layers('{"Layers": ["only", "names"]}'), "fp16", "net.onnx", 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", "7"])
def test_another_answer_of_the_inspector_is_a_model_error(text: str) -> None:
    with pytest.raises(ModelError, match="not understood"):
        files.layers(text)


@pytest.mark.parametrize("version", ["8.5.2", "10.2.0"])
def test_a_version_before_jetpack_6_is_refused_with_the_way_out(
    install: Any, tmp_path: Path, version: str
) -> None:
    install(version)
    assert TensorRT().version() == f"tensorrt {version}"
    with pytest.raises(MissingDependency, match=r"is too old: 10\.3 or newer is needed") as error:
        TensorRT().open(write_net(tmp_path / "net.onnx"), 1)
    assert "build_engine.sh" in error.value.hint
