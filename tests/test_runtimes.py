"""ONNX Runtime as a runtime: what it opens, what it refuses, and how it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_files import save, write_one_conv

from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.runtimes.onnxruntime import OnnxRuntime


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write_one_conv(tmp_path / "net.onnx")


@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_a_corrupt_file_is_a_model_error(tmp_path: Path, net: Path, content: bytes | str) -> None:
    path = tmp_path / "bad.onnx"
    whole = net.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        OnnxRuntime().open(path, 1)


def test_a_model_that_does_not_eat_images_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["input"], ["logits"], "same")
    path = save(tmp_path / "flat.onnx", [node], {}, [1, 10], 10)
    with pytest.raises(UnsupportedModel, match="one float tensor"):
        OnnxRuntime().open(path, 1)


def test_a_model_that_does_not_answer_with_logits_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["input"], ["logits"], "relu")
    path = save(tmp_path / "map.onnx", [node], {}, [1, 3, 4, 4], [1, 3, 4, 4])
    session = OnnxRuntime().open(path, 1)
    with pytest.raises(UnsupportedModel, match=r"accepted: \(N, K\)"):
        session(np.zeros((1, 3, 4, 4), np.float32))


def test_a_half_precision_model_eats_and_answers_float32(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["logits"], "flat")]
    path = save(tmp_path / "half.onnx", nodes, {}, [1, 2, 1, 1], 2, TensorProto.FLOAT16)
    logits = OnnxRuntime().open(path, 1)(np.array([[[[0.5]], [[0.25]]]], np.float32))
    assert logits.dtype == np.float32
    assert logits.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    "x", [np.zeros((1, 3, 8, 9), np.float32), np.zeros((3, 8, 8), np.float32), np.zeros((1, 3, 8, 8))]
)
def test_images_of_another_shape_or_type_are_refused(net: Path, x: Any) -> None:
    with pytest.raises(UsageError, match=r"float32 \(N, 3, 8, 8\)"):
        OnnxRuntime().open(net, 1)(x)


def test_free_image_sizes_need_to_be_said(tmp_path: Path) -> None:
    path = write_one_conv(tmp_path / "net.onnx", batch="batch", size="size")  # type: ignore[arg-type]
    session = OnnxRuntime().open(path, 1)
    with pytest.raises(UsageError, match="free dimensions"):
        session.image()
    assert session.image((3, 8, 6)).shape == (1, 3, 8, 6)


def test_the_image_that_is_timed_has_pixels_from_0_to_1(net: Path) -> None:
    x = OnnxRuntime().open(net, 1).image()
    assert x.shape == (1, 3, 8, 8)
    assert 0.0 <= x.min() < 0.1
    assert 0.9 < x.max() < 1.0
    assert x.std() == pytest.approx(12**-0.5, abs=0.02)  # as spread out as uniform noise


def test_building_copies_the_file_and_refuses_what_it_can_not_open(tmp_path: Path, net: Path) -> None:
    runtime = OnnxRuntime()
    assert runtime.build(net, tmp_path / "built.onnx", "fp32").read_bytes() == net.read_bytes()
    assert runtime.build(net, net, "fp32") == net
    with pytest.raises(UsageError, match="fp64"):
        runtime.build(net, tmp_path / "x.onnx", "fp64")
    with pytest.raises(UsageError, match="no file"):
        runtime.build(tmp_path / "none.onnx", tmp_path / "x.onnx", "fp32")
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(ModelError):
        runtime.build(tmp_path / "bad.onnx", tmp_path / "x.onnx", "fp32")
    assert not (tmp_path / "x.onnx").exists()
