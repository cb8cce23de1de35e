"""A network that runs on the parts of a batch at the same time, one thread each.

Where one thread after another waits for the slowest at the end of every operator, two threads that share a batch wait
once for the whole network. On two cores that is a tenth faster on an idle machine, and several times as fast on one
that does something else too.
"""

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.models.inference import logits
from edgeprune.models.torch_export import FORWARD_ERRORS

# Of malloc.h: from which size on memory comes directly from the system, and how much may lie idle at the end.
_TRIM, _MAP = -1, -3
# The largest that the library takes.
_LARGEST_BLOCK = 32 * 2**20
_MOST_IDLE = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees, up to 2 GiB for each heap; whether its C library can."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MAP, _LARGEST_BLOCK)) and bool(library.mallopt(_TRIM, _MOST_IDLE))


# More threads in Python would wait for each other between operators; beyond that, operators get several threads each.
MOST_REPLICAS = 8
# Fewer images are not worth a thread.
LEAST_IMAGES = 2


@contextmanager
def on_replicas(network: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """The network, or one with the same outputs that runs on as many threads as torch may use.

    In the block torch's own operators take one thread each; afterwards as many as before. The network's tensors are
    shared, and what its code keeps in its layers while it runs is not, so its code need not be thread-safe.
    """
    threads = torch.get_num_threads()
    replicas = min(threads, MOST_REPLICAS)
    if replicas < 2 or x.device.type != "cpu" or len(x) < 2 * LEAST_IMAGES:
        yield network
        return
    try:
        copies = [network, *(_sharing(network) for _ in range(replicas - 1))]
    except FORWARD_ERRORS:  # it can't be copied
        yield network
        return
    torch.set_num_threads(threads // replicas)
    keep_freed_memory()
    try:
        with ThreadPoolExecutor(replicas) as pool:
            yield Replicas(copies, pool)
    finally:
        torch.set_num_threads(threads)


class Replicas(nn.Module):
    """Copies of a network that share its tensors, each for a part of the batch."""

    def __init__(self, copies: Sequence[nn.Module], pool: ThreadPoolExecutor) -> None:
        nn.Module.__init__(self)
        self.copies, self.pool = nn.ModuleList(copies), pool

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W) to logits (N, K); the same gradients pass as through one of the copies."""
        count = self.count(len(x))
        if count < 2:
            return logits(self.copies[0], x)
        uphill = torch.is_grad_enabled() and x.requires_grad
        return _Apart.apply(x, self, count) if uphill else torch.cat(self.each(x.chunk(count), _output))

    def count(self, images: int) -> int:
        """How many replicas are worth it for so many images."""
        return min(len(self.copies), images // LEAST_IMAGES)

    def each(self, parts: Sequence[Any], work: Callable[[nn.Module, Any], Any]) -> list[Any]:
        """Some work with a copy on each part, at the same time; the first error is raised when all have ended."""
        futures = [self.pool.submit(work, copy, part) for copy, part in zip(self.copies, parts, strict=False)]
        return [future.result() for future in futures]


class _Apart(torch.autograd.Function):
    """The parts' outputs joined; their graphs run backward at the same time, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replicas: Replicas, count: int) -> Tensor:
        ctx.replicas, ctx.parts = replicas, replicas.each(x.chunk(count), _followed)
        return torch.cat([output.detach() for _, output in ctx.parts])

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, None, None]:
        sizes = [len(point) for point, _ in ctx.parts]
        parts = list(zip(ctx.parts, above[0].split(sizes), strict=True))
        return torch.cat(ctx.replicas.each(parts, _back)), None, None


def _output(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return logits(network, x)


def _followed(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return point, logits(network, point)


def _back(_: nn.Module, part: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
    (point, output), above = part
    if not output.requires_grad:
        return torch.zeros_like(point)
    found = torch.autograd.grad(output, point, above, allow_unused=True)[0]
    return torch.zeros_like(point) if found is None else found


def _sharing(network: nn.Module) -> nn.Module:
    tensors = chain(network.parameters(), network.buffers())
    return deepcopy(network, {id(tensor): tensor for tensor in tensors})
