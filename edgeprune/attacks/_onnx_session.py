"""A network's answers by ONNX Runtime, where nobody wants gradients: it fuses what torch does step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import ModelProto
from torch import Tensor, nn

from edgeprune.attacks._onnx_tail import tail_at
from edgeprune.attacks._tape import Tape
from edgeprune.errors import ModelError, UnsupportedModel, UsageError, not_short
from edgeprune.export import Exported, candidates, check_size
from edgeprune.models import CALL_ERRORS, Logits, Replicas, as_logits
from edgeprune.onnx_graph import open_onnx
from edgeprune.records import InputSpec

# From so many questions on it is worth the second that another runtime takes to be ready.
SWIFT_FROM = 20_000
# Torch has two exporters that make this one; the older of them takes less time.
OPSET = 17

# Between its answers and the network's, relative to the largest logit.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class OnnxInference:
    """What answers as a network does. answers: pixels (N, C, H, W) to logits (N, K). model: the same as ONNX."""

    answers: Logits
    model: ModelProto

    def __call__(self, x: Tensor) -> Tensor:
        """Logits float32 (N, K), rounded in another order than the network's."""
        return self.answers(x)

    def behind(self, tape: Tape, slot: int) -> Logits | None:
        """As `onnx_tail.tail_at`, for a tape of the network: in the thread that asks."""
        return tail_at(self.model, tape, slot)


def onnx_inference(model: nn.Module | Logits, x: Tensor, questions: int) -> OnnxInference | None:
    """What answers as a network does, without gradients, on as many lanes; None where it can't be had or does not pay.

    Args:
        model: pixels (N, C, H, W) to logits (N, K): a network in evaluation mode, or `Lanes` of one.
        x: images to compare the answers on.
        questions: how many are to come, in images.
    """
    one = alone(model, x, questions)
    if one is None or not isinstance(model, Replicas):
        return one
    return OnnxInference(_shared_out(one.answers, model), one.model)


def alone(model: nn.Module | Logits, x: Tensor, questions: int) -> OnnxInference | None:
    """As `swift`, but in the thread that asks: for one who is a lane."""
    if not isinstance(model, nn.Module) or x.device.type != "cpu" or questions < SWIFT_FROM:
        return None
    one = model.copies[0] if isinstance(model, Replicas) else model
    with torch.no_grad():
        known = as_logits(model)(x)
    spec = InputSpec((x.shape[1], x.shape[2], x.shape[3]), known.shape[1])
    scale = float(known.abs().max()) or 1.0
    try:
        check_size(one)
        for make in reversed([*candidates(one, spec, OPSET, dynamic_batch=True)]):
            made = _opened(make)
            if made is None:
                continue
            found = made(x)
            if found.shape == known.shape and bool((found - known).abs().max() <= TOLERANCE * scale):
                return made
    except (UnsupportedModel, UsageError, ModelError, *CALL_ERRORS):
        not_short()
    return None


def _opened(make: Callable[[], Exported]) -> OnnxInference | None:
    try:
        model = make().model
        return OnnxInference(open_onnx(model), model)
    except UnsupportedModel:
        return None


def _shared_out(session: Logits, lanes: Replicas) -> Logits:
    """The parts of a batch at the same time: a session takes questions from many threads."""

    def answers(x: Tensor) -> Tensor:
        count = lanes.count(len(x))
        if count < 2:
            return session(x)
        parts: Sequence[Tensor] = x.chunk(count)
        return torch.cat(lanes.each(parts, lambda _, part: session(part)))

    return answers
