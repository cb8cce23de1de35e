"""A verdict as text for people, JSON for programs, Markdown for pull requests and JUnit XML for CI servers."""

import json
import re
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from edgeprune import serialization
from edgeprune.quantities import check_choice, show
from edgeprune.records import METRICS, Check, Verdict

FORMATS = ("text", "json", "markdown", "junit")
WORDS = {0: "PASS", 1: "FAIL", 8: "INCONCLUSIVE"}
MARKS = {"pass": "✅", "fail": "❌", "missing": "⚠️", "inconclusive": "⚠️"}
ADVICE = {
    "macs": "compress further",
    "params": "compress further",
    "weight_density": "compress further",
    "param_density": "compress further",
    "compressed_size": "compress further",
    "size": "compress further or export at a lower precision",
    "peak_memory": "compress further or export at a lower precision",
    "clean_accuracy": "keep more, or tune for more epochs",
    "robust_accuracy": "keep more, or tune with an adversarial objective",
    "agreement": "keep more, or tune for more epochs",
}
FASTER = "compress further, with this limit as a budget of edgeprune compress"
# What XML 1.0 can't hold, halves of surrogate pairs included.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def render(verdict: Verdict, format: str) -> str:  # noqa: A002 - the word of the command line
    """The verdict in one of FORMATS, without a newline at the end."""
    writers: dict[str, Callable[[Verdict], str]] = {
        "text": _text,
        "json": lambda found: json.dumps(serialization.to_json(found), indent=1, allow_nan=False),
        "markdown": _markdown,
        "junit": _junit,
    }
    check_choice("format", format, FORMATS)
    return writers[format](verdict)


def _text(verdict: Verdict) -> str:
    rows = [
        (
            c.status.upper() if c.status != "pass" else c.status,
            c.metric,
            _shown(c, c.value),
            _limit(c),
            _margin(c),
        )
        for c in verdict.checks
    ]
    words, metrics, values, limits = ([row[i] for row in rows] for i in range(4))
    lines: list[str] = []
    for check, (word, metric, value, limit, margin) in zip(verdict.checks, rows, strict=True):
        start = f"  {word:{_widest(words)}}  {metric:{_widest(metrics)}}  {value:>{_widest(values)}}"
        lines.append(f"{start}  limit {limit:{_widest(limits)}}  {margin}".rstrip())
        if check.detail:
            lines.append(f"  {'':{_widest(words)}}  {_line(check.detail)}")
    lines += [f"note: {_line(note)}" for note in verdict.notes]
    advice = [line for check in verdict.checks for line in _advice(check)]
    last = f"gate: {WORDS[verdict.exit_code]} ({_tally(verdict)})"
    return "\n".join([*lines, *(["", *advice] if advice else []), "", last])


def _markdown(verdict: Verdict) -> str:
    # The comment on the first line lets a CI job find its own pull-request comment and update it.
    lines = [
        "<!-- edgeprune-gate -->",
        f"### edgeprune gate: {WORDS[verdict.exit_code].lower()} ({_tally(verdict)})",
        "",
    ]
    lines += ["| | metric | value | limit | margin | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for c in verdict.checks:
        cells = (MARKS[c.status], c.metric, _shown(c, c.value), _limit(c), _margin(c), _detail(c))
        lines.append("| " + " | ".join(_plain(cell) or " " for cell in cells) + " |")
    notes = [_plain(note) for note in verdict.notes]
    notes += [_plain(line) for check in verdict.checks for line in _advice(check)]
    return "\n".join([*lines, *([""] if notes else []), *[f"- {note}" for note in notes]])


def _junit(verdict: Verdict) -> str:
    failures = sum(c.status == "fail" for c in verdict.checks)
    errors = sum(c.status in ("missing", "inconclusive") for c in verdict.checks)
    counts = {"tests": str(len(verdict.checks)), "failures": str(failures), "errors": str(errors)}
    root = ElementTree.Element("testsuites", {"name": "edgeprune gate", **counts})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": "edgeprune gate", **counts, "skipped": "0", "time": "0"}
    )
    for check in verdict.checks:
        name = _xml(f"{check.metric} {check.limit}")
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "edgeprune.gate", "name": name, "time": "0"}
        )
        text = _xml(
            f"{_shown(check, check.value)}, limit {_limit(check)}, {_detail(check) or _margin(check)}"
        )
        if check.status == "pass":
            ElementTree.SubElement(case, "system-out").text = text
            continue
        tag = "failure" if check.status == "fail" else "error"
        missed = tag == "failure" and (check.margin is None or check.margin < 0)
        message = _xml(_margin(check) if missed else _detail(check))
        ElementTree.SubElement(case, tag, {"type": check.status, "message": message}).text = text
    if verdict.notes:
        ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(verdict.notes))
    ElementTree.indent(root, " ")
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'


def _widest(texts: Sequence[str]) -> int:
    return max(len(text) for text in texts)


def _detail(check: Check) -> str:
    if check.status in ("pass", "fail"):
        return check.detail
    return f"{check.status}: {check.detail}" if check.detail else check.status


def _shown(check: Check, value: float | None) -> str:
    return show(value, METRICS[check.metric].unit)


def _limit(check: Check) -> str:
    threshold = _shown(check, check.threshold)
    relative = check.limit.endswith("pp") or (
        check.limit.endswith("%") and METRICS[check.metric].unit != "fraction"
    )
    limit = _line(check.limit)
    return f"{limit} = {threshold}" if relative and check.threshold is not None else limit


def _margin(check: Check) -> str:
    if check.margin is None or check.threshold is None:
        return ""
    if check.margin == 0:
        return "exactly met"
    info = METRICS[check.metric]
    size, sign = abs(check.margin), "to spare"
    if check.margin < 0:
        sign = "over" if info.less_is_better else "short"
    if info.unit == "fraction":
        return f"{_points(100 * size)} pp {sign}"
    share = f" ({_points(100 * size / abs(check.threshold))} %)" if check.threshold else ""
    return f"{show(size, info.unit)} {sign}{share}"


def _points(percent: float) -> str:
    """At least two figures of a small number, so that a missed limit is never missed by 0."""
    return f"{percent:.2f}" if percent >= 0.01 else f"{percent:.1e}"


def _advice(check: Check) -> list[str]:
    if check.status == "fail":
        do = ADVICE.get(check.metric, FASTER)
        return [f"To meet {check.metric}: {do}; or allow it {_shown(check, check.value)} in the budget."]
    if check.status == "missing":
        return [
            f"To decide {check.metric}: give the run what it needs to take that reading, or drop the limit."
        ]
    if check.status == "inconclusive":
        more = (
            "measure on more images"
            if METRICS[check.metric].unit == "fraction"
            else "measure longer, on an idle machine"
        )
        where = "measure both on the same machine" if "not comparable" in check.detail else more
        if "estimate" in check.detail:
            where = "measure it on the device itself (--device): no measurement here says how far off the estimate is"
        return [f"To decide {check.metric}: {where}."]
    return []


def _tally(verdict: Verdict) -> str:
    names = {"pass": "met", "fail": "missed", "missing": "without a reading", "inconclusive": "undecided"}
    counts = {status: sum(c.status == status for c in verdict.checks) for status in names}
    return ", ".join(f"{count} {names[status]}" for status, count in counts.items() if count) or "no limits"


def _line(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    text = _xml(_line(text)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*|\[\]~])", r"\\\1", text)


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
