"""The gate: the whole table of verdicts, and what they add up to."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import ODD, budget, check, leaves, plain_report, put, reading, sample
from typer.testing import CliRunner

from edgeprune import serialization
from edgeprune.cli.app import app
from edgeprune.errors import DeviceError, UsageError
from edgeprune.gate import formats
from edgeprune.gate import verdict as verdict_module
from edgeprune.records import METRICS, Reading
from edgeprune.report import stage

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
    verdict = verdict_module.run(
        made, budget(**{metric: text}), other, baseline_missing=baseline == "missing"
    )

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
    verdict = verdict_module.run(plain_report([], after), budget(**limits), None, baseline_missing=False)
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
    document = serialization.to_json(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        document = put(document, data.draw(st.sampled_from(leaves(document))), data.draw(ODD))
    serialization.write(tmp_path / "report.json", document)
    try:
        changed = stage.load(tmp_path)
    except UsageError:
        return
    limits = budget(
        latency_p50="50 %", latency_p90="1 ms", clean_accuracy="-1 pp", size="50 %", energy="1 J", macs="1 M"
    )
    for baseline in (None, whole, changed):
        verdict = verdict_module.run(changed, limits, baseline, baseline_missing=False)
        assert verdict.exit_code in (0, 1, 8)
        for name in formats.FORMATS:
            assert formats.render(verdict, name).encode()


def test_the_gate_starts_without_any_heavy_package() -> None:
    code = (
        "import sys, edgeprune.gate.verdict\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'rich', 'torch_pruning') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------- what no run can have read, by the command


def asked(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["gate", *map(str, words)])
    return done.exit_code, done.output


def edited(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A report with times, accuracies and an agreement, changed by hand."""
    whole = sample(layers=0)
    document = serialization.to_json(replace(whole, after=(*whole.after, reading("agreement", 0.98))))
    change(document)
    (tmp_path / "edited.json").write_text(json.dumps(document))
    return tmp_path / "edited.json"


def with_field(metric: str, field: str, value: Any, side: str = "after") -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for row in document[side]:
            row.update({field: value} if row["metric"] == metric else {})

    return change


@pytest.mark.parametrize(
    ("metric", "field", "value", "limit"),
    [
        ("latency_p50", "value", -1.0, "1 ms"),
        ("latency_p50", "value", 0.0, "1 ms"),
        ("latency_p50", "value", 1e30, "1 ms"),
        ("size", "value", -1.0, "1 MB"),
        ("macs", "value", 0.0, "1 G"),
        ("agreement", "value", 100.0, "50 %"),
        ("clean_accuracy", "value", 1.0000001, "50 %"),
        ("latency_p50", "unit", "B", "1 ms"),
        ("latency_p50", "artifact", "dense", "1 ms"),
        ("latency_p50", "artifact", "model.onnx", "1 ms"),
        ("latency_p50", "n", 0, "1 ms"),
        ("latency_p50", "n", -1, "1 ms"),
        ("latency_p50", "n", True, "1 ms"),
        ("latency_p50", "spread", [-1e-3, 1e-3], "1 ms"),
        ("latency_p50", "spread", [2.0, 3.0], "1 ms"),
        ("latency_p50", "conditions", [], "1 ms"),
    ],
)
def test_a_number_that_no_run_can_have_read_is_refused_with_its_place(
    tmp_path: Path, metric: str, field: str, value: Any, limit: str
) -> None:
    whole = edited(tmp_path, lambda document: None).rename(tmp_path / "whole.json")
    bad = edited(tmp_path, with_field(metric, field, value))
    budget = ("--budget", f"{metric}={limit}")
    assert asked(whole, *budget)[0] == 0
    for words in ((bad, *budget), (whole, *budget, "--baseline", bad)):
        code, said = asked(*words)
        assert (code, "report.after" in said) == (2, True)


