"""The nouns: frozen records that the stages hand to each other. Read this file first.

Bundle -> Masks -> Plan -> Bundle -> Artifact -> Readings -> Report -> Verdict

Light: imports nothing heavy, keeps to Python 3.8 syntax, so that it also runs on a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Tuple

if TYPE_CHECKING:
    from torch import nn

REPORT_SCHEMA = "edgeprune.report/1"


@dataclass(frozen=True)
class InputSpec:
    """What a model eats: float32 (N, C, H, W) with values in [low, high]; it normalizes inside.

    `mean` and `std` have one value per channel, or are empty when the network normalizes by itself
    (or not at all). `classes` is K, the width of the logits (N, K).
    """

    shape: Tuple[int, int, int]
    classes: int
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Source:
    """How to get a network again: the file, and for weights without structure the architecture.

    `kind` is one of pt2, pickle, state_dict, safetensors, memory.
    """

    kind: str
    path: str = ""
    sha256: str = ""
    arch: str = ""
    allow_class: Tuple[str, ...] = ()
    trust_pickle: bool = False


@dataclass(frozen=True)
class Plan:
    """What was cut and what is left. JSON, and replayable on the original network without tracing.

    removed: group name -> channel indices that go.
    tensors: state-dict name -> ((axis, removed positions), ...), enough to shrink every tensor.
    attributes: module name -> {attribute: value after the cut}, such as out_channels.
    left_out: group name -> why it was not cut.
    params, macs: what is left; params_before, macs_before: what there was. One input image.
    """

    removed: Mapping[str, Tuple[int, ...]]
    tensors: Mapping[str, Tuple[Tuple[int, Tuple[int, ...]], ...]]
    attributes: Mapping[str, Mapping[str, int]]
    left_out: Mapping[str, str]
    params: int
    macs: int
    params_before: int
    macs_before: int


@dataclass(frozen=True)
class Bundle:
    """A network that can be saved, rebuilt and pruned again; dense when `plans` is empty.

    `module` is the bare network (eats normalized input); `nn.bundle.deployed` adds the normalization. `notes`: what was
    changed in it while it was loaded.
    """

    module: nn.Module
    source: Source
    input: InputSpec
    plans: Tuple[Plan, ...] = ()
    labels: Tuple[str, ...] = ()
    notes: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """One tensor of a coupled group, and which of its entries each channel owns.

    tensor: state-dict name. axis: the dimension. positions[i]: entries along axis owned by channel i.
    role: producer (makes the channels), norm (per-channel scale, shift or statistic), consumer (reads them).
    """

    tensor: str
    axis: int
    positions: Tuple[Tuple[int, ...], ...]
    role: str


@dataclass(frozen=True)
class Group:
    """Channels that must go together, named after the layer that makes them."""

    name: str
    channels: int
    members: Tuple[Member, ...]
    multiple_of: int = 1


@dataclass(frozen=True)
class Masks:
    """What a method decided to keep. channels: group -> bool (C,), True is kept; weights: parameter -> bool like it."""

    channels: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A file that can run, and where it came from."""

    path: str
    format: str
    precision: str
    input: InputSpec
    sha256: str
    size_bytes: int
    parent: str = ""
    opset: int = 0


@dataclass(frozen=True)
class Target:
    """The facts of a machine, from `targets/NAME.toml`.

    multiple_of, peak: per precision ("fp32", "fp16", "int8"); peak in operations per second.
    int8: the scheme that its runtime is fast with: "u8", unsigned asymmetric activations, or "s8", signed symmetric.
    setup: facts that only one runtime needs (TensorRT version, JetPack, threads).
    board: what the model in such a machine's device tree has in it; "" where no machine says that it is this one.
    """

    name: str
    title: str
    device: str
    runtime: str
    precisions: Tuple[str, ...]
    multiple_of: Mapping[str, int]
    memory_bytes: int
    bandwidth: float
    peak: Mapping[str, float]
    opset: int
    int8: str = "u8"
    setup: Mapping[str, Any] = field(default_factory=dict)
    board: str = ""


