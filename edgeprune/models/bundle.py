"""Loading, wrapping and rebuilding a Bundle: a network with all that is needed to prune and to rebuild it."""

import hashlib
import logging
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import safe_loading, serialization
from edgeprune.errors import ModelError, UnsupportedModel, UsageError
from edgeprune.models import architectures
from edgeprune.models.from_export import ExportedNetwork, remodulify
from edgeprune.models.inference import count_classes, main_output, text_of
from edgeprune.models.parametrizations import compute_once, detached, note
from edgeprune.models.state_dict import check_finite, fit, need_arch, read_safetensors, unwrap
from edgeprune.models.storage import key
from edgeprune.models.surgery import replay
from edgeprune.recipe import ModelTable
from edgeprune.records import Bundle, InputSpec, Plan, Source
from edgeprune.safe_loading import check_names, check_strides

_LOG = logging.getLogger("edgeprune")
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_HOW = "give it as --input CxHxW, for example --input 3x224x224"
_PROGRAM, _RECIPE, _PLAN = "model.pt2", "recipe.toml", "plan.json"


def load_bundle(table: ModelTable) -> Bundle:
    """Load a model file, or a run directory, so that no code in it runs."""
    if not table.path:
        raise UsageError(
            "no model was given", "MODEL is a .pt2, .pt, .pth or .safetensors file, or a run directory"
        )
    path, labels = _file_of(Path(table.path))
    data = _read(path)
    given = image_shape(table.input) if table.input else None
    kind = safe_loading.kind_of(data, path)
    arch = architectures.canonical(table.arch) if table.arch else ""
    digest = hashlib.sha256(data).hexdigest()
    source = Source(kind, str(path.resolve()), digest, arch, table.allow_class, table.trust_pickle)
    module, source = _network(data, source, path)
    if arch and source.arch == "":
        _LOG.warning("%s holds its own network: --arch %s is not used", path, table.arch)
    known = _known_input(module)
    if given and known and isinstance(module, ExportedNetwork) and given != known[0]:
        raise UsageError(
            f"--input {table.input}: {path} was exported for {text_of(known[0])}",
            "leave --input out, or export it again",
        )
    if not given and not known:
        raise UsageError(f"{path} does not say the shape of its input", _HOW)
    mean, std = (table.mean, table.std) if table.mean or table.std else known[1:] if known else ((), ())
    bundle = _checked(module, source, given or known[0], (mean, std))  # type: ignore[index]
    return replace(bundle, labels=labels if len(labels) == bundle.input.classes else ())


