"""What a pickle may do with each global that model files use for data, and with a network's class.

Every entry judges the arguments too: even a harmless function is only called the way torch.save itself calls it.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.safe_loading.pickle_interpreter import Made, Pairs, Permit

_TENSOR_CALLS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_NUMPY_SCALAR = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
_NUMPY_CODES = ("?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d")
_TABLES = {"_parameters": nn.Parameter, "_buffers": torch.Tensor, "_modules": nn.Module}
_BARE = vars(nn.Module())
_HOOKS = frozenset(key for key, value in _BARE.items() if isinstance(value, dict)) - _TABLES.keys()


def class_permit(cls: type, *, vouched: bool) -> Permit:
    """What may be done with a class: a network's is made empty and given attributes; a vouched-for one is free.

    A network's constructor never runs: with arguments out of a file some constructors read or fetch other files.
    """
    if issubclass(cls, nn.Module):
        return Permit(new=_no_arguments, build=partial(_module_state, cls))
    return Permit(call=_agree, new=_agree, build=_agree) if vouched else Permit()


def data_objects(names: Sequence[str]) -> list[Any]:
    """The objects of `names` that torch's restricted unpickler does not accept by default."""
    found: list[Any] = []
    for name in names:
        if name in _BEYOND_TORCH:
            module, _, attribute = _BEYOND_TORCH[name].rpartition(".")
            found.append((getattr(importlib.import_module(module), attribute), name))
    if "numpy.dtype" in names:
        import numpy as np

        found.extend({type(np.dtype(code)) for code in _NUMPY_CODES})
    return found


def _agree(_: Any) -> str:
    return ""


def _no_arguments(arguments: tuple[Any, ...]) -> str:
    return "arguments" if arguments else ""


def _scalars(arguments: tuple[Any, ...]) -> str:
    flat = [v for a in arguments for v in (a if isinstance(a, (tuple, list)) else [a])]
    return (
        ""
        if all(v is None or isinstance(v, (bool, int, float, str)) for v in flat)
        else "arguments that are not plain values"
    )


def _one_list(arguments: tuple[Any, ...]) -> str:
    good = not arguments or (len(arguments) == 1 and isinstance(arguments[0], (list, Pairs)))
    return "" if good else "odd arguments"


def _module_state(cls: type, state: Any) -> str:
    """A network's attributes may be data; they may not stand in for its methods, and hooks must be empty."""
    if not isinstance(state, Pairs):
        return "a state that is not a dict"
    for key, value in state.items:
        empty = isinstance(value, (Made, Pairs)) and not value.items
        if reason := _attribute(cls, key, value, empty=empty):
            return reason
    return ""


def _attribute(cls: type, key: Any, value: Any, *, empty: bool) -> str:
    if not isinstance(key, str) or key.startswith("__"):
        return f"the attribute {key!r}"
    if key == "_compiled_call_impl" and value is not None:
        return "another method for its call"
    if callable(getattr(cls, key, None)):
        return f"the attribute {key!r} in place of its method"
    return f"functions in {key}" if key in _HOOKS and not empty else ""


def fault_in(loaded: Any) -> str:
    """What is wrong with any network among the objects that were made; "" when there is nothing."""
    pending, seen = [loaded], {}
    while pending:
        value = pending.pop()
        if isinstance(value, (type, str, bytes, int, float)) or value is None or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module) and (reason := _module_fault(value)):
            return f"a {type(value).__name__} with {reason}"
        if isinstance(value, torch.Tensor) and value._backward_hooks:
            return "a tensor with functions in its hooks"
        if isinstance(value, dict):
            pending.extend((*value.keys(), *value.values()))
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        pending.extend(getattr(value, "__dict__", {}).values())
    return ""


