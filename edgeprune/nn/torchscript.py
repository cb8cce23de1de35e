"""TorchScript files: looked into, then turned into an exported program, and so into modules again.

TorchScript runs in a machine of its own and can't call Python, so loading such a file runs no Python code out of it.
But that machine has operators that write and read files, and a file's own code may run while it is loaded; so its code
is searched for them first.
"""

from __future__ import annotations

import ast
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import ExportedProgram

from edgeprune.errors import ModelError, UnsafeModel, UnsupportedModel
from edgeprune.nn.filekinds import records
from edgeprune.nn.pt2 import LOAD_ERRORS, last_line
from edgeprune.nn.remodulify import remodulify

_OPERATORS = ("aten", "prim", "torchvision")
_TOUCH_FILES = ("save", "from_file")
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._export.converter", "torch.export")


def modules_of(data: bytes, shape: tuple[int, int, int], where: str) -> nn.Module:
    """Load a TorchScript file and make modules of it, as `remodulify` does.

    Args:
        data: the whole file.
        shape: (C, H, W) of the images that it eats; a TorchScript file doesn't say.

    Raises:
        UnsafeModel: its code touches files, or can't be searched.
        UnsupportedModel: it can't be converted; says torch's reason.
        ModelError: corrupt.
    """
    _vet(data, where)
    script = _load(data, where)
    parameters = {name for name, _ in script.named_parameters()}
    module = remodulify(_converted(script, shape, where))
    for name, tensor in list(module.named_buffers()):
        # The converter makes buffers of everything.
        path, _, leaf = name.rpartition(".")
        if name in parameters:
            owner = module.get_submodule(path)
            del owner._buffers[leaf]
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return module


def _load(data: bytes, where: str) -> torch.jit.ScriptModule:
    try:
        with _quiet():
            return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{where} is a corrupt TorchScript file: {last_line(error)}", "save it again"
        ) from error


def _converted(script: torch.jit.ScriptModule, shape: tuple[int, int, int], where: str) -> ExportedProgram:
    # Private, but the only way from TorchScript to a graph that has modules; torch.export refuses script modules.
    from torch._export.converter import TS2EPConverter

    try:
        with _quiet(), torch.no_grad():
            return TS2EPConverter(script, (torch.rand(2, *shape),)).convert()
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"{where} is TorchScript that can't be turned into modules: {last_line(error)}",
            "give the PyTorch model that it was made from, or a .pt2 of it",
        ) from error


def _vet(data: bytes, where: str) -> None:
    reader, names = records(data, where)
    for name in names:
        if not name.endswith(".py"):
            continue
        try:
            tree = ast.parse(reader.get_record(name).decode("utf-8"))
        except (RuntimeError, ValueError, SyntaxError, RecursionError) as error:
            raise UnsafeModel(
                f"{where} was not loaded: its code {name} can't be read: {last_line(error)}"
            ) from error
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                _check_attribute(node, f"{where} ({name})")


def _check_attribute(node: ast.Attribute, where: str) -> None:
    """Operators are called as torch.NAME, ops.NAMESPACE.NAME, or as a method of any value."""
    text = ast.unparse(node)
    inner = node.value
    space = (
        inner.attr
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "ops"
        else ""
    )
    foreign = (space and space not in _OPERATORS) or text.startswith("__torch__.torch.classes.")
    if node.attr in _TOUCH_FILES or foreign:
        raise UnsafeModel(f"{where} was not loaded: it uses {text}, which is not an operator on tensors")


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs and warns about TorchScript's age and about sizes that it can't reason about."""
    logs = [logging.getLogger(name) for name in _LOGGERS]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
