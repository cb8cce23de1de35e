"""int8: every calibrator, with and without equalization and bias correction; layers go back to float as needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from edgeprune.errors import UnsupportedModel
from edgeprune.progress import bar
from edgeprune.quantize.calibrators import CALIBRATORS, Range, ranges
from edgeprune.quantize.equalization import equalized
from edgeprune.quantize.evaluation import FloatBaseline, best, logits_of, sqnr_db, worse
from edgeprune.quantize.fusion import block_float_fusion
from edgeprune.quantize.job import Built, Job, Judgement, row
from edgeprune.quantize.observers import Activations
from edgeprune.quantize.qdq import quantized
from edgeprune.recipe import QuantizeTable

Skip = tuple[str, ...]
# Of the judged images, for the output error of each layer alone.
FEW = 64


def fall_back(
    floats: FloatBaseline, name: str, build: Callable[[Skip], ModelProto], tolerance: float
) -> tuple[dict[str, float], Judgement]:
    """Put layers of a candidate back to float until its loss is tolerated, or as small as it gets.

    Args:
        build: builds the candidate with these layers in float.

    Returns:
        Layer that went back -> its output error: the power of the logits' error over that of the logits when it
        alone is quantized. And the judgement then.
    """
    evaluation = floats.evaluation
    images, reference = evaluation.images[:FEW], evaluation.logits[:FEW]

    def error_of(layer: str) -> np.ndarray:
        model = build(tuple(other for other in floats.layers if other != layer))
        logits = logits_of(model, images, free=evaluation.free)
        return np.array(10.0 ** (-sqnr_db(reference, logits) / 10.0))

    errors: dict[str, float] = {}
    with bar(len(floats.layers), "quantize: output error of each layer alone") as advance:
        for layer in floats.layers:
            found = floats.cache.array(f"alone {name} {layer}", lambda layer=layer: error_of(layer))
            errors[layer] = float(found)
            advance()
    back, judgement = fewest(errors, lambda skip: floats.judge(name, skip, lambda: build(skip)), tolerance)
    return {layer: errors[layer] for layer in back}, judgement


def fewest(
    errors: Mapping[str, float], attempt: Callable[[Skip], Judgement], tolerance: float
) -> tuple[Skip, Judgement]:
    """The layers that go back to float, and the judgement then.

    The most sensitive layers go back, twice as many at each step until the loss is tolerated; then as many fewer as
    bisection finds; then each of them, the least sensitive first, is quantized again where that is tolerated too. One
    layer at least stays quantized.

    Args:
        errors: layer -> its output error when it alone is quantized.
        attempt: judges a file with these layers in float.

    Returns:
        The layers and the judgement; where nothing is tolerated, those of the smallest loss.
    """
    order = sorted(errors, key=lambda layer: -errors[layer])
    tried: dict[int, Judgement] = {}

    def first(count: int) -> Judgement:
        if count not in tried:
            tried[count] = attempt(tuple(order[:count]))
        return tried[count]

    failed, count = 0, 1
    while first(count).loss > tolerance:
        if count >= len(order) - 1:
            least = min(tried, key=lambda n: (tried[n].loss, n))
            return tuple(order[:least]), tried[least]
        failed, count = count, min(2 * count, len(order) - 1)
    while count - failed > 1:
        middle = (failed + count) // 2
        failed, count = (failed, middle) if first(middle).loss <= tolerance else (middle, count)
    layers, judgement = tuple(order[:count]), first(count)
    for layer in reversed(layers[:-1]):
        fewer = tuple(name for name in layers if name != layer)
        found = attempt(fewer)
        if found.loss <= tolerance:
            layers, judgement = fewer, found
    return layers, judgement


@dataclass(frozen=True)
class Option:
    """One way to build an int8 file."""

    calibrator: str
    equalized: bool
    corrected: bool

    @property
    def name(self) -> str:
        """For people: "int8 entropy, equalized, bias-corrected"."""
        more = (", equalized" if self.equalized else "", ", bias-corrected" if self.corrected else "")
        return f"int8 {self.calibrator}{''.join(more)}"


@dataclass(frozen=True, eq=False)
class _Builder:
    """Builds candidates.

    models: equalized or not -> the float model and its activations. limits: that and the calibrator -> their ranges.
    pairs: of equalized layers.
    """

    models: Mapping[bool, tuple[ModelProto, Activations]]
    limits: Mapping[tuple[bool, str], Mapping[str, Range]]
    pairs: int
    scheme: str
    skipped: tuple[str, ...]

    def build(self, option: Option, skip: Sequence[str] = ()) -> ModelProto:
        model, seen = self.models[option.equalized]
        limits = self.limits[option.equalized, option.calibrator]
        means = {name: item.mean for name, item in seen.items()} if option.corrected else None
        made = quantized(model, limits, self.scheme, skip=(*self.skipped, *skip), means=means)
        block_float_fusion(made)
        return made

    def describe(self, option: Option) -> dict[str, object]:
        pairs = self.pairs if option.equalized else 0
        return {
            "calibrator": option.calibrator, "equalized": option.equalized, "pairs": pairs,
            "corrected": option.corrected,
        }  # fmt: skip


def build(floats: FloatBaseline, job: Job) -> Built:
    """The best int8 file that the recipe allows; its loss may still be above the tolerance."""
    if not floats.layers:
        none = "no Conv, Gemm or MatMul with weights"
        found = f"{len(floats.skipped)} skipped layers" if floats.skipped else none
        raise UnsupportedModel(
            f"no layer of the network can be int8: it has {found}", "ask for --precision fp32"
        )
    builder = _builder(floats, job)
    corrections = {"auto": (False, True), "on": (True,), "off": (False,)}[job.table.bias_correction]
    options = [
        Option(c, e, b) for e in sorted(builder.models) for b in corrections for c in _calibrators(job.table)
    ]
    job.log(f"quantize: {len(options)} ways to int8, judged on {floats.evaluation.clean} images")
    judgements: list[Judgement] = []
    with bar(len(options), "quantize: int8 candidates") as advance:
        for option in options:
            judgements.append(floats.judge(option.name, (), lambda option=option: builder.build(option)))
            advance()
    chosen = best(judgements, job.table.tolerance)
    option, judgement = options[chosen], judgements[chosen]
    others = tuple(
        row("int8", o.name, j, why_not=_why_not(option, judgement, j), options=builder.describe(o))
        for o, j in zip(options, judgements, strict=True)
        if o is not option
    )
    fallback: dict[str, float] = {}
    if judgement.loss > job.table.tolerance and len(floats.layers) > 1:
        job.log(f"quantize: {option.name} loses {_points(judgement.loss)}; find the layers that do")
        fallback, judgement = fall_back(
            floats, option.name, lambda skip: builder.build(option, skip), job.table.tolerance
        )
    made = builder.build(option, tuple(fallback))
    described = {"scheme": builder.scheme, **builder.describe(option)}
    kept = dict.fromkeys(floats.skipped, "asked for with quantize.skip")
    return Built("int8", option.name, made, floats.model, judgement, described, fallback, kept, others)


def _builder(floats: FloatBaseline, job: Job) -> _Builder:
    table = job.table
    models: dict[bool, tuple[ModelProto, Activations]] = {}
    pairs = 0
    if table.equalize != "off":
        model, pairs = equalized(floats.model, floats.seen(floats.model, "the network"))
        if pairs:
            job.log(f"quantize: {pairs} pairs of layers are equalized")
            models[True] = (model, floats.seen(model, "the equalized network"))
    if table.equalize != "on" or not pairs:
        models[False] = (floats.model, floats.seen(floats.model, "the network"))
    scheme = job.scheme if table.scheme == "auto" else table.scheme
    limits = {
        (equal, calibrator): ranges(seen, calibrator, symmetric=scheme == "s8")
        for equal, (_, seen) in models.items()
        for calibrator in _calibrators(table)
    }
    return _Builder(models, limits, pairs, scheme, floats.skipped)


def _calibrators(table: QuantizeTable) -> Sequence[str]:
    return CALIBRATORS if table.calibrator == "auto" else (table.calibrator,)


def _why_not(option: Option, chosen: Judgement, other: Judgement) -> str:
    if worse(other, chosen):
        fewer = sum(chosen.right) - sum(other.right)
        return f"{option.name} classifies {fewer} more of {len(chosen.right)} images right"
    if other.sqnr_db <= chosen.sqnr_db:
        errors = f"SQNR {chosen.sqnr_db:.1f} dB, this one {other.sqnr_db:.1f} dB"
        return f"{option.name} has the smaller output error: {errors}"
    return f"{option.name} loses less: {_points(chosen.loss)}, this one {_points(other.loss)}"


def _points(loss: float) -> str:
    return f"{100.0 * loss:.2f} points"
