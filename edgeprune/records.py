"""The nouns: frozen records that the stages hand to each other. Read this file first.

Bundle -> Masks -> Plan -> Bundle -> Artifact -> Readings -> Report -> Verdict
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Tuple

from edgeprune.errors import DeviceError

if TYPE_CHECKING:
    from torch import nn

REPORT_SCHEMA = "edgeprune.report/1"
MOST_SAMPLES = 10**12
# A device and its processor as `devices.Device.where` and `concurrency.names` write them; a processor has a digit.
_PLACE = re.compile(
    r"(?:local(?:://\?python=.+)?|fake(?::.+)?|ssh://\S+|adb://\S*)(?: \w*\d\w*)?"
    r"(?: torch(?: [\w.+]+)?)?(?: \(emulated\))?(?: #\d+)?",
    re.ASCII,
)


@dataclass(frozen=True)
class InputSpec:
    """The input of a model: float32 (N, C, H, W) with values in [low, high]; `classes` is K of the logits (N, K).

    `mean` and `std` have one value per channel, or are empty when the network normalizes by itself (or not at all).
    """

    shape: Tuple[int, int, int]
    classes: int
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Source:
    """How to load a network again. kind: pt2, pickle, state_dict, safetensors or memory. arch: of weights alone."""

    kind: str
    path: str = ""
    sha256: str = ""
    arch: str = ""
    allow_class: Tuple[str, ...] = ()
    trust_pickle: bool = False


@dataclass(frozen=True)
class Plan:
    """What was cut and what is left. JSON, and replayable on the original network without tracing.

    removed: group name -> channel indices.
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

    `module` takes normalized input; `models.deployed` adds the normalization. `notes`: what loading changed in it.
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

    value: in the metric's base unit (`METRICS`); None when there is none, and `conditions["why"]` says why.
    n: how many samples; spread: (low, high), a 95 % interval of the value, or None.
    where: "local x86_64" when it was measured there; "counted", "computed: HOW" or "estimated: HOW" otherwise.
    artifact: "dense", "compressed", or a file's name. conditions: threads, iterations, data set, and so on.
    A value, unit, count or interval that the metric can't have is a DeviceError.
    """

    metric: str
    value: Optional[float]
    unit: str
    n: int
    spread: Optional[Tuple[float, float]]
    where: str
    artifact: str
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise DeviceError(f"{self.metric} of {self.artifact!r:.80} can't be: {fault}")

    @property
    def measured(self) -> bool:
        """Whether it is known to be a measurement or a count; whatever is not is an estimate."""
        info = METRICS.get(self.metric)
        return is_place(self.where) or (info is not None and self.where != "" and self.where == info.taken)


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

    def threshold(self, reference: float) -> float:
        """The limit in the base unit; reference: the value of the dense model or the baseline."""
        if self.kind == "share":
            return self.value * reference
        return self.value + (reference if self.kind == "delta" else 0.0)


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
    """How a metric reads: its base unit, whether less is better, what it says, and what it can be.

    low, high: the least and the largest value, in the base unit. taken: `Reading.where` of what is known without
    running the file on a device; "" where there is no other way.
    """

    name: str
    unit: str
    less_is_better: bool
    about: str
    low: float
    high: float
    taken: str = ""


_COUNTED = "counted"

# A time, a number of bytes and a number of joules that something which exists can have.
_TIME, _FILE, _MEMORY, _JOULES, _COUNT = (1e-9, 1e5), (1.0, 1e13), (0.0, 1e13), (1e-12, 1e6), (1.0, 1e15)
_LEVELS = (-200.0, 200.0)
_SHARE, _CHANGE = (0.0, 1.0), (-1.0, 1.0)

METRICS: Dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("params", "", True, "non-zero parameters", *_COUNT, _COUNTED),
        Metric("macs", "", True, "multiply-accumulates for one image", *_COUNT, _COUNTED),
        Metric(
            "weight_density", "fraction", True, "non-zero weights, as a share of the dense model's weights",
            *_SHARE, _COUNTED,
        ),
        # A repair may give a layer a bias that it did not have.
        Metric(
            "param_density", "fraction", True, "non-zero parameters, as a share of the dense model's parameters",
            0.0, 2.0, _COUNTED,
        ),
        Metric("size", "B", True, "bytes of the deployed file", *_FILE, _COUNTED),
        Metric("compressed_size", "B", True, "bytes of the deployed file after deflate", *_FILE, _COUNTED),
        Metric("latency_p50", "s", True, "median time of one image", *_TIME),
        Metric("latency_p90", "s", True, "90th percentile of the time of one image", *_TIME),
        Metric("latency_p99", "s", True, "99th percentile of the time of one image", *_TIME),
        Metric("peak_memory", "B", True, "memory that the model adds over the bare runtime", *_MEMORY),
        Metric("energy", "J", True, "energy of one image", *_JOULES),
        Metric("clean_accuracy", "fraction", False, "share of held-out images classified right", *_SHARE),
        Metric("robust_accuracy", "fraction", False, "share of held-out images right under attack", *_SHARE),
        Metric("agreement", "fraction", False, "share of images classified as the dense model does", *_SHARE),
        Metric(
            "agreement_with_float", "fraction", False, "share of images classified as the float file does", *_SHARE
        ),
        Metric(
            "quantization_loss", "fraction", True, "accuracy lost against the float file on calibration images",
            *_CHANGE,
        ),
        Metric(
            "sqnr", "dB", False, "signal-to-quantization-noise ratio of the logits, against the float file", *_LEVELS
        ),
        Metric("int8_macs", "fraction", False, "multiply-accumulates that are done in int8", *_SHARE, _COUNTED),
        Metric("int8_weights", "fraction", False, "weights that are int8", *_SHARE, _COUNTED),
        Metric("runtime_int8_macs", "fraction", False, "multiply-accumulates that ONNX Runtime does in int8", *_SHARE),
        Metric("fp16_macs", "fraction", False, "multiply-accumulates that are done in fp16", *_SHARE, _COUNTED),
        Metric("fp16_weights", "fraction", False, "weights that are fp16", *_SHARE, _COUNTED),
    )
}  # fmt: skip


def is_place(where: str) -> bool:
    """Whether that is how a reading names a device that something was measured on."""
    return _PLACE.fullmatch(where) is not None


def _fault(reading: Reading) -> str:
    info, value, ends = METRICS.get(reading.metric), reading.value, reading.spread or ()
    if not 0 <= reading.n <= MOST_SAMPLES or (
        info and value is not None and reading.measured and not reading.n
    ):
        return f"n = {reading.n}, and a measurement needs 1 to {MOST_SAMPLES} samples"
    if ends and not ends[0] <= ends[-1]:
        return f"spread must be (low, high), found {ends}"
    if info is None:
        return ""
    if reading.unit != info.unit:
        return f"its unit is {info.unit!r}, found {reading.unit!r:.40}"
    bad = next((v for v in (value, *ends) if v is not None and not info.low <= v <= info.high), None)
    if bad is not None:
        return f"{bad!r:.40} is not between {info.low:g} and {info.high:g} {info.unit}".rstrip()
    if ends and value is not None and reading.measured:
        slack = 1e-9 * abs(value)
        if not ends[0] - slack <= value <= ends[1] + slack:
            return f"its spread {ends} does not hold its value {value!r}"
    return ""
