"""int8: every calibrator, with and without equalization and bias correction, judged; layers fall back as needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from edgeprune.errors import UnsupportedModel
from edgeprune.nn.activations import Activations
from edgeprune.nn.bias_correction import corrected
from edgeprune.nn.equalize import equalized
from edgeprune.nn.onnx_quantize import quantized
from edgeprune.nn.progress import bar
from edgeprune.nn.ranges import CALIBRATORS, ranges
from edgeprune.recipe import QuantizeTable
from edgeprune.stages.quantize_fallback import fall_back
from edgeprune.stages.quantize_floats import Floats
from edgeprune.stages.quantize_guard import guarded
from edgeprune.stages.quantize_job import Built, Job, Judgement, row
from edgeprune.stages.quantize_judge import best, worse


@dataclass(frozen=True)
class Option:
    """One way to make an int8 file."""

    calibrator: str
    equalized: bool
    corrected: bool

    @property
    def words(self) -> str:
        """For people: "int8 entropy, equalized, bias-corrected"."""
        more = (", equalized" if self.equalized else "", ", bias-corrected" if self.corrected else "")
        return f"int8 {self.calibrator}{''.join(more)}"


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes candidates.

    nets: equalized or not -> the float model and what its activations are. limits: that and the calibrator -> their
    ranges.
    """

    nets: Mapping[bool, tuple[ModelProto, Activations]]
    limits: Mapping[tuple[bool, str], Mapping[str, tuple[float, float]]]
    pairs: int
    scheme: str
    skipped: tuple[str, ...]

    def build(self, option: Option, skip: Sequence[str] = ()) -> ModelProto:
        model, seen = self.nets[option.equalized]
        limits = self.limits[option.equalized, option.calibrator]
        made = quantized(model, limits, self.scheme, skip=(*self.skipped, *skip))
        return guarded(corrected(made, model, seen) if option.corrected else made)


def build(floats: Floats, job: Job) -> Built:
    """The best int8 file that the recipe allows; its loss may still be above the tolerance.

    Raises:
        UnsupportedModel: no layer of the network can be int8.
    """
    if not floats.layers:
        found = (
            f"{len(floats.skipped)} skipped layers"
            if floats.skipped
            else "no Conv, Gemm or MatMul with weights"
        )
        raise UnsupportedModel(
            f"no layer of the network can be int8: it has {found}", "ask for --precision fp32"
        )
    maker = _maker(floats, job)
    options = _options(job.table, tuple(maker.nets))
    job.say(f"quantize: {len(options)} ways to int8, judged on {floats.panel.clean} images")
    judgements = []
    with bar(len(options), "quantize: int8 candidates") as advance:
        for option in options:
            judgements.append(floats.judge(option.words, (), lambda option=option: maker.build(option)))
            advance()
    chosen = best(judgements, job.table.tolerance)
    option, judgement = options[chosen], judgements[chosen]
    fallback: dict[str, float] = {}
    if judgement.loss > job.table.tolerance and len(floats.layers) > 1:
        job.say(f"quantize: {option.words} loses {_points(judgement.loss)}; find the layers that do")
        fallback, judgement = fall_back(
            floats, option.words, lambda skip: maker.build(option, skip), job.table.tolerance
        )
    others = tuple(
        row("int8", o.words, j, why_not=_why_not(option, judgements[chosen], j), options=_facts(o, maker))
        for o, j in zip(options, judgements, strict=True)
        if o is not option
    )
    made = maker.build(option, tuple(fallback))
    options_of = {"scheme": maker.scheme, **_facts(option, maker)}
    kept = dict.fromkeys(floats.skipped, "asked for with quantize.skip")
    return Built("int8", option.words, made, floats.model, judgement, options_of, fallback, kept, others)


def _maker(floats: Floats, job: Job) -> _Maker:
    table = job.table
    nets: dict[bool, tuple[ModelProto, Activations]] = {}
    pairs = 0
    if table.equalize != "off":
        model, pairs = equalized(floats.model, floats.seen(floats.model, "the network"))
        if pairs:
            job.say(f"quantize: {pairs} pairs of layers are equalized")
            nets[True] = (model, floats.seen(model, "the equalized network"))
    if table.equalize != "on" or not pairs:
        nets[False] = (floats.model, floats.seen(floats.model, "the network"))
    scheme = job.scheme if table.scheme == "auto" else table.scheme
    limits = {
        (equal, calibrator): ranges(seen, calibrator, symmetric=scheme == "s8")
        for equal, (_, seen) in nets.items()
        for calibrator in _calibrators(table)
    }
    return _Maker(nets, limits, pairs, scheme, floats.skipped)


def _calibrators(table: QuantizeTable) -> Sequence[str]:
    return CALIBRATORS if table.calibrator == "auto" else (table.calibrator,)


def _options(table: QuantizeTable, nets: Sequence[bool]) -> list[Option]:
    corrections = {"auto": (False, True), "on": (True,), "off": (False,)}[table.bias_correction]
    return [Option(c, e, b) for e in sorted(nets) for b in corrections for c in _calibrators(table)]


def _facts(option: Option, maker: _Maker) -> dict[str, object]:
    pairs = maker.pairs if option.equalized else 0
    return {
        "calibrator": option.calibrator, "equalized": option.equalized, "pairs": pairs,
        "corrected": option.corrected,
    }  # fmt: skip


def _why_not(best_option: Option, chosen: Judgement, other: Judgement) -> str:
    name = best_option.words
    if worse(other, chosen):
        fewer = sum(chosen.right) - sum(other.right)
        return f"{name} classifies {fewer} more of {len(chosen.right)} images right"
    if other.sqnr_db <= chosen.sqnr_db:
        return f"{name} has the smaller output error: SQNR {chosen.sqnr_db:.1f} dB, this one {other.sqnr_db:.1f} dB"
    return f"{name} loses less: {_points(chosen.loss)}, this one {_points(other.loss)}"


def _points(loss: float) -> str:
    return f"{100.0 * loss:.2f} points"
