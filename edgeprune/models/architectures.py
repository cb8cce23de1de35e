"""Architectures by name, with random weights: timm:NAME, torchvision:NAME, package.module:callable, file.py:callable.

Naming a file or a package here means running it: that is the user's own code, never something out of a model file.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from edgeprune.errors import MissingDependency, ModelError, UsageError
from edgeprune.safe_loading import USER_CODE_ERRORS, import_library, importable_here, prepare_torchvision

_FORMS = (
    "accepted: timm:NAME, torchvision:NAME, package.module:callable or file.py:callable, "
    "each with ?key=value&key=value"
)
_NETWORK_KEYS = (
    "pretrained",
    "weights",
    "weights_backbone",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


def architecture(spec: str) -> nn.Module:
    """Build the network that a spec names, with random weights and without any download."""
    head, arguments = _parse(spec)
    origin, _, name = head.rpartition(":")
    if not origin or not name:
        raise UsageError(f"--arch {spec!r} names no architecture", _FORMS)
    if origin == "timm":
        build: Callable[..., Any] = _timm(name, arguments)
    elif origin == "torchvision":
        build = _torchvision(name, arguments)
    elif origin.endswith(".py"):
        build = _attribute(_from_file(Path(origin)), name, spec)
    else:
        build = _attribute(_from_package(origin, spec), name, spec)
    return _built(build, arguments, spec)


def canonical(spec: str) -> str:
    """The spec with the path of a `file.py` made absolute, so that it can be built from another directory."""
    head, mark, query = spec.partition("?")
    origin, _, name = head.rpartition(":")
    return f"{os.path.realpath(origin)}:{name}{mark}{query}" if origin.endswith(".py") else spec


def default_input(
    module: nn.Module,
) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]] | None:
    """The input (C, H, W), mean and std that a timm or torchvision network was made for; None for any other.

    Only timm says which normalization goes with a network, so torchvision's mean and std are empty.
    """
    home = type(module).__module__
    if home.startswith("timm."):
        return _timm_input(module)
    task = home.split(".")[2] if home.startswith("torchvision.models.") else ""
    if task and task not in ("detection", "segmentation", "video", "optical_flow", "quantization"):
        side = 299 if type(module).__name__ == "Inception3" else 224
        return (3, side, side), (), ()
    return None


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    head, _, query = spec.strip().partition("?")
    arguments: dict[str, Any] = {}
    for part in (p for p in query.split("&") if p):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--arch {spec!r}: {part!r} must be key=value", _FORMS)
        arguments[key] = _value(value)
    return head, arguments


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _timm(name: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    _no_download(arguments, f"timm:{name}")
    timm = import_library("timm", f"--arch timm:{name}")
    if ":" in name or "/" in name or not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "`python -c 'import timm; print(timm.list_models())'` lists them"
        )
        raise UsageError(f"timm has no model named {name!r}", hint)
    return lambda **given: timm.create_model(name, pretrained=False, **given)


def _torchvision(name: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    _no_download(arguments, f"torchvision:{name}")
    models = import_library("torchvision", f"--arch torchvision:{name}").models
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "accepted: " + ", ".join(known)
        raise UsageError(f"torchvision has no classification model named {name!r}", hint)
    # These two warn that their own initialization is slow; the weights come from the user's file anyway.
    quiet = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return lambda **given: models.get_model(name, weights=None, **{**quiet, **given})


def _no_download(arguments: dict[str, Any], what: str) -> None:
    for key in arguments:
        if key in _NETWORK_KEYS:
            raise UsageError(
                f"--arch {what}?{key}=...: weights are never downloaded",
                "give them as a file: MODEL is its path",
            )


def _from_package(dotted: str, spec: str) -> ModuleType:
    top = dotted.split(".", maxsplit=1)[0]
    prepare_torchvision()
    try:
        with importable_here():
            return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        missing = error.name or top
        if missing != top and (dotted + ".").startswith(missing + "."):
            raise UsageError(f"--arch {spec!r}: the package {top} has no module {missing}") from error
        hint = f"pip install {missing.split('.')[0]}, or run in the directory that holds it"
        raise MissingDependency(f"--arch {spec!r} needs the package {missing.split('.')[0]}", hint) from error
    except USER_CODE_ERRORS as error:
        raise ModelError(
            f"--arch {spec!r}: importing {dotted} failed: {type(error).__name__}: {error}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"--arch: no file {str(path)!r}", _FORMS)
    path = path.resolve()
    name = f"edgeprune_arch_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--arch: {path} is not a Python file", _FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    sys.path.append(str(path.parent))
    prepare_torchvision()
    try:
        with importable_here():
            spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"--arch: {path} needs the package {error.name}", f"pip install {error.name}"
        ) from error
    except USER_CODE_ERRORS as error:
        raise ModelError(f"--arch: running {path} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _attribute(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    value = getattr(module, name, None)
    if value is None:
        here = [
            k
            for k, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        close = difflib.get_close_matches(name, here, n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"it defines: {', '.join(sorted(here)) or 'nothing callable'}"
        )
        raise UsageError(f"--arch {spec!r}: there is no {name!r} in {module.__file__}", hint)
    if not callable(value):
        raise UsageError(
            f"--arch {spec!r}: {name} is a {type(value).__name__}, not a class or function", _FORMS
        )
    return value


def _built(build: Callable[..., Any], arguments: dict[str, Any], spec: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = build(**arguments)
    except USER_CODE_ERRORS as error:
        raise ModelError(
            f"--arch {spec!r}: building it failed: {type(error).__name__}: {error}",
            "its arguments are given as ?key=value&key=value",
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"--arch {spec!r} gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def _timm_input(
    module: nn.Module,
) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]] | None:
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    read = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    size = read("input_size")
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    channels = _first_channels(module, read("first_conv")) or int(size[0])
    mean, std = (tuple(float(v) for v in read(key) or ()) for key in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        mean, std = (), ()
    return (channels, int(size[1]), int(size[2])), mean, std


def _first_channels(module: nn.Module, names: object) -> int | None:
    name = names[0] if isinstance(names, (tuple, list)) and names else names
    weight = dict(module.named_parameters()).get(f"{name}.weight")
    return int(weight.shape[1]) if weight is not None and weight.ndim == 4 else None
