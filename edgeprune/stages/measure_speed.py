"""What two latencies say in plain words: how many times faster, or not faster and why not.

Light: works on numbers that were measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgeprune.runtimes import NodeTime

# Two sessions of the very same file differ by up to this factor from one process to the next: where their memory
# lands decides. Less than that is no gain, however narrow the interval of one process is.
SAME = 1.02
# Wider than this, an interval round 1 says that the machine was too busy to tell.
WIDE = 1.05
# A node below this does next to nothing: what is timed is the runtime handing over from node to node.
FLOOR_S = 3e-6
# Multiply-accumulates that a core does while it fetches one byte (57 GMAC/s in ONNX Runtime's fp32 convolutions and
# 29 GB/s in a copy, one Zen 4 core); a node with fewer for each of its bytes waits for memory.
BALANCE = 2.0
MOSTLY = 0.5


@dataclass(frozen=True)
class Ratio:
    """How many times faster the compressed model is: the median of n paired ratios, and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Clues:
    """What is known about a cut and about the machine that timed it; a field left at its default says nothing.

    macs_before, macs_after: counted. channels: layer -> channels that it kept. multiple_of: what the channels of a
    layer should be a multiple of on the machine that was timed. nodes: of the compressed file, as they ran.
    latency_s: the compressed model's median. balance: multiply-accumulates per byte, see BALANCE.
    """

    macs_before: int = 0
    macs_after: int = 0
    channels: Mapping[str, int] = field(default_factory=dict)
    multiple_of: int = 1
    nodes: Sequence[NodeTime] = ()
    latency_s: float = 0.0
    balance: float = BALANCE


def balance(peak: float, bandwidth: float) -> float:
    """Multiply-accumulates per byte of a machine, from operations/s and bytes/s; BALANCE where they are unknown (0)."""
    return peak / 2.0 / bandwidth if peak > 0 and bandwidth > 0 else BALANCE


def words(ratio: Ratio, place: str, clues: Clues | None = None) -> str:
    """One sentence without a full stop: "1.62x faster (95 % interval 1.58-1.66) on local x86_64, 1 thread".

    Args:
        place: where and how it was timed, as in "local x86_64, 1 thread".
        clues: for the reason, when it is not faster or by far less than the cut should give.
    """
    clues = clues or Clues()
    interval = f"(95 % interval {ratio.low:.2f}-{ratio.high:.2f}) on {place}"
    if ratio.low > 1.0 and ratio.value >= SAME:
        return f"{ratio.value:.2f}x faster {interval}{_though(ratio, clues)}"
    if ratio.low <= 1.0 <= ratio.high and ratio.high / ratio.low > WIDE:
        return (
            f"NOT shown to be faster: {ratio.value:.2f}x {interval}: inconclusive, because the timings differ more than "
            "the models; measure again on an idle machine or with more iterations"
        )
    return f"NOT faster: {ratio.value:.2f}x the speed of the dense model {interval}, because {_because(clues)}"


def reasons(clues: Clues) -> list[str]:
    """Why a cut does not pay, as far as the clues tell: little work gone, alignment, small layers, memory."""
    found = (_little_gone(clues), _unaligned(clues), _overhead(clues), _memory(clues))
    return [reason for reason in found if reason]


def _because(clues: Clues) -> str:
    return ", and ".join(reasons(clues)) or "of something that the counts and the times of its layers do not tell"


def _though(ratio: Ratio, clues: Clues) -> str:
    """The reason why a cut gives less than half of the gain that its multiply-accumulates promise, on a log scale."""
    if not 0 < clues.macs_after < clues.macs_before:
        return ""
    promised = clues.macs_before / clues.macs_after
    why = reasons(clues)
    if not why or math.log(ratio.value) >= MOSTLY * math.log(promised):
        return ""
    return f", though it does {promised:.1f}x less work: " + ", and ".join(why)


def _little_gone(clues: Clues) -> str:
    if clues.macs_before <= 0 or clues.macs_after < 0.95 * clues.macs_before:
        return ""
    share = 1.0 - clues.macs_after / clues.macs_before
    return f"only {100 * share:.1f} % of the multiply-accumulates are gone"


def _unaligned(clues: Clues) -> str:
    off = {name: kept for name, kept in clues.channels.items() if kept % clues.multiple_of}
    if not off:
        return ""
    name, kept = next(iter(off.items()))
    return (
        f"{len(off)} of {len(clues.channels)} cut layers keep channels that are not a multiple of {clues.multiple_of} "
        f"({name} keeps {kept}), which this machine pads or runs on its slow path"
    )


def _overhead(clues: Clues) -> str:
    total = clues.latency_s or sum(n.seconds for n in clues.nodes)
    if not clues.nodes or total <= 0:
        return ""
    between = max(0.0, total - sum(n.seconds for n in clues.nodes))
    share = (between + sum(min(n.seconds, FLOOR_S) for n in clues.nodes)) / total
    if share < MOSTLY:
        return ""
    return (
        f"its layers are too small: about {100 * min(share, 1.0):.0f} % of the time goes into passing from one of its "
        f"{len(clues.nodes)} nodes to the next, which no cut of channels shortens"
    )


def _memory(clues: Clues) -> str:
    total = sum(n.seconds for n in clues.nodes)
    bound = [n for n in clues.nodes if n.bytes > 0 and n.seconds > 2 * FLOOR_S and n.macs < clues.balance * n.bytes]
    share = sum(n.seconds for n in bound) / total if total > 0 else 0.0
    if share < MOSTLY:
        return ""
    return (
        f"it is bound by memory: {100 * share:.0f} % of the time goes into nodes that do fewer than {clues.balance:.2g} "
        "multiply-accumulates for each byte that they move"
    )
