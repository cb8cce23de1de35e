"""Whether a network's output for an image depends on the other images of the batch, and in which layer that begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.models.from_export import ExportedNetwork
from edgeprune.models.torch_export import title

# Kernels for other batch sizes add up in another order; what mixes images differs by far more of the largest value.
TOLERANCE = 1e-3
HINT = (
    "let every image be computed by itself: no sums over dimension 0, and batch-norm with running statistics "
    "(track_running_stats=True, and trained with it)"
)
TWO_LINES = (
    "let it give two, 0 and its own, which name the same classes:\n"
    "class Two(torch.nn.Sequential): "
    "forward = lambda self, x: torch.nn.functional.pad(super(Two, self).forward(x).reshape(-1, 1), (1, 0))\n"
    "network = Two(network)"
)


def check_alone(module: nn.Module, x: Tensor, where: str) -> None:
    """Refuse a network that gives an image another output in a batch than alone.

    Args:
        module: in eval mode, (N, ...) to one tensor or several, each with N rows; left alone if it takes batches of one
            size only.
        x: images that differ; of a single one nothing can be told.
        where: what to call the network in messages.

    Raises:
        UnsupportedModel: names the first layer whose output depends on the other images, or is another at every call.
    """
    if len(x) < 2 or any(m.fixed_batch for m in module.modules() if isinstance(m, ExportedNetwork)):
        return
    together, again = _outputs(module, x), _outputs(module, x)
    alone = [_outputs(module, image) for image in x.split(1)]
    if not _alike(together[""], again[""]):
        raise UnsupportedModel(
            f"{where} gives the same images other outputs at every call: {_first(together, again, module)} is random",
            "leave chance to training: dropout and noise with training=self.training",
        )
    joined = {
        name: [_joined([one[name][i] for one in alone], value) for i, value in enumerate(values)]
        for name, values in together.items()
        if all(len(one.get(name, ())) == len(values) for one in alone)
    }
    if not _alike(together[""], joined[""]):
        raise UnsupportedModel(
            f"{where} gives an image another output in a batch of {len(x)} than alone: "
            f"{_first(together, joined, module)} mixes the images of a batch",
            HINT,
        )


def differs(together: Tensor, alone: Tensor) -> bool:
    """Whether two outputs for the same images are further apart than rounding makes them.

    Args:
        together, alone: the same shape; NaN equals NaN.
    """
    scale = float(together.abs().nan_to_num(0.0, 0.0, 0.0).max()) if together.numel() else 0.0
    return not torch.allclose(together, alone, rtol=0.0, atol=TOLERANCE * max(scale, 1e-12), equal_nan=True)


def _outputs(module: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Layer -> the tensors that go in, then those that come out, of every call; in the order in which calls end."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, inputs: Any, output: Any) -> None:
        found.setdefault(name, []).extend(t.detach().clone() for t in (*_tensors(inputs), *_tensors(output)))

    handles = [
        part.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
        for name, part in module.named_modules(remove_duplicate=False)
        if name
    ]
    try:
        with torch.no_grad():
            found[""] = _tensors(module(x))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.float()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """What images gave alone, as a batch; `like` itself where it has no rows of images."""
    if parts[0].ndim and all(part.shape[1:] == like.shape[1:] for part in parts):
        joined = torch.cat(parts)
        return joined if joined.shape == like.shape else like
    return like


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return not any(differs(a, b) for a, b in zip(some, others, strict=True) if a.shape == b.shape)


def _first(together: dict[str, list[Tensor]], other: dict[str, list[Tensor]], module: nn.Module) -> str:
    """The first layer that is given the same and gives something else; what a network does itself is its own."""
    for name, values in together.items():
        pairs = [(a, b) for a, b in zip(values, other.get(name, values), strict=False) if a.shape == b.shape]
        if pairs and not differs(*pairs[0]) and any(differs(a, b) for a, b in pairs):
            return title(name, type(module.get_submodule(name)).__name__)
    return "the network"
