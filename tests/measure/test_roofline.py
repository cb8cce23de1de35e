"""Estimates: the roofline on worked examples, always labelled, with what the formula is wrong by where it can tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx_files import save, write_net

from edgeprune import targets
from edgeprune.devices.local import Local
from edgeprune.errors import ModelError, UsageError
from edgeprune.measure import roofline
from edgeprune.onnx_graph.work import Work, work_of
from edgeprune.recipe.schema import MeasureTable
from edgeprune.records import Target
from edgeprune.runtimes._base import NodeTime

ROOF = roofline.Roof(peak=100e9, bandwidth=10e9, overhead_s=1e-6)


@pytest.fixture
def board() -> Target:
    target = targets.target("raspberry-pi-4")
    return replace(
        target, peak={"fp32": 100e9, "int8": 200e9}, bandwidth=10e9, setup={"layer_overhead_s": 1e-6}
    )


def test_a_layer_takes_its_arithmetic_or_its_traffic_whichever_is_longer() -> None:
    assert ROOF.seconds(500_000, 1000) == pytest.approx(10e-6 + 1e-6)
    assert ROOF.seconds(500_000, 200_000) == pytest.approx(20e-6 + 1e-6)
    assert ROOF.seconds(0, 0) == pytest.approx(1e-6)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_work_never_takes_less(macs: int, moved: int, more_macs: int, more_moved: int) -> None:
    assert ROOF.seconds(macs + more_macs, moved + more_moved) >= ROOF.seconds(macs, moved)


def test_the_work_of_a_file_is_counted_with_its_layers_fused(tmp_path: Path) -> None:
    rows = {row.name: row for row in work_of(write_net(tmp_path / "net.onnx", 16))}
    assert set(rows) == {"stem", "block.conv", "block.add", "pool", "fc"}
    assert rows["stem"] == Work("stem", "Conv", 16 * 64 * 27, 3 * 64 + 16 * 27 + 16 * 64)
    assert rows["block.conv"].macs == 16 * 64 * 16 * 9
    assert rows["block.add"] == Work("block.add", "Add", 0, 16 * 64), (
        "of a residual sum only the other branch is read"
    )
    assert rows["fc"].macs == 160


def test_an_estimate_is_the_sum_of_its_layers_and_says_that_it_is_one(board: Target) -> None:
    layers = [Work("conv", "Conv", 500_000, 250), Work("pool", "MaxPool", 0, 50_000)]
    reading = roofline.estimate(layers, board, "fp32")
    assert reading.value == pytest.approx(10e-6 + 20e-6 + 2e-6)
    assert (reading.metric, reading.where, reading.n) == (
        "latency_p50",
        "estimated: roofline of raspberry-pi-4",
        0,
    )
    assert reading.spread is None and reading.conditions["validation"].startswith("none")
    assert reading.conditions["share"] == pytest.approx(
        {"arithmetic": 10 / 32, "memory": 20 / 32, "overhead": 2 / 32}
    )


def test_int8_moves_a_quarter_and_computes_at_its_own_peak(board: Target) -> None:
    layers = [Work("conv", "Conv", 500_000, 250), Work("pool", "MaxPool", 0, 50_000)]
    assert roofline.estimate(layers, board, "int8").value == pytest.approx(5e-6 + 5e-6 + 2e-6)


def test_what_the_formula_is_wrong_by_is_its_interval(board: Target) -> None:
    fit = roofline.Validation(error=0.4, low=0.8, high=2.5, network=1.3, n=40, where="local x86_64")
    reading = roofline.estimate([Work("conv", "Conv", 500_000, 250)], board, "fp32", validation=fit)
    assert reading.value is not None and reading.spread == pytest.approx(
        (0.8 * reading.value, 2.5 * reading.value)
    )
    assert reading.conditions["validation"] == {
        "error": 0.4, "low": 0.8, "high": 2.5, "network": 1.3, "n": 40, "where": "local x86_64",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [({"peak": {}}, "do not say its peak in fp32"), ({"bandwidth": 0.0}, "do not say its bandwidth")],
)
def test_without_the_facts_there_is_no_estimate(board: Target, change: dict[str, object], said: str) -> None:
    reading = roofline.estimate([Work("conv", "Conv", 1, 1)], replace(board, **change), "fp32")
    assert reading.value is None and said in reading.conditions["why"]
    assert reading.where.startswith("estimated")


def test_layers_that_were_timed_tell_how_well_a_roof_fits() -> None:
    """Twice as long as the roof says, all of them: the error is a half, both ratios are 2."""
    nodes = [
        NodeTime(f"n{i}", "Conv", 2 * ROOF.seconds(m, 1000), m, 1000)
        for i, m in enumerate(range(10**6, 9 * 10**6, 10**6))
    ]
    fit = roofline.fitted(nodes, ROOF, "here")
    assert fit is not None
    assert (fit.error, fit.low, fit.high, fit.network, fit.n) == pytest.approx((0.5, 2.0, 2.0, 2.0, 8))


def test_layers_that_are_all_overhead_tell_nothing() -> None:
    assert roofline.fitted([NodeTime("n", "Conv", 1e-6, 100, 100)] * 20, ROOF, "here") is None
    assert roofline.fitted([NodeTime("n", "Conv", 1e-3, 10**6, 100)] * 4, ROOF, "here") is None


def test_the_roof_of_this_machine_is_measured() -> None:
    roof = roofline.roof_of(Local(), MeasureTable(iterations=10, warmup=1, seconds=1.0))
    assert 1e8 < roof.peak < 1e14
    assert 1e7 < roof.bandwidth < 1e13
    assert 0 <= roof.overhead_s < 1e-3


def test_what_can_not_be_estimated_is_refused(tmp_path: Path, board: Target) -> None:
    with pytest.raises(UsageError, match="fp64"):
        roofline.estimate([Work("conv", "Conv", 1, 1)], board, "fp64")
    with pytest.raises(UsageError, match="no layers"):
        roofline.estimate([], board, "fp32")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        roofline.estimate(tmp_path / "bad.onnx", board, "fp32")
    node = helper.make_node("MatMul", ["input", "other"], ["logits"], "product")
    with pytest.raises(ModelError, match="'product'"):
        work_of(save(tmp_path / "net.onnx", [node], {}, [1, 4], [1, 4]))


def test_a_file_is_estimated_for_every_target_that_has_the_facts(tmp_path: Path) -> None:
    file = write_net(tmp_path / "net.onnx")
    for name in targets.names("targets"):
        target = targets.target(name)
        reading = roofline.estimate(file, target, "fp32")
        known = target.peak.get("fp32", 0) > 0 and target.bandwidth > 0
        assert (reading.value is not None) == known
        assert reading.value is None or 1e-7 < reading.value < 1.0
