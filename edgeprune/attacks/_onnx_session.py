"""A network's logits by ONNX Runtime, which is faster than torch where no gradients are needed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError, UnsupportedModel, UsageError, not_short
from edgeprune.export import Exported, candidates, check_size
from edgeprune.models import FORWARD_ERRORS, Logits, Replicas, as_logits
from edgeprune.onnx_graph import open_onnx
from edgeprune.records import InputSpec

# Queries from which on the second that the export takes pays.
WORTH_FROM = 20_000
# Torch has two exporters that make this one; the older of them takes less time.
OPSET = 17

# Difference from the network's logits, relative to the largest one.
TOLERANCE = 1e-4


def onnx_inference(model: nn.Module | Logits, x: Tensor, queries: int) -> Logits | None:
    """A network's logits by ONNX Runtime, on as many replicas; None where that fails or does not pay."""
    one = alone(model, x, queries)
    if one is None or not isinstance(model, Replicas):
        return one
    return _shared_out(one, model)


def alone(model: nn.Module | Logits, x: Tensor, queries: int) -> Logits | None:
    """As `onnx_inference`, in the calling thread: for a caller that is one of several replicas."""
    if not isinstance(model, nn.Module) or x.device.type != "cpu" or queries < WORTH_FROM:
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
    except (UnsupportedModel, UsageError, ModelError, *FORWARD_ERRORS):
        not_short()
    return None


def _opened(make: Callable[[], Exported]) -> Logits | None:
    try:
        return open_onnx(make().model)
    except UnsupportedModel:
        return None


def _shared_out(session: Logits, replicas: Replicas) -> Logits:
    """The parts of a batch at the same time: a session may be used by many threads."""

    def logits(x: Tensor) -> Tensor:
        count = replicas.count(len(x))
        if count < 2:
            return session(x)
        parts: Sequence[Tensor] = x.chunk(count)
        return torch.cat(replicas.each(parts, lambda _, part: session(part)))

    return logits
