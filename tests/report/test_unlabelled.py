"""What a report says without labels: in a section of its own, marked for what it is not, and no metric of a gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import HERE, budget, check_page, html_of, sample

from edgeprune import serialization
from edgeprune.errors import UsageError
from edgeprune.gate import verdict
from edgeprune.gate.budget import budget_from
from edgeprune.quantities import limit
from edgeprune.records import METRICS, Reading, Report
from edgeprune.report import stage
from edgeprune.report.rows import UNLABELLED, comparison
from edgeprune.report.unlabelled import INTRODUCTION, TITLE, without_labels

MADE = {"images": "synthetic", "synthesis": {"steps": 500}}
WHERE = "computed: interval bounds over the input box"


def agreement(**changes: Any) -> Reading:
    base = Reading("synthetic_agreement", 0.94, "fraction", 256, (0.9, 0.97), HERE, "compressed", MADE)
    return replace(base, **changes)


def divergence(**changes: Any) -> Reading:
    base = Reading("synthetic_kl", 0.0123, "nats", 256, (0.01, 0.015), HERE, "compressed", MADE)
    return replace(base, **changes)


def with_readings(*readings: Reading) -> Report:
    made = sample(labeled=False)
    return replace(made, after=(*made.after, *readings))


FULL = with_readings(agreement(), divergence())


def test_they_stand_in_a_section_of_their_own_and_not_beside_what_ships() -> None:
    assert not {row.metric for row in comparison(FULL)} & set(UNLABELLED)
    rows = {row.metric: row for row in without_labels(FULL)}
    assert list(rows) == list(UNLABELLED)
    assert rows["synthetic_agreement"].text == "94.00 % (90.00 % to 97.00 %)"
    assert rows["synthetic_kl"].text == "0.0123 nats (0.01 nats to 0.015 nats)"
    assert without_labels(sample()) == []


def test_each_is_marked_for_what_it_is_not() -> None:
    rows = {row.metric: row for row in without_labels(FULL)}
    assert rows["synthetic_agreement"].mark == rows["synthetic_kl"].mark == "synthetic images, not accuracy"
    assert rows["synthetic_agreement"].how == f"measured on {HERE}"


def test_the_summary_says_them_in_plain_words() -> None:
    lines = stage.summary_lines(FULL)
    assert (
        "On 256 synthetic images (not accuracy) 94.00 % (90.00 % to 97.00 %) of the outputs are the dense model's, "
        "KL 0.0123 nats (0.01 nats to 0.015 nats)." in lines
    )
    assert not any("synthetic" in line for line in stage.summary_lines(sample()))


def test_images_that_the_repair_was_solved_on_are_not_passed_off_as_new_ones() -> None:
    fitted = agreement(conditions={**MADE, "fitted": True})
    (row,) = without_labels(with_readings(fitted))
    assert row.about.endswith("; the repair was solved on these images")
    said = "On 256 synthetic images (not accuracy; the repair was solved on these images) 94.00 %"
    assert any(line.startswith(said) for line in stage.summary_lines(with_readings(fitted)))


def test_markdown_and_html_show_the_section_with_its_marks(tmp_path: Path) -> None:
    page = check_page(html_of(FULL, tmp_path))
    text = " ".join("".join(page.text).split())
    document = (tmp_path / "report.md").read_text(encoding="utf-8")
    for form in (text, document):
        assert TITLE in form and INTRODUCTION in form
        assert form.count("synthetic images, not accuracy") == 2
    before = document.index("## Before and after")
    assert before < document.index(f"## {TITLE}") < document.index("<details>")
    assert "synthetic_agreement" not in document[before : document.index(f"## {TITLE}")]


def test_a_report_without_them_has_no_such_section(tmp_path: Path) -> None:
    assert TITLE not in html_of(sample(), tmp_path)
    assert TITLE not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_they_come_back_from_report_json(tmp_path: Path) -> None:
    stage.run(FULL, tmp_path)
    assert serialization.to_json(stage.load(tmp_path)) == serialization.to_json(FULL)


@pytest.mark.parametrize("metric", UNLABELLED)
def test_no_budget_and_no_gate_takes_them(metric: str, tmp_path: Path) -> None:
    assert metric not in METRICS
    for take in (lambda: limit(metric, "90 %"), lambda: budget_from([f"{metric}=90 %"], tmp_path)):
        with pytest.raises(UsageError, match=f"unknown metric '{metric}'"):
            take()


def test_a_gate_judges_a_report_that_has_them_as_it_would_without() -> None:
    wanted = budget(macs="60 %", agreement="90 %")
    with_them, without = (
        verdict.run(made, wanted, None, baseline_missing=False) for made in (FULL, sample(labeled=False))
    )
    assert with_them == without
    assert {c.metric: c.status for c in with_them.checks} == {"macs": "pass", "agreement": "missing"}
