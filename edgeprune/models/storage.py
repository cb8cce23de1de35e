"""The state of a training, in one file that is whole or absent."""

import hashlib
import io
import pickle
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgeprune import distributed, serialization
from edgeprune.errors import UsageError, WorkdirError
from edgeprune.models import surgery
from edgeprune.records import Bundle, Plan
from edgeprune.serialization import replace_file


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as safetensors; tensors that share memory are written each."""
    with replace_file(path) as file:
        file.write(save({name: t.detach().clone().contiguous() for name, t in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise WorkdirError(
            f"{path} can't be read: {error}", f"delete {path.parent}; it will be made again"
        ) from error


def save_network(network: nn.Module, path: Path) -> None:
    """Write a network's state dict as safetensors."""
    save_tensors(dict(network.state_dict()), path)


class CutNetwork:
    """The cut network of a run: it is put together once, and afterwards only given the weights of another stage."""

    def __init__(self) -> None:
        self._last: tuple[Path, Bundle] | None = None

    def at(self, dense: Bundle, plan: Path, weights: Path) -> Bundle:
        """The bundle with the weights of a file; it is shared, and not to be changed."""
        if self._last is None:
            made = serialization.read(Plan, plan, WorkdirError)
            network = deepcopy(dense.module)
            surgery.replay(network, made)
            self._last = weights, _with_weights(replace(dense, plans=(*dense.plans, made)), network, weights)
        elif self._last[0] != weights:
            bundle = self._last[1]
            self._last = weights, _with_weights(bundle, deepcopy(bundle.module), weights)
        return self._last[1]


def _with_weights(bundle: Bundle, network: nn.Module, weights: Path) -> Bundle:
    network.load_state_dict(load_tensors(weights), strict=True)
    return replace(bundle, module=network.eval())


# What torch.load and load_state_dict raise on a file of another kind.
BROKEN = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError)
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass
class Progress:
    """How far a training has come; it grows with each step.

    epoch: epochs that are done. step, total: steps of the next one that are done, and the sum of their losses.
    losses, validation: of each epoch that is done. best: the number of the best one, counted from 0; -1 for none.
    kept: what "module" and "hooks" were after it.
    """

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best: int = -1
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training, and its key. Of several processes, process 0 alone writes and reads it."""

    path: Path
    key: str

    def save(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        hooks: Mapping[str, Any],
    ) -> None:
        """Write the state over the one before; a process that is killed meanwhile leaves the one before."""
        if distributed.rank():
            return
        state = {
            "progress": dict(vars(progress)),
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "hooks": dict(hooks),
        }
        save_state(self.path, self.key, state, alone=True)

    def restore(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> tuple[Progress, dict[str, Any]] | None:
        """Put the saved state into the network and the optimizer; None without a whole one of this training."""
        state = load_state(self.path, self.key, device=device)
        if state is None:
            return None
        try:
            progress = Progress(**state["progress"])
            # The optimizer first: if it is refused, the network is still as it was.
            optimizer.load_state_dict(state["optimizer"])
            module.load_state_dict(state["module"])
            return progress, state["hooks"]
        except BROKEN:
            return None


def key(settings: str, networks: Iterable[nn.Module], more: Any) -> str:
    """A hash of the settings, of all weights that a training starts from, and of what hooks start from."""
    digest = hashlib.sha256(settings.encode())
    for network in networks:
        tensors = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
        _feed(digest, tensors)
    _feed(digest, more)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            digest.update(repr(name).encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(repr((value.shape, value.dtype)).encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:
        raise UsageError(
            f"a {type(value).__name__} can't be kept in a checkpoint",
            "a hook's state may have tensors, numbers, text, and dictionaries and lists of them",
        )


def _read(path: Path) -> bytes:
    """The content of a file of `save_state`; empty when there is none, or when it is damaged."""
    try:
        found = path.read_bytes()
    except OSError:
        return b""
    digest, content = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else b""


def save_state(path: Path, key: str, state: Mapping[str, Any], *, alone: bool = False) -> None:
    """Write a state over the one before; a process that is killed meanwhile leaves the one before."""
    if alone or distributed.rank() == 0:
        content = io.BytesIO()
        torch.save({"key": key, "state": dict(state)}, content)
        with replace_file(path) as file:
            file.write(hashlib.sha256(content.getbuffer()).digest())
            file.write(content.getbuffer())
    if not alone:
        distributed.barrier()


def load_state(
    path: Path, key: str, *, alone: bool = False, device: torch.device | None = None
) -> dict[str, Any] | None:
    """The state saved under the same key, or None. Of several processes, process 0 reads for all unless `alone`.

    Tensors that were on a GPU go to `device`, the CPU by default.
    """
    content = _read(path) if alone or distributed.rank() == 0 else b""
    content = content if alone else distributed.broadcast_object(content)

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" or device is None else storage.to(device=device)

    try:
        found = torch.load(io.BytesIO(content), weights_only=True, map_location=place)
        return found["state"] if found["key"] == key else None
    except BROKEN:
        # The work starts again then, and ends the same.
        return None
