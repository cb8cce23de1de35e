"""Calling a network whose code may be anybody's: its main answer, its modes, its failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from edgeprune.errors import ModelError

# What a network's own code may raise when it is called; not KeyboardInterrupt and its kind.
CALL_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
)


def logits(module: nn.Module, x: Tensor) -> Tensor:
    """The network's answer (N, K); of several outputs (auxiliary heads in training mode) the main one.

    Raises:
        ModelError: the network fails on the batch, or its answer is not one row for each image.
    """
    try:
        answer = _main(module(x))
    except CALL_ERRORS as error:
        mode = "training" if module.training else "evaluation"
        raise ModelError(f"the network fails on a batch {tuple(x.shape)} in {mode} mode: {error}") from error
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(x):
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ModelError(f"the network answers a batch {tuple(x.shape)} with {found}, not with logits (N, K)")
    return answer


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


def _main(output: Any) -> Any:
    if isinstance(output, Mapping):
        # torchvision's segmentation and detection name it "out", Hugging Face "logits".
        return next(
            (output[key] for key in ("logits", "out") if key in output), next(iter(output.values()), None)
        )
    return output[0] if isinstance(output, (tuple, list)) and output else output


def unfreeze(module: nn.Module) -> None:
    """A network that was frozen for inference is trained whole; one that is frozen in part stays so."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
