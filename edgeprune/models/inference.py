"""The output of a network: run once on noise, its classes counted, and the layer named in which it fails."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError, UnsupportedModel
from edgeprune.models.from_export import ExportedNetwork
from edgeprune.models.torch_export import FORWARD_ERRORS, running_layers, temporary_hooks, title

# Kernels for other batch sizes add up in another order; what mixes images differs by far more of the largest value.
TOLERANCE = 1e-3
# Where a network rounds, as in int8, the tolerance is so many times what a change of the images does to its output: by
# NUDGE, as a share of the largest pixel.
NUDGE, STEPS = 1e-6, 10.0
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


def logits(module: nn.Module, x: Tensor) -> Tensor:
    """The logits (N, K); of several outputs (auxiliary heads in training mode) the main one."""
    try:
        output = main_output(module(x))
    except FORWARD_ERRORS as error:
        mode = "training" if module.training else "evaluation"
        raise ModelError(f"the network fails on a batch {tuple(x.shape)} in {mode} mode: {error}") from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(x):
        found = (
            f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        )
        raise ModelError(
            f"the output of the network for a batch {tuple(x.shape)} is {found}, not logits (N, K)"
        )
    return output


@contextmanager
def modes(training: nn.Module | None, evaluating: nn.Module | None) -> Iterator[None]:
    """One network in training mode, another in evaluation mode; afterwards each layer is as it was."""
    networks = [network for network in (training, evaluating) if network is not None]
    before = [(layer, layer.training) for network in networks for layer in network.modules()]
    for network in networks:
        network.train(network is training)
    try:
        yield
    finally:
        for layer, mode in before:
            layer.training = mode


def unfreeze(module: nn.Module) -> None:
    """A network that was frozen for inference is trained whole; one that is frozen in part stays so."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def full(output: Tensor) -> Tensor:
    """Logits in at least float32: a loss of bfloat16 logits has three digits."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


_LOG = logging.getLogger("edgeprune")
_IMAGES = 2


def count_classes(
    module: nn.Module,
    shape: tuple[int, int, int],
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    where: str,
) -> int:
    """K, the width of the logits that a network gives to images of a shape.

    Args:
        normalization: mean and std, one value per channel or empty.
    """
    fixed = module.fixed_batch if isinstance(module, ExportedNetwork) else None
    if fixed is not None and fixed > 1:
        raise UnsupportedModel(
            f"{where} was exported for batches of {fixed} images and works with no other number",
            "export it again with an open batch dimension: dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)",
        )
    if fixed is not None:
        _LOG.warning("%s takes one image at a time only, as it was exported: it can't be fine-tuned", where)
    x = torch.rand((_IMAGES, *shape), generator=torch.Generator().manual_seed(0))
    if all(normalization):
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalization)
        x = (x - mean) / std
    images, x = x, x[: fixed or _IMAGES]
    output = _output(module, x, where)
    if (
        isinstance(output, Tensor)
        and output.ndim == 2
        and output.shape[0] == len(x)
        and output.shape[1] > 1
        and output.is_floating_point()
        and not bool(output.isnan().all())
    ):
        check_alone(module, images, where)
        return int(output.shape[1])
    raise _refusal(output, len(x), where)


def _refusal(output: Any, count: int, where: str) -> UnsupportedModel:
    if isinstance(output, Tensor) and output.is_floating_point() and output.numel() == count:
        return UnsupportedModel(
            f"{where} gives one number for each image, {tuple(output.shape)}; accepted: logits of two classes or more",
            TWO_LINES,
        )
    if isinstance(output, Tensor) and output.ndim == 2 and output.numel() and bool(output.isnan().all()):
        return UnsupportedModel(
            f"the output of {where} for {count} images of noise is NaN only; accepted: finite logits",
            "look for a division by 0, a root or a logarithm of what is below 0",
        )
    return UnsupportedModel(
        f"the output of {where} for {count} images is {_what(output)}, expected float logits ({count}, K)",
        "give the part of the network that classifies images",
    )


def main_output(output: Any) -> Any:
    """The main logits of several outputs: the ones that torchvision and timm name so, or the first."""
    if isinstance(output, Mapping):
        named = [output[key] for key in ("logits", "out") if key in output]
        return next(iter([*named, *output.values()]), None)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def text_of(shape: tuple[int, ...]) -> str:
    """A shape as the command line writes it, such as 3x224x224."""
    return "x".join(map(str, shape))


def _output(module: nn.Module, x: Tensor, where: str) -> Any:
    with running_layers(module) as running, torch.no_grad():
        try:
            return module(x)
        except FORWARD_ERRORS as error:
            inside = f" in {running[-1]}" if running and running[-1] else ""
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UnsupportedModel(
                f"{where} fails{inside} on {len(x)} images of {text_of(tuple(x.shape[1:]))}: {reason}",
                "if its images have another size, give it as --input CxHxW",
            ) from error


def _what(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {str(output.dtype).removeprefix('torch.')} tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(str, list(output)[:5]))}"
    return f"a {type(output).__name__}" + (
        f" of {len(output)} values" if isinstance(output, (tuple, list)) else ""
    )


def check_alone(module: nn.Module, x: Tensor, where: str) -> None:
    """Refuse a network that gives an image another output in a batch than alone.

    Args:
        module: in eval mode, (N, ...) to one tensor or several, each with N rows; left alone if it was exported for one
            image and fails on more.
    """
    if len(x) < 2:
        return
    try:
        together, again = _outputs(module, x), _outputs(module, x)
    except FORWARD_ERRORS:
        if any(m.fixed_batch for m in module.modules() if isinstance(m, ExportedNetwork)):
            return
        raise
    alone, shaken = [_outputs(module, image) for image in x.split(1)], _outputs(module, nudged(x))
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
    if not _alike(together[""], joined[""], shaken[""]):
        raise UnsupportedModel(
            f"{where} gives an image another output in a batch of {len(x)} than alone: "
            f"{_first(together, joined, module, shaken)} mixes the images of a batch",
            HINT,
        )


def nudged(x: Tensor) -> Tensor:
    """The images changed by about what rounding changes, which can take a network that rounds a step further."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return x + NUDGE * float(x.abs().max()) * (noise - 0.5)


