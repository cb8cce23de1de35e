"""report.html: safe, legible, without a network, and its plots are drawn to scale."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import EVIL, check_page, html_of, layer, parts, reading, sample

from edgeprune.errors import visible
from edgeprune.records import REPORT_SCHEMA, Reading, Report
from edgeprune.report import page as page_module
from edgeprune.report.page import escape_html
from edgeprune.report.plots import CURVE_POINTS, SERIES

CSS = (Path(page_module.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")


def palette_after(start: str) -> dict[str, str]:
    """The color of each variable in the first block after `start`."""
    block = CSS[CSS.index(start) :].partition("}")[0]
    return dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", block))


LIGHT, DARK = palette_after(":root {"), palette_after("@media(prefers-color-scheme:dark)")


def bars(*numbers: tuple[float | None, float | None]) -> str:
    """The section of the page with the channels of layers, each before and after."""
    rows = [{"layer": f"l{i}", "channels_before": a, "channels_after": b} for i, (a, b) in enumerate(numbers)]
    text = page_module.page(replace(sample(), layers=tuple(rows)), [])
    return text[text.index("Channels kept in each layer") : text.index('<div class="two">')]


def widths(section: str) -> list[tuple[str, str]]:
    drawings = re.findall(r'<svg width="100%".*?</svg>', section, re.S)
    return [(rect["class"], rect["width"]) for rect in parts("".join(drawings), "rect")]


def distribution(samples: dict[str, list[float]]) -> str:
    """What the page draws of times."""
    times = {name: tuple(values) for name, values in samples.items()}
    text = page_module.page(replace(sample(), samples=times), [])
    return text[text.index('<div class="axes">') : text.index("<section><h2>Channels")].rpartition(
        "</section>"
    )[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(sample(target="jetson-orin-nano"), tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("layers", [0, 1, 3, 24, 25, 161])
@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("labeled", [True, False])
def test_the_page_is_whole_for_many_layers_and_few_and_with_parts_missing(
    tmp_path: Path, layers: int, timed: bool, labeled: bool
) -> None:
    page = html_of(sample(layers=layers, timed=timed, labeled=labeled), tmp_path)
    parsed = check_page(page)
    text = " ".join(parsed.text)
    assert ("This report holds no single times" in text) is not timed
    assert ("No accuracies were taken" in text) is not labeled
    assert ("This report has no time of single layers" in text) is (layers > 0 and not timed)
    assert ('class="skyline"' in page) is (layers > 24)
    bars = [a for t, a in parsed.seen if t == "svg" and (a.get("aria-label") or "").startswith("layer")]
    assert len(bars) == layers * (3 if timed else 2)


def test_a_report_with_nothing_in_it_is_still_a_page(tmp_path: Path) -> None:
    page = html_of(Report(REPORT_SCHEMA, {}, {}, (), ()), tmp_path)
    check_page(page)
    assert "This report has no readings." in page
    assert "model" in page


def test_a_command_in_a_note_is_set_as_code(tmp_path: Path) -> None:
    notes = ("See `edgeprune why <MODEL>` and this.", "An odd ` stays.")
    page = html_of(replace(sample(), notes=notes), tmp_path)
    assert "See <code>edgeprune why &lt;MODEL&gt;</code> and this." in page
    assert "An odd ` stays." in page


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    tags = {tag for tag, _ in check_page(page).seen}
    assert tags.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "image", "use"}
    )
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=|href=|javascript:|\son[a-z]+=", page)
    assert "default-src &#x27;none&#x27;" in page


@pytest.mark.parametrize(
    "text", [EVIL, '"><img src=x onerror=alert(1)>', "'];x", "</style><b>", "&lt;b&gt;", "\x00\x1b\ud800"]
)
def test_every_string_of_a_report_shows_as_itself_and_runs_nowhere(tmp_path: Path, text: str) -> None:
    evil = {"why": text, "stage": text, text: text}
    report = replace(
        sample(),
        recipe={"target": text, "model": {"path": text}, "prune": {"method": text}, text: text},
        environment={text: text, "versions": {"edgeprune": text}},
        before=(
            reading("macs", 1.0, text, where=text, conditions=evil),
            reading("size", None, text, conditions=evil),
        ),
        after=(Reading(text, 1.0, text, 1, None, text, text, evil), reading("latency_p50", 1.0, where=text)),
        ledger=(reading("clean_accuracy", 0.5, text, conditions=evil),),
        layers=({**layer(0, True), "layer": text, "op": text, "why_kept": text},),
        notes=(text,),
        left_out={text: text},
    )
    page = html_of(report, tmp_path)
    parsed = check_page(page)
    plain = {tag for tag, _ in check_page(html_of(sample(), tmp_path)).seen}
    assert {tag for tag, _ in parsed.seen} <= plain | {"ul", "li"}
    assert all(not key.startswith("on") for _, attributes in parsed.seen for key in attributes)
    assert "".join(parsed.text).count(visible(text)) >= 12


@given(st.text())
def test_text_put_into_the_page_comes_out_again(text: str) -> None:
    made = escape_html(text)
    back = ElementTree.fromstring(f'<p title="{made}">{made}</p>')
    assert (back.text or "") == re.sub("[\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", visible(text))


def test_tables_have_headings_and_drawings_have_words(page: str) -> None:
    parsed = check_page(page)
    tables = re.findall(r"<table.*?</table>", page, re.S)
    assert len(tables) >= 7
    assert all(t.count("<caption>") == 1 and 'scope="col"' in t and 'scope="row"' in t for t in tables)
    outer = [a for t, a in parsed.seen if t == "svg" and a.get("preserveaspectratio") is None]
    assert outer
    assert all(a.get("role") == "img" and a.get("aria-label") for a in outer)
    assert page.count('lang="en"') == 1
    assert page.count("<h1>") == 1
    assert "width=device-width" in page


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out_in_both_palettes(palette: dict[str, str]) -> None:
    """WCAG 2.2 asks for 4.5 of text and for 3 of the marks of a drawing."""
    for name in ("ink", "muted", "good", "bad"):
        assert contrast(palette[name], palette["ground"]) >= 4.5, name
    assert contrast(palette["ink"], palette["raised"]) >= 4.5
    for name in ("dense", "compressed", *SERIES):
        assert contrast(palette[name], palette["ground"]) >= 3.0, name


def test_every_color_of_the_style_is_one_of_the_palette() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert set(re.findall(r"var\(--([a-z]+)\)", CSS)) - {"numbers"} == set(LIGHT)
    assert palette_after(":root[data-theme=dark]") == DARK
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", CSS)) == set(LIGHT.values()) | set(DARK.values())
    assert "prefers-color-scheme:dark" in CSS
    assert CSS.count("{") == CSS.count("}")


# ------------------------------------------------------------------------------------------------------ the plots


def test_bars_are_drawn_to_one_scale() -> None:
    assert widths(bars((64, 32), (16, 0), (None, 8), (0.01, 64))) == [
        ("dense", "100%"),
        ("compressed", "50%"),
        ("dense", "25%"),
        ("compressed", "0%"),
        ("compressed", "12.5%"),
        ("dense", "0.5%"),
        ("compressed", "100%"),
    ]


def test_bars_without_any_length_are_drawn_all_the_same() -> None:
    assert widths(bars((0, 0))) == [("dense", "0%"), ("compressed", "0%")]


def test_the_skyline_has_one_column_a_layer_as_high_as_its_number() -> None:
    section = bars((100, 25), (50, 50), *[(10, 10)] * 23)
    (skyline,) = re.findall(r'<svg class="skyline".*?</svg>', section, re.S)
    assert [(r["x"], r["y"], r["height"]) for r in parts(skyline, "rect")][:4] == [
        ("0", "0", "100"),
        ("0", "75", "25"),
        ("1", "50", "50"),
        ("1", "50", "50"),
    ]


def test_the_distribution_marks_the_median_where_it_lies() -> None:
    # 101 times from 100 to 200 ms: p90 is 190 and p99 is 199, so the axis runs from 100 - 4.95 to 199 + 4.95 ms.
    markup = distribution({"dense": [(100 + i) / 1000 for i in range(101)]})
    (dot,) = parts(markup, "circle")
    low, high = 0.1 - 0.05 * 0.099, 0.199 + 0.05 * 0.099
    assert float(dot["cx"].rstrip("%")) == pytest.approx(100 * (0.150 - low) / (high - low), abs=1e-3)
    assert "dense: median 150 ms of 101 times" in markup
    assert [t for t in re.findall(r">(\d+) ms<", markup)] == ["100", "125", "150", "175", "200"]


def test_the_median_of_an_even_number_of_times_is_one_of_them() -> None:
    assert "dense: median 200 ms of 4 times" in distribution({"dense": [0.1, 0.2, 0.3, 0.4]})


def test_the_curve_rises_from_none_to_all() -> None:
    markup = distribution({"dense": [0.1, 0.2, 0.3, 0.4], "compressed": [0.1] * 1000})
    for line in parts(markup, "polyline"):
        points = [tuple(float(v) for v in p.split(",")) for p in line["points"].split()]
        assert points[0] == (0, 100)
        assert points[-1] == (100, 0)
        assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in pairwise(points))
        assert len(points) <= 2 * CURVE_POINTS + 4


def test_a_long_tail_is_cut_from_the_drawing_and_said() -> None:
    markup = distribution({"dense": [0.010] * 995 + [1.0] * 5, "compressed": [0.005] * 1000})
    assert "not drawn: 5 of 1000 dense times." in markup


@given(st.lists(st.floats(0, 1e6, exclude_max=True), min_size=1, max_size=20), st.booleans())
def test_any_times_can_be_drawn_with_readable_ticks(times: list[float], one_sided: bool) -> None:
    ordered = sorted(times)
    markup = distribution({"compressed": ordered} if one_sided else {"dense": ordered, "compressed": [0.0]})
    assert "nan" not in markup
    ticks = [t for t in parts(markup, "text") if t["text-anchor"] == "middle"]
    assert 1 <= len(ticks) <= 6
    assert all(-0.01 <= float(t["x"].rstrip("%")) <= 100.01 for t in ticks)


def test_the_ledger_s_dots_lie_inside_their_intervals(tmp_path: Path) -> None:
    page = html_of(sample(), tmp_path)
    table = re.search(r"<h3>clean_accuracy</h3>(.*?)</table>", page, re.S)
    assert table
    drawings = re.findall(r"<svg.*?</svg>", table.group(1), re.S)
    assert len(drawings) == 4
    for drawing in drawings:
        (dot,) = parts(drawing, "circle")
        whisker = next(line for line in parts(drawing, "line") if line["class"] == "whisker")
        low, middle, high = (float(v.rstrip("%")) for v in (whisker["x1"], dot["cx"], whisker["x2"]))
        assert 0 <= low < middle < high <= 100
        assert middle - low == pytest.approx(high - middle, abs=0.01)


def test_accuracies_on_other_images_are_drawn_apart(tmp_path: Path) -> None:
    report = sample()
    few = replace(report.ledger[-1], n=100, value=0.5, spread=(0.4, 0.6))
    page = html_of(replace(report, ledger=(*report.ledger, few)), tmp_path)
    assert "<h3>clean_accuracy, 100 images</h3>" in page
    assert f"<h3>clean_accuracy, {report.ledger[-1].n} images</h3>" in page
    assert "<h3>clean_accuracy</h3>" not in page
    assert page.index("clean_accuracy, 100 images</h3>") < page.index("Time of one image")