def _module_fault(module: nn.Module) -> str:
    own = vars(module)
    for key, value in own.items():
        empty = isinstance(value, dict) and not value
        if reason := _attribute(type(module), key, value, empty=empty):
            return reason
    for key, usual in _BARE.items():
        value = own.get(key, usual)
        kind = dict if isinstance(usual, dict) else object if usual is None else type(usual)
        content = value.values() if key in _TABLES and isinstance(value, dict) else ()
        if not isinstance(value, kind) or any(
            v is not None and not isinstance(v, _TABLES[key]) for v in content
        ):
            return f"something else than {key} should hold"
    return ""


def _plain_state(state: Any) -> str:
    good = isinstance(state, Pairs) and all(
        isinstance(key, str) and not key.startswith("__") for key, _ in state.items
    )
    return "" if good else "a state that is not plain"


def _tensor(arguments: tuple[Any, ...]) -> str:
    for value in arguments:
        if isinstance(value, Made) and value.of == "collections.OrderedDict" and value.items:
            return "hooks"
        if isinstance(value, Pairs) and _plain_state(value):
            return "a state that is not plain"
        if isinstance(value, tuple) and not all(isinstance(v, int) for v in value):
            return "a state that is not plain"
    return ""


def _tensor_with_attributes(arguments: tuple[Any, ...]) -> str:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state)."""
    if len(arguments) != 4 or not isinstance(arguments[2], tuple):
        return "odd arguments"
    function, kind, inner, state = arguments
    functions = tuple(f"torch._utils.{name}" for name in _TENSOR_CALLS)
    if getattr(function, "name", "") not in functions or getattr(kind, "name", "") not in _TENSOR_TYPES:
        return "another function than a tensor's"
    return _tensor(inner) or _plain_state(state)


def _latin1(arguments: tuple[Any, ...]) -> str:
    good = len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1"
    return "" if good else "another codec"


def _number_type(arguments: tuple[Any, ...]) -> str:
    good = (
        arguments
        and isinstance(arguments[0], str)
        and re.fullmatch(r"[?biuf]\d*", arguments[0])
        and not _scalars(arguments[1:])
    )
    return "" if good else "a type that is no number's"


def _number(arguments: tuple[Any, ...]) -> str:
    return (
        ""
        if [getattr(v, "of", "") for v in arguments] == ["numpy.dtype", "_codecs.encode"]
        else "odd arguments"
    )


def _number_type_state(state: Any) -> str:
    return _scalars(state) if isinstance(state, tuple) else "a state that is not plain"


def _storages() -> list[str]:
    names = [
        f"torch.{kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ]
    return [*names, "torch.storage.UntypedStorage", "torch.storage.TypedStorage"]


_BEYOND_TORCH: Mapping[str, str] = {
    "argparse.Namespace": "argparse.Namespace",
    "numpy.dtype": "numpy.dtype",
    "timm.layers.format.Format": "timm.layers.format.Format",
    **{name: "numpy._core.multiarray.scalar" for name in _NUMPY_SCALAR},
}
DATA: Mapping[str, Permit] = {
    **{name: Permit() for name in _storages()},
    **{str(value): Permit() for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **{f"torch._utils.{name}": Permit(call=_tensor) for name in _TENSOR_CALLS},
    **{name: Permit() for name in _TENSOR_TYPES},
    "torch._tensor._rebuild_from_type_v2": Permit(call=_tensor_with_attributes),
    "torch.Size": Permit(call=_scalars),
    "torch.device": Permit(call=_scalars),
    "collections.OrderedDict": Permit(call=_one_list, build=_plain_state),
    "collections.Counter": Permit(call=_one_list),
    "builtins.set": Permit(call=_one_list),
    "argparse.Namespace": Permit(new=_no_arguments, build=_plain_state),
    "timm.layers.format.Format": Permit(call=_scalars),
    "_codecs.encode": Permit(call=_latin1),
    "numpy.dtype": Permit(call=_number_type, build=_number_type_state),
    **{name: Permit(call=_number) for name in _NUMPY_SCALAR},
}
