"""What a network computes on some images, operator by operator, to be asked about images that changed in a window.

A convolution sees a few pixels. Where an image changes in a small square, most of what the first layers made of it
stays; so their outputs are kept, and only the part that the change can have reached is computed anew, with the same
operators. Where that part is most of the image, and behind operators that mix all positions, everything is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from edgeprune.attacks._tape_rules import RULES, UNARY, Look, Rule, Slot, Window, name_of
from edgeprune.models import logits

# Operators that a network's work is counted by.
WEIGHTED = ("convolution", "addmm", "mm")


class Unfit(Exception):
    """The network does something that can't be written down; says what."""


class Stale(Exception):
    """Something is needed that was not kept: write down what the network computes on the kept images again."""


@dataclass(frozen=True, eq=False)
class _Step:
    """One operator. args, keywords: with a Slot for each value that depends on the images. outs: of its tensors."""

    func: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    reads: tuple[int, ...]
    outs: tuple[int | None, ...]
    several: bool

    @cached_property
    def rule(self) -> Rule | None:
        """How to compute a part of what it makes, where only that is wanted."""
        alone = self.outs[0] is not None and not any(slot is not None for slot in self.outs[1:])
        return RULES.get(name_of(self.func)) if alone else None

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...] | None:
        """Arguments that are slots, with their slots; None when some are inside of lists or keywords."""
        found = tuple((i, arg.number) for i, arg in enumerate(self.args) if isinstance(arg, Slot))
        inside = sum(isinstance(leaf, Slot) for leaf in tree_leaves((self.args, self.keywords)))
        return found if inside == len(found) else None


