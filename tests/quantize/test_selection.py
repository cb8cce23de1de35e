"""Which layers go back to float, which candidate is best, and which precision ships: worked examples."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.quantities import limit
from edgeprune.quantize.evaluation import best, judged, sqnr_db
from edgeprune.quantize.int8 import fewest
from edgeprune.quantize.job import Judgement
from edgeprune.quantize.selection import Candidate, missed_limits, pick, seconds_of
from edgeprune.records import Reading


def losing(loss: float, sqnr: float = 20.0, right: tuple[bool, ...] = ()) -> Judgement:
    return Judgement(None, None, 1.0 - loss, sqnr, loss, right)


class Attempts:
    """The loss of a file is the sum of what each layer that is still quantized costs."""

    def __init__(self, costs: Mapping[str, float]) -> None:
        self.costs, self.asked = costs, list[tuple[str, ...]]()

    def __call__(self, skip: tuple[str, ...]) -> Judgement:
        self.asked.append(skip)
        return losing(sum(cost for layer, cost in self.costs.items() if layer not in skip))


def test_only_the_layer_that_costs_goes_back() -> None:
    attempts = Attempts({"a": 0.001, "b": 0.2, "c": 0.002, "d": 0.001})
    layers, judgement = fewest({"a": 0.1, "b": 0.9, "c": 0.2, "d": 0.05}, attempts, 0.01)
    assert layers == ("b",)
    assert judgement.loss == pytest.approx(0.004)
    assert attempts.asked == [("b",)]


def test_a_sensitive_layer_that_costs_nothing_is_quantized_again() -> None:
    # By its error alone "loud" would go first, but the loss is that of "quiet".
    attempts = Attempts({"loud": 0.0, "quiet": 0.05, "rest": 0.0})
    assert fewest({"loud": 0.9, "quiet": 0.5, "rest": 0.1}, attempts, 0.01)[0] == ("quiet",)


def test_where_nothing_helps_the_smallest_loss_is_given_and_one_layer_stays_quantized() -> None:
    costs = {"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.3}
    attempts = Attempts(costs)
    layers, judgement = fewest({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, attempts, 0.01)
    assert layers == ("a", "b", "c") and judgement.loss == pytest.approx(0.3)
    assert max(map(len, attempts.asked)) == 3


@given(st.lists(st.floats(0.0, 0.1), min_size=2, max_size=40), st.floats(0.0, 0.2))
def test_no_layer_that_went_back_could_have_stayed_and_few_files_are_tried(
    costs: list[float], tolerance: float
) -> None:
    by_name = {f"layer{i}": cost for i, cost in enumerate(costs)}
    attempts = Attempts(by_name)
    layers, judgement = fewest(by_name, attempts, tolerance)
    assert len(attempts.asked) <= 2 * math.ceil(math.log2(len(costs) + 1)) + len(layers) + 2
    if judgement.loss <= tolerance:
        least = sum(sorted(costs)[:1])
        assert least <= tolerance or len(layers) < len(costs)
        for layer in layers:
            if len(layers) > 1:
                assert attempts(tuple(n for n in layers if n != layer)).loss > tolerance
    else:
        assert min(costs) > tolerance


def bits(wrong: int, of: int = 200) -> tuple[bool, ...]:
    return tuple(i >= wrong for i in range(of))


def test_the_candidate_that_is_right_more_often_is_best_when_a_test_can_tell() -> None:
    # 9 images lost and none gained: McNemar's p is 0.004.
    fewer, more = losing(0.0, 30.0, bits(15)), losing(0.0, 20.0, bits(6))
    assert best([fewer, more], 0.01) == 1


def test_among_candidates_that_no_test_can_tell_apart_the_output_error_decides() -> None:
    # 3 images lost and none gained: p is 0.25.
    assert best([losing(0.0, 30.0, bits(9)), losing(0.0, 20.0, bits(6))], 0.01) == 0


def test_a_candidate_that_loses_too_much_is_never_preferred_for_its_output_error() -> None:
    assert best([losing(0.02, 30.0, bits(4)), losing(0.0, 20.0, bits(3))], 0.01) == 1


def test_without_labels_the_smallest_output_error_is_best() -> None:
    assert best([losing(0.005, 25.0), losing(0.004, 26.0), losing(0.001, 24.0)], 0.01) == 1


def test_output_errors_are_decibels() -> None:
    logits = np.array([[3.0, 4.0]], np.float32)
    assert sqnr_db(logits, logits + np.array([[0.3, 0.4]], np.float32)) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(logits, logits) == math.inf
    assert sqnr_db(logits, logits * np.float32("nan")) == -math.inf


def test_a_quarter_of_the_images_is_judged_on_where_there_are_many() -> None:
    assert [judged(n) for n in (1, 100, 1000, 1024, 2048, 100_000)] == [1, 100, 512, 256, 512, 512]


def timed(seconds: float, **more: float) -> Reading:
    return Reading("latency_p50", seconds, "s", 50, None, "local x86_64", "x", {"threads": 1, **more})


def test_wall_times_count_unless_other_work_ran() -> None:
    still = {"fp32": timed(2e-3, cpu_p50=1.9e-3, contention=1.01), "int8": timed(1e-3, cpu_p50=0.9e-3)}
    assert seconds_of(still) == {"fp32": 2e-3, "int8": 1e-3}
    busy = {**still, "int8": timed(3e-3, cpu_p50=0.9e-3, contention=3.3)}
    assert seconds_of(busy) == {"fp32": 1.9e-3, "int8": 0.9e-3}
    assert seconds_of({**busy, "fp16": timed(1e-3)}) == {"fp32": 2e-3, "int8": 3e-3, "fp16": 1e-3}


def entry(precision: str, seconds: float | None, *, why_not: str = "", **facts: float) -> Candidate:
    return Candidate(precision, facts, seconds, why_not)


def test_the_fastest_ships() -> None:
    chosen = pick((entry("fp32", 2e-3), entry("int8", 1e-3), entry("fp16", 1.5e-3)), {}, {}, "here")
    assert chosen.precision == "int8"
    assert chosen.why_not == {
        "fp32": "slower: 2 ms, int8 1 ms on here",
        "fp16": "slower: 1.5 ms, int8 1 ms on here",
    }


def test_int8_that_is_slower_does_not_ship_and_the_reason_has_both_times() -> None:
    chosen = pick((entry("fp32", 0.76e-3), entry("int8", 1e-3)), {}, {}, "local x86_64, 1 thread")
    assert chosen.precision == "fp32"
    assert chosen.why_not == {"int8": "slower: 1 ms, fp32 760 us on local x86_64, 1 thread"}


def test_a_gain_within_the_scatter_of_timings_is_none() -> None:
    chosen = pick((entry("fp32", 1e-3), entry("int8", 0.99e-3)), {}, {}, "here")
    assert chosen.precision == "fp32"
    assert chosen.why_not["int8"].startswith("not faster by more than timings scatter")


def test_a_precision_that_failed_is_never_taken_and_keeps_its_reason() -> None:
    chosen = pick((entry("fp32", 1e-3), entry("int8", 0.1e-3, why_not="it loses 3 points")), {}, {}, "here")
    assert chosen.precision == "fp32" and chosen.why_not == {"int8": "it loses 3 points"}


def test_without_times_the_float_file_ships_unless_the_budget_says_otherwise() -> None:
    both = (entry("fp32", None, size=1000.0), entry("int8", None, size=300.0))
    assert pick(both, {}, {}, "no device").precision == "fp32"
    small = {"size": limit("size", "500 B")}
    chosen = pick(both, small, {}, "no device")
    assert chosen.precision == "int8"
    assert chosen.why_not == {"fp32": "misses the budget of size, which int8 meets"}
    assert pick(both, {"size": limit("size", "50 %")}, {"size": 900.0}, "no device").precision == "int8"
    assert pick(both, {"size": limit("size", "50 %")}, {}, "no device").precision == "fp32"


def test_an_accuracy_that_the_budget_asks_for_keeps_a_faster_file_from_shipping() -> None:
    both = (entry("fp32", 2e-3, clean_accuracy=0.92), entry("int8", 1e-3, clean_accuracy=0.90))
    asked = {"clean_accuracy": limit("clean_accuracy", "91 %")}
    assert pick(both, asked, {}, "here").precision == "fp32"
    relative = {"clean_accuracy": limit("clean_accuracy", "-1 pp")}
    assert pick(both, relative, {"clean_accuracy": 0.915}, "here").precision == "fp32"
    assert pick(both, relative, {"clean_accuracy": 0.905}, "here").precision == "int8"


def test_an_accuracy_that_the_float_file_misses_itself_says_nothing() -> None:
    both = (entry("fp32", 1e-3, clean_accuracy=0.90), entry("int8", 2e-3, clean_accuracy=0.912))
    assert pick(both, {"clean_accuracy": limit("clean_accuracy", "91 %")}, {}, "here").precision == "fp32"


def test_limits_are_missed_in_the_direction_of_their_metric() -> None:
    limits = {"size": limit("size", "1 kB"), "clean_accuracy": limit("clean_accuracy", "90 %")}
    assert missed_limits(limits, {"size": 1001.0, "clean_accuracy": 0.9}, {}) == ("size",)
    assert missed_limits(limits, {"size": 1000.0, "clean_accuracy": 0.8999}, {}) == ("clean_accuracy",)
    assert missed_limits(limits, {"size": None}, {}) == ()
