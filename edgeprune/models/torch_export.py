"""A network as an ExportedProgram, or the layer it stopped at and the reason in torch's own words."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import torch
from torch import Tensor, fx, nn
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.utils.hooks import RemovableHandle

from edgeprune.errors import UnsupportedModel
from edgeprune.records import InputSpec

# What a network's forward() may raise when it is run, traced or exported; most of torch's own are RuntimeErrors.
FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SpecViolationError,
    TypeError,
    ValueError,
)
LONGEST_REASON = 300
# What the paths of the network begin with in the module that `models.bundle.deployed` wraps around it.
PREFIX = "network."


def example(spec: InputSpec, batch: int = 1) -> Tensor:
    """Fixed uniform pixels in [low, high], float32 (batch, C, H, W): the same at every call."""
    pixels = torch.rand(batch, *spec.shape, generator=torch.Generator().manual_seed(0))
    return spec.low + (spec.high - spec.low) * pixels


def check_logits(module: nn.Module, spec: InputSpec) -> None:
    """Run the network once and check its output."""
    try:
        with torch.no_grad():
            logits = module(example(spec))
    except FORWARD_ERRORS as error:
        where = _stopped_at(module, example(spec))
        raise UnsupportedModel(
            f"{where} fails on an input of shape {spec.shape}: {reason(error)}", "check --input and --arch"
        ) from error
    found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if found != f"a tensor {(1, spec.classes)}":
        raise UnsupportedModel(
            f"the output of the network for one image is {found}; accepted: one tensor of logits {(1, spec.classes)}",
            "wrap it so that forward() returns the logits alone",
        )


def module_path(node: fx.Node) -> str:
    """The path of the innermost module around a node; torch writes "L['self'].a.b", or "a.b@1" for its second call."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    for prefix in ("L['self']", "L__self__", "self"):
        path = path.removeprefix(prefix)
    return path.strip(".")


def capture(module: nn.Module, spec: InputSpec, *, dynamic_batch: bool) -> ExportedProgram:
    """Trace the network with torch.export; parameters are shared with it, not copied."""
    # A batch of one would let torch take the open dimension for a constant in code such as `if len(x) == 1`.
    pixels = example(spec, 2 if dynamic_batch else 1)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    failure: Exception | None = None
    for strict in (False, True):
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(module, (pixels,), dynamic_shapes=shapes, strict=strict)
        except FORWARD_ERRORS as error:
            failure = failure or error
    assert failure is not None
    if dynamic_batch:
        capture(module, spec, dynamic_batch=False)
        raise UnsupportedModel(
            f"the network fixes its batch size, so it can't be exported with an open one: {reason(failure)}",
            "leave export.dynamic_batch off",
        ) from failure
    raise UnsupportedModel(
        f"{_stopped_at(module, pixels, export=True)} can't be traced by torch.export: {reason(failure)}",
        "rewrite it in tensor operations: no .item(), no .numpy(), no `if` on what a tensor holds",
    ) from failure


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line: the innermost cause without advice or stack traces."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def title(path: str, kind: str) -> str:
    """A module of the deployed network as people call it: "layer1.0 (BasicBlock)"."""
    inner = f"{path}.".removeprefix(PREFIX).rstrip(".")
    return f"{inner} ({kind})" if inner else "the network"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters print, warn and log: stdout belongs to --json, and what fails is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks of layers afterwards."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def running_layers(module: nn.Module) -> Iterator[list[str]]:
    """The paths of the layers that run, the innermost last; when forward() fails, those that did not end."""
    running: list[str] = []

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        handles.append(part.register_forward_hook(leave))
    with temporary_hooks(handles):
        yield running


def _stopped_at(module: nn.Module, pixels: Tensor, *, export: bool = False) -> str:
    """The innermost layer that ran when forward() failed, such as "layer1.0 (BasicBlock)"."""
    with running_layers(module) as running, quiet(), torch.no_grad():
        try:
            torch.export.export(module, (pixels,), strict=False) if export else module(pixels)
        except FORWARD_ERRORS:
            path = running[-1] if running else ""
            return title(path, type(module.get_submodule(path)).__name__)
    return "the network"
