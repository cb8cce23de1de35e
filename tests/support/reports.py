"""Reports as runs give them, ways to spoil them, and a reader of the page that is stricter than a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hypothesis import strategies as st

from edgeprune.gate import verdict
from edgeprune.quantities import limit
from edgeprune.records import METRICS, REPORT_SCHEMA, Budget, Check, Reading, Report
from edgeprune.report import stage

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
    counted = metric in ("params", "macs", "size", "compressed_size", "weight_density", "param_density")
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


ZEROS = "Zeros: single weights were set to zero."


def history(layers: int = 12, n: int = 9) -> dict[str, Any]:
    """What every method here records, with as many layers and iterations."""
    names = [f"layer{i // 4}.{i % 4}.conv" for i in range(layers)]

    def falls_and_rises(i: int) -> list[float]:
        low = 0.2 + 0.01 * i
        return [round(low + 0.012 * (1 + i % 3) * (t - n / 2) ** 2 / n, 6) for t in range(n)]

    def falls(start: float, rate: float) -> list[float]:
        return [round(start * rate**t, 6) for t in range(n)]

    return {
        "pqi": {
            "iterations": list(range(n)),
            "layers": {name: falls_and_rises(i) for i, name in enumerate(names)},
            "kept": {name: falls(1.0, 0.7 + 0.02 * (i % 5)) for i, name in enumerate(names)},
            "accuracy": [round(0.9 - 0.002 * t**2, 6) for t in range(n)],
            "stopped": "the validation accuracy fell by more than 2 points",
        },
        "dnr": {
            "epochs": list(range(1, n + 1)),
            "density": {name: [round(0.1 + 0.005 * t * (i % 3 - 1), 6) for t in range(n)]
                        for i, name in enumerate(names)},
            "removed": [max(0, 5000 - 400 * t) for t in range(n)],
            "grown": [max(0, 5000 - 400 * t) for t in range(n)],
        },
        "deadwooding": {
            "epochs": [3, n - 3],
            "lambda": {name: [round(0.01 * t * (1 + i), 6) for t in range(3)] for i, name in enumerate(names)},
            "deadwood": falls(0.2, 0.5)[:3],
            "lambda_kd": [1.0 + 0.1 * t for t in range(n - 3)],
            "lambda_adv": [1.0 + 0.3 * t for t in range(n - 3)],
        },
        "training": {"losses": falls(2.3, 0.8), "validation": [None, *falls(0.6, 1.02)[1:]]},
    }  # fmt: skip


def pruned_weights() -> Report:
    """A report as a run at granularity "weight" gives it."""
    base = sample(layers=12)
    sizes = {
        "weight_density": (1.0, 0.1),
        "param_density": (1.0, 0.105),
        "compressed_size": (1030000, 230000),
    }
    sides = (
        [reading(m, v[0], "dense") for m, v in sizes.items()],
        [reading(m, v[1]) for m, v in sizes.items()],
    )
    rows = tuple(
        {**row, "params_after": row["params_before"], "channels_after": row["channels_before"],
         "nonzero_before": row["params_before"], "nonzero_after": row["params_before"] // (4 + i)}
        for i, row in enumerate(base.layers)
    )  # fmt: skip
    return replace(
        base, before=(*base.before, *sides[0]), after=(*base.after, *sides[1]), layers=rows, notes=(ZEROS,),
        history=history(),
    )  # fmt: skip


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
    (only,) = verdict.run(made, budget(**{metric: text}), baseline, baseline_missing=False).checks
    return only