def from_module(
    module: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Bundle:
    """A bundle of a module in memory; the module itself is copied and never changed.

    Args:
        mean, std: the normalization to put inside, one value per channel; empty for none.
    """
    example = (
        example_inputs[0]
        if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1
        else example_inputs
    )
    given: Any = module
    if not isinstance(given, nn.Module):
        raise UsageError(f"model must be a torch.nn.Module, got a {type(given).__name__}")
    if not isinstance(example, Tensor) or example.ndim != 4 or not len(example):
        found = (
            f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"a {type(example).__name__}"
        )
        raise UsageError(f"example_inputs must be one float tensor (N, C, H, W), got {found}")
    try:
        copy = deepcopy(module, detached(module))
    except safe_loading.USER_CODE_ERRORS as error:
        raise ModelError(
            f"{type(module).__name__} can't be copied: {error}", "give a module that copy.deepcopy takes"
        ) from error
    _, channels, height, width = example.shape
    source = Source(
        "memory",
        sha256=key(str(copy), (copy,), None),
        arch=f"{type(module).__module__}.{type(module).__qualname__}",
    )
    return _checked(copy, source, (channels, height, width), (tuple(mean), tuple(std)))


def rebuild(source: Source, input: InputSpec, plans: tuple[Plan, ...], weights: Path) -> Bundle:  # noqa: A002
    """The compressed network again: the original architecture, the cuts replayed on it, and the weights."""
    module = _original(source)
    _prepare(module, source.arch or source.path)
    for plan in plans:
        replay(module, plan)
    tensors = read_safetensors(_read(weights), str(weights))
    fit(module, tensors, str(weights), source.arch or source.path)
    check_finite(module, str(weights))
    return Bundle(module, source, input, plans)


def deployed(bundle: Bundle) -> nn.Module:
    """The network as it ships, sharing the bundle's: pixels in [0, 1], float32 (N, C, H, W), to logits (N, K)."""
    return Deployed(bundle.module, bundle.input).eval()


class Deployed(nn.Module):
    """A network behind its normalization. In training mode, auxiliary outputs are left out."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        """Share `network`; the normalization of `spec` becomes constants."""
        nn.Module.__init__(self)
        self.network = network
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(
                name, torch.tensor(values).view(1, -1, 1, 1) if values else None, persistent=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: pixels in [0, 1], float32 (N, C, H, W). Returns logits (N, K)."""
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        return main_output(self.network(x))


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    return hashlib.sha256(_read(Path(path))).hexdigest()


def _file_of(path: Path) -> tuple[Path, tuple[str, ...]]:
    if not path.exists():
        raise UsageError(
            f"no such file: {str(path)!r}",
            "MODEL is a .pt2, .pt, .pth or .safetensors file, or a run directory",
        )
    if not path.is_dir():
        return path, ()
    if not (path / _RECIPE).is_file():
        raise UsageError(
            f"{path} is a directory, but no run of edgeprune: it has no {_RECIPE}",
            "give the model file in it",
        )
    if not (path / _PROGRAM).is_file():
        raise UsageError(
            f"the run in {path} isn't finished: it has no {_PROGRAM}",
            "run its compress again; it goes on where it stopped",
        )
    try:
        labels = tuple(str(label) for label in serialization.load(path / _PLAN)["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        labels = ()
    return path / _PROGRAM, labels


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # what a pipe or a device gives may never end
        raise UsageError(f"{path} is no file")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"no such file: {str(path)!r}") from error
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from error


def _network(data: bytes, source: Source, path: Path) -> tuple[nn.Module, Source]:
    where = str(path)
    if source.kind == "pt2":
        return _remodulified(data, where), replace(source, arch="")
    if source.kind == "safetensors":
        found: nn.Module | dict[str, Tensor] = read_safetensors(data, where)
    else:
        loaded = safe_loading.load_pickle(
            data, where, allow_class=source.allow_class, trust=source.trust_pickle
        )
        found = unwrap(loaded, where)
    if isinstance(found, nn.Module):
        return found, replace(source, arch="")
    if not source.arch:
        raise need_arch(found, where)
    module = architectures.architecture(source.arch)
    fit(module, found, where, source.arch)
    return module, replace(source, kind="safetensors" if source.kind == "safetensors" else "state_dict")


def _remodulified(data: bytes, where: str) -> nn.Module:
    program = safe_loading.load_pt2(data, where)
    try:
        return remodulify(program)
    except safe_loading.USER_CODE_ERRORS as error:
        raise UnsupportedModel(
            f"{where} can't be turned into modules again: {type(error).__name__}: {error}",
            "give the PyTorch model that it was made from: its weights and --arch",
        ) from error


def _original(source: Source) -> nn.Module:
    if source.kind in ("state_dict", "safetensors"):
        return architectures.architecture(source.arch)
    if source.kind == "memory":
        raise ModelError(
            f"{source.arch or 'the network'} came from memory, so it can't be rebuilt from a plan",
            f"load {_PROGRAM} instead",
        )
    path = Path(source.path)
    if not path.is_file():
        raise ModelError(
            f"the original model {path} is gone, and its architecture with it",
            f"put it back, or load {_PROGRAM} instead",
        )
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise ModelError(
            f"{path} is not the file any more that was compressed", f"put it back, or load {_PROGRAM} instead"
        )
    return _network(data, source, path)[0]


def image_shape(text: str) -> tuple[int, int, int]:
    """Read the shape given as --input."""
    match = _SHAPE.fullmatch(text.strip().lower())
    if not match or not all(int(n) for n in match.groups()):
        raise UsageError(
            f"--input {text!r} is not a shape",
            "write channels x height x width, for example --input 3x224x224",
        )
    channels, height, width = (int(n) for n in match.groups())
    return channels, height, width


def _known_input(
    module: nn.Module,
) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]] | None:
    if isinstance(module, ExportedNetwork):
        return (module.image_shape, (), ()) if module.image_shape else None
    return architectures.default_input(module)


def _checked(
    module: nn.Module,
    source: Source,
    shape: tuple[int, int, int],
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
) -> Bundle:
    mean, std = normalization
    _check_normalization(mean, std, shape[0])
    where = source.path or type(module).__name__
    notes = _prepare(module, where)
    for text in notes:
        _LOG.warning("%s: %s", where, text)
    check_finite(module, where)
    classes = count_classes(module, shape, (mean, std), where)
    return Bundle(module, source, InputSpec(shape, classes, mean, std), notes=notes)


def _check_normalization(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels and (mean or std):
            raise UsageError(
                f"--{name} has {len(values)} values, the input has {channels} channels",
                "give one value per channel to both",
            )
        if not all(torch.isfinite(torch.tensor(values, dtype=torch.float64))):
            raise UsageError(f"--{name} {values} must be finite numbers")
    if any(value <= 0 for value in std):
        raise UsageError(f"--std {','.join(map(str, std))} must be more than 0")


def _prepare(module: nn.Module, where: str) -> tuple[str, ...]:
    """Check the names of a network, put it on the CPU in float32 and evaluation mode; notes for the user."""
    check_names(module, where)
    check_strides(module, where)
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        _LOG.warning(
            "the network is in %s; it is used in float32",
            ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds)),
        )
    try:
        module.to("cpu").float().eval()
        computed = module.computed if isinstance(module, ExportedNetwork) else compute_once(module)
    except safe_loading.USER_CODE_ERRORS as error:
        raise UnsupportedModel(
            f"{type(module).__name__} can't be put in eval mode as float32, with its weights computed: {error}"
        ) from error
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return (note(computed),) if computed else ()
