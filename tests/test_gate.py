"""The gate: the whole table of verdicts, and what they add up to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import ODD, budget, check, leaves, plain_report, put, reading, sample

from edgeprune import codec
from edgeprune.errors import UsageError
from edgeprune.records import METRICS
from edgeprune.stages import gate
from edgeprune.stages import report as stage

# The compressed model's value, and half its 95 % interval; the dense model has 100 of everything, the baseline 80.
PASS, FAIL, EQUAL, MISSING, UNSURE, NO_REFERENCE = (
    "pass",
    "fail",
    "equal",
    "missing",
    "inconclusive",
    "no reference",
)
DENSE, BASE = 100.0, 80.0


def threshold_of(kind: str, given_baseline: bool) -> float:
    reference = BASE if given_baseline else DENSE
    return {"absolute": 50e-3, "share": 0.5 * reference * 1e-3, "delta": reference / 100 * 0.9 - 0.02}[kind]


@pytest.mark.parametrize("baseline", ["given", "missing", "none"])
@pytest.mark.parametrize("outcome", [PASS, FAIL, EQUAL, MISSING, UNSURE, NO_REFERENCE])
@pytest.mark.parametrize("kind", ["absolute", "share", "delta"])
def test_the_table_of_verdicts(kind: str, outcome: str, baseline: str) -> None:
    """Times in ms against 50 ms or 50 %; accuracies against -2 pp, where larger is better."""
    metric, text = {
        "absolute": ("latency_p50", "50 ms"),
        "share": ("latency_p50", "50 %"),
        "delta": ("clean_accuracy", "-2 pp"),
    }[kind]
    scale = 1e-3 if kind != "delta" else 0.009
    threshold = threshold_of(kind, baseline == "given")
    step = {PASS: -0.1, FAIL: 0.1, EQUAL: 0.0, UNSURE: -0.01}.get(outcome, -0.1) * (
        -1 if kind == "delta" else 1
    )
    value = None if outcome == MISSING else threshold * (1 + step)
    spread = None
    if outcome == UNSURE and value is not None:
        spread = (value - 0.05 * threshold, value + 0.05 * threshold)
    after = [
        reading(
            metric, value, spread=spread, conditions={"why": "the sensor is off"} if value is None else {}
        )
    ]
    before = [] if outcome == NO_REFERENCE else [reading(metric, DENSE * scale)]
    base = [] if outcome == NO_REFERENCE else [reading(metric, BASE * scale)]
    made, other = plain_report(before, after), plain_report([], base) if baseline == "given" else None
    verdict = gate.run(made, budget(**{metric: text}), other, baseline_missing=baseline == "missing")

    (found,) = verdict.checks
    expected = {EQUAL: PASS, NO_REFERENCE: PASS if kind == "absolute" else MISSING}.get(outcome, outcome)
    assert found.status == expected
    assert verdict.exit_code == {PASS: 0, FAIL: 1, MISSING: 8, UNSURE: 8}[expected]
    assert verdict.ok is (expected == PASS)
    assert found.value == value
    if expected == MISSING:
        assert found.margin is None
        assert "the sensor is off" in found.detail or "to compare with" in found.detail
        return
    assert found.threshold == pytest.approx(threshold)
    assert value is not None
    assert found.margin is not None
    better = value - threshold if kind == "delta" else threshold - value
    assert found.margin == pytest.approx(better, abs=1e-15)
    assert (found.margin == 0) is (outcome == EQUAL)
    assert any("no baseline yet" in note for note in verdict.notes) is (baseline == "missing")


@pytest.mark.parametrize(
    ("share", "dense", "value"), [("29 %", 100, 29), ("7 %", 100, 7), ("57 %", 1e9, 57e7)]
)
def test_a_share_that_is_met_exactly_passes_although_it_is_no_binary_number(
    share: str, dense: float, value: float
) -> None:
    found = check(plain_report([reading("params", dense)], [reading("params", value)]), "params", share)
    assert (found.status, found.margin) == ("pass", 0.0)
    assert (
        check(
            plain_report([reading("params", dense)], [reading("params", value + 1)]), "params", share
        ).status
        == "fail"
    )


def test_an_accuracy_that_dropped_by_exactly_what_is_allowed_passes() -> None:
    for dense, drop in ((0.92, 1), (0.9, 3), (0.1, 2), (0.7, 7)):
        made = plain_report(
            [reading("clean_accuracy", dense)], [reading("clean_accuracy", dense - drop / 100)]
        )
        assert check(made, "clean_accuracy", f"-{drop} pp").status == "pass"


def test_accuracies_must_be_at_least_and_everything_else_at_most_the_limit() -> None:
    for metric, info in METRICS.items():
        text, at = (
            ("50 %", 0.5)
            if info.unit == "fraction"
            else ("50", 50)
            if not info.unit
            else (f"50 {info.unit}", 50)
        )
        above, below = (
            check(plain_report([], [reading(metric, at * f)]), metric, text).status for f in (1.1, 0.9)
        )
        assert (above, below) == (("fail", "pass") if info.less_is_better else ("pass", "fail")), metric


@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(0, 1))),
    st.booleans(),
)
def test_a_verdict_follows_the_margin_unless_noise_holds_the_limit(
    value: float, at: float, widths: tuple[float, float] | None, metric_is_time: bool
) -> None:
    metric, text = ("latency_p90", f"{at!r} s") if metric_is_time else ("energy", f"{at!r} J")
    spread = (max(value * (1 - widths[0]), 1e-9), value * (1 + widths[1])) if widths else None
    found = check(plain_report([], [reading(metric, value, spread=spread)]), metric, text)
    assert found.margin == pytest.approx(at - value, abs=1e-9)
    inside = spread is not None and spread[0] * (1 + 1e-9) < at < spread[1] * (1 - 1e-9)
    assert (found.status == "inconclusive") >= inside
    if found.status != "inconclusive":
        assert found.status == ("pass" if value <= at * (1 + 1e-12) else "fail")


@given(st.lists(st.sampled_from(["pass", "fail", "missing", "inconclusive"]), min_size=1, max_size=4))
def test_one_missed_limit_decides_and_then_one_undecided(statuses: list[str]) -> None:
    metrics = ("latency_p50", "latency_p90", "latency_p99", "energy")
    values = {
        "pass": (1.0, None),
        "fail": (3.0, None),
        "missing": (None, None),
        "inconclusive": (1.9, (1.0, 3.0)),
    }
    after = [reading(m, values[s][0], spread=values[s][1]) for m, s in zip(metrics, statuses, strict=False)]
    limits = {m: "2 J" if m == "energy" else "2 s" for m in metrics[: len(statuses)]}
    verdict = gate.run(plain_report([], after), budget(**limits), None, baseline_missing=False)
    assert [c.status for c in verdict.checks] == statuses
    assert verdict.exit_code == (1 if "fail" in statuses else 0 if set(statuses) == {"pass"} else 8)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_report_is_refused_or_decided_but_never_a_crash(
    tmp_path: Path, data: st.DataObject
) -> None:
    paired = {"speedup": {"value": 1.6, "low": 1.5, "high": 1.7}, "contended": True, "cpu_p50": 4e-4}
    timed = [reading("latency_p50", 4.7e-4, conditions=paired), reading("agreement", 0.98)]
    whole = replace(sample(layers=0, timed=False), after=(*sample().after, *timed), ledger=(), samples={})
    document = codec.to_json(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        document = put(document, data.draw(st.sampled_from(leaves(document))), data.draw(ODD))
    codec.write(tmp_path / "report.json", document)
    try:
        changed = stage.load(tmp_path)
    except UsageError:
        return
    limits = budget(
        latency_p50="50 %", latency_p90="1 ms", clean_accuracy="-1 pp", size="50 %", energy="1 J", macs="1 M"
    )
    for baseline in (None, whole, changed):
        verdict = gate.run(changed, limits, baseline, baseline_missing=False)
        assert verdict.exit_code in (0, 1, 8)
        for name in gate.FORMATS:
            assert gate.render(verdict, name).encode()


def test_the_gate_starts_without_any_heavy_package() -> None:
    code = (
        "import sys, edgeprune.stages.gate\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'rich', 'torch_pruning') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
