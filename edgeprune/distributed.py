"""The processes that torchrun starts, as one group: ranks, means and copies over all, and a common end.

Process 0 leads. Without torchrun, or before `start`, a process is alone: its rank is 0, the size is 1, and every
function here returns its argument. Nothing heavy is imported until a group is started.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprune.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# So long may it take until all processes, on all machines, have started.
START = timedelta(minutes=10)
# A follower waits while process 0 exports and measures, and that may take hours on a device.
PATIENCE = timedelta(hours=24)
# So long may process 0 take to say that it ended, before a follower takes an error for its own.
COURTESY = timedelta(seconds=20)
_OVER = "edgeprune/over"


class PeerLost(DeviceError):
    """Another process of the group has ended before its time."""


@dataclass(frozen=True)
class Launch:
    """What torchrun says of this process: its number and how many there are, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launch() -> Launch:
    """How this process was started; the one place that reads torchrun's variables."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    return Launch(*map(int, found)) if all(text.isdecimal() for text in found) else Launch()


def start() -> Store | None:
    """Meet the other processes; gives the store of the group, or None to a process that is alone.

    Tensors on the CPU travel by gloo. Where every process has a GPU of its own, which becomes its current one, those
    on the GPU travel by NCCL.
    """
    place = launch()
    if place.size == 1:
        return None
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    # The default arguments of its functions are the group that is there when it is imported. Imported later, by others,
    # it would keep the group's threads alive until the interpreter dies, which then aborts now and then.
    import_module("torch.distributed.nn")

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(place.local_rank % gpus)
    fast = gpus >= place.local_size and dist.is_nccl_available()
    with _peer_lost():
        store, rank, size = next(rendezvous("env://", timeout=START))
        store.set(f"edgeprune/gpu/{rank}", str(int(fast)))
        all_fast = all(store.get(f"edgeprune/gpu/{other}") == b"1" for other in range(size))
        backend = "cpu:gloo,cuda:nccl" if all_fast else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return store


def stop(store: Store | None) -> None:
    """Leave the group; processes that wait for this one get `PeerLost`. Process 0 records that it is over."""
    if store is None:
        return
    import torch.distributed as dist

    if rank() == 0:
        store.set(_OVER, "1")
    dist.destroy_process_group()


def run_on_all_ranks(work: Callable[[], int]) -> int:
    """Do the work of a command in every process of the group; process 0's exit code is the one that counts.

    The others print nothing and end with 0, also when process 0 fails, whose error it is; unless they fail while it
    does not.
    """
    store = start()
    if store is None or rank() == 0:
        try:
            return work()
        finally:
            stop(store)
    try:
        with _silence():
            work()
    except BaseException:
        if not _is_over(store):
            raise
    finally:
        stop(store)
    return 0


def rank() -> int:
    """The rank of this process in its group; 0 leads."""
    if not _joined():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def size() -> int:
    """How many processes the group has."""
    if not _joined():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes into each tensor, in place: bit for bit the same everywhere.

    The tensors have the same shapes, types and order in every process; all of one type and device travel in one piece.
    """
    count = size()
    if count == 1 or not tensors:
        return
    import torch
    import torch.distributed as dist

    piles: dict[tuple[Any, Any], list[Tensor]] = {}
    for tensor in tensors:
        piles.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        for pile in piles.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in pile])
            with _peer_lost():
                dist.all_reduce(flat)
            parts = flat.div_(count).split([tensor.numel() for tensor in pile])
            for tensor, part in zip(pile, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))


def broadcast_(tensor: Tensor) -> Tensor:
    """Put process 0's values into a tensor of the same shape and type, in place; gives the tensor."""
    if size() == 1:
        return tensor
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _peer_lost():
            dist.broadcast(sent, src=0)
        tensor.detach().copy_(sent)
    return tensor


def broadcast_object(value: T) -> T:
    """Process 0's value in every process; what the others hand in does not count."""
    if size() == 1:
        return value
    import torch
    import torch.distributed as dist

    box = [value]
    with _peer_lost():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    """Go on when every process has come here; idle, so that what process 0 times is not disturbed."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    with _peer_lost():
        dist.all_reduce(torch.zeros(1))


def _joined() -> bool:
    if launch().size == 1:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _is_over(store: Store) -> bool:
    """Whether process 0 has recorded its end, or its store is gone."""
    import torch.distributed as dist

    try:
        store.wait([_OVER], COURTESY)
    except dist.DistStoreError:
        return False
    except dist.DistError:
        return True
    return True


@contextmanager
def _peer_lost() -> Iterator[None]:
    """What a broken connection raises, as an error that says what happened; gloo's errors have no type of their own."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error)).partition(". ")[0]
        raise PeerLost(
            f"another process of the group has ended, or can't be reached ({reason})",
            "see its own message; start the same command again to go on",
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    log = logging.getLogger("edgeprune")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with open(os.devnull, "w", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
            yield
    finally:
        log.setLevel(level)
