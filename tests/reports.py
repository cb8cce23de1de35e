"""Reports as runs give them, ways to spoil them, and a reader of the page that is stricter than a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hypothesis import strategies as st

from edgeprune.quantities import limit
from edgeprune.records import METRICS, REPORT_SCHEMA, Budget, Check, Reading, Report
from edgeprune.stages import gate
from edgeprune.stages import report as stage

HERE = "local x86_64"
EVIL = '<script>alert("x")</script>'
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
VOID = {"meta", "wbr"}


def reading(metric: str, value: float | None, artifact: str = "compressed", **changes: Any) -> Reading:
    counted = metric in ("params", "macs", "size")
    base = Reading(
        metric, value, METRICS[metric].unit, 1000, None, "counted" if counted else HERE, artifact, {}
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
        environment={"device": {"cpu": "some CPU"}, "versions": {"edgeprune": "0.1.0", "torch": "2.13.0"}},
        before=before,
        after=after,
        ledger=tuple(taken) if labeled else (),
        layers=tuple(layer(i, timed) for i in range(layers)),
        samples=runs if timed else {},
        notes=("Nothing has been measured on jetson-orin-nano yet.",) if target != "local" else (),
        left_out={"conv1": "it reads the image"},
    )


def html_of(report: Report, tmp_path: Path) -> str:
    stage.run(report, tmp_path)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(leaf for key, value in inner for leaf in leaves(value, (*path, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = put(data[path[0]], path[1:], value)
    return copy


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


def parts(markup: str, tag: str) -> list[dict[str, str]]:
    return [e.attrib for e in ElementTree.fromstring(f"<x>{markup}</x>").iter(tag)]


def plain_report(
    before: list[Reading], after: list[Reading], target: str = "local", cpu: str = "one CPU"
) -> Report:
    """A report of bare readings."""
    return Report(
        REPORT_SCHEMA, {"target": target, "seed": 0}, {"device": {"cpu": cpu}}, tuple(before), tuple(after)
    )


def budget(**limits: str) -> Budget:
    return Budget({metric: limit(metric, text) for metric, text in limits.items()})


def check(made: Report, metric: str, text: str, baseline: Report | None = None) -> Check:
    (only,) = gate.run(made, budget(**{metric: text}), baseline, baseline_missing=False).checks
    return only
