"""When timing ends: at the precision that was asked for, or at a cap; together, or each model by itself."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import write_one_conv

from edgeprune import confidence, host
from edgeprune.agent import archive, program
from edgeprune.agent.timing import LEAST, Rule, precision, take_turns

STEADY = (1000, 1001, 999)


def timed(times: Iterator[int]) -> Callable[[], int]:
    return lambda: next(times)


def steady() -> Callable[[], int]:
    return timed(cycle(STEADY))


def shaky(seed: int = 0) -> Callable[[], int]:
    generator = random.Random(seed)
    return lambda: generator.randint(500, 1500)


def still() -> float:
    """A clock that stands: only the number of runs can end the timing."""
    return 0.0


def test_precise_medians_end_it_after_the_least_number_of_runs() -> None:
    samples, why = take_turns({"a": steady(), "b": steady()}, Rule(1000, 60, 0.02, least=50), still)
    assert why == "precise"
    assert [len(s.wall) for s in samples.values()] == [50, 50]


def test_without_a_wanted_precision_every_run_is_made() -> None:
    samples, why = take_turns({"a": steady()}, Rule(123, 60), still)
    assert (why, len(samples["a"].wall)) == ("iterations", 123)


def test_models_that_are_compared_go_on_until_all_are_precise() -> None:
    """The runs stay paired: neighbors of one model have neighbors of the other."""
    samples, why = take_turns({"a": steady(), "b": shaky()}, Rule(100_000, 60, 0.02, least=10), still)
    assert why == "precise"
    assert len(samples["a"].wall) == len(samples["b"].wall) > 100
    found = precision(samples["b"].wall)
    assert found is not None and found <= 0.02


def test_models_that_stand_apart_leave_when_they_are_precise() -> None:
    turns = {f"{i}": steady() for i in range(49)} | {"shaky": shaky()}
    samples, why = take_turns(turns, Rule(100_000, 60, 0.02, least=10, apart=True), still)
    assert why == "precise"
    assert {len(samples[f"{i}"].wall) for i in range(49)} == {10}
    assert len(samples["shaky"].wall) > 100


def test_a_cap_of_runs_ends_it_and_says_so() -> None:
    samples, why = take_turns({"a": shaky()}, Rule(33, 60, 0.0001), still)
    assert (why, len(samples["a"].wall)) == ("iterations", 33)


def test_a_cap_of_time_ends_it_after_ten_runs_at_least() -> None:
    late = timed_clock([0.0, 1e9])
    samples, why = take_turns({"a": shaky()}, Rule(10**6, 1.0, 0.0001), late)
    assert (why, len(samples["a"].wall)) == ("seconds", LEAST)


def test_slow_models_need_no_more_runs_than_their_median_does() -> None:
    """A quarter of the time is gone after 30 runs, long before the 368 that the 99th percentile needs."""
    ticks = timed_clock([0.0] * 6 + [26.0])
    samples, why = take_turns({"a": steady()}, Rule(10**6, 100.0, 0.02, least=368), ticks)
    assert (why, len(samples["a"].wall)) == ("precise", 30)


def timed_clock(values: list[float]) -> Callable[[], float]:
    times = chain(values, repeat(values[-1]))
    return lambda: next(times)


@given(st.lists(st.integers(1, 10**6), min_size=6, max_size=80))
def test_the_precision_is_the_farther_end_of_the_interval(samples: list[int]) -> None:
    ordered = sorted(samples)
    low, high = confidence.quantile_interval(ordered, 0.5) or (0, 0)
    median, found = confidence.quantile(ordered, 0.5), precision(samples)
    assert found is not None
    assert low >= median * (1 - found) - 1e-6 and high <= median * (1 + found) + 1e-6
    assert found == pytest.approx(max(high / median - 1, 1 - low / median))


def test_five_runs_have_no_interval() -> None:
    assert precision([1, 1, 1, 1, 1]) is None


def test_fifty_small_models_are_timed_in_one_request(tmp_path: Path) -> None:
    files = {
        f"c{n}": str(write_one_conv(tmp_path / f"{n}.onnx", channels=1 + n % 7, size=1 + n % 5))
        for n in range(50)
    }
    answer = program.handle({
        "op": "time", "runtime": "onnxruntime", "models": files, "threads": 1, "warmup": 1, "iterations": 100,
        "seconds": 0.2, "precision": 0.02, "least": 10, "apart": True,
    })  # fmt: skip
    assert set(answer["models"]) == set(files)
    for row in answer["models"].values():
        assert len(row["wall_ns"]) == len(row["cpu_ns"]) >= LEAST
        assert row["precision"] == pytest.approx(precision(row["wall_ns"]))
    assert answer["stopped"] in ("precise", "iterations", "seconds")


def test_the_state_of_the_machine_is_told_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([{"temperature_c": 40.0, "load": 0.5}, {"temperature_c": 55.0}])
    monkeypatch.setattr(host, "state", lambda gpu: next(states))
    answer = program.handle({
        "op": "time", "runtime": "onnxruntime", "models": {"a": str(write_one_conv(tmp_path / "a.onnx"))},
        "threads": 1, "iterations": 10, "seconds": 1,
    })  # fmt: skip
    assert (answer["before"]["temperature_c"], answer["after"]["temperature_c"]) == (40.0, 55.0)
    assert answer["load"] == 0.5
    assert answer["clock"] == "wall"


PARTS = [path for path in archive.sources() if path.name != "__init__.py"]
# In the standard library or the language only since Python 3.9 or later.
TOO_NEW = {
    "removeprefix",
    "removesuffix",
    "is_relative_to",
    "with_stem",
    "readlink",
    "hardlink_to",
    "pairwise",
}


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_all_that_travels_keeps_to_python_3_8(path: Path) -> None:
    parsed = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    nodes = list(ast.walk(parsed))
    assert not [n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr in TOO_NEW]
    calls = [
        n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "zip"
    ]
    assert not [k.arg for call in calls for k in call.keywords]
    first = next((n for n in parsed.body if isinstance(n, ast.ImportFrom)), None)
    assert first is None or first.module == "__future__", "annotations are not evaluated by 3.8"
    assert not [n for n in nodes if evaluated_subscript(n)]


def evaluated_subscript(node: Any) -> bool:
    """`Alias = dict[str, int]` is evaluated at run time, which 3.8 can't do; annotations are not."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Subscript)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id
        in ("dict", "list", "tuple", "type", "Callable", "Iterator", "Mapping", "Sequence")
    )
