"""int8 on this CPU beside fp32 and beside onnxruntime's own quantize_static: time, accuracy, closeness.

    python benchmarks/precision.py [--data DATA] [--resnet20 WEIGHTS]... [--mobilenet WEIGHTS] [--epochs N]
                                   [--data-free] [--threads 1 2] [--iterations N] [--seconds S] [--work DIR]

Two tables in Markdown. The first times a ResNet-18 and MobileNetV2's body at 224 x 224 (random weights with the
batch-norm statistics of the images that they see); the files take turns in one process. The second, with --data
(CIFAR-10 in class folders, a tar of them or an .npz), is the accuracy of the state dicts that are given for
examples/resnet20_cifar10.py, and of a small MobileNetV2 that is trained for --epochs, or read from --mobilenet if that
file is there. --data-free calibrates a second time on images synthesized from the network. Both quantizers get the
same images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from precision_networks import Normalized, large, small_mobilenet, train
from resnet20_cifar10 import resnet20
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.data.collection import Data, calibration_indices, open_data
from edgeprune.data.synthesis import synthesize
from edgeprune.devices.local import Local
from edgeprune.export import stage
from edgeprune.measure import latency
from edgeprune.onnx_graph.session import open_onnx
from edgeprune.quantize import job as job_module
from edgeprune.quantize import stage as stage_module
from edgeprune.quantize.job import CalibrationSet
from edgeprune.quantize.stage import FILE
from edgeprune.quantize.verification import closeness, verify
from edgeprune.recipe.schema import DataTable, ExportTable, MeasureTable, QuantizeTable
from edgeprune.records import InputSpec

LARGE, SMALL = InputSpec((3, 224, 224), 100), InputSpec((3, 32, 32), 10)
LARGE_IMAGES, COMPARED = 24, 300
FP32, PLAIN, OURS = "fp32", "quantize_static", "edgeprune"


@dataclass(frozen=True)
class Files:
    """One network in each form, by the words of the tables; how the int8 one was made, and on how many images."""

    paths: Mapping[str, Path]
    choice: Mapping[str, Any]
    images: int

    def model(self, kind: str) -> onnx.ModelProto:
        """One form, loaded."""
        return onnx.load(self.paths[kind])


@dataclass(frozen=True)
class Calibration:
    """What both quantizers are given: images float32 (N, C, H, W), and their labels where they are known."""

    images: Tensor
    labels: Tensor | None


class Images(CalibrationDataReader):
    """Calibration images one by one, as quantize_static asks for them."""

    def __init__(self, images: Tensor) -> None:
        """Images float32 (N, C, H, W)."""
        self.left = [{"input": image[None].numpy()} for image in images]

    def get_next(self) -> dict[str, object] | None:
        """The next one, or None at the end."""
        return self.left.pop() if self.left else None


def main() -> None:
    """Build, time, evaluate, and print the tables."""
    given = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edgeprune-precision-") as scratch:
        work = Path(given.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        data = open_data(DataTable(path=given.data), SMALL, 0) if given.data else None
        if given.networks:
            latencies(given, work, data)
        if data is not None:
            accuracies(given, work, data)


def arguments() -> argparse.Namespace:
    """What stands on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="")
    parser.add_argument("--resnet20", action="append", default=[])
    parser.add_argument("--mobilenet", default="")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--data-free", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--networks", nargs="*", default=["resnet18", "mobilenetv2"])
    parser.add_argument("--work", default="")
    return parser.parse_args()


