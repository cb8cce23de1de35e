"""Asking a network about images that differ from earlier ones in one window, for less than it costs to ask anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.attacks._onnx_session import OnnxInference
from edgeprune.attacks._tape import Stale, Tape, Unfit, record
from edgeprune.attacks._tape_rules import Window
from edgeprune.errors import ModelError
from edgeprune.models import Logits, Replicas, full

# Of a larger window little is saved, and most of the tape would have to be written anew.
LARGEST = 0.3
# A multiply-accumulate in a window takes so many times as long as one of a whole image where something swift answers;
# and of the whole image's time more than this is not worth the trouble.
DEARER, WORTH = 4.0, 0.9
# Between the answers of the tape and of the network, relative to the largest logit.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Way:
    """How a look at a window is had: on the tape or anew; and behind which slot of the tape by a tail, if at all."""

    windowed: bool
    slot: int = 0
    tail: Logits | None = None


@dataclass
class Asker:
    """Asks about changed images, and remembers what the network made of the images that were kept.

    answers: pixels to logits. network: the same where it is one in torch, else None, and nothing is remembered.
    swift: what gives nearly the same answers in less time, if there is anything.
    """

    answers: Logits
    network: nn.Module | None = None
    swift: OnnxInference | None = None

    def __post_init__(self) -> None:
        """Nothing is known yet."""
        self._tapes: list[Tape] = []
        self._windowed = self._swiftly = False
        # Sides of a window -> what costs least.
        self._ways: dict[tuple[int, int], _Way] = {}
        self._tails: dict[int, Logits | None] = {}

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
            if isinstance(self.network, Replicas):
                count = max(1, self.network.count(len(kept)))
                self._tapes = self.network.each(_parts(kept, count), record)
            else:
                self._tapes = [record(self.network, kept)]
            again, anew = self._again(tried, window), self.answers(tried)
        except (Unfit, ModelError):
            again, anew = kept.new_full((), torch.nan), kept.new_zeros(())
        if _alike(again, anew):
            return True
        self.network, self._tapes, self._windowed = None, [], False
        return False

    def _anew(self, tried: Tensor) -> Tensor:
        """The answer about whole images, as `swift` gives it where that is there."""
        self._windowed, self._swiftly = False, self.swift is not None
        return self.answers(tried) if self.swift is None else full(self.swift(tried))

    def _pays(self, window: Window, tried: Tensor) -> bool:
        """Whether less is done for a window of this size, as the first one of it has shown."""
        way = self._ways.get(_sides(window))
        return _small(window, tried) and (way is None or way.windowed)

    def _again(self, tried: Tensor, window: Window) -> Tensor:
        parts = list(zip(self._tapes, _parts(tried, len(self._tapes)), strict=True))
        way = self._ways.get(_sides(window), _Way(True))

        def work(_: object, part: tuple[Tape, Tensor]) -> Tensor:
            with torch.no_grad():
                if way.tail is None:
                    return full(part[0].look(part[1], window))
                return full(way.tail(part[0].look(part[1], window, way.slot)))

        self._swiftly = False
        if isinstance(self.network, Replicas) and len(parts) > 1:
            found = self.network.each(parts, work)
        else:
            found = [work(None, part) for part in parts]
        answer = torch.cat(found)
        if self.swift is not None and _sides(window) not in self._ways:
            self._ways[_sides(window)] = chosen = self._cheapest(self._tapes[0], self.swift)
            if chosen.tail is not None and not _alike(self._again(tried, window), answer):
                self._ways[_sides(window)] = _Way(False)
        return answer

    def _cheapest(self, tape: Tape, swift: OnnxInference) -> _Way:
        """What costs least for windows like the one that all of the tape was just asked about."""
        works = tape.works()
        whole = sum(work for work, _ in works.values())
        costs: list[tuple[float, int]] = [(DEARER * sum(again for _, again in works.values()), 0)]
        for slot in tape.places:
            before = sum(again for made, (_, again) in works.items() if made <= slot)
            behind = sum(work for made, (work, _) in works.items() if made > slot)
            costs.append((DEARER * before + behind, slot))
        for cost, slot in sorted(costs):
            if cost > WORTH * whole:
                break
            if not slot:
                return _Way(True)
            if slot not in self._tails:
                self._tails[slot] = swift.behind(tape, slot)
            tail = self._tails[slot]
            if tail is not None:
                return _Way(True, slot, tail)
        return _Way(False)


def _alike(one: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max()) or 1.0
    return bool((one - other).abs().max() <= TOLERANCE * scale)


def _sides(window: Window) -> tuple[int, int]:
    return window.bottom - window.top, window.right - window.left


def _small(window: Window, x: Tensor) -> bool:
    height, width = x.shape[-2:]
    return window.bottom - window.top <= LARGEST * height and window.right - window.left <= LARGEST * width


def _parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    return rows.tensor_split(max(1, count))[: count or 0]
