"""Which part of an operator's output a change of its input in a window can reach, and that part computed anew."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Where the change reaches so much of an output, all of it is computed.
MOST_OF_IT = 0.8


@dataclass(frozen=True)
class Slot:
    """The place of a value that depends on the images."""

    number: int


@dataclass(frozen=True)
class Window:
    """Positions of an activation (N, C, H, W): rows top to bottom, columns left to right, ends not counted."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.right)

    @property
    def area(self) -> int:
        """How many positions it has."""
        return (self.bottom - self.top) * (self.right - self.left)

    def hull(self, other: Window) -> Window:
        """The smallest window that holds both."""
        return Window(
            min(self.top, other.top), max(self.bottom, other.bottom),
            min(self.left, other.left), max(self.right, other.right),
        )  # fmt: skip

    def meet(self, other: Window) -> Window | None:
        """What both have, or None."""
        both = Window(
            max(self.top, other.top), min(self.bottom, other.bottom),
            max(self.left, other.left), min(self.right, other.right),
        )  # fmt: skip
        return both if both.top < both.bottom and both.left < both.right else None

    def seen_from(self, other: Window) -> Window:
        """The same positions, counted from the corner of another window."""
        return Window(
            self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left
        )


class Look(ABC):
    """What rules may ask of a look at changed images."""

    @abstractmethod
    def changed(self, slot: int) -> bool:
        """Whether the value has changed."""

    @abstractmethod
    def window(self, slot: int) -> Window | None:
        """Where it has changed; None: nowhere or everywhere."""

    @abstractmethod
    def shape(self, slot: int) -> torch.Size:
        """Of the whole value."""

    @abstractmethod
    def within(self, slot: int, window: Window) -> Tensor:
        """The value as it is now, in a window."""


Found = tuple[Tensor, Window]
# (operator, arguments, keywords, look, shape of the output) -> the new part and where it is; None: compute everything.
Rule = Callable[[Any, Sequence[Any], Mapping[str, Any], Look, torch.Size], Found | None]


def name_of(func: Any) -> str:
    """The operator without namespace and overload: "relu"."""
    return str(func._schema.name).rpartition("::")[2]


def _unary(
    func: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, _: torch.Size
) -> Found | None:
    """Each entry by itself, or with numbers of its channel."""
    window = look.window(args[0].number) if isinstance(args[0], Slot) else None
    if window is None or any(isinstance(arg, Slot) for arg in args[1:]):
        return None
    made = func(look.within(args[0].number, window), *args[1:], **keywords)
    return (made[0] if isinstance(made, tuple) else made), window


def _entrywise(
    func: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, shape: torch.Size
) -> Found | None:
    """Entries of several values with each other."""
    window = _hull(args, look)
    pieces = [_piece(arg, window, look, shape) for arg in args]
    if window is None or any(piece is None for piece in pieces):
        return None
    return func(*pieces, **keywords), window


def _joined(
    func: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, shape: torch.Size
) -> Found | None:
    """Channels of several values side by side."""
    window = _hull(args[0], look)
    if window is None or (args[1] if len(args) > 1 else 0) not in (1, -3):
        return None
    pieces = [_piece(arg, window, look, shape) for arg in args[0]]
    return None if any(piece is None for piece in pieces) else (func(pieces, *args[1:], **keywords), window)


def _hull(args: Sequence[Any], look: Look) -> Window | None:
    found: Window | None = None
    for arg in args:
        if isinstance(arg, Slot) and look.changed(arg.number):
            window = look.window(arg.number)
            if window is None:
                return None
            found = window if found is None else found.hull(window)
    return found


def _piece(arg: Any, window: Window | None, look: Look, shape: torch.Size) -> Any:
    """An argument in the window; what has no positions as it is; None where that can't be said."""
    if window is None or not isinstance(arg, (Slot, Tensor)):
        return arg
    size = look.shape(arg.number) if isinstance(arg, Slot) else arg.shape
    if len(size) == 4 and size[2:] == shape[2:]:
        if isinstance(arg, Slot):
            return look.within(arg.number, window)
        return arg[:, :, window.rows, window.columns]
    # A number for each channel, or one for all; values of that shape that change are everywhere changed.
    alike = len(size) == 0 or (len(size) in (3, 4) and tuple(size[-2:]) == (1, 1))
    return arg if alike and isinstance(arg, Tensor) else None


def _convolved(
    _: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, shape: torch.Size
) -> Found | None:
    given, weight, bias, stride, padding, dilation, transposed, _outputs, groups = args
    if transposed or len(shape) != 4 or not isinstance(given, Slot) or isinstance(weight, Slot) or keywords:
        return None
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    part = _reached(look, given.number, shape, (reach, stride, padding), 0.0)
    if part is None:
        return None
    return functional.conv2d(part[0], weight, bias, stride, 0, dilation, groups), part[1]


