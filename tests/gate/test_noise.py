"""The gate: what noise, other machines and a baseline do to a verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from reports import HERE, budget, check, plain_report, reading

from edgeprune.gate import formats
from edgeprune.gate import verdict as verdict_module
from edgeprune.records import Report
from edgeprune.report.stage import summary_lines

LATENCIES = ("latency_p50", "latency_p90", "latency_p99")


def test_the_noise_of_the_dense_model_counts_in_a_share() -> None:
    """Limit 50 % of 100 +- 20 is 50 +- 10; a value of 45 +- 1 can't be told from it, one of 35 +- 1 can."""
    dense = reading("latency_p50", 0.100, spread=(0.080, 0.120))
    near, far = (reading("latency_p50", v, spread=(v - 0.001, v + 0.001)) for v in (0.045, 0.035))
    assert check(plain_report([dense], [near]), "latency_p50", "50 %").status == "inconclusive"
    assert check(plain_report([dense], [far]), "latency_p50", "50 %").status == "pass"
    quiet = replace(dense, spread=None)
    assert check(plain_report([quiet], [near]), "latency_p50", "50 %").status == "pass"


def test_only_the_side_of_the_noise_that_faces_the_limit_counts() -> None:
    """The dense model's reading may be 40 lower and is never higher: a limit of 50 may be 30, so 45 may miss it."""
    dense = reading("latency_p50", 0.100, spread=(0.060, 0.100))
    assert (
        check(plain_report([dense], [reading("latency_p50", 0.045)]), "latency_p50", "50 %").status
        == "inconclusive"
    )
    assert (
        check(plain_report([dense], [reading("latency_p50", 0.055)]), "latency_p50", "50 %").status == "fail"
    )


def test_two_accuracies_on_the_same_images_are_told_apart_by_how_often_the_networks_agree() -> None:
    """With 1000 images and agreement 0.99, a change of 0 pp is known to 1.96 sqrt(0.01 / 1000) = 0.62 pp."""
    wide = (0.88, 0.92)
    dense = reading("clean_accuracy", 0.90, spread=wide)
    after = [reading("clean_accuracy", 0.90, spread=wide), reading("agreement", 0.99)]
    assert check(plain_report([dense], after), "clean_accuracy", "-0.63 pp").status == "pass"
    assert check(plain_report([dense], after), "clean_accuracy", "-0.61 pp").status == "inconclusive"
    assert check(plain_report([dense], after[:1]), "clean_accuracy", "-0.63 pp").status == "inconclusive"
    elsewhere = [after[0], reading("agreement", 0.99, n=50)]
    assert check(plain_report([dense], elsewhere), "clean_accuracy", "-0.63 pp").status == "inconclusive"


def test_a_change_that_is_itself_large_is_known_a_little_better() -> None:
    """5 pp lost at agreement 0.9: 1.96 sqrt((0.1 - 0.05^2) / 1000) = 1.935 pp, without the square 1.960 pp."""
    after = [reading("clean_accuracy", 0.85), reading("agreement", 0.90)]
    made = plain_report([reading("clean_accuracy", 0.90)], after)
    assert check(made, "clean_accuracy", "-6.95 pp").status == "pass"
    assert check(made, "clean_accuracy", "-6.92 pp").status == "inconclusive"


def test_an_interval_that_only_touches_the_limit_decides() -> None:
    under = plain_report([], [reading("latency_p50", 0.9, spread=(0.8, 1.0))])
    over = plain_report([], [reading("latency_p50", 1.1, spread=(1.0, 1.2))])
    assert check(under, "latency_p50", "1 s").status == "pass"
    assert check(over, "latency_p50", "1 s").status == "fail"


def test_a_time_without_an_interval_is_decided_and_said_to_have_none() -> None:
    few = reading("latency_p99", 0.9, conditions={"no_interval": "20 runs are too few"})
    found = check(plain_report([], [few]), "latency_p99", "1 s")
    assert (found.status, found.detail) == ("pass", "20 runs are too few")