def latencies(given: argparse.Namespace, work: Path, data: Data | None) -> None:
    """Time the large networks with each number of threads."""
    images = large_images(data)
    rows = [
        f"| network | threads | {FP32} ms | {PLAIN} ms | {OURS} ms | {OURS} against {FP32} | against {PLAIN} | "
        f"MACs in int8 (as ONNX Runtime runs them) | SQNR {PLAIN} dB | SQNR {OURS} dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in given.networks:
        files = build(name, large(name, images), LARGE, Calibration(images, None), work)
        near = [f"{closeness(files.model(FP32), files.model(k), images).sqnr_db:.1f}" for k in (PLAIN, OURS)]
        for threads in given.threads:
            table = MeasureTable(threads=threads, iterations=given.iterations, seconds=given.seconds)
            rows.append(
                f"| {name} | {threads} | {timed(files, table)} | {share(files)} | {near[0]} | {near[1]} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows), flush=True)


def timed(files: Files, table: MeasureTable) -> str:
    """Medians in ms, and how many times faster the int8 file is than each other: with 95 % intervals."""
    against = {}
    for other in (FP32, PLAIN):
        pair = {"dense": files.paths[other], "compressed": files.paths[OURS]}
        against[other] = latency.latency(pair, Local(), table)
    found = []
    for other in (FP32, PLAIN):
        clock, ratio = latency.latency_ratio(against[other]) or ("", None)
        assert ratio is not None
        note = " CPU time" if clock == "cpu" else ""
        found.append(f"{ratio.value:.2f} x ({ratio.low:.2f}-{ratio.high:.2f}{note})")
    medians = [p50(against[FP32], "dense"), p50(against[PLAIN], "dense"), p50(against[FP32], "compressed")]
    return " | ".join([*(f"{1e3 * value:.2f}" for value in medians), *found])


def p50(latency: latency.Latency, name: str) -> float:
    """The median in seconds: of CPU time where other work got in the way and there is such a clock."""
    reading = latency.readings[name][0]
    on_cpu = reading.conditions.get("cpu_p50")
    return float(on_cpu if latency.contended and on_cpu else reading.value or 0.0)


def accuracies(given: argparse.Namespace, work: Path, data: Data) -> None:
    """The accuracy of the small networks in each form."""
    assert data.train is not None
    chosen = calibration_indices(data.train.labels, "default")
    known = Calibration(data.train.take(chosen), data.train.labels[chosen])
    print(
        f"\n| network | calibrated on | {FP32} | {PLAIN} | {OURS} | agreement | SQNR {PLAIN} dB | SQNR {OURS} dB | "
        f"MACs in int8 | how |\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name, network in small_networks(given, data).items():
        print(row(name, "training images", build(name, network, SMALL, known, work), data), flush=True)
        if given.data_free:
            made = synthesize(network, SMALL, images=0, steps=0, seed=0, scratch=None).images
            files = build(name, network, SMALL, Calibration(made, None), work)
            print(row(name, "synthesized images", files, data), flush=True)


def row(name: str, source: str, files: Files, data: Data) -> str:
    """Accuracies on all held-out images, closeness on some."""
    right = [f"{100 * accuracy(files.model(kind), data):.2f} %" for kind in (FP32, PLAIN, OURS)]
    some = data.held_out.take(torch.arange(min(COMPARED, len(data.held_out))))
    near = {k: closeness(files.model(FP32), files.model(k), some) for k in (PLAIN, OURS)}
    cells = [
        name, f"{files.images} {source}", *right, f"{100 * near[OURS].agreement:.1f} %",
        *(f"{near[kind].sqnr_db:.1f}" for kind in (PLAIN, OURS)), share(files), how(files.choice),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def how(choice: Mapping[str, Any]) -> str:
    """What was chosen for the int8 file, and the layers that stay float."""
    return f"{choice['name']}; float: {', '.join(choice['float_layers']) or 'none'}"


def share(files: Files) -> str:
    """MACs in int8 in the file, and as ONNX Runtime runs them."""
    proof = verify(files.model(OURS), "int8", allowed=files.choice["float_layers"])
    return f"{100 * proof.low_macs / proof.macs:.1f} % ({100 * (proof.runtime_low_macs or 0) / proof.macs:.1f} %)"


def build(name: str, network: nn.Module, spec: InputSpec, known: Calibration, work: Path) -> Files:
    """Export a network and quantize it both ways on the same images."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=work))
    exported, plain = folder / "fp32.onnx", folder / "plain.onnx"
    stage.run(network.eval(), spec, exported, opset=20, table=ExportTable(), meta={}, real=None)
    quantize_static(
        exported, plain, Images(known.images), per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    kind = "synthesized" if known.labels is None else "calibration"
    job = job_module.Job(
        QuantizeTable(), "int8", ("fp32", "int8"), "u8", CalibrationSet(known.images, known.labels, kind),
        folder, lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    result = stage_module.run(exported, folder / "quantize", job)
    paths = {FP32: exported, PLAIN: plain, OURS: folder / "quantize" / FILE}
    return Files(paths, result.choice, len(known.images))


def accuracy(model: onnx.ModelProto, data: Data) -> float:
    """Share of the held-out images classified right."""
    network, right = open_onnx(model), 0
    for pixels, labels in data.held_out.batches(1):
        right += int((network(pixels).argmax(1) == labels).sum())
    return right / len(data.held_out)


def small_networks(given: argparse.Namespace, data: Data) -> dict[str, nn.Module]:
    """The trained networks for 32 x 32 images, pixels -> logits."""
    found: dict[str, nn.Module] = {}
    for path in map(Path, given.resnet20):
        network = resnet20()
        network.load_state_dict(torch.load(path, weights_only=True))
        found[path.stem] = Normalized(network).eval()
    assert data.train is not None
    torch.manual_seed(0)
    network = small_mobilenet()
    if given.mobilenet and Path(given.mobilenet).is_file():
        network.load_state_dict(torch.load(given.mobilenet, weights_only=True))
    elif given.epochs:
        train(network, data.train.pixels.take(torch.arange(len(data.train))), data.train.labels, given.epochs)
    if given.mobilenet or given.epochs:
        found["MobileNetV2-like"] = network.eval()
        if given.mobilenet:
            torch.save(network.state_dict(), given.mobilenet)
    return found


def large_images(data: Data | None) -> Tensor:
    """Images of 224 x 224: of the data, enlarged, or smooth noise where there are none."""
    if data is not None and data.train is not None:
        small = data.train.take(
            torch.arange(0, len(data.train), len(data.train) // LARGE_IMAGES)[:LARGE_IMAGES]
        )
    else:
        small = torch.rand((LARGE_IMAGES, 3, 14, 14), generator=torch.Generator().manual_seed(0))
    return functional.interpolate(small, (224, 224), mode="bilinear").clamp(0, 1)


if __name__ == "__main__":
    main()