@dataclass(frozen=True)
class Reading:
    """One number with all that is needed to believe it.

    value: in the metric's base unit (`METRICS`); None when it could not be had, and `conditions["why"]` says why.
    n: how many samples; spread: (low, high), a 95 % interval of the value, or None.
    where: "local x86_64" when it was measured there; "counted", "computed: HOW" or "estimated: HOW" otherwise.
    artifact: "dense", "compressed", or a file's name. conditions: threads, iterations, data set, and so on.
    """

    metric: str
    value: Optional[float]
    unit: str
    n: int
    spread: Optional[Tuple[float, float]]
    where: str
    artifact: str
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A run on one page; `report.json` is this record (docs/report.md documents each field).

    before, after: readings of the dense and of the compressed file. ledger: accuracies after each stage.
    layers: one row a layer (docs/report.md). samples: "dense"/"compressed" -> latencies in s, for the plots.
    notes: plain sentences that a reader must see. left_out: group -> why it was not pruned.
    history: how the choice came about: what was recorded ("pqi") -> curve -> numbers, or layer -> numbers.
    """

    schema: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    before: Tuple[Reading, ...]
    after: Tuple[Reading, ...]
    ledger: Tuple[Reading, ...] = ()
    layers: Tuple[Mapping[str, Any], ...] = ()
    samples: Mapping[str, Tuple[float, ...]] = field(default_factory=dict)
    notes: Tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limit:
    """One line of a budget.

    kind: "absolute" (value in the base unit), "share" (value times the dense model's or the baseline's reading),
    "delta" (dense or baseline plus value; accuracies only, value in [-1, 1]). text: as the user wrote it.
    """

    metric: str
    kind: str
    value: float
    text: str


@dataclass(frozen=True)
class Budget:
    """What the product needs: metric -> limit. allow_estimates: whether an estimate may stand for a measurement."""

    limits: Mapping[str, Limit] = field(default_factory=dict)
    allow_estimates: bool = False


@dataclass(frozen=True)
class Check:
    """One limit held against one reading. status: pass, fail, missing, inconclusive.

    threshold: the limit in the base unit. margin: by how much it is met (> 0) or missed (< 0), in the base unit.
    """

    metric: str
    limit: str
    status: str
    value: Optional[float]
    threshold: Optional[float]
    margin: Optional[float]
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """Every check of a budget, and the exit status they add up to (0, 1 or 8)."""

    checks: Tuple[Check, ...]
    ok: bool
    exit_code: int
    notes: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """How a metric reads: its base unit, whether less is better, what it says."""

    name: str
    unit: str
    less_is_better: bool
    about: str


METRICS: Dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("params", "", True, "non-zero parameters"),
        Metric("macs", "", True, "multiply-accumulates for one image"),
        Metric(
            "weight_density", "fraction", True, "non-zero weights, as a share of the dense model's weights"
        ),
        Metric(
            "param_density",
            "fraction",
            True,
            "non-zero parameters, as a share of the dense model's parameters",
        ),
        Metric("size", "B", True, "bytes of the deployed file"),
        Metric("compressed_size", "B", True, "bytes of the deployed file after deflate"),
        Metric("latency_p50", "s", True, "median time of one image"),
        Metric("latency_p90", "s", True, "90th percentile of the time of one image"),
        Metric("latency_p99", "s", True, "99th percentile of the time of one image"),
        Metric("peak_memory", "B", True, "memory that the model adds over the bare runtime"),
        Metric("energy", "J", True, "energy of one image"),
        Metric("clean_accuracy", "fraction", False, "share of held-out images classified right"),
        Metric("robust_accuracy", "fraction", False, "share of held-out images right under attack"),
        Metric(
            "certified_accuracy",
            "fraction",
            False,
            "share that no image within a small radius changes: a lower bound",
        ),
        Metric("agreement", "fraction", False, "share of images classified as the dense model does"),
        Metric(
            "agreement_with_float", "fraction", False, "share of images classified as the float file does"
        ),
        Metric(
            "quantization_loss",
            "fraction",
            True,
            "accuracy lost against the float file on calibration images",
        ),
        Metric(
            "sqnr", "dB", False, "signal-to-quantization-noise ratio of the logits, against the float file"
        ),
        Metric("int8_macs", "fraction", False, "multiply-accumulates that are done in int8"),
        Metric("int8_weights", "fraction", False, "weights that are int8"),
        Metric("runtime_int8_macs", "fraction", False, "multiply-accumulates that ONNX Runtime does in int8"),
        Metric("fp16_macs", "fraction", False, "multiply-accumulates that are done in fp16"),
        Metric("fp16_weights", "fraction", False, "weights that are fp16"),
    )
}
