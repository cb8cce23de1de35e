"""What is said about speed, and the reason for each way in which a cut can fail to pay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeprune.measure.why_not_faster import BALANCE, BANDWIDTH, Clues, clues, reasons, words
from edgeprune.records import Plan, Target
from edgeprune.runtimes._base import NodeTime
from edgeprune.speedup import Ratio

FASTER, SLOWER, SAME, UNSURE = (
    Ratio(1.62, 1.58, 1.66, 40),
    Ratio(0.91, 0.90, 0.93, 40),
    Ratio(1.004, 1.001, 1.008, 40),
    Ratio(1.05, 0.9, 1.3, 40),
)

HERE = "local x86_64, 1 thread"


def node(seconds: float, macs: int = 0, moved: int = 0, op: str = "Conv") -> NodeTime:
    return NodeTime("n", op, seconds, macs, moved)


def test_a_gain_is_said_with_its_interval_and_place() -> None:
    assert words(FASTER, HERE) == "1.62x faster (95 % interval 1.58-1.66) on local x86_64, 1 thread"


def test_a_loss_without_clues_claims_no_reason() -> None:
    assert words(SLOWER, HERE) == (
        "NOT faster: 0.91x the speed of the dense model (95 % interval 0.90-0.93) on local x86_64, 1 thread, because "
        "of something that the counts and the times of its layers do not tell"
    )


def test_a_difference_that_two_runs_of_one_file_can_have_is_no_gain() -> None:
    assert words(SAME, HERE).startswith("NOT faster: 1.00x")


def test_a_small_gain_without_less_work_is_no_gain() -> None:
    ratio = Ratio(1.03, 1.02, 1.04, 40)
    assert words(ratio, HERE, Clues(macs_before=1000, macs_after=900)).startswith("1.03x faster")
    same = words(ratio, HERE, Clues(macs_before=1000, macs_after=1000))
    assert same.startswith("NOT faster: 1.03x") and same.endswith("because no work is gone")


def test_noise_is_called_inconclusive_but_where_nothing_was_removed() -> None:
    text = words(UNSURE, HERE)
    assert words(UNSURE, HERE, Clues(nothing_removed=True)).startswith("NOT faster: 1.05x")
    assert text.startswith("NOT shown to be faster: 1.05x (95 % interval 0.90-1.30)")
    assert "inconclusive" in text


def test_little_work_gone_is_a_reason() -> None:
    assert words(SLOWER, HERE, Clues(macs_before=1000, macs_after=980)).endswith(
        "because only 2.0 % of the multiply-accumulates are gone"
    )
    assert reasons(Clues(macs_before=1000, macs_after=1000)) == ["no work is gone"]
    assert reasons(Clues(macs_before=1000, macs_after=500)) == []


def test_channels_off_the_grid_are_a_reason() -> None:
    known = Clues(channels={"a": 16, "b": 11, "c": 22}, multiple_of=16)
    assert reasons(known) == [
        "2 of 3 cut layers keep channels that are not a multiple of 16 (b keeps 11), which this machine fills up or "
        "runs on a slow path"
    ]
    moving = replace(known, nodes=(node(90e-6, 10**6), node(10e-6, 0, 1, "ReorderOutput")))
    assert reasons(moving)[0].endswith("; 10 % of the time goes into changing the memory layout")
    assert reasons(replace(known, multiple_of=1)) == []
    assert reasons(replace(known, channels={"a": 16, "b": 32})) == []


def test_small_layers_are_a_reason() -> None:
    small = Clues(nodes=[node(1e-6)] * 30, latency_s=40e-6)
    assert reasons(small) == [
        "its layers are too small: at least 50 % of the time is what the runtime takes to be called and to go through "
        "30 nodes, which no cut of channels shortens"
    ]
    assert reasons(replace(small, latency_s=400e-6)) == []


def test_memory_is_a_reason_when_bytes_and_not_sums_take_the_time() -> None:
    """1 MB in 100 us is 10 GB/s; 100,000 multiply-accumulates are a tenth of one for each byte."""
    bound = Clues(nodes=[node(100e-6, 100_000, 1_000_000), node(50e-6, 10**7, 1_000_000)])
    assert reasons(bound) == [
        "it is bound by memory: 67 % of the time goes into nodes that do fewer than 2 multiply-accumulates for each "
        "byte that they move"
    ]
    slow_not_bound = Clues(nodes=[node(1000e-6, 100_000, 1_000_000)])  # 1 GB/s: it waits for something else
    assert reasons(slow_not_bound) == []


def test_going_to_and_fro_between_precisions_is_a_reason() -> None:
    between = [NodeTime("c", "Conv", 70e-6, 10**7, 0), NodeTime("q", "QuantizeLinear", 20e-6, 0, 0)]
    found = reasons(Clues(nodes=[*between, NodeTime("d", "DequantizeLinear", 10e-6, 0, 0)]))
    assert len(found) == 1
    assert found[0].startswith("30 % of the time goes into converting between precisions")
    assert reasons(Clues(nodes=between[:1])) == []


def test_a_gain_far_below_what_the_cut_promises_says_why() -> None:
    known = Clues(macs_before=4000, macs_after=1000, channels={"a": 3}, multiple_of=4)
    small = Ratio(1.1, 1.05, 1.15, 40)
    assert words(small, HERE, known).startswith(
        "1.10x faster (95 % interval 1.05-1.15) on local x86_64, 1 thread, though"
    )
    assert "4.0x less work: 1 of 1 cut layers" in words(small, HERE, known)
    assert "though" not in words(Ratio(2.5, 2.4, 2.6, 40), HERE, known)
    assert "though" not in words(small, HERE, replace(known, channels={}))


def test_clues_come_from_the_plan_and_from_the_machine_that_was_timed() -> None:
    plan = Plan(
        {},
        {},
        {"a": {"out_channels": 12, "in_channels": 3}, "n": {"num_features": 12}, "f": {"out_features": 7}},
        {},
        1,
        50,
        2,
        100,
    )
    machine = Target("m", "M", "local", "onnxruntime", ("fp32",), {"fp32": 8}, 1, 10e9, {"fp32": 40e9}, 20)
    known = clues(plan, machine, "fp32", nodes=(node(1.0),), latency_s=2.0)
    assert known.channels == {"a": 12, "f": 7}
    assert (known.macs_before, known.macs_after, known.multiple_of, known.latency_s) == (100, 50, 8, 2.0)
    assert known.balance == pytest.approx(2.0)  # 20 G multiply-accumulates a second over 10 GB/s
    assert known.bandwidth == 10e9
    unknown = clues(plan, replace(machine, peak={}, bandwidth=0.0), "fp32")
    assert (unknown.balance, unknown.bandwidth) == (BALANCE, BANDWIDTH)