def test_a_network_that_answers_alike_always_has_lost_nothing() -> None:
    dense = reading("clean_accuracy", 0.90, spread=(0.88, 0.92))
    after = [replace(dense), reading("agreement", 1.0)]
    assert check(plain_report([dense], after), "clean_accuracy", "-0.1 pp").status == "pass"


def test_accuracies_on_other_images_are_as_noisy_as_both_together() -> None:
    """Half intervals of 3 and 4 pp are 5 pp together; on the same images only the compressed one's 3 pp count."""
    after = reading("robust_accuracy", 0.50, spread=(0.47, 0.53))
    base = reading("robust_accuracy", 0.55, spread=(0.51, 0.59), n=500)
    assert (
        check(plain_report([], [after]), "robust_accuracy", "-9.5 pp", plain_report([], [base])).status
        == "inconclusive"
    )
    assert (
        check(plain_report([], [after]), "robust_accuracy", "-10.5 pp", plain_report([], [base])).status
        == "pass"
    )
    same = replace(base, n=1000)
    assert (
        check(plain_report([], [after]), "robust_accuracy", "-9.5 pp", plain_report([], [same])).status
        == "pass"
    )


def timed_in_turn(dense: float, after: float, low: float, high: float) -> Report:
    noisy = reading("latency_p50", dense, spread=(0.5 * dense, 2 * dense))
    paired = {"speedup": {"value": dense / after, "low": low, "high": high, "pairs": 20}}
    return plain_report(
        [noisy], [reading("latency_p50", after, spread=(0.5 * after, 2 * after), conditions=paired)]
    )


def test_two_models_timed_in_turn_are_told_apart_by_their_ratios() -> None:
    """1.9 to 2.1 times faster is 47.6 to 52.6 % of the dense time, however noisy each of the two times is."""
    made = timed_in_turn(0.100, 0.050, 1.9, 2.1)
    assert check(made, "latency_p50", "53 %").status == "pass"
    assert check(made, "latency_p50", "52 %").status == "inconclusive"
    assert check(made, "latency_p50", "48 %").status == "inconclusive"
    assert check(made, "latency_p50", "47 %").status == "fail"
    assert check(made, "latency_p50", "90 ms").status == "inconclusive"
    assert check(made, "latency_p50", "50 %", made).status == "inconclusive"


def side_by_side(low: float, value: float, high: float, **says: Any) -> Report:
    paired = {"speedup": {"value": value, "low": low, "high": high, "pairs": 20}, **says}
    dense = [reading(metric, 0.100, spread=(0.099, 0.101)) for metric in LATENCIES]
    after = [reading("latency_p50", 0.1 / value, spread=(0.1 / high, 0.1 / low), conditions=paired)]
    return plain_report(
        dense, [*after, *(replace(after[0], metric=m, conditions=says) for m in LATENCIES[1:])]
    )


NONE_FASTER = {
    "less than two processes of one file differ by": side_by_side(1.005, 1.01, 1.015),
    "less than files of the same work differ by": side_by_side(1.02, 1.03, 1.04, same_work=True),
    "slower": side_by_side(0.90, 0.91, 0.92),
    "as fast": side_by_side(0.998, 1.0, 1.002),
    "nothing removed, and noise": side_by_side(0.8, 1.1, 1.3, same_work=True, nothing_removed=True),
}


