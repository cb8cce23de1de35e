"""Filling a table: what is predicted is what the device does, nothing is timed twice, and a drift is no staircase."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import latency_files
import onnx
import pytest
from latency_files import MadeUp

from edgeprune.errors import DeviceError, NoLayerTimes, WorkdirError
from edgeprune.latency.sampling import BATCH, LEAST, MOST, survey
from edgeprune.latency.table import Predictor, load, table_path
from edgeprune.progress import track
from edgeprune.structure.allocation import levels


def off(clock: Predictor, name: str, count: int = 40) -> list[float]:
    network, draw = latency_files.subject_of(name), random.Random(9)
    found = []
    for _ in track(range(count), count, ""):
        kept = {g: draw.randint(max(1, c // 4), c) for g, c in network.channels.items()}
        true = sum(s for _, s in latency_files.node_seconds(network.resizer.file(kept)))
        found.append(abs(clock.seconds(kept) / true - 1))
    return sorted(found)


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise"])
def test_cuts_that_were_never_timed_are_predicted_within_some_per_cent(name: str, tmp_path: Path) -> None:
    device = MadeUp()
    clock = survey(latency_files.subject_of(name), device.bench(tmp_path), multiple_of=4)
    errors = off(clock, name)
    assert errors[20] < 0.03 and errors[35] < 0.1
    assert LEAST <= len(clock.wholes) <= MOST and clock.errors()


def test_what_was_timed_once_is_not_timed_again(tmp_path: Path) -> None:
    network = latency_files.subject_of("residual")
    first, second = MadeUp(), MadeUp()
    one = survey(network, first.bench(tmp_path))
    two = survey(network, second.bench(tmp_path))
    assert second.calls == 0 and two.seconds({}) == one.seconds({}) and two.wholes == one.wholes


def test_a_survey_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    network = latency_files.subject_of("residual")
    whole = survey(network, MadeUp().bench(tmp_path / "a"))
    killed, later = MadeUp(fails_at=2), MadeUp()
    with pytest.raises(KeyboardInterrupt):
        survey(network, killed.bench(tmp_path / "b"))
    again = survey(network, later.bench(tmp_path / "b"))
    assert killed.calls == 2 and later.calls == 2 * (-(-len(whole.wholes) // BATCH) - 1)
    assert again.wholes == whole.wholes


def test_layers_that_another_network_timed_are_known_already(tmp_path: Path) -> None:
    survey(latency_files.subject_of("residual"), MadeUp().bench(tmp_path))
    table = load(table_path(tmp_path, "made-up"), "made-up")
    signature = latency_files.subject_of("concat").segments[0].signature
    assert signature in table.entries and len(table.networks) == 1


def test_a_machine_that_gets_slower_in_between_changes_nothing(tmp_path: Path) -> None:
    network = latency_files.subject_of("residual")
    steady = survey(network, MadeUp().bench(tmp_path / "a"))
    drifting = survey(network, MadeUp(speed=(1.0, 1.7, 0.6)).bench(tmp_path / "b"))
    assert drifting.seconds({}) == pytest.approx(steady.seconds({}), rel=1e-6)


def test_what_disturbs_a_file_at_one_moment_changes_nothing(tmp_path: Path) -> None:
    network = latency_files.subject_of("residual")
    steady = survey(network, MadeUp().bench(tmp_path / "a"))
    disturbed = MadeUp(disturbed={0: "cut3", 1: "dense", 3: "cut0"})
    found = survey(network, disturbed.bench(tmp_path / "b"))
    assert found.wholes == steady.wholes and found.dense == steady.dense


def test_most_cuts_of_a_survey_are_aligned_and_some_are_not(tmp_path: Path) -> None:
    """Cuts that gain time are multiples of a vector; those between and odd ones have to be known too."""
    network = latency_files.subject_of("residual")
    wholes = survey(network, MadeUp().bench(tmp_path), multiple_of=8).wholes[1:]
    aligned = [
        sum(all(k in levels(network.channels[g], m, 0.1) for g, k in w.kept.items()) for w in wholes)
        for m in (8, 4, 1)
    ]
    assert len(wholes) / 3 < aligned[0] < aligned[1] < aligned[2] == len(wholes)


def test_every_place_has_a_table_of_its_own(tmp_path: Path) -> None:
    network = latency_files.subject_of("residual")
    survey(network, MadeUp().bench(tmp_path, "board a"))
    other = MadeUp()
    survey(network, other.bench(tmp_path, "board b"))
    assert other.calls > 0 and len(list(tmp_path.glob("*.json"))) == 2
    taken = table_path(tmp_path, "board a")
    with pytest.raises(WorkdirError, match="not of 'board c'"):
        load(taken, "board c")


@pytest.mark.parametrize("text", ["", "{", '{"place": 3}', "[]"])
def test_a_table_that_can_not_be_read_is_refused_with_its_path(text: str, tmp_path: Path) -> None:
    path = table_path(tmp_path, "made-up")
    path.write_text(text)
    with pytest.raises(WorkdirError, match=path.name):
        survey(latency_files.subject_of("residual"), MadeUp().bench(tmp_path))


def test_times_below_zero_are_no_times(tmp_path: Path) -> None:
    survey(latency_files.subject_of("residual"), MadeUp().bench(tmp_path))
    path = table_path(tmp_path, "made-up")
    data = json.loads(path.read_text())
    next(iter(next(iter(data["entries"].values())).values()))["seconds"] = -1.0
    path.write_text(json.dumps(data))
    with pytest.raises(WorkdirError, match="times that are negative or not finite"):
        load(path, "made-up")


def test_a_device_that_tells_no_times_is_an_error(tmp_path: Path) -> None:
    bench = MadeUp().bench(tmp_path)
    with pytest.raises(DeviceError, match="gave no time for 'cut0'"):
        survey(
            latency_files.subject_of("residual"),
            replace(bench, time=lambda _: {"dense": 1.0, "dense again": 1.0}),
        )


def test_a_device_that_tells_no_times_of_layers_is_known_before_anything_is_timed(tmp_path: Path) -> None:
    device = MadeUp()
    with pytest.raises(NoLayerTimes, match="made-up reports no time of any layer of residual.onnx"):
        survey(latency_files.subject_of("residual"), replace(device.bench(tmp_path), nodes=lambda _: []))
    assert device.calls == 0


def test_the_clock_of_a_file_runs_the_survey_when_it_is_asked(tmp_path: Path) -> None:
    device = MadeUp()
    clock = latency_files.latency_model(
        latency_files.exported("residual"), device.bench(tmp_path), multiple_of=4
    )
    assert device.calls == 0
    found = clock(latency_files.subject_of("residual").resizer.costs)
    true = sum(s for _, s in latency_files.node_seconds(onnx.load(latency_files.exported("residual"))))
    assert device.calls and found.seconds({}) == pytest.approx(true, rel=0.03)
