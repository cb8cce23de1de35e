"""Weights without structure: finding the state dict in a checkpoint, and fitting it to an architecture."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.safe_loading import USER_CODE_ERRORS

_LOG = logging.getLogger("edgeprune")
_HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_SHOWN = 5


def unwrap(loaded: Any, where: str) -> nn.Module | dict[str, Tensor]:
    """The network or the state dict in what a file held, from inside a checkpoint if need be."""
    path = ""
    while not isinstance(loaded, nn.Module):
        if not isinstance(loaded, Mapping):
            raise ModelError(
                f"{where} holds a {type(loaded).__name__}{path}, not a network or a state dict",
                "save model.state_dict()",
            )
        tensors = {
            name: value
            for name, value in loaded.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        holder = next(
            (key for key in _HOLDERS if isinstance(loaded.get(key), (Mapping, nn.Module)) and loaded[key]), ""
        )
        if tensors and len(tensors) * 2 > len(loaded):
            _note_path(path, where)
            _note_left_out(loaded, tensors, where)
            return tensors
        if not holder:
            keys = ", ".join(map(str, list(loaded)[:_SHOWN])) or "nothing"
            raise ModelError(
                f"{where} holds no network and no state dict{path}, only: {keys}", "save model.state_dict()"
            )
        loaded, path = loaded[holder], f"{path}[{holder!r}]"
    _note_path(path, where)
    _check_tree(loaded, where)
    return loaded


def read_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise ModelError(
            f"{where} is a corrupt or truncated safetensors file: {error}", "save or copy it again"
        ) from error
    if not tensors:
        raise ModelError(f"{where} holds no tensors", "save model.state_dict() again")
    return tensors


def fit(module: nn.Module, tensors: Mapping[str, Tensor], where: str, arch: str) -> None:
    """Load a state dict into an architecture, strictly but for wrappers' prefixes and counters, in place."""
    own = module.state_dict()
    given = _without_prefix(tensors, own, where)
    for name in [name for name in own if name not in given]:
        # Batch counters are not in old files, and tensors tied to another are not in safetensors.
        tied = next((k for k in given if k in own and _same_memory(own[k], own[name])), "")
        if tied or name.endswith("num_batches_tracked"):
            given[name] = given[tied] if tied else own[name]
    missing, unexpected = [k for k in own if k not in given], [k for k in given if k not in own]
    if missing or unexpected:
        raise ModelError(
            f"{where} does not fit --arch {arch}: {_listed('missing', missing)}; "
            f"{_listed('not in the architecture', unexpected)}",
            f"the file's keys begin with {', '.join(list(tensors)[:3])}",
        )
    _check_shapes(own, given, where, arch)
    try:
        module.load_state_dict(given, strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{where} can't be loaded into --arch {arch}: {str(error).strip().splitlines()[-1].strip()}"
        ) from error


def need_arch(tensors: Mapping[str, Tensor], where: str) -> ModelError:
    """The error for a state dict without an architecture."""
    keys = ", ".join(list(tensors)[:_SHOWN])
    return ModelError(
        f"{where} holds only weights ({len(tensors)} tensors: {keys}, ...), not the network they belong to",
        "add --arch timm:NAME, torchvision:NAME, package.module:callable or file.py:callable",
    )


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse NaN anywhere and infinities in what was learned.

    Masks made of -inf are buffers that are not saved; those may be infinite.
    """
    saved = set(module.state_dict())
    bad = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            wrong = torch.isnan(tensor) if name not in saved else ~torch.isfinite(tensor)
            if count := int(wrong.sum()):
                bad.append(f"{name} ({count} of {tensor.numel()})")
    if bad:
        more = f" and {len(bad) - _SHOWN} more tensors" if len(bad) > _SHOWN else ""
        raise ModelError(
            f"{where} has NaN or infinite values in {', '.join(bad[:_SHOWN])}{more}",
            "train it again, or take an earlier checkpoint",
        )


def _check_tree(module: nn.Module, where: str) -> None:
    try:
        parts: dict[Any, nn.Module] = dict(module.named_modules())
        kept: list[tuple[Any, Any]] = [
            *module.named_parameters(),
            *module.named_buffers(),
            *module.state_dict().items(),
        ]
        whole = all(isinstance(name, str) for name in (*parts, *(name for name, _ in kept)))
    except USER_CODE_ERRORS as error:
        raise ModelError(f"{where} holds a damaged network: {error}", "save it again") from error
    if not whole:
        raise ModelError(f"{where} holds a damaged network: its parts have no names", "save it again")


def _note_path(path: str, where: str) -> None:
    if path:
        _LOG.warning("%s: took what is in %s", where, path)


def _note_left_out(loaded: Mapping[Any, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    left = [str(key) for key in loaded if key not in tensors]
    if left:
        _LOG.warning("%s: left out what is no tensor: %s", where, ", ".join(left[:_SHOWN]))


def _without_prefix(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Strip what DataParallel, torch.compile or Lightning put before every name, unless the network has it too."""
    given = dict(tensors)
    while given.keys() != own.keys():
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in given)), "")
        if not prefix or all(k.startswith(prefix) for k in own):
            break
        given = {k.removeprefix(prefix): v for k, v in given.items()}
        _LOG.warning("%s: took the prefix %r off every name", where, prefix)
    return given


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a is not b
        and a.numel() > 0
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str, arch: str) -> None:
    wrong = [k for k in own if own[k].shape != given[k].shape]
    if not wrong:
        return
    shown = "; ".join(
        f"{k} is {_shape(given[k])}, the architecture's is {_shape(own[k])}" for k in wrong[:_SHOWN]
    )
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    rows = {given[k].shape[:1] for k in wrong if own[k].shape[1:] == given[k].shape[1:]}
    hint = "give the architecture's arguments as ?key=value"
    if len(rows) == 1 and len(wrong) <= 2 and "num_classes" not in arch:
        argument = f"{'&' if '?' in arch else '?'}num_classes={next(iter(rows))[0]}"
        hint = f"if {wrong[0]} is the classifier: --arch '{arch}{argument}'"
    raise ModelError(f"{where} has other shapes than --arch {arch}: {shown}{more}", hint)


def _listed(what: str, keys: Sequence[str]) -> str:
    return f"{len(keys)} {what}" + (
        f" ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})" if keys else ""
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