@pytest.mark.parametrize("metric", LATENCIES)
@pytest.mark.parametrize("limit", ["100 %", "500 %"])
@pytest.mark.parametrize("made", NONE_FASTER.values(), ids=NONE_FASTER)
def test_a_model_that_is_not_faster_meets_no_limit_on_a_time_in_percent(
    made: Report, limit: str, metric: str
) -> None:
    verdict = verdict_module.run(made, budget(**{metric: limit}), None, baseline_missing=False)
    assert (verdict.exit_code, verdict.checks[0].status) == (1, "fail")
    assert verdict.checks[0].detail.startswith("not faster: ")
    assert "not faster: " in formats.render(verdict, "junit").split("message=", 1)[1]
    held = verdict_module.run(made, budget(**{metric: limit}), made, baseline_missing=False)
    assert held.exit_code == 1, "against a baseline too"
    assert check(made, metric, "1 s").status == "pass", "an absolute limit asks for no gain"
    line = next(line for line in summary_lines(made) if "faster" in line)
    assert line.startswith("NOT faster"), "the report and the gate agree"


def test_what_is_not_shown_to_be_faster_is_undecided_where_its_numbers_would_do() -> None:
    unsure = side_by_side(0.9, 1.05, 1.3)
    assert check(unsure, "latency_p50", "150 %").status == "inconclusive"
    assert check(unsure, "latency_p50", "150 %").detail.startswith("not shown to be faster: 1.050x")
    assert check(unsure, "latency_p50", "50 %").status == "fail"
    busy = side_by_side(0.99, 1.01, 1.03, contended=True, cpu_p50=0.09)
    assert check(busy, "latency_p50", "150 %").status == "inconclusive"
    assert check(side_by_side(1.03, 1.04, 1.05), "latency_p50", "98 %").status == "pass"
    assert any(line.startswith("NOT shown to be faster") for line in summary_lines(unsure))


def test_the_budget_of_a_run_is_held_by_its_numbers() -> None:
    """Not faster is no failure of the run itself: it says so, and ends with 0."""
    made = side_by_side(1.005, 1.01, 1.015)
    verdict = verdict_module.run(
        made, budget(latency_p50="150 %"), None, baseline_missing=False, must_be_faster=False
    )
    assert verdict.exit_code == 0
    assert verdict.checks[0].detail.startswith("not faster: ")


def test_estimates_of_one_formula_that_are_alike_are_no_gain() -> None:
    guess = reading("latency_p50", 0.5, where="estimated: roofline", spread=(0.3, 0.7))
    allowed = replace(budget(latency_p50="300 %"), allow_estimates=True)
    same = verdict_module.run(plain_report([guess], [guess], "jetson"), allowed, None, baseline_missing=False)
    assert same.exit_code == 1
    less = replace(guess, value=0.2, spread=(0.12, 0.28))
    found = verdict_module.run(plain_report([guess], [less], "jetson"), allowed, None, baseline_missing=False)
    assert found.exit_code == 0


def test_ratios_that_contradict_the_two_times_decide_nothing() -> None:
    assert check(timed_in_turn(0.100, 0.052, 2.05, 2.2), "latency_p50", "50 %").status == "inconclusive"


@pytest.mark.parametrize(
    "odd",
    [
        "fast",
        {},
        {"low": 1.9},
        {"low": 2.1, "high": 1.9},
        {"low": 0.0, "high": 1.0},
        {"low": "a", "high": "b"},
    ],
)
def test_a_ratio_that_is_none_is_left_aside(odd: Any) -> None:
    made = plain_report(
        [reading("latency_p50", 0.1)], [reading("latency_p50", 0.04, conditions={"speedup": odd})]
    )
    assert check(made, "latency_p50", "50 %").status == "pass"


def test_a_time_taken_on_a_busy_machine_fails_only_when_its_cpu_time_does() -> None:
    """8 ms of wall time that needed 5 ms of CPU time: a limit of 6 ms may be met on an idle machine, one of 4 can't."""
    busy = reading(
        "latency_p50", 0.008, spread=(0.0079, 0.0081), conditions={"contended": True, "cpu_p50": 0.005}
    )
    found = check(plain_report([], [busy]), "latency_p50", "6 ms")
    assert found.status == "inconclusive"
    assert "other work ran" in found.detail
    assert check(plain_report([], [busy]), "latency_p50", "4 ms").status == "fail"
    assert check(plain_report([], [busy]), "latency_p50", "9 ms").status == "pass"
    idle = replace(busy, conditions={"contended": False, "cpu_p50": 0.005})
    assert check(plain_report([], [idle]), "latency_p50", "6 ms").status == "fail"


