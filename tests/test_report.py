"""The report: what its three forms say, that the page is safe and legible, and that a bad report.json is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from edgeprune.errors import UsageError
from edgeprune.records import METRICS, REPORT_SCHEMA, Reading, Report
from edgeprune.stages import report as stage
from edgeprune.stages.report_css import CSS, DARK, LIGHT
from edgeprune.stages.report_markup import Markup, element, escape
from edgeprune.stages.report_plots import CURVE_POINTS, Bar, distribution, paired_bars, skyline
from edgeprune.stages.report_rows import change, comparison, facts, number_in

HERE = "local x86_64"
EVIL = '<script>alert("x")</script>'


def reading(metric: str, value: float | None, artifact: str = "compressed", **changes: Any) -> Reading:
    counted = metric in ("params", "macs", "size")
    base = Reading(
        metric, value, METRICS[metric].unit, 200, None, "counted" if counted else HERE, artifact, {}
    )
    return replace(base, **changes)


def spread(value: float, half: float) -> tuple[float, float]:
    return (value - half, value + half)


def side(artifact: str, values: dict[str, float | None]) -> tuple[Reading, ...]:
    noisy = ("latency_p50", "latency_p90", "latency_p99", "clean_accuracy")
    made = []
    for metric, value in values.items():
        interval = spread(value, 0.01 * value) if value is not None and metric in noisy else None
        why = {} if value is not None else {"why": "no power sensor"}
        made.append(reading(metric, value, artifact, spread=interval, conditions=why))
    return tuple(made)


def layer(i: int, timed: bool) -> dict[str, Any]:
    wide = 16 * (1 + i // 8)
    kept = wide // 2
    row: dict[str, Any] = {"layer": f"layer{i // 8}.{i % 8}.conv", "op": "Conv2d", "why_kept": ""}
    for name, before, after in (("channels", wide, kept), ("params", 9 * wide * wide, 9 * kept * kept)):
        row |= {f"{name}_before": before, f"{name}_after": after}
    row |= {
        "macs_before": 9e5 * wide,
        "macs_after": 9e5 * kept,
        "size_before": 36 * wide,
        "size_after": 36 * kept,
    }
    times = (1e-6 * wide, 6e-7 * wide) if timed else (None, None)
    return row | {"time_before_s": times[0], "time_after_s": times[1]}


def sample(*, layers: int = 20, timed: bool = True, labeled: bool = True, target: str = "local") -> Report:
    """A report as a run of a small residual network gives it."""
    counts = (
        {"params": 272474, "macs": 41.2e6, "size": 1117214},
        {"params": 141322, "macs": 20.6e6, "size": 589312},
    )
    speed = ("latency_p50", "latency_p90", "latency_p99")
    times = (dict.fromkeys(speed), dict.fromkeys(speed))
    if timed:
        times = (
            dict(zip(speed, (7.6e-4, 8.5e-4, 1.1e-3), strict=True)),
            dict(zip(speed, (4.7e-4, 5e-4, 8e-4), strict=True)),
        )
    accuracy = (0.921, 0.9168) if labeled else (None, None)
    before = side("dense", {**counts[0], **times[0], "energy": None, "clean_accuracy": accuracy[0]})
    after = side("compressed", {**counts[1], **times[1], "energy": None, "clean_accuracy": accuracy[1]})
    stages = (("dense", 0.921), ("cut", 0.41), ("batch-norm", 0.86), ("tuned", 0.917))
    taken = [reading("clean_accuracy", v, name, spread=spread(v, 0.012), n=2000) for name, v in stages]
    runs = {
        name: tuple(base * (1 + 0.001 * (i * 37 % 101)) for i in range(200))
        for name, base in (("dense", 7e-4), ("compressed", 4e-4))
    }
    return Report(
        schema=REPORT_SCHEMA,
        recipe={
            "target": target,
            "seed": 0,
            "model": {"path": "models/resnet20.pt"},
            "prune": {"method": "taylor"},
        },
        environment={"edgeprune": "0.1.0", "cpu": "some CPU", "packages": {"torch": "2.13.0"}},
        before=before,
        after=after,
        ledger=tuple(taken) if labeled else (),
        layers=tuple(layer(i, timed) for i in range(layers)),
        samples=runs if timed else {},
        notes=("Nothing has been measured on jetson-orin-nano yet.",) if target != "local" else (),
        left_out={"conv1": "it reads the image"},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    stage.run(sample(target="jetson-orin-nano"), folder)
    return folder


def html_of(report: Report, tmp_path: Path) -> str:
    stage.run(report, tmp_path)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- reading it back


def test_a_written_report_reads_back_as_the_same_record(written: Path) -> None:
    assert stage.load(written) == sample(target="jetson-orin-nano")
    assert stage.load(written / "report.json") == stage.load(written)
    assert sorted(p.name for p in written.iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_report_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such run directory or report: .*nowhere"):
        stage.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has no report\.json") as caught:
        stage.load(tmp_path)
    assert "resume" in caught.value.hint
    with pytest.raises(UsageError, match="can't be read"):
        stage.load(tmp_path / ("x" * 5000))


def test_another_schema_is_refused_naming_both(tmp_path: Path) -> None:
    stage.run(sample(), tmp_path)
    file = tmp_path / "report.json"
    file.write_text(file.read_text().replace(REPORT_SCHEMA, "edgeprune.report/9"))
    with pytest.raises(UsageError) as caught:
        stage.load(tmp_path)
    assert "'edgeprune.report/9'" in caught.value.message
    assert repr(REPORT_SCHEMA) in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "Expecting value"),
        ("[]", "no schema"),
        ("{}", "no schema"),
        ('{"schema": 1}', "no schema"),
        ("PK\x03\x04", "Expecting value"),
        ("[" * 100000, "recursion"),
        ('{"schema": ' + "[" * 100 + "]" * 100 + "}", "nested deeper"),
        (f'{{"schema": "{REPORT_SCHEMA}"}}', "recipe"),
        (f'{{"schema": "{REPORT_SCHEMA}", "extra": 1}}', "unknown field 'extra'"),
    ],
    ids=["empty", "list", "object", "numbered schema", "zip", "bottomless", "deep", "bare", "unknown field"],
)
def test_a_foreign_file_is_refused_with_the_reason(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=found):
        stage.load(file)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('"value": 141322', '"value": NaN', "must be a finite number"),
        ('"value": 141322', '"value": 1e999', "must be a finite number"),
        ('"value": 141322', f'"value": 1{"0" * 400}', "must be a finite number"),
        ('"value": 141322', '"value": "141322"', "value must be a float"),
        ('"value": 141322', '"value": true', "value must be a float"),
        ('"n": 2000', '"n": -1', r"ledger\[0\]\.n"),
        ('"n": 2000', f'"n": 1{"0" * 30}', r"ledger\[0\]\.n"),
        ('"metric": "params"', '"metric": "\\ud800"', "surrogates"),
        ('"path": "models/resnet20.pt"', '"path": "models/\x01"', "control character"),
    ],
)
def test_a_number_or_text_that_no_report_holds_is_refused(
    tmp_path: Path, old: str, new: str, found: str
) -> None:
    stage.run(sample(), tmp_path)
    file = tmp_path / "report.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=found):
        stage.load(file)


def test_an_interval_upside_down_and_a_negative_time_are_refused(tmp_path: Path) -> None:
    report = sample()
    stage.run(replace(report, after=(reading("latency_p50", 1.0, spread=(2.0, 1.0)),)), tmp_path)
    with pytest.raises(UsageError, match=r"after\[0\]\.spread must be \(low, high\)"):
        stage.load(tmp_path)
    stage.run(replace(report, samples={"dense": (0.1, -0.2)}), tmp_path)
    with pytest.raises(UsageError, match=r"samples\.dense holds a negative time, -0\.2"):
        stage.load(tmp_path)


def test_a_report_cut_off_anywhere_is_refused(written: Path, tmp_path: Path) -> None:
    whole = (written / "report.json").read_bytes().rstrip()
    file = tmp_path / "report.json"
    for end in range(0, len(whole), 50):
        file.write_bytes(whole[:end])
        with pytest.raises(UsageError):
            stage.load(file)


def test_bytes_that_are_no_text_are_refused(written: Path, tmp_path: Path) -> None:
    whole = (written / "report.json").read_bytes()
    for at in range(0, len(whole), 997):
        (tmp_path / "report.json").write_bytes(whole[:at] + b"\xff\xfe" + whole[at + 2 :])
        with pytest.raises(UsageError):
            stage.load(tmp_path)


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(leaf for key, value in inner for leaf in leaves(value, (*path, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = put(data[path[0]], path[1:], value)
    return copy


SMALL = sample(layers=2)
SMALL = replace(SMALL, samples={k: v[:5] for k, v in SMALL.samples.items()})
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**320), 10**320),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.just(EVIL),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_report_is_refused_or_shown_but_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    from edgeprune import codec

    document = codec.to_json(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        document = put(document, data.draw(st.sampled_from(leaves(document))), data.draw(ODD))
    (tmp_path / "report.json").write_text(json.dumps(document))
    try:
        report = stage.load(tmp_path)
    except UsageError:
        return
    page = html_of(report, tmp_path)
    assert "<script" not in page
    check_page(page)
    Console(file=StringIO()).print(stage.terminal(report))
    assert all(isinstance(line, str) for line in stage.summary_lines(report))


# ------------------------------------------------------------------------------------------- what the rows say


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
        ("latency_p50", 0.0162, 0.01, "1.62x faster", True),
        ("latency_p50", 0.01, 0.0131, "1.31x slower", False),
        ("latency_p50", 0.01, 0.01002, "unchanged", None),
        ("latency_p50", 0.0, 0.01, "-", None),
        ("latency_p50", None, 0.01, "-", None),
        ("energy", float("nan"), 0.01, "-", None),
    ],
)
def test_a_change_is_said_in_the_metric_s_own_way(
    metric: str, before: float | None, after: float | None, words: str, better: bool | None
) -> None:
    assert change(reading(metric, before, "dense"), reading(metric, after)) == (words, better)


def test_speed_inside_the_noise_is_no_speed() -> None:
    dense = reading("latency_p50", 0.0100, "dense", spread=(0.0098, 0.0102))
    apart = reading("latency_p50", 0.0096, spread=(0.0095, 0.0097))
    touching = reading("latency_p50", 0.0096, spread=(0.0094, 0.0098))
    assert change(dense, apart) == ("1.04x faster", True)
    assert change(dense, touching) == ("within noise", None)


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
    table = {"a": {"b": {"c": 1}}, "d": [1, 2], "e": "", "f": None, "g": [], "h": False}
    assert facts(table) == [("a.b.c", "1"), ("d", "1, 2"), ("h", "False")]


@pytest.mark.parametrize("value", [None, True, "8", -1, float("inf"), float("nan"), 10**400, [8]])
def test_a_layer_s_number_that_is_none_is_left_out(value: Any) -> None:
    assert number_in({"channels_before": value}, "channels_before") is None
    assert number_in({"channels_before": 8}, "channels_before") == 8.0


# ------------------------------------------------------------------------------------------ terminal and Markdown


def shown(report: Report) -> str:
    out = StringIO()
    Console(file=out, width=120).print(stage.terminal(report))
    return out.getvalue()


def test_the_terminal_shows_each_metric_with_how_and_where() -> None:
    lines = {line.split()[0]: " ".join(line.split()) for line in shown(sample()).splitlines() if line.split()}
    assert lines["macs"] == "macs 41.2 M 20.6 M -50.0 % counted"
    assert lines["latency_p50"] == f"latency_p50 760 us 470 us 1.62x faster measured on {HERE}"
    assert lines["clean_accuracy"] == f"clean_accuracy 92.10 % 91.68 % -0.42 pp measured on {HERE}"


def test_square_brackets_are_text_in_the_terminal() -> None:
    report = replace(sample(), recipe={"target": "[red]x[/red]", "model": {"path": "[bold]m.pt"}})
    assert "[bold]m.pt for [red]x[/red]" in shown(report)


def test_the_summary_says_smaller_faster_and_right_and_then_the_notes() -> None:
    assert stage.summary_lines(sample(target="jetson-orin-nano")) == [
        "Compared with the dense model: multiply-accumulates -50.0 %, parameters -48.1 %, file size -47.3 %.",
        f"1.62x faster: median 760 us before, 470 us after, measured on {HERE}.",
        "Clean accuracy 91.68 % of 200 held-out images, dense 92.10 % (-0.42 pp).",
        "Nothing has been measured on jetson-orin-nano yet.",
    ]


def test_the_summary_says_plainly_what_is_not_faster_and_what_is_unknown() -> None:
    slow = replace(sample(), after=(reading("latency_p50", 1e-3, spread=(0.9e-3, 1.1e-3)),))
    assert (
        f"NOT faster (1.32x slower): median 760 us before, 1 ms after, measured on {HERE}."
        in stage.summary_lines(slow)
    )
    same = replace(sample(), after=(reading("latency_p50", 7.6e-4, spread=(7e-4, 8e-4)),))
    assert any(line.startswith("NOT faster (within noise)") for line in stage.summary_lines(same))
    blind = stage.summary_lines(sample(timed=False, labeled=False))
    assert "Speed is unknown: no latency was measured." in blind
    assert "Accuracy is unknown: the compressed model was not tried on labeled images." in blind


def test_markdown_holds_the_table_the_ledger_the_notes_and_the_layers(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# resnet20.pt for jetson-orin-nano\n")
    assert "| macs | 41.2 M | 20.6 M | -50.0 % | counted |" in text
    assert "| energy | - | - | - | not available: no power sensor |" in text
    assert "| cut | clean_accuracy | 41.00 % (39.8 to 42.2) | 2000 |" in text
    assert "- Nothing has been measured on jetson-orin-nano yet." in text
    assert "| layer0.0.conv | Conv2d | 16 -> 8 | 2304 -> 576 |" in text
    assert "| packages.torch | 2.13.0 |" in text
    assert text.count("<details>") == text.count("</details>") == 5


def test_no_name_breaks_a_markdown_table(tmp_path: Path) -> None:
    name = "a|b\n`c` " + EVIL + " **d** [e](f) \\"
    rows = ({**layer(0, True), "layer": name},)
    stage.run(replace(sample(), layers=rows, recipe={"target": "```", "x": "```"}), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    (line,) = [line for line in text.splitlines() if "Conv2d" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == 9
    assert r"a\|b \`c\` &lt;script>" in line
    assert "\n````json\n" in text


# ------------------------------------------------------------------------------------------------------- the page


VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """The page's elements; fails when a tag is left open or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"{tag} has an attribute twice"
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(page: str) -> Page:
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    # Closed and nested right is more than HTML asks; each drawing is even XML.
    for drawing in re.findall(
        r"<svg class=\"chart.*?</svg></svg>|<svg [^>]*>(?:(?!<svg|</svg>).)*</svg>", page, re.S
    ):
        if drawing.count("<svg") == drawing.count("</svg>"):
            ElementTree.fromstring(drawing)
    return parsed


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


