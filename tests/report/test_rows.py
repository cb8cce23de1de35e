"""What the rows of a report say: changes in each metric's own way, and never more than was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import HERE, html_of, reading, sample

from edgeprune.records import METRICS, Reading
from edgeprune.report import stage
from edgeprune.report.rows import change, comparison, facts, number_in, provenance


@pytest.mark.parametrize(
    ("metric", "before", "after", "words", "better"),
    [
        ("macs", 41.2e6, 20.6e6, "-50.0 %", True),
        ("size", 1000, 1201, "+20.1 %", False),
        ("size", 1000, 1000, "unchanged", None),
        ("params", 1000000, 999990, "-<0.1 %", True),
        ("peak_memory", 1, 100, "+9900 %", False),
        ("peak_memory", 0, 5, "-", False),
        ("clean_accuracy", 0.921, 0.9168, "-0.42 pp", False),
        ("clean_accuracy", 0.90, 0.91, "+1.00 pp", True),
        ("clean_accuracy", 0.90, 0.90, "0.00 pp", None),
        ("latency_p99", 0.0162, 0.01, "1.62x, uncertain", None),
        ("peak_memory", 1000, 995, "-0.5 %", None),
        ("peak_memory", 1000, 980, "-2.0 %", True),
        ("latency_p50", None, 0.01, "-", None),
    ],
)
def test_a_change_is_said_in_the_metric_s_own_way(
    metric: str, before: float | None, after: float | None, words: str, better: bool | None
) -> None:
    assert change(reading(metric, before, "dense"), reading(metric, after)) == (words, better)


@pytest.mark.parametrize(
    ("before", "after", "words", "better"),
    [
        (0.0162, 0.01, "1.62x faster", True),
        (0.01, 0.0131, "1.31x slower", False),
        (0.01, 0.01002, "unchanged", None),
    ],
)
def test_a_time_with_an_interval_gives_a_factor(
    before: float, after: float, words: str, better: bool | None
) -> None:
    exact = (reading("latency_p50", v, spread=(v, v)) for v in (before, after))
    assert change(*exact) == (words, better)


def test_speed_inside_the_noise_is_no_speed() -> None:
    dense = reading("latency_p50", 0.0100, "dense", spread=(0.0098, 0.0102))
    apart = reading("latency_p50", 0.0096, spread=(0.0095, 0.0097))
    touching = reading("latency_p50", 0.0096, spread=(0.0094, 0.0098))
    assert change(dense, apart) == ("1.04x faster", True)
    assert change(dense, touching) == ("within noise", None)


def test_a_small_gain_of_a_file_that_does_the_same_work_is_none() -> None:
    dense = reading("latency_p50", 0.0103, "dense", spread=(0.0103, 0.0103))
    same = {"same_work": True}
    after = reading("latency_p50", 0.0100, spread=(0.0100, 0.0100))
    assert change(dense, after) == ("1.03x faster", True)
    assert change(dense, replace(after, conditions=same)) == ("unchanged", None)
    assert change(dense, replace(after, value=0.0102, spread=(0.0102, 0.0102))) == ("unchanged", None)
    much = replace(after, value=0.0090, spread=(0.0090, 0.0090), conditions=same)
    assert change(dense, much) == ("1.14x faster", True)
    removed = replace(much, conditions={**same, "nothing_removed": True})
    assert change(dense, removed) == ("unchanged", None), "what nothing was removed from is not faster"


def test_speed_of_models_timed_in_turn_is_their_paired_ratio() -> None:
    dense = reading("latency_p50", 0.010, "dense", spread=(0.005, 0.020))

    def after(low: float, value: float, high: float) -> Reading:
        paired = {"speedup": {"value": value, "low": low, "high": high, "pairs": 20}}
        return reading("latency_p50", 0.005, spread=(0.0025, 0.010), conditions=paired)

    assert change(dense, after(1.5, 1.6, 1.7)) == ("1.60x faster", True)
    assert change(dense, after(0.7, 0.8, 0.9)) == ("1.25x slower", False)
    assert change(dense, after(0.9, 1.2, 1.4)) == ("within noise", None)
    assert change(dense, after(1.0005, 1.001, 1.002)) == ("unchanged", None)
    assert change(dense, after(2.0, 1.0, 3.0)) == ("within noise", None)  # no interval: the two times decide


def test_an_accuracy_inside_the_noise_is_neither_better_nor_worse() -> None:
    dense = reading("clean_accuracy", 0.92, "dense", spread=(0.91, 0.93))
    assert change(dense, reading("clean_accuracy", 0.915, spread=(0.905, 0.925))) == ("-0.50 pp", None)
    assert change(dense, reading("clean_accuracy", 0.895, spread=(0.885, 0.905))) == ("-2.50 pp", False)


def test_an_estimate_is_never_compared_with_a_measurement() -> None:
    dense = reading("latency_p50", 0.02, "dense", where="estimated: roofline of jetson-orin-nano")
    after = reading("latency_p50", 0.01)
    report = replace(sample(), before=(dense,), after=(after,))
    (row,) = comparison(report)
    assert row.change == "not comparable"
    assert row.how == f"dense estimated: roofline of jetson-orin-nano; compressed measured on {HERE}"
    assert any("can't be compared" in line for line in stage.summary_lines(report))


def test_rows_come_in_the_order_of_the_metrics_with_the_reason_of_what_is_missing() -> None:
    rows = comparison(sample())
    order = list(METRICS)
    assert [order.index(r.metric) for r in rows] == sorted(order.index(r.metric) for r in rows)
    energy = next(r for r in rows if r.metric == "energy")
    assert (energy.dense, energy.compressed, energy.how) == ("-", "-", "not available: no power sensor")


def test_a_metric_of_a_later_version_is_shown_as_it_is(tmp_path: Path) -> None:
    new = Reading("entropy", 2.5, "bit", 1, None, "counted", "compressed", {})
    report = replace(sample(), after=(*sample().after, new))
    assert comparison(report)[-1].compressed == "2.5 bit"
    assert "2.5 bit" in html_of(report, tmp_path)


def test_facts_are_flat_and_leave_out_what_is_empty() -> None:
    table = {
        "a": {"b": {"c": 1}},
        "d": [1, 2],
        "e": "",
        "f": None,
        "g": [],
        "h": False,
        "i": 49332224.0,
        "j": 0.0872637,
        "k": [{"url": "fake:a", "facts": {"cores": 2}}, {"url": "local"}],
    }
    assert facts(table) == [
        ("a.b.c", "1"),
        ("d", "1, 2"),
        ("h", "False"),
        ("i", "49332224"),
        ("j", "0.087264"),
        ("k.1.url", "fake:a"),
        ("k.1.facts.cores", "2"),
        ("k.2.url", "local"),
    ]


def test_what_was_read_under_attack_says_of_which_attack_and_how_far() -> None:
    used = {"attack": "standard", "eps": "8/255", "norm": "Linf"}
    read = Reading("robust_accuracy", 0.3, "fraction", 100, (0.2, 0.4), "local torch", "dense", used)
    assert provenance(read) == "measured on local torch, under standard, Linf 8/255"
    sure = replace(read, where="computed: interval bounds", conditions={"eps": "1/255", "norm": "Linf"})
    assert provenance(sure) == "computed: interval bounds, within Linf 1/255"
    assert provenance(replace(read, conditions={})) == "measured on local torch"


@pytest.mark.parametrize("value", [None, True, "8", -1, float("inf"), float("nan"), 10**400, [8]])
def test_a_layer_s_number_that_is_none_is_left_out(value: Any) -> None:
    assert number_in({"channels_before": value}, "channels_before") is None
    assert number_in({"channels_before": 8}, "channels_before") == 8.0