def test_a_baseline_wins_over_the_dense_model_and_absolute_limits_ignore_it() -> None:
    made, base = (
        plain_report([reading("size", 1000)], [reading("size", 550)]),
        plain_report([], [reading("size", 500)]),
    )
    assert check(made, "size", "60 %").status == "pass"
    assert check(made, "size", "105 %", base).status == "fail"
    assert check(made, "size", "111 %", base).status == "pass"
    verdict = verdict_module.run(made, budget(size="600 B"), base, baseline_missing=False)
    assert verdict.ok
    assert verdict.notes == ("Every limit is absolute, so the baseline was not used.",)


def test_a_baseline_without_the_reading_gives_way_to_the_dense_model_and_says_so() -> None:
    made = plain_report([reading("clean_accuracy", 0.9)], [reading("clean_accuracy", 0.89)])
    for base in (plain_report([], []), plain_report([], [reading("clean_accuracy", None)])):
        found = check(made, "clean_accuracy", "-2 pp", base)
        assert (found.status, found.threshold) == ("pass", pytest.approx(0.88))
        assert "the baseline has no clean_accuracy: held against the dense model" in found.detail


def test_a_first_run_without_a_baseline_is_no_failure() -> None:
    made = plain_report([reading("size", 1000)], [reading("size", 400)])
    verdict = verdict_module.run(made, budget(size="50 %"), None, baseline_missing=True)
    assert verdict.exit_code == 0
    assert "held against the dense model" in verdict.notes[0]
    absolute = verdict_module.run(made, budget(size="1 kB"), None, baseline_missing=True)
    assert "dense model" not in absolute.notes[0]
    assert verdict_module.run(made, budget(size="50 %"), None, baseline_missing=False).notes == ()


def test_times_of_two_machines_are_not_compared() -> None:
    made = plain_report([], [reading("latency_p50", 0.010)])
    elsewhere = plain_report([], [reading("latency_p50", 0.5, where="ssh://jetson aarch64")])
    found = check(made, "latency_p50", "105 %", elsewhere)
    assert found.status == "inconclusive"
    assert "'ssh://jetson aarch64'" in found.detail
    memory = (
        plain_report([], [reading("peak_memory", 5)]),
        plain_report([], [reading("peak_memory", 9, where="ssh://x aarch64")]),
    )
    assert check(memory[0], "peak_memory", "90 %", memory[1]).status == "inconclusive"
    other = plain_report([], [reading("latency_p50", 0.5)], cpu="another CPU")
    assert "timed on another CPU, this one on one CPU" in check(made, "latency_p50", "105 %", other).detail
    unknown = replace(other, environment={})
    assert check(made, "latency_p50", "105 %", unknown).status == "pass"


def test_sizes_and_accuracies_of_two_machines_are_compared() -> None:
    made = plain_report([], [reading("size", 10), reading("clean_accuracy", 0.9), reading("peak_memory", 10)])
    base = plain_report(
        [],
        [
            reading("size", 10),
            reading("clean_accuracy", 0.9, where="ssh://x aarch64"),
            reading("peak_memory", 10),
        ],
        cpu="b",
    )
    verdict = verdict_module.run(
        made, budget(size="100 %", clean_accuracy="-1 pp", peak_memory="100 %"), base, baseline_missing=False
    )
    assert verdict.ok


def test_a_baseline_of_another_target_is_said() -> None:
    made, base = (
        plain_report([], [reading("size", 10)], "jetson"),
        plain_report([], [reading("size", 10)], "local"),
    )
    verdict = verdict_module.run(made, budget(size="100 %"), base, baseline_missing=False)
    assert verdict.notes == ("The baseline is a run for local, this one is for jetson.",)


