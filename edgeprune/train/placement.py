"""Device, memory format and precision of training: GPU, channels last and bfloat16 where these work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models import logits, modes
from edgeprune.quantities import check_choice
from edgeprune.recipe import MIXED

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExecutionConfig:
    """mixed: layers compute in bfloat16."""

    device: torch.device = CPU
    memory_format: torch.memory_format = torch.channels_last
    mixed: bool = False

    def images(self, x: Tensor) -> Tensor:
        """A batch (N, C, H, W) on the device in the memory format."""
        return x.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)

    def autocast(self) -> torch.autocast:
        """The context of losses and attacks.

        Without a cache of casts: weights that were cast without gradients (for a teacher, an attack) have none later.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed, cache_enabled=False)


def device_of(module: nn.Module) -> torch.device:
    """Where its first tensor is; the CPU when it has none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return CPU if first is None else first.device


def fastest_config(networks: Sequence[nn.Module], example: Tensor, mixed: str = "fp32") -> ExecutionConfig:
    """The first configuration, from fast to slow, in which all networks run; they are on its device afterwards.

    Channels last is a third faster on CPUs; networks that call `view` on feature maps fail with it. A network that
    makes tensors on the CPU fails on a GPU. One that runs nowhere gets the slowest and raises when it is used.

    Args:
        mixed: "fp32", "bf16", or "auto": bfloat16 on a GPU and float32 on a CPU.
            CPUs with AVX-512 BF16 train convolutions in half the time with "bf16" (benchmarks/mixed.py); others
            emulate it, and results would depend on the CPU.
    """
    *tried, last = _candidates(mixed)
    for placement in tried:
        if all(_runs(network, example, placement) for network in networks):
            return placement
    for network in networks:
        network.to(last.device)
    return last


@contextmanager
def restored_device(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Move the networks back to their devices afterwards."""
    before = [(network, device_of(network)) for network in networks]
    try:
        yield
    finally:
        for network, device in before:
            network.to(device)


def set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Convert the kernels in place."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Restore the global random state afterwards; cuDNN uses deterministic algorithms meanwhile."""
    before = torch.backends.cudnn.deterministic
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = before


def _runs(network: nn.Module, example: Tensor, placement: ExecutionConfig) -> bool:
    network.to(placement.device)
    try:
        with modes(None, network), torch.no_grad(), placement.autocast():
            logits(network, placement.images(example))
    except ModelError:
        return False
    return True


def _candidates(mixed: str) -> list[ExecutionConfig]:
    check_choice("tune.mixed", mixed, MIXED)
    devices = [CPU]
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda", torch.cuda.current_device()))
    formats = (torch.channels_last, torch.contiguous_format)
    found: list[ExecutionConfig] = []
    for device in devices:
        mixes = {"auto": (True, False) if device.type == "cuda" else (False,), "bf16": (True,)}
        chosen = mixes.get(mixed, (False,))
        found += [ExecutionConfig(device, layout, mix) for mix, layout in product(chosen, formats)]
    return found