@pytest.mark.parametrize("metric", ["latency_p50", "size", "clean_accuracy"])
@pytest.mark.parametrize(
    "where",
    [
        "Estimated: guess", " estimated", "guess", "", "\u0435stimated: roofline", "measured", "local guess",
        "Local x86_64", "local\u00a0x86_64", "local x86_64\n", "computed: interval bounds", "l\u043ecal x86_64", "ssh",
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_a_measurement_decides_nothing(
    tmp_path: Path, where: str, metric: str
) -> None:
    limit = {"latency_p50": "1 ms", "size": "1 GB", "clean_accuracy": "1 %"}[metric]
    file = edited(tmp_path, with_field(metric, "where", where))
    code, said = asked(file, "--budget", f"{metric}={limit}")
    assert code == 8
    assert "not known to be a measurement" in said


@pytest.mark.parametrize(
    ("metric", "limit"), [("latency_p50", "90 %"), ("macs", "90 %"), ("clean_accuracy", "-50 pp")]
)
@pytest.mark.parametrize("where", ["ssh://pi aarch64", "guess"])
def test_a_relative_limit_needs_the_dense_reading_from_the_same_place(
    tmp_path: Path, metric: str, limit: str, where: str
) -> None:
    file = edited(tmp_path, with_field(metric, "where", where, "before"))
    assert asked(file, "--budget", f"{metric}={limit}")[0] == 8


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"value": 2e-5, "spread": None}, 2),
        ({"value": 2e-5, "spread": None, "where": "local aarch64"}, 2),
        ({"value": None, "spread": None}, 2),
        ({"value": 2e-5, "spread": None, "where": "estimated: roofline"}, 1),
    ],
)
def test_two_readings_of_a_metric_are_refused_and_an_estimate_never_goes_first(
    tmp_path: Path, change: dict[str, Any], code: int, first: bool
) -> None:
    def twice(document: dict[str, Any]) -> None:
        row = next(row for row in document["after"] if row["metric"] == "latency_p50")
        document["after"].insert(0 if first else len(document["after"]), {**row, **change})

    assert asked(edited(tmp_path, twice), "--budget", "latency_p50=50 us")[0] == code


def test_a_reading_that_can_not_be_is_not_made() -> None:
    for change in (
        {"unit": "B"}, {"value": float("nan")}, {"value": float("inf")}, {"value": -1.0}, {"n": 0},
        {"spread": (0.6, 0.7)}, {"spread": (float("nan"), 1.0)},
    ):  # fmt: skip
        with pytest.raises(DeviceError, match="latency_p50 of 'compressed' can't be"):
            replace(reading("latency_p50", 0.5), **change)
    assert not reading("latency_p50", 0.5, where="estimated: roofline", n=0).measured
    assert Reading("own", -5.0, "flops", 0, None, "x", "y").value == -5.0, "a metric of somebody else's"


def test_the_gate_of_a_run_looks_at_the_file_that_ships(tmp_path: Path) -> None:
    model, whole = tmp_path / "model.onnx", sample(layers=0)
    model.write_bytes(b"the file")
    made_of = hashlib.sha256(b"the file").hexdigest()
    stage.run(replace(whole, environment={**whole.environment, "files": {"model.onnx": made_of}}), tmp_path)
    (tmp_path / "edgeprune.lock").write_text("{}")
    limit = ("--budget", "size=1 GB")
    assert asked(tmp_path, *limit) == asked(tmp_path / "report.json", *limit)
    code, said = asked(tmp_path, *limit)
    assert (code, "no file was checked" in said) == (0, False)
    model.write_bytes(b"the filf")
    for run in (tmp_path, tmp_path / "report.json"):
        code, said = asked(run, *limit)
        assert code == 2
        assert made_of in said and hashlib.sha256(b"the filf").hexdigest() in said
    model.unlink()
    assert asked(tmp_path, *limit)[0] == 2
    code, said = asked((tmp_path / "report.json").rename(tmp_path / "bare.json"), *limit)
    assert (code, "no file was checked" in said) == (0, True)


def test_a_baseline_that_is_there_and_can_not_be_read_is_not_absent(tmp_path: Path) -> None:
    file, limit = edited(tmp_path, lambda document: None), ("--budget", "size=100 %")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in ("dangling", "edited.json/x", "x" * 5000):
        assert asked(file, *limit, "--baseline", tmp_path / path)[0] == 2, path[:20]
    assert asked(file, *limit, "--baseline", tmp_path / "main.json")[0] == 0


def test_a_baseline_of_another_network_is_said() -> None:
    made = plain_report([reading("params", 1000)], [reading("size", 10)])
    base = plain_report([reading("params", 2000)], [reading("size", 10)])
    verdict = verdict_module.run(made, budget(size="100 %"), base, baseline_missing=False)
    said = "The baseline is of another network: 2000 parameters before it was cut, here 1000."
    assert verdict.notes == (said,)


def test_no_name_of_a_report_writes_a_line_of_its_own() -> None:
    made = plain_report([], [reading("latency_p50", 2.0)], "x\n\ngate: PASS (1 met)")
    text = formats.render(
        verdict_module.run(made, budget(latency_p50="1 s"), None, baseline_missing=False), "text"
    )
    assert [line for line in text.splitlines() if line.startswith("gate: ")] == ["gate: FAIL (1 missed)"]