def differs(together: Tensor, alone: Tensor, shaken: Tensor | None = None) -> bool:
    """Whether two outputs for the same images are further apart than rounding makes them.

    Args:
        together, alone: the same shape; NaN equals NaN. shaken: the output for `nudged` images, None where not known.
    """
    scale = float(together.abs().nan_to_num(0.0, 0.0, 0.0).max()) if together.numel() else 0.0
    atol = TOLERANCE * max(scale, 1e-12)
    if shaken is not None and shaken.numel():
        atol = max(atol, STEPS * float((shaken - together).abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return not torch.allclose(together, alone, rtol=0.0, atol=atol, equal_nan=True)


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
    with temporary_hooks(handles), torch.no_grad():
        found[""] = _tensors(module(x))
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


def _alike(some: list[Tensor], others: list[Tensor], shaken: list[Tensor] | None = None) -> bool:
    triples = zip(some, others, shaken or some, strict=True)
    return not any(differs(a, b, c) for a, b, c in triples if a.shape == b.shape == c.shape)


def _first(
    together: dict[str, list[Tensor]],
    other: dict[str, list[Tensor]],
    module: nn.Module,
    shaken: dict[str, list[Tensor]] | None = None,
) -> str:
    """The first layer that is given the same and gives something else; what a network does itself is its own."""
    for name, values in together.items():
        near = (shaken or together).get(name, values)
        pairs = [
            (a, b, c)
            for a, b, c in zip(values, other.get(name, values), near, strict=False)
            if a.shape == b.shape == c.shape
        ]
        if pairs and not differs(*pairs[0]) and any(differs(*pair) for pair in pairs):
            return title(name, type(module.get_submodule(name)).__name__)
    return "the network"
