"""Asking a network about images that differ from earlier ones in one window, for less than it costs to ask anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.nn.asking import Logits
from edgeprune.nn.lanes import Lanes
from edgeprune.nn.perturb import full
from edgeprune.nn.tape import Stale, Tape, Unfit, record
from edgeprune.nn.tape_rules import Window

__all__ = ["Asker", "Window"]

# Of a larger window little is saved, and most of the tape would have to be written anew.
LARGEST = 0.3
# Of the multiply-accumulates: where more must be done again, whole images cost less where something swift answers,
# for each of those that is done in a window takes longer than one that is done whole.
MOST_OF_IT = 0.3
# Between the answers of the tape and of the network, relative to the largest logit.
TOLERANCE = 1e-4


@dataclass
class Asker:
    """Asks about changed images, and remembers what the network made of the images that were kept.

    answers: pixels to logits. network: the same where it is one in torch, else None, and nothing is remembered.
    swift: what gives nearly the same answers in less time, if there is anything.
    """

    answers: Logits
    network: nn.Module | None = None
    swift: Logits | None = None

    def __post_init__(self) -> None:
        """Nothing is known yet."""
        self._tapes: list[Tape] = []
        self._windowed = self._swiftly = False
        # Sides of a window -> whether a change there reaches so little that it pays to know the rest.
        self._paying: dict[tuple[int, int], bool] = {}

    def look(self, kept: Tensor, tried: Tensor, window: Window | None) -> Tensor:
        """The logits of images that differ from the kept ones in a window, or anywhere: (N, K).

        Args:
            kept: (N, C, H, W), as `keep` was told. tried: like `kept`.
        """
        with torch.no_grad():
            self._windowed = self.network is not None and window is not None and self._pays(window, tried)
            if not self._windowed or window is None:
                return self._anew(tried)
            if self._tapes:
                try:
                    return self._again(tried, window)
                except Stale:
                    self._tapes = []
            return self._again(tried, window) if self._written(kept, tried, window) else self._anew(tried)

    def sure(self, tried: Tensor, rows: Tensor, answer: Tensor) -> Tensor:
        """The answer with these rows, bool (N,), as the network itself gives them."""
        if (self._windowed or self._swiftly) and bool(rows.any()):
            answer = answer.clone()
            with torch.no_grad():
                answer[rows] = self.answers(tried[rows])
        return answer

    def keep(self, rows: Tensor) -> None:
        """From now on these rows, bool (N,), of the images last asked about are kept."""
        if not self._windowed and bool(rows.any()):
            self._tapes = []
        for tape, part in zip(self._tapes, _parts(rows, len(self._tapes)), strict=True):
            tape.keep(part.nonzero().squeeze(1))

    def forget(self) -> None:
        """From now on it is about other images."""
        self._tapes = []

    def _written(self, kept: Tensor, tried: Tensor, window: Window) -> bool:
        """Whether the network fits; then tapes of the kept images are there."""
        assert self.network is not None
        try:
            if isinstance(self.network, Lanes):
                count = max(1, self.network.count(len(kept)))
                self._tapes = self.network.each(_parts(kept, count), record)
            else:
                self._tapes = [record(self.network, kept)]
            again, anew = self._again(tried, window), self.answers(tried)
        except (Unfit, ModelError):
            again, anew = kept.new_full((), torch.nan), kept.new_zeros(())
        scale = float(anew.abs().max()) or 1.0
        if bool((again - anew).abs().max() <= TOLERANCE * scale):
            return True
        self.network, self._tapes, self._windowed = None, [], False
        return False

    def _anew(self, tried: Tensor) -> Tensor:
        """The answer about whole images, as `swift` gives it where that is there."""
        self._windowed, self._swiftly = False, self.swift is not None
        return self.answers(tried) if self.swift is None else full(self.swift(tried))

    def _pays(self, window: Window, tried: Tensor) -> bool:
        """Whether less is done for a window of this size, as the first one of it has shown."""
        return _small(window, tried) and self._paying.get(_sides(window), True)

    def _again(self, tried: Tensor, window: Window) -> Tensor:
        parts = list(zip(self._tapes, _parts(tried, len(self._tapes)), strict=True))

        def work(_: object, part: tuple[Tape, Tensor]) -> Tensor:
            with torch.no_grad():
                return full(part[0].look(part[1], window))

        self._swiftly = False
        if isinstance(self.network, Lanes) and len(parts) > 1:
            found = self.network.each(parts, work)
        else:
            found = [work(None, part) for part in parts]
        if self.swift is not None and _sides(window) not in self._paying:
            self._paying[_sides(window)] = self._tapes[0].share() <= MOST_OF_IT
        return torch.cat(found)


def _sides(window: Window) -> tuple[int, int]:
    return window.bottom - window.top, window.right - window.left


def _small(window: Window, x: Tensor) -> bool:
    height, width = x.shape[-2:]
    return window.bottom - window.top <= LARGEST * height and window.right - window.left <= LARGEST * width


def _parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    return rows.tensor_split(max(1, count))[: count or 0]