def test_the_page_asks_nothing_of_the_network(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
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
        environment={text: text, "edgeprune": text},
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
    visible = re.sub("[\x00\x1b\ud800]", "\ufffd", text)
    assert "".join(parsed.text).count(visible) >= 12


@given(st.text())
def test_text_put_into_an_element_comes_out_again(text: str) -> None:
    made = element("p", text, title=text)
    back = ElementTree.fromstring(made)
    allowed = re.sub(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]", "\ufffd", text
    )
    assert (back.text or "") == allowed.replace("\r\n", "\n").replace("\r", "\n")
    assert element("p", Markup(escape(text))) == element("p", text)


def test_attributes_that_are_absent_are_left_out() -> None:
    assert element("td", "x", class_=None, title=False, hidden=True) == '<td hidden="">x</td>'
    assert element("meta", http_equiv="a") == '<meta http-equiv="a">'


def test_tables_have_headings_and_drawings_have_words(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
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
    for name in ("dense", "compressed"):
        assert contrast(palette[name], palette["ground"]) >= 3.0, name


def test_every_color_of_the_style_is_one_of_the_palette() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert set(re.findall(r"var\(--([a-z]+)\)", CSS)) - {"numbers"} == set(LIGHT)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", CSS)) == set(LIGHT.values()) | set(DARK.values())
    assert "prefers-color-scheme:dark" in CSS
    assert CSS.count("{") == CSS.count("}")


# ------------------------------------------------------------------------------------------------------ the plots


def parts(markup: str, tag: str) -> list[dict[str, str]]:
    return [e.attrib for e in ElementTree.fromstring(f"<x>{markup}</x>").iter(tag)]


def test_bars_are_drawn_to_one_scale() -> None:
    bars = [
        Bar("a", 64, 32, "32 of 64"),
        Bar("b", 16, 0, "0 of 16"),
        Bar("c", None, 8, "8 of ?"),
        Bar("d", 0.01, 64, ""),
    ]
    drawn = [(r["class"], r["width"]) for r in parts(paired_bars("channels", bars, "kept", ""), "rect")]
    assert drawn == [
        ("dense", "100%"),
        ("compressed", "50%"),
        ("dense", "25%"),
        ("compressed", "0%"),
        ("compressed", "12.5%"),
        ("dense", "0.5%"),
        ("compressed", "100%"),
    ]


def test_bars_without_any_length_are_drawn_all_the_same() -> None:
    assert [r["width"] for r in parts(paired_bars("time", [Bar("a", 0, 0, "")], "time", "s"), "rect")] == [
        "0%",
        "0%",
    ]


def test_the_skyline_has_one_column_a_layer_as_high_as_its_number() -> None:
    drawn = parts(skyline([Bar("a", 100, 25, ""), Bar("b", 50, 50, "")], "channels"), "rect")
    assert [(r["x"], r["y"], r["height"]) for r in drawn] == [
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
    drawings = re.findall(r"<svg.*?</svg>", table.group(1))
    assert len(drawings) == 4
    for drawing in drawings:
        (dot,) = parts(drawing, "circle")
        whisker = next(line for line in parts(drawing, "line") if line["class"] == "whisker")
        low, middle, high = (float(v.rstrip("%")) for v in (whisker["x1"], dot["cx"], whisker["x2"]))
        assert 0 <= low < middle < high <= 100
        assert middle - low == pytest.approx(high - middle, abs=0.01)