class Tape:
    """A network on some images, which can be asked about changes of them."""

    def __init__(self, steps: Sequence[_Step], values: list[Tensor], answer: int) -> None:
        """values: of each slot; slot 0 are the images. answer: the slot of the logits."""
        self.steps, self.values, self.answer = steps, values, answer
        # Where only operators without a neighbourhood read a value, it is never read again.
        self.kept = {slot for step in steps if name_of(step.func) not in UNARY for slot in step.reads}
        self.kept.add(0)
        self._looks: _Looks | None = None
        self._rows: Tensor | None = None
        self._end = answer
        self._stale: set[int] = set()

    def look(self, images: Tensor, window: Window, until: int | None = None) -> Tensor:
        """The logits of images that differ from the kept ones in the window alone: (N, K).

        Args:
            until: a slot of `places`: that value is asked for instead, and nothing behind it is computed.

        Raises:
            Stale: as it says.
        """
        self._write()
        looks = _Looks(self.values, {0: (images[:, :, window.rows, window.columns], window)}, self._stale)
        wanted = self.answer if until is None else until
        for step in self.steps:
            used = [slot for slot in step.reads if slot in looks.changes]
            if used:
                _again(step, looks, used)
            if wanted in step.outs:
                break
        self._looks, self._end = looks, wanted
        return looks.whole(wanted)

    def keep(self, rows: Tensor) -> None:
        """From now on the images of the last look are the kept ones, in these rows (int64)."""
        self._rows = rows

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Kept slots (N, C, H, W) in their order behind which nothing reads what was before them."""
        last = {slot: i for i, step in enumerate(self.steps) for slot in step.reads}
        alive, found = {0}, []
        for i, step in enumerate(self.steps):
            alive = {slot for slot in (*alive, *step.outs) if slot is not None and last.get(slot, -1) > i}
            slot = min(alive, default=0)
            if len(alive) == 1 and slot in step.outs and slot in self.kept and self.values[slot].ndim == 4:
                found.append(slot)
        return tuple(found)

    def share(self) -> float:
        """How much of the work of its weighted operators the last look did again, in [0, 1]."""
        works = self.works().values()
        whole = sum(work for work, _ in works)
        return sum(again for _, again in works) / whole if whole else 1.0

    def works(self) -> dict[int, tuple[float, float]]:
        """Slot of each weighted operator, in their order -> its work, and how much of that the last look did again."""
        found = {}
        for step in self.steps:
            slot = step.outs[0]
            if name_of(step.func) not in WEIGHTED or slot is None:
                continue
            weights = max((arg.numel() for arg in step.args if isinstance(arg, Tensor)), default=0)
            size = self.values[slot].shape
            # Each output of a channel reads as many weights as the channel has.
            work, again = float(size.numel() * weights / size[1]), 0.0
            if self._looks is not None and slot in self._looks.changes:
                window = self._looks.changes[slot][1]
                again = work if window is None else work * window.area / (size[-2] * size[-1])
            found[slot] = (work, again)
        return found

    def _write(self) -> None:
        """Put what is kept of the last look in its place; what it computed everywhere is not worth that."""
        if self._looks is not None and self._rows is not None and len(self._rows):
            for slot, (new, window) in self._looks.changes.items():
                if window is None:
                    self._stale.add(slot)
                elif slot in self.kept and slot not in self._stale:
                    self.values[slot][:, :, window.rows, window.columns][self._rows] = new[self._rows]
            if self._end != self.answer:
                # What is behind the end of that look was not computed.
                self._stale.update(range(self._end + 1, len(self.values)))
        self._looks = self._rows = None


@dataclass(frozen=True, eq=False)
class _Looks(Look):
    """What is known during one look. changes: slot -> what is new, and where; everywhere when there is no window.

    stale: slots whose `values` are of other images.
    """

    values: list[Tensor]
    changes: dict[int, tuple[Tensor, Window | None]]
    stale: set[int]
    wholes: dict[int, Tensor] = field(default_factory=dict)

    def window(self, slot: int) -> Window | None:
        return self.changes[slot][1] if slot in self.changes else None

    def shape(self, slot: int) -> torch.Size:
        return self.values[slot].shape

    def changed(self, slot: int) -> bool:
        return slot in self.changes

    def within(self, slot: int, window: Window) -> Tensor:
        if slot not in self.changes:
            return self._known(slot)[:, :, window.rows, window.columns]
        new, own = self.changes[slot]
        if own == window:
            return new
        if own is None:
            return new[:, :, window.rows, window.columns]
        part = self._known(slot)[:, :, window.rows, window.columns].clone()
        both = own.meet(window)
        if both is not None:
            inside, mine = both.seen_from(window), both.seen_from(own)
            part[:, :, inside.rows, inside.columns] = new[:, :, mine.rows, mine.columns]
        return part

    def whole(self, slot: int) -> Tensor:
        if slot not in self.changes:
            return self._known(slot)
        new, own = self.changes[slot]
        if own is None:
            return new
        if slot not in self.wholes:
            found = self._known(slot).clone()
            found[:, :, own.rows, own.columns] = new
            self.wholes[slot] = found
        return self.wholes[slot]

    def _known(self, slot: int) -> Tensor:
        if slot in self.stale:
            raise Stale
        return self.values[slot]


def _again(step: _Step, looks: _Looks, used: Sequence[int]) -> None:
    """One operator on what has changed: in a window where there is a rule for it, or else on everything."""
    first = step.outs[0]
    if step.rule is not None and first is not None and all(looks.window(slot) for slot in used):
        found = step.rule(step.func, step.args, step.keywords, looks, looks.shape(first))
        if found is not None:
            looks.changes[first] = found
            return
    if step.places is not None:
        args = list(step.args)
        for place, slot in step.places:
            args[place] = looks.whole(slot)
        made = step.func(*args, **step.keywords)
    else:

        def fill(arg: Any) -> Any:
            return looks.whole(arg.number) if isinstance(arg, Slot) else arg

        made = step.func(*tree_map(fill, step.args), **tree_map(fill, step.keywords))
    for slot, tensor in zip(step.outs, made if step.several else (made,), strict=True):
        if slot is not None:
            looks.changes[slot] = (tensor, None)


def record(network: nn.Module, images: Tensor) -> Tape:
    """Write down what a network computes on images.

    Args:
        network: pixels (N, C, H, W) to logits (N, K), in evaluation mode.
        images: float (N, C, H, W); they are kept.

    Raises:
        Unfit: it changes tensors in place in a way that is not followed, or its answer does not depend on the images.
        ModelError: it fails.
    """
    images = images.clone()
    recorder = _Recorder(images)
    with torch.no_grad(), recorder:
        answer = logits(network, images)
    if id(answer) not in recorder.slots:
        raise Unfit("the answer does not depend on the images")
    steps = _needed(recorder.steps, recorder.slots[id(answer)])
    read = {slot for step in steps for slot in step.reads}
    trimmed = [replace(s, outs=(s.outs[0], *(o if o in read else None for o in s.outs[1:]))) for s in steps]
    return Tape(trimmed, recorder.values, recorder.slots[id(answer)])


def _needed(steps: Sequence[_Step], answer: int) -> list[_Step]:
    wanted, kept = {answer}, []
    for step in reversed(steps):
        if wanted.intersection(step.outs):
            kept.append(step)
            wanted.update(step.reads)
    return kept[::-1]


class _Recorder(TorchDispatchMode):
    """Gives every tensor that depends on the images a slot. Tensors stay alive, so that ids stay theirs."""

    def __init__(self, images: Tensor) -> None:
        TorchDispatchMode.__init__(self)
        self.slots: dict[int, int] = {id(images): 0}
        self.values: list[Tensor] = [images]
        self.steps: list[_Step] = []
        self.alive: list[Any] = [images]
        self.memory: set[int] = {images.untyped_storage().data_ptr()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reads = tuple(dict.fromkeys(self.slots[id(t)] for t in given if id(t) in self.slots))
        if not reads:
            answer = func(*args, **kwargs)
            self.alive.append(answer)
            return answer
        fixed: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(self._slot, (tuple(args), kwargs))
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs, (fixed, reads))
        answer = func(*args, **kwargs)
        tensors = tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)
        outs = tuple(self._new(t) if isinstance(t, Tensor) else None for t in tensors)
        self.steps.append(_Step(func, fixed[0], fixed[1], reads, outs, isinstance(answer, (tuple, list))))
        return answer

    def _in_place(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], known: Any) -> Any:
        """An operator such as `relu_`, written down as `relu`: the tensor that it changes has a new value."""
        target: Any = args[0]
        name = func._schema.name.removeprefix("aten::")
        pure = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), func._overloadname, None)
        slot = self.slots.get(id(target)) if isinstance(target, Tensor) else None
        if pure is None or slot is None or not name.endswith("_") or name.endswith("__"):
            raise Unfit(f"{name} changes a tensor in place")
        place = target.untyped_storage().data_ptr()
        others = [v for v in self.alive if isinstance(v, Tensor) and v is not target]
        if any(other.untyped_storage().data_ptr() == place for other in others):
            raise Unfit(f"{name} changes a tensor in place that is seen elsewhere")
        self.values[slot] = target.clone()
        answer = func(*args, **kwargs)
        outs = (self._new(target),)
        (fixed, keywords), reads = known
        self.steps.append(_Step(pure, fixed, keywords, reads, outs, False))
        return answer

    def _slot(self, arg: Any) -> Any:
        return Slot(self.slots[id(arg)]) if isinstance(arg, Tensor) and id(arg) in self.slots else arg

    def _new(self, tensor: Tensor) -> int:
        place = tensor.untyped_storage().data_ptr()
        # A view is kept as a tensor of its own: what is written into one must not appear in the other.
        self.values.append(tensor.clone() if place in self.memory else tensor)
        self.memory.add(place)
        self.slots[id(tensor)] = len(self.values) - 1
        self.alive.append(tensor)
        return len(self.values) - 1