def _pooled(
    func: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, shape: torch.Size
) -> Found | None:
    kernel = _two(args[1])
    stride = _two(args[2]) if len(args) > 2 and args[2] else kernel
    padding = _two(args[3]) if len(args) > 3 else [0, 0]
    largest = name_of(func) == "max_pool2d_with_indices"
    # Of an average behind a padded border the number of summands differs.
    if len(args) > 4 or keywords or (any(padding) and not largest):
        return None
    part = _reached(look, args[0].number, shape, (kernel, stride, padding), -torch.inf)
    if part is None:
        return None
    pool = functional.max_pool2d if largest else functional.avg_pool2d
    return pool(part[0], kernel, stride), part[1]


def _reached(
    look: Look, slot: int, shape: torch.Size, geometry: tuple[Sequence[int], ...], outside: float
) -> Found | None:
    """The input, padded, of the outputs that a change of it can reach, and where these are.

    The outputs' window has the same size wherever the change lies: operators are prepared for a size once.
    """
    window = look.window(slot)
    if window is None:
        return None
    height, width = look.shape(slot)[2:]
    reach, stride, padding = (list(numbers) for numbers in geometry)
    spans = [(window.top, window.bottom), (window.left, window.right)]
    out = [
        _outputs(*span, size, (r, s, p))
        for span, size, r, s, p in zip(spans, shape[2:], reach, stride, padding, strict=True)
    ]
    found = Window(*out[0], *out[1])
    if found.area >= MOST_OF_IT * shape[2] * shape[3]:
        return None
    ends: list[tuple[int, int]] = [
        (first * s - p, (last - 1) * s - p + r)
        for (first, last), r, s, p in zip(out, reach, stride, padding, strict=True)
    ]
    (top, bottom), (left, right) = ends
    inside = Window(max(top, 0), min(bottom, height), max(left, 0), min(right, width))
    pads = (inside.left - left, right - inside.right, inside.top - top, bottom - inside.bottom)
    part = look.within(slot, inside)
    return (functional.pad(part, pads, value=outside) if any(pads) else part), found


def _outputs(first: int, last: int, size: int, geometry: tuple[int, int, int]) -> tuple[int, int]:
    """Which outputs, of `size`, read inputs `first` to `last` along one axis."""
    reach, stride, padding = geometry
    count = min((last - first + reach - 2) // stride + 1, size)
    # The first output whose last input is not before the change.
    begin = -((reach - 1 - padding - first) // stride)
    begin = max(0, min(begin, size - count))
    return begin, begin + count


def _sliced(
    func: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, shape: torch.Size
) -> Found | None:
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given, dim, start, _end, step = (*args, *defaults[len(args) - 1 :])
    window = look.window(given.number)
    if window is None or keywords or dim not in (1, 2, 3):
        return None
    if dim == 1:
        return func(look.within(given.number, window), *args[1:]), window
    size = look.shape(given.number)[dim]
    begin = 0 if start is None else min(start + size if start < 0 else start, size)
    first, last = (window.top, window.bottom) if dim == 2 else (window.left, window.right)
    low = max(0, -((begin - first) // step))
    high = min(shape[dim], -((begin - last) // step))
    if low >= high:
        low, high = (0, 1) if low == 0 else (low - 1, low)
    rows = slice(begin + low * step, begin + (high - 1) * step + 1)
    if dim == 2:
        inside = Window(rows.start, rows.stop, window.left, window.right)
        return look.within(given.number, inside)[:, :, ::step], Window(low, high, window.left, window.right)
    inside = Window(window.top, window.bottom, rows.start, rows.stop)
    return look.within(given.number, inside)[:, :, :, ::step], Window(window.top, window.bottom, low, high)


def _padded(
    func: Any, args: Sequence[Any], keywords: Mapping[str, Any], look: Look, _: torch.Size
) -> Found | None:
    window, pads = look.window(args[0].number), [*args[1], 0, 0, 0, 0, 0, 0]
    if window is None or keywords or min(pads) < 0 or pads[6] or pads[7]:
        return None
    left, top = pads[0], pads[2]
    made = func(look.within(args[0].number, window), [0, 0, 0, 0, pads[4], pads[5]], *args[2:])
    return made, Window(window.top + top, window.bottom + top, window.left + left, window.right + left)


def _two(numbers: Any) -> list[int]:
    given = [numbers] if isinstance(numbers, int) else list(numbers)
    return given * 2 if len(given) == 1 else given


UNARY = (
    "relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid",
    "gelu", "leaky_relu", "elu", "neg", "abs", "exp", "clone", "detach", "alias", "_to_copy", "native_batch_norm",
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
)  # fmt: skip
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "maximum", "minimum"), _entrywise),
    "cat": _joined,
    "convolution": _convolved,
    "max_pool2d_with_indices": _pooled,
    "avg_pool2d": _pooled,
    "slice": _sliced,
    "constant_pad_nd": _padded,
}
