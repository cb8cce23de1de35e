"""Whether a file answers like the network it was made from, on random and on real images."""

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from onnx import ModelProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor, nn

from edgeprune.errors import ParityError, UnsupportedModel
from edgeprune.models import reason
from edgeprune.records import InputSpec, Reading

METRIC = "output_difference"
ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    RuntimeError,
    ValueError,
)
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Difference:
    """How far two networks are apart over a set of images.

    absolute: the largest |a - b| of any logit. scale: the largest |a|. on: the input with the worst one.
    images: how many were compared. agreeing: on how many both name the same class.
    """

    absolute: float
    scale: float
    on: str
    images: int
    agreeing: int

    @property
    def relative(self) -> float:
        """The worst difference as a share of the largest logit of the reference."""
        return self.absolute / self.scale if self.scale > 0 else self.absolute


def probes(spec: InputSpec, seed: int, batch: int = 1) -> Iterable[tuple[str, Tensor]]:
    """Named inputs (batch, C, H, W) that a network should answer alike in every form: flat ones and noise."""
    generator = torch.Generator().manual_seed(seed)
    shape, span = (batch, *spec.shape), spec.high - spec.low
    tag = f" (batch {batch})" if batch > 1 else ""
    yield f"all {spec.low:g}{tag}", torch.full(shape, spec.low)
    yield f"all {spec.high:g}{tag}", torch.full(shape, spec.high)
    for count in range(3):
        yield f"uniform noise {count}{tag}", spec.low + span * torch.rand(shape, generator=generator)
    yield (
        f"black and white noise{tag}",
        spec.low + span * torch.randint(0, 2, shape, generator=generator).float(),
    )


def open_session(
    model: ModelProto | Path, *, threads: int = 0, optimized: bool = True, written: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime on this machine's CPU, which prints nothing: the one place that makes one.

    Args:
        threads: 0 for as many as torch has. optimized: whether nodes may be fused. written: where the graph that is
            run is written to, None for nowhere.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if written is not None:
        options.optimized_model_filepath = str(written)
    try:
        content = str(model) if isinstance(model, Path) else model.SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise UnsupportedModel(
            f"ONNX Runtime {onnxruntime.__version__} can't load the model: {reason(error)}"
        ) from error


def open_onnx(model: ModelProto) -> Network:
    """An ONNX model as a callable from float32 (N, C, H, W) to (N, K), run by ONNX Runtime on this CPU."""
    session = open_session(model)
    name = session.get_inputs()[0].name

    def network(pixels: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: pixels.contiguous().numpy()})[0])
        except ORT_ERRORS as error:
            raise UnsupportedModel(f"ONNX Runtime can't run the model: {reason(error)}") from error

    return network


def reference(module: nn.Module) -> Network:
    """A module as a callable that keeps no gradients."""

    def network(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return module(pixels)

    return network


def compare(made_from: Network, made: Network, inputs: Iterable[tuple[str, Tensor]], name: str) -> Difference:
    """Run both on every input and find where they differ most."""
    worst, scale, on, images, agreeing = 0.0, 0.0, "", 0, 0
    for title, pixels in inputs:
        wanted, got = made_from(pixels), made(pixels)
        for who, logits in (("the network", wanted), (name, got)):
            if not bool(torch.isfinite(logits).all()):
                raise ParityError(
                    f"{who} answers {title} with NaN or infinity",
                    "look at the weights: training may have diverged",
                )
        if wanted.shape != got.shape:
            raise ParityError(
                f"{name} answers {title} with shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
            )
        difference = float((wanted - got).abs().max())
        if difference > worst or not on:
            worst, on = difference, title
        scale = max(scale, float(wanted.abs().max()))
        images += len(pixels)
        agreeing += int((wanted.argmax(1) == got.argmax(1)).sum())
    return Difference(worst, scale, on, images, agreeing)


def check(difference: Difference, *, tolerance: float, name: str, inputs: str, hint: str) -> Reading:
    """The difference as a reading, when it is within `tolerance` of the largest logit."""
    if difference.relative > tolerance:
        raise ParityError(
            f"{name} differs from the network it was made from by {difference.absolute:.3g} on "
            f"{difference.on}, {difference.relative:.2g} of the largest logit ({difference.scale:.3g}); "
            f"at most {tolerance:g} of it is accepted",
            hint,
        )
    conditions = {
        "inputs": inputs,
        "worst_on": difference.on,
        "absolute": difference.absolute,
        "largest_logit": difference.scale,
        "tolerance": tolerance,
        "same_class": difference.agreeing / difference.images,
    }
    where = f"local {platform.machine()}"
    return Reading(METRIC, difference.relative, "fraction", difference.images, None, where, name, conditions)
