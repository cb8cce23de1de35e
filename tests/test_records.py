"""Records to JSON and back: exact for every record, strict with everything else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import serialization
from edgeprune.errors import UsageError, WorkdirError
from edgeprune.records import (
    REPORT_SCHEMA,
    Artifact,
    Budget,
    InputSpec,
    Limit,
    Plan,
    Reading,
    Report,
    Target,
    Verdict,
)

NAMES = st.text(max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
INDICES = st.lists(st.integers(0, 4096), max_size=5).map(tuple)
JSON_SCALARS = st.none() | st.booleans() | st.integers() | FINITE | NAMES
SPECS = st.builds(
    InputSpec,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 999), st.integers(1, 999)),
    classes=st.integers(1, 1000),
    mean=st.lists(FINITE, max_size=3).map(tuple),
    std=st.lists(FINITE, max_size=3).map(tuple),
    low=FINITE,
    high=FINITE,
)
READINGS = st.builds(
    Reading,
    metric=NAMES,
    value=st.none() | FINITE,
    unit=NAMES,
    n=st.integers(0, 10**6),
    spread=st.none() | st.tuples(FINITE, FINITE).map(sorted).map(tuple),
    where=NAMES,
    artifact=NAMES,
    conditions=st.dictionaries(NAMES, JSON_SCALARS, max_size=3),
)
RECORDS = st.one_of(
    SPECS,
    READINGS,
    st.builds(
        Plan,
        removed=st.dictionaries(NAMES, INDICES, max_size=3),
        tensors=st.dictionaries(
            NAMES, st.lists(st.tuples(st.integers(0, 3), INDICES), max_size=3).map(tuple), max_size=3
        ),
        attributes=st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(), max_size=2), max_size=2),
        left_out=st.dictionaries(NAMES, NAMES, max_size=2),
        params=st.integers(),
        macs=st.integers(),
        params_before=st.integers(),
        macs_before=st.integers(),
    ),
    st.builds(
        Artifact,
        path=NAMES,
        format=NAMES,
        precision=NAMES,
        input=SPECS,
        sha256=NAMES,
        size_bytes=st.integers(),
        parent=NAMES,
        opset=st.integers(),
    ),
    st.builds(
        Budget, limits=st.dictionaries(NAMES, st.builds(Limit, NAMES, NAMES, FINITE, NAMES), max_size=3)
    ),
    st.builds(
        Report,
        schema=st.just(REPORT_SCHEMA),
        recipe=st.dictionaries(NAMES, JSON_SCALARS, max_size=3),
        environment=st.dictionaries(NAMES, JSON_SCALARS, max_size=3),
        before=st.lists(READINGS, max_size=2).map(tuple),
        after=st.lists(READINGS, max_size=2).map(tuple),
        ledger=st.lists(READINGS, max_size=1).map(tuple),
        layers=st.lists(st.dictionaries(NAMES, JSON_SCALARS, max_size=3), max_size=2).map(tuple),
        samples=st.dictionaries(NAMES, st.lists(FINITE, max_size=4).map(tuple), max_size=2),
        notes=st.lists(NAMES, max_size=2).map(tuple),
        left_out=st.dictionaries(NAMES, NAMES, max_size=2),
    ),
)


@pytest.fixture
def reading() -> Reading:
    return Reading("latency_p50", 0.0123, "s", 200, (0.012, 0.013), "local x86_64", "dense", {"threads": 1})


@given(RECORDS)
def test_a_record_comes_back_equal_through_json_text(record: Any) -> None:
    text = json.dumps(serialization.to_json(record), allow_nan=False)
    assert serialization.from_json(type(record), json.loads(text)) == record


def test_a_record_is_written_as_this_json(reading: Reading) -> None:
    assert serialization.to_json(reading) == {
        "metric": "latency_p50",
        "value": 0.0123,
        "unit": "s",
        "n": 200,
        "spread": [0.012, 0.013],
        "where": "local x86_64",
        "artifact": "dense",
        "conditions": {"threads": 1},
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_becomes_null_everywhere(reading: Reading, value: float) -> None:
    broken = dataclasses.replace(reading, metric="own", value=value, conditions={"deep": [{"x": value}]})
    written = serialization.to_json(broken)
    assert written["value"] is None
    assert written["conditions"] == {"deep": [{"x": None}]}
    assert serialization.from_json(Reading, written).value is None


def test_a_field_with_a_default_may_be_missing() -> None:
    assert serialization.from_json(InputSpec, {"shape": [3, 32, 32], "classes": 10}) == InputSpec(
        (3, 32, 32), 10
    )


def test_a_whole_number_is_a_float_where_one_is_asked(reading: Reading) -> None:
    data = {**serialization.to_json(reading), "value": 1, "spread": None}
    value = serialization.from_json(Reading, data).value
    assert value == 1.0
    assert type(value) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "fast"}, "Reading.value must be a float, found str 'fast'"),
        ({"value": True}, "Reading.value must be a float, found bool True"),
        ({"value": math.nan}, "Reading.value must be a finite number, found float nan"),
        ({"value": math.inf}, "Reading.value must be a finite number, found float inf"),
        ({"n": 2.5}, "Reading.n must be a int, found float 2.5"),
        ({"n": None}, "Reading.n must be a int, found nothing"),
        ({"n": True}, "Reading.n must be a int, found bool True"),
        ({"unit": 3}, "Reading.unit must be a str, found int 3"),
        ({"spread": [0.1]}, "Reading.spread must have 2 values, found 1"),
        ({"spread": [0.1, None]}, "Reading.spread[1] must be a float, found nothing"),
        ({"spread": "ab"}, "Reading.spread must be a list, found str 'ab'"),
        ({"conditions": [1]}, "Reading.conditions must be an object, found list [1]"),
        ({"speed": 1}, "Reading has an unknown field 'speed'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_found(
    reading: Reading, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        serialization.from_json(Reading, {**serialization.to_json(reading), **change})
    assert caught.value.message == message


def test_a_number_too_large_for_a_float_is_refused(reading: Reading) -> None:
    with pytest.raises(UsageError, match=r"Reading.value must be a finite number, found int 1000"):
        serialization.from_json(Reading, {**serialization.to_json(reading), "value": 10**400})


def test_a_missing_field_is_named(reading: Reading) -> None:
    data = serialization.to_json(reading)
    del data["where"]
    with pytest.raises(UsageError, match="Reading: missing 1 required positional argument: 'where'"):
        serialization.from_json(Reading, data)


def test_a_wrong_value_deep_inside_is_named_by_its_path() -> None:
    data = {
        "checks": [{"metric": "size", "limit": "2 MB", "status": 1, "value": 1, "threshold": 2, "margin": 1}]
    }
    with pytest.raises(UsageError, match=r"Verdict\.checks\[0\]\.status must be a str, found int 1"):
        serialization.from_json(Verdict, {**data, "ok": True, "exit_code": 0})


def test_a_file_is_written_and_read_back(tmp_path: Path, reading: Reading) -> None:
    serialization.write(tmp_path / "r.json", reading)
    assert serialization.read(Reading, tmp_path / "r.json") == reading
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, reading: Reading) -> None:
    serialization.write(tmp_path / "r.json", reading)
    with pytest.raises(TypeError):
        serialization.write(tmp_path / "r.json", {"x": object()})
    assert serialization.read(Reading, tmp_path / "r.json") == reading


def test_no_prefix_of_a_file_reads_as_the_record(tmp_path: Path, reading: Reading) -> None:
    serialization.write(tmp_path / "r.json", reading)
    whole = (tmp_path / "r.json").read_bytes().rstrip()
    for length in range(len(whole)):
        (tmp_path / "cut.json").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"cut\.json is not a readable JSON file"):
            serialization.read(Reading, tmp_path / "cut.json")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'"x"', b"{}", b"3", b"9" * 5000]
)
def test_a_foreign_file_is_refused_with_the_error_that_was_asked_for(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(WorkdirError, match="foreign.json is not a "):
        serialization.read(Reading, path, WorkdirError)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not"),
        ("[1e999]", "1e999 is not"),
        (f"[1{'0' * 400}]", "401 digits"),
        (f"[1{'0' * 9000}]", "9001 digits"),
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("[" * 10**5, "deeper than 64"),
        ('["\\ud800"]', "surrogates"),
        ("\ufeff{}", "BOM"),
    ],
    ids=["twice", "nan", "inf", "1e999", "long", "longer", "deep", "bottomless", "surrogate", "bom"],
)
def test_json_that_can_not_be_meant_is_refused(text: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        serialization.parse(text)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", serialization.LARGEST + 1)
    os.mkfifo(tmp_path / "pipe")
    for name in ("large.json", "pipe", "."):
        with pytest.raises(UsageError, match="it is no file of at most"):
            serialization.read(InputSpec, tmp_path / name)


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.json is not a readable JSON file: .*No such file"):
        serialization.read(Target, tmp_path / "none.json")


JSON = st.recursive(
    JSON_SCALARS | st.sampled_from([math.nan, math.inf, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Reading)]), JSON, max_size=8) | JSON
)
def test_any_json_gives_a_record_or_a_usage_error(data: Any) -> None:
    try:
        record = serialization.from_json(Reading, data)
    except UsageError:
        return
    assert record.value is None or math.isfinite(record.value)