@pytest.mark.parametrize("metric", [*LATENCIES, "peak_memory"])
def test_what_was_not_measured_on_the_target_is_checked_and_said(metric: str) -> None:
    text = "1 B" if metric == "peak_memory" else "1 s"
    made = plain_report([], [reading(metric, 0.5)], "jetson-orin-nano")
    verdict = verdict_module.run(made, budget(**{metric: text}), None, baseline_missing=False)
    assert verdict.checks[0].status == "pass"
    assert verdict.checks[0].detail == f"measured on {HERE}, not on jetson-orin-nano"
    assert verdict.notes[0].startswith(f"Not measured on jetson-orin-nano: {metric} ")
    there = plain_report([], [reading(metric, 0.5, where="ssh://pi aarch64")], "jetson-orin-nano")
    assert verdict_module.run(there, budget(**{metric: text}), None, baseline_missing=False).notes == ()
    itself = plain_report([], [reading(metric, 0.5, conditions={"on_target": True})], "raspberry-pi-5")
    assert (
        verdict_module.run(itself, budget(**{metric: text}), None, baseline_missing=False).checks[0].detail
        == ""
    )
    assert (
        verdict_module.run(
            plain_report([], [reading(metric, 0.5)]), budget(**{metric: text}), None, baseline_missing=False
        ).notes
        == ()
    )


def test_a_reading_that_says_it_is_emulated_in_its_place_alone_is_no_measurement() -> None:
    far = reading("latency_p50", 0.5, where="ssh://pi aarch64 (emulated)")
    assert check(plain_report([], [far]), "latency_p50", "1 s").status == "missing"


def test_an_estimate_is_called_one_and_never_held_against_a_measurement() -> None:
    guess = reading("latency_p50", 0.5, where="estimated: roofline", spread=(0.3, 0.7))
    refused = check(plain_report([], [guess], "jetson"), "latency_p50", "1 s")
    assert refused.status == "missing"
    assert "only estimated: roofline" in refused.detail
    assert "--device" in refused.detail
    allowed = replace(budget(latency_p50="1 s"), allow_estimates=True)
    found = verdict_module.run(plain_report([], [guess], "jetson"), allowed, None, baseline_missing=False)
    assert found.exit_code == 0
    assert found.checks[0].detail == "not measured, estimated: roofline"
    unchecked = plain_report([], [replace(guess, spread=None)], "jetson")
    doubtful = verdict_module.run(unchecked, allowed, None, baseline_missing=False)
    assert doubtful.exit_code == 8
    assert "not validated" in doubtful.checks[0].detail
    advice = next(line for line in formats.render(doubtful, "text").splitlines() if "To decide" in line)
    assert "--device" in advice and "longer" not in advice, "no patience helps an estimate"
    allowed = replace(budget(latency_p50="50 %"), allow_estimates=True)
    measured = plain_report([reading("latency_p50", 2.0)], [guess])
    one = verdict_module.run(measured, allowed, None, baseline_missing=False).checks[0]
    assert one.status == "inconclusive"
    assert "'estimated: roofline'" in one.detail


@pytest.mark.parametrize("metric", ["latency_p50", "peak_memory", "energy"])
def test_a_reading_of_an_emulated_processor_is_no_measurement_whatever_is_allowed(metric: str) -> None:
    text = {"latency_p50": "1 s", "peak_memory": "1 MB", "energy": "1 J"}[metric]
    far = reading(metric, 0.5, where="ssh://pi aarch64 (emulated)", conditions={"emulated": True})
    allowed = replace(budget(**{metric: text}), allow_estimates=True)
    verdict = verdict_module.run(plain_report([], [far]), allowed, None, baseline_missing=False)
    assert verdict.exit_code == 8
    assert "emulated" in verdict.checks[0].detail
