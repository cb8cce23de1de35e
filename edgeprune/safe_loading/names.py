"""Checks of what torch uses unchecked: names that it writes into Python source, and strides that crash it.

torch.fx and torch.export put the paths of modules, parameters and buffers into generated code without escaping them.
"""

import re
from typing import Any

from torch import nn

from edgeprune.errors import UnsafeModel, UnsupportedModel

# From 32768 on, the gradient of a convolution ends the process (torch 2.13, oneDNN).
LARGEST_STRIDE = 4096

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


def check_name(name: Any, where: str) -> None:
    """Refuse what can't be the name of a parameter, a buffer or a module."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UnsafeModel(
            f"{where} was not loaded: it names a tensor or a module {short(name)}; "
            "accepted: letters, digits, '_', '-' and '.', because names become Python source",
            "rename it in the network's class, and save or export it again",
        )


def check_names(module: nn.Module, where: str) -> None:
    """Refuse a network with a module, a parameter or a buffer whose name can't be one, before source is made of it."""
    for part in module.modules():
        for table in (part._modules, part._parameters, part._buffers):
            for name in table:
                check_name(name, where)


def check_strides(module: nn.Module, where: str) -> None:
    """Refuse a network with a stride that torch can't compute with."""
    for path, part in module.named_modules():
        stride = getattr(part, "stride", 1)
        steps = stride if isinstance(stride, (tuple, list)) else (stride,)
        if any(isinstance(step, int) and step > LARGEST_STRIDE for step in steps):
            raise UnsupportedModel(
                f"{where}: {path} has the stride {short(stride)}, accepted are at most {LARGEST_STRIDE}"
            )


def short(value: Any) -> str:
    """The value for a message, cut off when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
