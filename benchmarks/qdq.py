"""Our Q/DQ writer beside onnxruntime's quantize_static that is given our ranges: size, accuracy, SQNR and time.

    python benchmarks/qdq.py DATA [--resnet20 WEIGHTS]... [--large NAME]...

Both write the same prepared network with the same minmax ranges, without equalization and bias correction, so that only
the writing differs. DATA: CIFAR-10 in class folders, a tar of them or an .npz. One row for each network.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import _paths  # noqa: F401
import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from precision import accuracy, large_images, p50
from precision_networks import Normalized, large
from resnet20_cifar10 import resnet20
from torch import Tensor, nn

from edgeprune.data.collection import Data, calibration_indices, open_data
from edgeprune.devices.local import Local
from edgeprune.export import stage
from edgeprune.measure import latency
from edgeprune.quantize import calibrators, observers, prepare, qdq, verification
from edgeprune.recipe.schema import DataTable, ExportTable, MeasureTable
from edgeprune.records import InputSpec

SMALL, LARGE = InputSpec((3, 32, 32), 10), InputSpec((3, 224, 224), 100)
IMAGES = 512
# The operators that the unsigned scheme computes on 8 bits, and the activations that it fuses.
OPERATORS = [
    "Conv", "Gemm", "MatMul", "Add", "Mul", "GlobalAveragePool", "AveragePool", "Concat", "Sigmoid", "LeakyRelu",
    "MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Pad", "Relu", "Clip",
]  # fmt: skip


class OneImage(CalibrationDataReader):
    """What quantize_static runs to find ranges; it takes ours in their place."""

    def __init__(self, image: Tensor) -> None:
        """Image float32 (1, C, H, W)."""
        self.left: list[dict[str, object]] = [{"input": image.numpy()}]

    def get_next(self) -> dict[str, object] | None:
        """The image, then None."""
        return self.left.pop() if self.left else None


def static(
    model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], image: Tensor, out: Path
) -> onnx.ModelProto:
    """The network as quantize_static writes it with given ranges."""
    overrides = {}
    for name, bounds in ranges.items():
        scale, zero = calibrators.grid(*bounds, symmetric=False)
        overrides[name] = [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero, np.uint8)}]
    copy = onnx.ModelProto()  # it moves the weights of what it is given into a file
    copy.CopyFrom(model)
    quantize_static(
        copy, out, OneImage(image), per_channel=True, op_types_to_quantize=OPERATORS,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options={"TensorQuantOverrides": overrides, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
    )  # fmt: skip
    made = onnx.load(out)
    del made.graph.value_info[:]
    return made


def row(name: str, network: nn.Module, spec: InputSpec, images: Tensor, data: Data) -> str:
    """Write both files and compare them."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-qdq-") as scratch:
        folder = Path(scratch)
        exported = folder / "fp32.onnx"
        stage.run(network.eval(), spec, exported, opset=20, table=ExportTable(), meta={}, real=None)
        floats = prepare.prepare(onnx.load(exported))
        ranges = calibrators.ranges(observers.observe(floats, images), "minmax", symmetric=False)
        ours = qdq.quantized(floats, ranges, "u8")
        del ours.graph.value_info[:]
        theirs = static(floats, ranges, images[:1], folder / "static.onnx")
        files = {"dense": folder / "theirs.onnx", "compressed": folder / "ours.onnx"}
        for model, path in zip((theirs, ours), files.values(), strict=True):
            path.write_bytes(model.SerializeToString())
        table = MeasureTable(threads=1, iterations=100, seconds=10.0)
        timed = latency.latency(files, Local(), table)
        ratio = (latency.latency_ratio(timed) or ("", None))[1]
        assert ratio is not None
        near = [
            f"{verification.closeness(floats, model, images[:300]).sqnr_db:.1f}" for model in (theirs, ours)
        ]
        right = ["", "", ""]
        if spec is SMALL:
            right = [f"{100 * accuracy(model, data):.2f} %" for model in (floats, theirs, ours)]
    cells = [
        name, *(f"{model.ByteSize():,}" for model in (theirs, ours)), *right, *near,
        *(f"{1e3 * p50(timed, kind):.3f}" for kind in files),
        f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        *(f"{len(model.graph.node)}" for model in (theirs, ours)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--resnet20", action="append", default=[])
    parser.add_argument("--large", action="append", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(DataTable(path=given.data), SMALL, 0)
    assert data.train is not None
    head = "bytes static | bytes ours | fp32 | static | ours | SQNR static dB | SQNR ours dB | ms static | ms ours"
    print(
        f"| network | {head} | static against ours | nodes static | nodes ours |\n|{'---|' * 13}", flush=True
    )
    images = data.train.take(calibration_indices(data.train.labels, "default")[:IMAGES])
    for path in map(Path, given.resnet20):
        network = resnet20()
        network.load_state_dict(torch.load(path, weights_only=True))
        print(row(path.stem, Normalized(network), SMALL, images, data), flush=True)
    images = large_images(data)
    for name in given.large:
        print(row(name, large(name, images), LARGE, images, data), flush=True)


if __name__ == "__main__":
    main()
