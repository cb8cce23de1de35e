"""How a choice came about: recorded curves are drawn where their numbers are, named, and readable as tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import EVIL, ODD, check_page, history, html_of, parts, sample

from edgeprune.records import Report
from edgeprune.report import stage
from edgeprune.report.history import Chapter, Curve, Plot, chapters, summary_rows
from edgeprune.report.page import page as page_of
from edgeprune.report.plots import SERIES, Drawing, drawing, fixed, ticks, widen


def recorded(**record: Any) -> Report:
    return replace(sample(layers=1), history=record)


def chapter(topic: str = "x", **record: Any) -> Chapter:
    (only,) = chapters(recorded(**{topic: record}))
    return only


def plot(*curves: tuple[float | None, ...], unit: str = "") -> Plot:
    made = [Curve(f"c{i}", tuple(float(k) for k in range(1, len(v) + 1)), v) for i, v in enumerate(curves)]
    return Plot("what", "", "epoch", unit, tuple(made), single=len(made) == 1)


def section(report: Report) -> str:
    """The part of the page about what was recorded; empty without it."""
    text = page_of(report, [])
    start = text.find("<section><h2>How the choice came about")
    return text[start : text.index("<section><h2>Channels")].strip() if start >= 0 else ""


def points(drawn: Drawing, color: str) -> list[tuple[float, ...]]:
    """The corners of one line, in percent."""
    (run,) = [run for line in drawn.lines if line.color == color for run in line.runs]
    return [tuple(float(v) for v in corner.split(",")) for corner in run.split()]


# ------------------------------------------------------------------------------------------------ what was recorded


def test_every_mapping_of_lists_and_every_list_is_a_plot_over_what_counts_them() -> None:
    found = chapter(
        "pqi",
        iterations=[0, 2, 4],
        layers={"a": [0.1, 0.2, 0.3], "b": [0.4, None, 0.5]},
        accuracy=[0.9, 0.8, 0.7],
        stopped="nothing to cut",
    )
    layers, accuracy = found.plots
    assert found.title == "PQ index (SAP)" and found.facts == (("stopped", "nothing to cut"),)
    assert (layers.axis, layers.unit, layers.single) == ("iteration", "", False)
    assert layers.curves == (
        Curve("a", (0.0, 2.0, 4.0), (0.1, 0.2, 0.3)),
        Curve("b", (0.0, 2.0, 4.0), (0.4, None, 0.5)),
    )
    assert (accuracy.title, accuracy.unit, accuracy.single) == ("Validation accuracy", "fraction", True)


def test_epochs_that_count_something_else_are_words_and_curves_count_from_one() -> None:
    found = chapter("deadwooding", epochs=[3, 5], kd=[1.0, 1.1, 1.3], deadwood=[0.4])
    assert found.facts == (("epochs", "3, 5"),)
    assert [(p.axis, p.curves[0].at) for p in found.plots] == [("epoch", (1.0, 2.0, 3.0)), ("epoch", (1.0,))]
    # As long as some of the curves by chance: the epochs of two stages are no axis.
    chance = chapter("deadwooding", epochs=[3, 5], kd=[1.0, 1.1, 1.3], deadwood=[0.4, 0.2])
    assert [p.curves[0].at for p in chance.plots] == [(1.0, 2.0, 3.0), (1.0, 2.0)]
    falling = chapter(epochs=[3, 2, 1], loss=[1.0, 2.0, 3.0])
    assert falling.plots[0].curves[0].at == (1.0, 2.0, 3.0) and falling.facts == (("epochs", "3, 2, 1"),)


@pytest.mark.parametrize(
    "value", ["x", 3, None, [], ["a"], [True, False], {"a": []}, {"a": "b"}, [[1], [2]], {}]
)
def test_what_is_no_list_of_numbers_is_no_plot(value: Any) -> None:
    assert all(not c.plots for c in chapters(recorded(x={"y": value})))
    assert chapters(recorded(x=value)) == [] or value == {"a": "b"} or isinstance(value, dict)


def test_numbers_that_are_none_are_gaps() -> None:
    (only,) = chapter(y=[1.0, None, 10**400, float("nan"), 2]).plots
    assert only.curves[0].values == (1.0, None, None, None, 2.0)
    assert chapters(recorded(x={"y": [None, None]}))[0].plots == ()


def test_only_shares_are_percent() -> None:
    found = chapter("dnr", density={"a": [0.1, 0.2]}, removed=[0.5, 1], kept=[3, 2])
    assert [p.unit for p in found.plots] == ["fraction", "", ""]


def test_rows_say_where_each_curve_began_how_far_it_went_and_where_it_ended() -> None:
    found = chapter("pqi", layers={"a": [0.3, 0.2, 0.25]}, accuracy=[0.9, 0.95, 0.92])
    assert summary_rows(found) == [
        ["PQ index", "a", "0.3", "0.2", "0.3", "0.25"],
        ["Validation accuracy", "", "90.00 %", "90.00 %", "95.00 %", "92.00 %"],
    ]


# ------------------------------------------------------------------------------------------------------ the drawing


def test_a_line_goes_through_its_numbers() -> None:
    # From 0 to 4 with 5 % to spare above: 4.2 is the top.
    drawn = drawing(plot((0.0, 4.0, 2.0)))
    assert points(drawn, "first") == [
        (0.0, 100.0),
        (50.0, pytest.approx(100 * 0.2 / 4.2, abs=1e-3)),
        (100.0, pytest.approx(100 * 2.2 / 4.2, abs=1e-3)),
    ]
    (line,) = drawn.lines
    assert [dot[:2] for dot in line.dots] == [(fixed(x), fixed(y)) for x, y in points(drawn, "first")]
    assert line.dots[1][2] == "c0, epoch 2: 4"


def test_a_gap_breaks_a_line_and_one_number_alone_is_a_dot() -> None:
    (line,) = drawing(plot((1.0, 2.0, None, 3.0))).lines
    assert [len(run.split()) for run in line.runs] == [2, 1]
    (alone,) = drawing(plot((5.0,))).lines
    assert [x for x, _, _ in alone.dots] == ["50"]


def test_curves_share_one_scale_and_the_places_that_they_are_of() -> None:
    one, two = Curve("a", (1.0, 2.0), (1.0, 1.0)), Curve("b", (1.0, 5.0), (0.0, 2.0))
    drawn = drawing(Plot("w", "", "epoch", "", (one, two), single=False))
    assert [x for x, _ in points(drawn, "first")] == [0.0, 25.0]
    assert points(drawn, "first")[0][1] == pytest.approx(
        sum(y for _, y in points(drawn, "second")) / 2, abs=0.01
    )


def test_of_many_lines_those_that_change_most_have_names_and_the_others_are_grey(tmp_path: Path) -> None:
    layers = {f"l{i}": [0.0, float(i)] for i in range(20)}
    report = recorded(x={"layers": layers})
    page = html_of(report, tmp_path)
    check_page(page)
    drawn = [p["class"].split()[0] for p in parts(section(report), "polyline")]
    assert drawn == ["other"] * 12 + list(SERIES)
    (legend,) = re.findall(r'<p class="legend">((?:(?!</p>).)*key.*?)</p>', page, re.S)
    assert re.findall(r"</svg>(.*?)</span>", legend) == [
        *(f"l{i}" for i in range(12, 20)),
        "12 others, which change less",
    ]


def test_long_curves_have_no_dots_and_a_table_of_some_of_their_numbers() -> None:
    report = recorded(training={"losses": [float(i) for i in range(200)]})
    markup = section(report)
    assert parts(markup, "circle") == []
    headings = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', markup)
    assert headings[:2] == ["epoch", "1"] and headings[-1] == "200" and len(headings) == 13
    cells = re.findall(r'<td class="number">(.*?)</td>', markup)
    assert cells == [str(int(at) - 1) for at in headings[1:]]


def test_a_page_with_every_method_s_record_is_whole_and_every_drawing_has_words(tmp_path: Path) -> None:
    report = replace(sample(), history=history(layers=30, n=12))
    page = html_of(report, tmp_path)
    parsed = check_page(page)
    text = " ".join(parsed.text)
    for said in (
        "How the choice came about",
        "the validation accuracy fell by more than 2 points",
        "Regrown",
    ):
        assert said in text
    charts = [a for t, a in parsed.seen if t == "svg" and a.get("class") == "chart"]
    assert len(charts) == 1 + 3 + 3 + 4 + 2
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert page.count("<summary>Numbers: ") == 3 + 2 + 2 + 1
    assert stage.load(tmp_path) == report
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- stopped: the validation accuracy fell by more than 2 points" in written
    assert "| Regrown |  | 5 k | 600 | 5 k | 600 |" in written
    assert written.count("<details>") == written.count("</details>")


def test_no_name_of_a_record_becomes_markup(tmp_path: Path) -> None:
    report = recorded(**{EVIL: {EVIL: {EVIL: [1.0, 2.0]}, "fact": EVIL, "list": [1.0]}})
    page = html_of(report, tmp_path)
    check_page(page)
    assert "<script" not in page and "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8")


NUMBERS = st.one_of(st.none(), st.integers(-(10**320), 10**320), st.floats())
RECORDS = st.dictionaries(
    st.sampled_from(["iterations", "epochs", "layers", "accuracy", "kept", "x"]),
    st.one_of(
        st.lists(NUMBERS, max_size=5),
        st.dictionaries(st.text(max_size=3), st.lists(NUMBERS, max_size=5)),
        ODD,
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["pqi", "dnr", "other"]), st.one_of(RECORDS, ODD)))
def test_any_record_is_drawn_or_left_out_but_never_a_crash(record: dict[str, Any]) -> None:
    report = recorded(**record)
    markup = section(report)
    check_page(markup)
    for line in parts(markup, "polyline"):
        corners = [tuple(float(v) for v in corner.split(",")) for corner in line["points"].split()]
        assert all(-0.01 <= v <= 100.01 for corner in corners for v in corner)
    for found in chapters(report):
        assert all(len(row) == 6 for row in summary_rows(found))


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(3, 9))
def test_ticks_are_few_round_and_inside(low: float, span: float, most: int) -> None:
    low, high = widen(low, low + span, 0.05)
    found = ticks(low, high, most)
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert 1 <= len(found) <= most
    assert all(low - slack <= tick <= high + slack for tick in found)


@pytest.mark.parametrize(
    ("metric", "budget", "text"),
    [
        ("latency_p50", 0.000189, "189 us"),
        ("latency_p99", 5e-3, "5 ms"),
        ("latency_p50", 10**400, str(10**400)),
        ("latency_p50", "soon", "soon"),
        ("unknown", 0.5, "0.5"),
    ],
)
def test_a_budget_is_shown_in_the_unit_of_its_metric(metric: str, budget: Any, text: str) -> None:
    found = dict(chapter("latency", predicted=[1e-3], measured=[1e-3], metric=metric, budget=budget).facts)
    assert found == {"metric": metric, "budget": text}
