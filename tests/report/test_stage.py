"""The report: it reads back, a bad report.json is refused, and what terminal and Markdown say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import (
    EVIL,
    HERE,
    ODD,
    ZEROS,
    check_page,
    history,
    html_of,
    layer,
    leaves,
    pruned_weights,
    put,
    reading,
    sample,
)
from rich.console import Console

from edgeprune import serialization
from edgeprune.cli import tables
from edgeprune.errors import UsageError
from edgeprune.models.costs import LayerCost
from edgeprune.records import REPORT_SCHEMA, Report
from edgeprune.report import stage
from edgeprune.report.assembly import SPARSE_NOTE, layers, sparse_notes

SMALL = sample(layers=2)
SMALL = replace(
    SMALL,
    samples={k: v[:5] for k, v in SMALL.samples.items()},
    history={"pqi": history(layers=2, n=3)["pqi"]},
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    stage.run(sample(target="jetson-orin-nano"), folder)
    return folder


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
        ("[" * 100000, "nested deeper"),
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
        ('"value": 141322', '"value": NaN', "NaN is not a finite number"),
        ('"value": 141322', '"value": 1e999', "1e999 is not a finite number"),
        ('"value": 141322', f'"value": 1{"0" * 400}', "a whole number of 401 digits"),
        ('"value": 141322', '"value": "141322"', "value must be a float"),
        ('"value": 141322', '"value": true', "value must be a float"),
        ('"n": 2000', '"n": -1', r"ledger\[0\]: clean_accuracy of .*n = -1"),
        ('"n": 2000', f'"n": 1{"0" * 30}', r"ledger\[0\]: clean_accuracy of .*n = 1000"),
        ('"metric": "params"', '"metric": "size", "metric": "params"', "'metric' stands twice"),
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
    stage.run(replace(report, after=(reading("latency_p50", 1.0, spread=(0.5, 1.0)),)), tmp_path)
    file = tmp_path / "report.json"
    file.write_text(file.read_text().replace("0.5", "1.5"))
    with pytest.raises(UsageError, match=r"after\[0\]: .*spread must be \(low, high\)"):
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


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_report_is_refused_or_shown_but_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    document = serialization.to_json(SMALL)
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
    Console(file=StringIO()).print(tables.report_table(report))
    assert all(isinstance(line, str) for line in stage.summary_lines(report))


# ------------------------------------------------------------------------------------------ terminal and Markdown


def shown(report: Report) -> str:
    out = StringIO()
    Console(file=out, width=120).print(tables.report_table(report))
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
        "Clean accuracy 91.68 % of 1000 held-out images, dense 92.10 % (-0.42 pp).",
        "Nothing has been measured on jetson-orin-nano yet.",
    ]


def test_the_summary_says_plainly_what_is_not_faster_and_what_is_unknown() -> None:
    slow = replace(sample(), after=(reading("latency_p50", 1e-3, spread=(0.9e-3, 1.1e-3)),))
    assert (
        f"NOT faster (1.32x slower): median 760 us before, 1 ms after, measured on {HERE}."
        in stage.summary_lines(slow)
    )
    same = replace(sample(), after=(reading("latency_p50", 7.6e-4, spread=(7e-4, 8e-4)),))
    assert any(line.startswith("NOT shown to be faster (within noise)") for line in stage.summary_lines(same))
    near = replace(sample(), after=(reading("latency_p50", 7.6e-4, spread=(7.55e-4, 7.65e-4)),))
    assert any(line.startswith("NOT faster (within noise)") for line in stage.summary_lines(near))
    few = replace(sample(), after=(reading("latency_p50", 3.8e-4),))
    assert any(
        line.startswith("Not known to be faster (2.00x, uncertain:") for line in stage.summary_lines(few)
    )
    busy = replace(same, after=(replace(same.after[0], conditions={"contended": True}),))
    assert any(f"measured on {HERE} while other work ran on it" in line for line in stage.summary_lines(busy))
    blind = stage.summary_lines(sample(timed=False, labeled=False))
    assert "Speed is unknown: no latency was measured." in blind
    assert "Accuracy is unknown: the compressed model was not tried on labeled images." in blind


def test_what_the_run_s_notes_say_with_a_reason_is_not_said_twice() -> None:
    notes = ("Speed: NOT faster, because the layers are small.", "No accuracy was measured: no images.")
    lines = stage.summary_lines(replace(sample(labeled=False), notes=notes))
    assert len(lines) == 3
    # Who reads one line only must read that it is not faster.
    assert (lines[0], lines[2]) == notes


def test_the_summary_opens_with_what_zeros_are_good_for_and_says_it_once(tmp_path: Path) -> None:
    report = pruned_weights()
    lines = stage.summary_lines(report)
    assert lines[0].endswith("compressed file size -77.7 %.")
    assert lines[1] == ZEROS and lines.count(ZEROS) == 1
    page = html_of(report, tmp_path)
    assert page.count(ZEROS) == (tmp_path / "report.md").read_text(encoding="utf-8").count(ZEROS) == 1
    assert "Read this first" not in page
    # The first things to see are those that changed.
    assert re.findall(r"<dt>(.*?)</dt>", page) == [
        "params",
        "compressed_size",
        "latency_p50",
        "clean_accuracy",
    ]
    assert stage.load(tmp_path) == report


def test_the_note_on_zeros_promises_no_speed_and_knows_where_times_were_taken() -> None:
    local = [reading("latency_p50", 1e-3, conditions={"runtime": "onnxruntime 1.27.0"})]
    jetson = [reading("latency_p50", 1e-3, conditions={"runtime": "TensorRT 10.3.0"})]
    assert sparse_notes("channel", local) == []
    (weight,), (pattern,) = sparse_notes("weight", local), sparse_notes("2:4", local)
    assert weight.startswith(SPARSE_NOTE) and pattern.startswith(SPARSE_NOTE)
    assert all("not faster on a CPU" in note and "dense" in note for note in (weight, pattern))
    assert "TensorRT" not in weight
    assert pattern.endswith("TensorRT's sparse kernels can use this pattern; nothing was timed there.")
    assert sparse_notes("2:4", jetson)[0].endswith("can use this pattern.")


def test_layers_count_what_is_not_zero_where_weights_were_pruned(tmp_path: Path) -> None:
    row = LayerCost("conv", "Conv2d", 8, 224, 1000, (3, 3))
    (plain,) = layers([row], [row], {}, {})
    assert "nonzero_after" not in plain
    (counted,) = layers([row], [row], {}, {}, nonzero={"dense": {"conv": 216}, "compressed": {"conv": 20}})
    assert (counted["nonzero_before"], counted["nonzero_after"]) == (216, 20)
    stage.run(replace(sample(), layers=(counted,)), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| layer | operator | channels | parameters | non-zero weights | macs |" in text
    assert "| conv | Conv2d | 8 -> 8 | 224 -> 224 | 216 -> 20 | 1000 -> 1000 |" in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Weights that are not zero in each layer" in page and "20 of 216" in page
    assert "Weights that are not zero" not in html_of(sample(), tmp_path)


def test_a_report_of_an_earlier_version_reads_as_one_without_a_history(tmp_path: Path) -> None:
    stage.run(sample(), tmp_path)
    file = tmp_path / "report.json"
    data = json.loads(file.read_text())
    del data["history"]
    file.write_text(json.dumps(data))
    assert stage.load(tmp_path) == sample() and stage.load(tmp_path).history == {}
    assert "How the choice came about" not in html_of(sample(), tmp_path)


def test_markdown_holds_the_table_the_ledger_the_notes_and_the_layers(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# resnet20.pt for jetson-orin-nano\n")
    assert "| macs | 41.2 M | 20.6 M | -50.0 % | counted |" in text
    assert "| energy | - | - | - | not available: no power sensor |" in text
    assert "| cut | clean_accuracy | 41.00 % (39.8 to 42.2) | 2000 | measured on local x86_64 |" in text
    assert "- Nothing has been measured on jetson-orin-nano yet." in text
    assert "| layer0.0.conv | Conv2d | 16 -> 8 | 2304 -> 576 |" in text
    assert "| versions.torch | 2.13.0 |" in text
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
