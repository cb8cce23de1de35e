"""The gate: each format is read back, and no name breaks it."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import budget, plain_report, reading

from edgeprune.errors import UsageError
from edgeprune.gate import formats
from edgeprune.gate import verdict as verdict_module
from edgeprune.records import Check, Verdict


@pytest.fixture
def verdict() -> Verdict:
    """One of each: met, missed, missing, undecided; with names that every format must escape."""
    after = [
        reading("latency_p50", 0.00731, spread=(0.0072, 0.0074)),
        reading("macs", 20.1e6),
        reading("energy", None, conditions={"why": 'no <sensor> | "rail" & co\x1b'}),
        reading("clean_accuracy", 0.915, spread=(0.9, 0.93)),
    ]
    before = [reading("macs", 41.2e6), reading("clean_accuracy", 0.921, n=999)]
    limits = budget(latency_p50="5 ms", macs="50 %", energy="1 mJ", clean_accuracy="-1 pp")
    return verdict_module.run(plain_report(before, after, "a|<b>"), limits, None, baseline_missing=True)


def test_text_says_by_how_much_each_limit_is_met_or_missed_and_what_to_do(verdict: Verdict) -> None:
    lines = formats.render(verdict, "text").splitlines()
    rows = {line.split()[1]: " ".join(line.split()) for line in lines if "  limit " in line}
    assert rows["latency_p50"] == "FAIL latency_p50 7.31 ms limit 5 ms 2.31 ms over (46.20 %)"
    assert rows["macs"] == "pass macs 20.1 M limit 50 % = 20.6 M 500 k to spare (2.43 %)"
    assert rows["energy"] == "MISSING energy - limit 1 mJ"
    assert (
        rows["clean_accuracy"] == "INCONCLUSIVE clean_accuracy 91.50 % limit -1 pp = 91.10 % 0.40 pp to spare"
    )
    columns = {line.index("  limit ") for line in lines if "  limit " in line}
    assert len(columns) == 1
    assert any(line.startswith("To meet latency_p50: ") for line in lines)
    assert lines[-1] == "gate: FAIL (1 met, 1 missed, 1 without a reading, 1 undecided)"


def test_a_limit_missed_by_next_to_nothing_is_not_missed_by_zero() -> None:
    made = plain_report([], [reading("clean_accuracy", 0.89999999), reading("size", 1000001)])
    text = formats.render(
        verdict_module.run(made, budget(clean_accuracy="90 %", size="1 MB"), None, baseline_missing=False),
        "text",
    )
    assert "1.0e-06 pp short" in text
    assert "1 B over (1.0e-04 %)" in text


def test_what_is_met_to_the_last_byte_is_said_so() -> None:
    made = plain_report([], [reading("size", 1000)])
    verdict = verdict_module.run(made, budget(size="1 kB"), None, baseline_missing=False)
    assert "exactly met" in formats.render(verdict, "text")
    assert formats.render(verdict, "text").splitlines()[-1] == "gate: PASS (1 met)"


def test_json_is_the_verdict_itself(verdict: Verdict) -> None:
    data = json.loads(formats.render(verdict, "json"))
    assert (data["ok"], data["exit_code"]) == (False, 1)
    assert [c["status"] for c in data["checks"]] == ["fail", "pass", "missing", "inconclusive"]
    assert data["checks"][0]["margin"] == pytest.approx(-0.00231)
    assert data["checks"][2]["value"] is None


def test_markdown_is_one_table_that_no_name_breaks(verdict: Verdict) -> None:
    lines = formats.render(verdict, "markdown").splitlines()
    assert lines[0].startswith("<!--")
    assert lines[1].startswith("### edgeprune gate: fail")
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 6
    assert {line.replace(r"\|", "").count("|") for line in rows} == {7}
    assert [row[2] for row in rows[2:]] == ["❌", "✅", "⚠", "⚠"]
    assert "<sensor>" not in "".join(lines)
    assert r"no &lt;sensor> \| \"rail\"".replace(r"\"", '"') in "".join(lines)
    assert "| 2.31 ms over (46.20 %) |" in rows[2]


def test_junit_has_a_failure_for_a_missed_limit_and_an_error_for_an_open_one(verdict: Verdict) -> None:
    text = formats.render(verdict, "junit")
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    root = ElementTree.fromstring(text.encode())
    (suite,) = root.findall("testsuite")
    for node in (root, suite):
        assert (node.get("tests"), node.get("failures"), node.get("errors")) == ("4", "1", "2")
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    (failure,) = cases["latency_p50 5 ms"].findall("failure")
    assert failure.get("message") == "2.31 ms over (46.20 %)"
    assert [e.get("type") for c in cases.values() for e in c.findall("error")] == ["missing", "inconclusive"]
    assert not cases["macs 50 %"].findall("failure") + cases["macs 50 %"].findall("error")
    missing = cases["energy 1 mJ"].find("error")
    assert missing is not None
    assert 'no <sensor> | "rail" & co\ufffd' in (missing.get("message") or "")


@given(st.text())
def test_no_text_makes_the_xml_invalid(text: str) -> None:
    made = Verdict(
        (
            Check("size", text, "fail", 1.0, 2.0, -1.0, text),
            Check("size", text, "missing", None, None, None, text),
        ),
        False,
        1,
        (text,),
    )
    root = ElementTree.fromstring(formats.render(made, "junit").encode())
    assert len(root.findall(".//testcase")) == 2


def test_the_formats_are_named_in_the_error(verdict: Verdict) -> None:
    for name in formats.FORMATS:
        assert formats.render(verdict, name)
    with pytest.raises(UsageError, match="format = 'html' is not one of"):
        formats.render(verdict, "html")
