"""Explain the ratio of two latencies: how many times faster, or not faster and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgeprune.records import Plan, Target
from edgeprune.runtimes import NodeTime
from edgeprune.speedup import FASTER, UNDECIDED, Ratio, verdict

# What ONNX Runtime takes for itself on a Zen 4 core: for each call, and for each node that does next to nothing
# (0.2 to 0.7 us). On a slower machine it is more, so that the share below is a lower bound.
CALL_S = 5e-6
NODE_S = 0.5e-6
OVERHEAD = 1 / 3
# Where a machine's facts are unknown. Multiply-accumulates that a core does while it fetches one byte: 57 GMAC/s in
# fp32 convolutions against 29 GB/s in a copy on that core. And a bandwidth that any machine of today has.
BALANCE = 2.0
BANDWIDTH = 10e9
MOSTLY = 0.5
# Changing the memory layout between kernels that want different ones is worth a word from this share of the time on.
REORDERED = 0.05
# And going to and fro between precisions from this share on: the runtime has no kernel for the layers between.
CONVERTED = 0.15
CONVERTERS = ("QuantizeLinear", "DequantizeLinear", "Cast")


@dataclass(frozen=True)
class Clues:
    """What is known about a cut and about the machine that timed it; defaults mean unknown.

    channels: layer -> kept channels. multiple_of: of the channels on that machine. nodes: of the compressed file, as
    they ran. latency_s: median of the compressed model. nothing_removed: as for `speed.verdict`. balance:
    multiply-accumulates per byte, and bandwidth: bytes per second of that machine.
    """

    macs_before: int = 0
    macs_after: int = 0
    channels: Mapping[str, int] = field(default_factory=dict)
    multiple_of: int = 1
    nodes: Sequence[NodeTime] = ()
    latency_s: float = 0.0
    nothing_removed: bool = False
    balance: float = BALANCE
    bandwidth: float = BANDWIDTH


def clues(
    plan: Plan, machine: Target, precision: str, *, nodes: Sequence[NodeTime] = (), latency_s: float = 0.0
) -> Clues:
    """Collect the clues of a cut."""
    peak = machine.peak.get(precision, 0.0)
    widths = ("out_channels", "out_features")
    channels = {name: a[key] for name, a in plan.attributes.items() for key in widths if key in a}
    return Clues(
        macs_before=plan.macs_before,
        macs_after=plan.macs,
        channels=channels,
        multiple_of=machine.multiple_of.get(precision, 1),
        nodes=nodes,
        latency_s=latency_s,
        balance=peak / 2.0 / machine.bandwidth if peak > 0 and machine.bandwidth > 0 else BALANCE,
        bandwidth=machine.bandwidth or BANDWIDTH,
    )


def words(ratio: Ratio, place: str, clues: Clues | None = None, *, unsure: bool = False) -> str:
    """One sentence without a full stop: "1.62x faster (95 % interval 1.58-1.66) on local x86_64, 1 thread".

    Args:
        unsure: other work got in the way, so that an interval with 1 in it says nothing, however narrow it is.
    """
    clues = clues or Clues()
    interval = f"(95 % interval {ratio.low:.2f}-{ratio.high:.2f}) on {place}"
    same_work = 0 < clues.macs_before == clues.macs_after
    found = verdict(ratio, same_work=same_work, nothing_removed=clues.nothing_removed, unsure=unsure)
    if found == FASTER:
        return f"{ratio.value:.2f}x faster {interval}{_though(ratio, clues)}"
    if found == UNDECIDED:
        return (
            f"NOT shown to be faster: {ratio.value:.2f}x {interval}: inconclusive, because the timings differ more "
            "than the models; measure again on an idle machine or with more iterations"
        )
    return (
        f"NOT faster: {ratio.value:.2f}x the speed of the dense model {interval}, because {_because(clues)}"
    )


def reasons(clues: Clues) -> list[str]:
    """Why a cut does not pay, as far as the clues tell: little work gone, alignment, small layers, memory."""
    found = (_converted(clues), _little_gone(clues), _unaligned(clues), _overhead(clues), _memory(clues))
    return [reason for reason in found if reason]


def _because(clues: Clues) -> str:
    return (
        ", and ".join(reasons(clues))
        or "of something that the counts and the times of its layers do not tell"
    )


def _though(ratio: Ratio, clues: Clues) -> str:
    if not 0 < clues.macs_after < clues.macs_before:
        return ""
    promised = clues.macs_before / clues.macs_after
    why = reasons(clues)
    if not why or math.log(ratio.value) >= MOSTLY * math.log(promised):
        return ""
    return f", though it does {promised:.1f}x less work: " + ", and ".join(why)


def _converted(clues: Clues) -> str:
    total = sum(n.seconds for n in clues.nodes)
    spent = sum(n.seconds for n in clues.nodes if n.op in CONVERTERS)
    if total <= 0 or spent < CONVERTED * total:
        return ""
    return (
        f"{100 * spent / total:.0f} % of the time goes into converting between precisions: not all layers run in "
        "the file's own on this machine (runtime_int8_macs says how much does)"
    )


def _little_gone(clues: Clues) -> str:
    if clues.macs_before <= 0 or clues.macs_after < 0.95 * clues.macs_before:
        return ""
    share = 1.0 - clues.macs_after / clues.macs_before
    return (
        f"only {100 * share:.1f} % of the multiply-accumulates are gone" if share > 0 else "no work is gone"
    )


def _unaligned(clues: Clues) -> str:
    off = {name: kept for name, kept in clues.channels.items() if kept % clues.multiple_of}
    if not off:
        return ""
    name, kept = next(iter(off.items()))
    total = sum(n.seconds for n in clues.nodes)
    reordering = sum(n.seconds for n in clues.nodes if n.op.startswith("Reorder"))
    share = reordering / total if total > 0 else 0.0
    more = (
        f"; {100 * share:.0f} % of the time goes into changing the memory layout"
        if share >= REORDERED
        else ""
    )
    return (
        f"{len(off)} of {len(clues.channels)} cut layers keep channels that are not a multiple of "
        f"{clues.multiple_of} ({name} keeps {kept}), which this machine fills up or runs on a slow path{more}"
    )


def _overhead(clues: Clues) -> str:
    total = clues.latency_s or sum(n.seconds for n in clues.nodes)
    share = (CALL_S + NODE_S * len(clues.nodes)) / total if clues.nodes and total > 0 else 0.0
    if share < OVERHEAD:
        return ""
    return (
        f"its layers are too small: at least {100 * min(share, 1.0):.0f} % of the time is what the runtime takes "
        f"to be called and to go through {len(clues.nodes)} nodes, which no cut of channels shortens"
    )


def _memory(clues: Clues) -> str:
    total = sum(n.seconds for n in clues.nodes)
    busy = [n for n in clues.nodes if n.bytes >= MOSTLY * clues.bandwidth * n.seconds]
    bound = [n for n in busy if n.macs < clues.balance * n.bytes]
    share = sum(n.seconds for n in bound) / total if total > 0 else 0.0
    if share < MOSTLY:
        return ""
    return (
        f"it is bound by memory: {100 * share:.0f} % of the time goes into nodes that do fewer than "
        f"{clues.balance:.2g} multiply-accumulates for each byte that they move"
    )
