"""fp16: the graph converted, what overflows kept in fp32, and layers that lose too much put back."""

from __future__ import annotations

from onnx import ModelProto

from edgeprune.nn.onnx_half import half
from edgeprune.stages.quantize_fallback import fall_back
from edgeprune.stages.quantize_floats import Floats
from edgeprune.stages.quantize_job import Built, Job

NAME = "fp16"


def build(floats: Floats, job: Job) -> Built:
    """The network in fp16; its loss may still be above the tolerance.

    Raises:
        UnsupportedModel: the graph can't be converted.
    """
    seen = floats.seen(floats.model, "the network")

    def made(skip: tuple[str, ...]) -> ModelProto:
        return half(floats.model, seen, skip=(*floats.skipped, *skip))[0]

    job.say(f"quantize: to fp16, judged on {floats.panel.clean} images")
    judgement, fallback = floats.judge(NAME, (), lambda: made(())), dict[str, float]()
    if judgement.loss > job.table.tolerance and len(floats.layers) > 1:
        job.say(f"quantize: fp16 loses {100 * judgement.loss:.2f} points; find the layers that do")
        fallback, judgement = fall_back(floats, NAME, made, job.table.tolerance)
    model, kept = half(floats.model, seen, skip=(*floats.skipped, *fallback))
    kept = {node: reason for node, reason in kept.items() if node not in fallback}
    kept |= dict.fromkeys(floats.skipped, "asked for with quantize.skip")
    return Built("fp16", NAME, model, floats.model, judgement, {}, fallback, kept)
