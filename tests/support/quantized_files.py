"""Small Q/DQ files made by ONNX Runtime's own quantizer, so that what looks at them is not tested on its own kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_files
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static


class _Images(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.images = [{"input": image[None]} for image in images]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.images.pop() if self.images else None


def images(shape: tuple[int, ...] = (3, 8, 8), count: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


def quantize(model: Path, scheme: str, pixels: np.ndarray) -> ModelProto:
    """A file as explicit Q/DQ, in the scheme "u8" or "s8"."""
    out = model.with_name(f"{model.stem}-{scheme}.onnx")
    kind = QuantType.QUInt8 if scheme == "u8" else QuantType.QInt8
    extra = {"ActivationSymmetric": True, "QuantizeBias": False} if scheme == "s8" else {}
    quantize_static(
        model, out, _Images(pixels), per_channel=True, activation_type=kind, weight_type=QuantType.QInt8,
        extra_options={"WeightSymmetric": True, **extra},
    )  # fmt: skip
    return onnx.load(out)


def write_net(folder: Path) -> Path:
    """Two convolutions with a residual sum and a linear layer."""
    return onnx_files.write_net(folder / "net.onnx")


def write_gated(folder: Path) -> Path:
    """Pointwise, normalized, depthwise with squeeze-and-excitation and hard-swish, pointwise, linear; batch "N"."""
    rng = np.random.default_rng(0)
    shapes = {
        "a.w": (16, 3, 1, 1), "d.w": (16, 1, 3, 3), "s.w": (4, 16, 1, 1), "e.w": (16, 4, 1, 1), "c.w": (8, 16, 1, 1),
        "fc.w": (5, 8), "n.w": (16,), "n.b": (16,), "a.b": (16,), "fc.b": (5,),
    }  # fmt: skip
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["input", "a.w", "a.b"], ["a"], "a"),
        helper.make_node("InstanceNormalization", ["a", "n.w", "n.b"], ["n"], "n"),
        helper.make_node("Relu", ["n"], ["rn"], "rn"),
        helper.make_node("Conv", ["rn", "d.w"], ["d"], "d", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["d"], ["h"], "h"),
        helper.make_node("GlobalAveragePool", ["h"], ["squeezed"], "squeezed"),
        helper.make_node("Conv", ["squeezed", "s.w"], ["s"], "s"),
        helper.make_node("Relu", ["s"], ["rs"], "rs"),
        helper.make_node("Conv", ["rs", "e.w"], ["e"], "e"),
        helper.make_node("Sigmoid", ["e"], ["gate"], "gate"),
        helper.make_node("Mul", ["h", "gate"], ["gated"], "gated"),
        helper.make_node("Conv", ["gated", "c.w"], ["c"], "c"),
        helper.make_node("GlobalAveragePool", ["c"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["logits"], "fc", transB=1),
    ]
    return onnx_files.save(folder / "gated.onnx", nodes, tensors, ["N", 3, 8, 8], 5)


def node_of(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def maker_of(model: ModelProto, value: str) -> NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def array_of(model: ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


def set_array(model: ModelProto, name: str, array: np.ndarray) -> None:
    item = next(item for item in model.graph.initializer if item.name == name)
    item.CopyFrom(numpy_helper.from_array(np.asarray(array), name))
