"""What readings say of the device: its state, how well a median is known, emulation, energy, and who else measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from onnx_files import timed, write_net

from edgeprune import targets
from edgeprune.devices._base import Device
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError
from edgeprune.measure import latency, resources, stage
from edgeprune.recipe.schema import MeasureTable
from edgeprune.records import InputSpec, Plan

TABLE = MeasureTable(iterations=200, seconds=5.0)
PLAN = Plan({}, {}, {}, {}, 100, 1000, 200, 2000)


@dataclass(frozen=True)
class Talking(Device):
    """A device whose facts and answers a test says; what the agent was asked is written down."""

    answers: dict[str, Any]
    more_facts: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "talking"

    def facts(self) -> dict[str, Any]:
        return {**Fake().facts(), **self.more_facts}

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        if argv[-1] != "the-agent":
            return Fake().run(argv, stdin, timeout_s)
        request = json.loads(stdin)
        self.asked.append(request)
        if request["op"] in self.answers:
            return Answer(0, json.dumps(self.answers[request["op"]]), "")
        return Fake().run(["edgeprune-agent"], stdin, timeout_s)

    def put(self, here: Path, there: str) -> None:
        Fake().put(here, there)

    def get(self, there: str, here: Path) -> None:
        Fake().get(there, here)

    def agent(self) -> list[str]:
        return ["the-agent"]


def answer(dense: list[int], compressed: list[int], **more: Any) -> dict[str, Any]:
    return {**json.loads(timed(dense, compressed).stdout), **more}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return {
        "dense": write_net(tmp_path / "dense.onnx", 32),
        "compressed": write_net(tmp_path / "model.onnx", 16),
    }


def wanted(device: Device) -> stage.MeasureRequest:
    return stage.MeasureRequest(
        InputSpec((3, 8, 8), 10), device, TABLE, targets.target("local"), None, lambda _: None
    )


def test_the_agent_is_asked_for_two_percent_and_a_tail(pair: dict[str, Path]) -> None:
    device = Talking({})
    latency.latency(pair, device, MeasureTable())
    assert {k: device.asked[0][k] for k in ("precision", "least", "iterations", "seconds")} == {
        "precision": 0.02, "least": 368, "iterations": MeasureTable().iterations, "seconds": 20.0,
    }  # fmt: skip
    latency.latency(pair, device, MeasureTable(iterations=20))
    assert device.asked[1]["least"] == 20


def test_the_state_before_and_after_stands_in_the_conditions(pair: dict[str, Path]) -> None:
    before = {"governor": "schedutil", "temperature_c": 41.0, "power_mode": "15W", "clock_hz": 1.5e9}
    after = {**before, "temperature_c": 63.0}
    device = Talking({"time": answer([1000] * 40, [500] * 40, before=before, after=after, stopped="precise")})
    conditions = latency.latency(pair, device, TABLE).readings["dense"][0].conditions
    assert (conditions["before"], conditions["after"], conditions["stopped"]) == (before, after, "precise")
    silent = Talking({"time": answer([1000] * 40, [500] * 40, before={}, after={})})
    conditions = latency.latency(pair, silent, TABLE).readings["dense"][0].conditions
    assert "before" not in conditions and "after" not in conditions, "absent is absent"


def test_a_median_that_is_known_within_two_percent_is_conclusive(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, Talking({"time": answer([1000, 1010] * 60, [500] * 120)}), TABLE)
    conditions = result.readings["dense"][0].conditions
    assert conditions["precision"] == pytest.approx(5 / 1005)
    assert "inconclusive" not in conditions
    assert result.notes == ()


def test_a_cap_that_comes_first_leaves_it_inconclusive(pair: dict[str, Path]) -> None:
    times = [1000, 1300] * 100
    device = Talking({"time": answer(times, [500] * 200, stopped="iterations")})
    result = latency.latency(pair, device, TABLE)
    said = "after 200 runs (iterations) it is known within 13.0 %, not 2 %"
    assert result.readings["dense"][0].conditions["inconclusive"] == said
    assert result.notes[0] == f"The median time is inconclusive. dense: {said}."


def test_too_few_runs_for_an_interval_are_inconclusive(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, Talking({"time": answer([1000] * 5, [500] * 5)}), TABLE)
    assert "5 runs are too few" in result.readings["dense"][0].conditions["inconclusive"]


@pytest.mark.parametrize(("times", "noted"), [([1000, 1049] * 50, False), ([1000, 1060] * 50, True)])
def test_runs_that_differ_by_more_than_two_and_a_half_percent_are_noted(
    pair: dict[str, Path], times: list[int], noted: bool
) -> None:
    notes = latency.latency(pair, Talking({"time": answer(times, [500] * 100)}), TABLE).notes
    assert any("unsteady" in note for note in notes) is noted
    if noted:
        assert "differ by 2.9 % (dense), as a coefficient of variation" in notes[-1]


def test_two_files_that_noise_hides_are_inconclusive_in_the_first_words(pair: dict[str, Path]) -> None:
    """Contended, and the interval of the ratio has 1 in it: narrow or not, nothing is told."""
    dense, compressed = [1000, 1010] * 60, [1010, 1000] * 60
    cpu = ([900] * 120, [905, 895] * 60)
    told = json.loads(timed(dense, compressed, cpu).stdout)
    result = latency.latency(pair, Talking({"time": told}), TABLE)
    assert result.contended
    assert result.inconclusive == "other work ran on the machine, and the interval of the ratio has 1 in it"
    assert latency.speed_words(result).startswith("NOT shown to be faster: 1.00x")
    assert "inconclusive" in latency.speed_words(result)


def test_an_idle_machine_that_shows_no_difference_is_conclusive(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, Talking({"time": answer([1000, 1001] * 60, [1001, 1000] * 60)}), TABLE)
    assert result.inconclusive == ""
    assert latency.speed_words(result).startswith("NOT faster: 1.00x")


def test_where_nothing_was_removed_no_difference_is_a_gain(pair: dict[str, Path]) -> None:
    """Half the time, by chance: it is the same network in the same precision."""
    device = Talking({"time": answer([1000, 1400] * 60, [500, 700] * 60)})
    cuts = {"macs": (0, 1000), "weights": (50, 0), "nothing": (0, 0), "both": (50, 1000)}
    plans = {name: Plan({}, {}, {}, {}, 100 - p, 1000 + m, 100, 1000) for name, (p, m) in cuts.items()}
    marked = {}
    for name, plan in plans.items():
        found = stage.run(wanted(device), pair, plan)
        times = [r.conditions for r in found.after if r.metric.startswith("latency")]
        marked[name] = {c.get("nothing_removed") for c in times}
        assert found.notes[0].startswith("Speed: NOT faster: 2.00x" if name == "nothing" else "Speed: 2.00x")
    assert marked == {"macs": {None}, "weights": {None}, "nothing": {True}, "both": {None}}


def test_an_emulated_processor_is_marked_and_never_compared(pair: dict[str, Path]) -> None:
    device = Talking({}, {"emulated": True})
    found = stage.run(wanted(device), pair, PLAN)
    for reading in (*found.before, *found.after):
        if reading.metric.startswith(("latency", "peak_memory")):
            assert reading.conditions["emulated"] is True
            assert reading.where == "talking aarch64 (emulated)"
            assert "speedup" not in reading.conditions
    assert found.notes[0].startswith("Speed: the speed can't be compared on talking aarch64 (emulated)")
    assert any("never to be compared" in note for note in found.notes[1:])
    result = latency.latency(pair, device, TABLE)
    assert result.ratios == {} and latency.latency_ratio(result) is None


def test_energy_is_asked_for_only_where_the_device_can_measure_it(pair: dict[str, Path]) -> None:
    without = Talking({})
    found = stage.run(wanted(without), pair, PLAN)
    assert not [r for r in found.after if r.metric == "energy"]
    assert "energy" not in {request["op"] for request in without.asked}
    joules = {
        "joule": 0.004, "spread": [0.0038, 0.0042], "watts": 7.5, "idle_watts": 4.0, "images": 900, "seconds": 5.0,
        "samples": 200, "source": "ina", "rails": ["VDD_IN"], "runtime": "r 1",
    }  # fmt: skip
    device = Talking({"time": answer([1000] * 40, [500] * 40, powered=True), "energy": joules})
    reading = next(r for r in stage.run(wanted(device), pair, PLAN).after if r.metric == "energy")
    assert (reading.value, reading.unit, reading.n, reading.spread) == (0.004, "J", 900, (0.0038, 0.0042))
    assert (reading.conditions["idle_watts"], reading.conditions["rails"]) == (4.0, ["VDD_IN"])


def test_energy_that_can_not_be_had_says_why(pair: dict[str, Path]) -> None:
    reading = resources.energy(pair["dense"], Talking({"energy": {"joule": None, "why": "no sensor"}}), TABLE)
    assert (reading.value, reading.conditions["why"]) == (None, "no sensor")
    for joule in ("much", -1.0, 10**30, True):
        with pytest.raises(DeviceError, match="joule"):
            resources.energy(pair["dense"], Talking({"energy": {"joule": joule}}), TABLE)
    for odd in (
        {"images": "x"},
        {"images": 0},
        {"spread": ["a", 1]},
        {"spread": [0.7, 0.6]},
        {"spread": [None, 1]},
    ):
        answer = {"joule": 0.5, "images": 10, "spread": [0.4, 0.6], **odd}
        with pytest.raises(DeviceError):
            resources.energy(pair["dense"], Talking({"energy": answer}), TABLE)


def test_on_this_machine_energy_is_a_number_or_a_reason(pair: dict[str, Path]) -> None:
    reading = resources.energy(pair["dense"], Local(), MeasureTable(seconds=0.1))
    assert (reading.value is None) == ("why" in reading.conditions)


def test_memory_has_its_private_part_and_the_gpus(pair: dict[str, Path]) -> None:
    told = {
        "peak": 900, "at_load": 500, "baseline": 4000, "pss_added": 700, "private_dirty_added": -20, "host": 800,
        "gpu": 900, "shared": True, "runtime": "r 1",
    }  # fmt: skip
    reading = resources.peak_memory(pair["dense"], Talking({"memory": told}))
    assert reading.value == 900
    keys = ("pss_bytes", "private_dirty_bytes", "host_bytes", "gpu_bytes", "shared_with_gpu")
    assert [reading.conditions[key] for key in keys] == [700, -20, 800, 900, True]


def test_somebody_else_who_measures_there_is_not_disturbed(pair: dict[str, Path]) -> None:
    """Two at once on one machine would time each other."""
    with Local().exclusively(wait_s=120.0), pytest.raises(DeviceError):
        stage.run(replace(wanted(Local()), wait_s=0.0), pair, PLAN)
