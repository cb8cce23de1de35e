"""Latency budgets by a table: the measured time lands just below the budget, or it is said that it can't."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import latency_files
import nets
import onnx
import pytest
import torch
from latency_files import MadeUp
from torch import nn

from edgeprune.errors import InfeasibleBudget, UnsupportedModel
from edgeprune.latency import layer_table
from edgeprune.methods._base import PruneTask
from edgeprune.methods.taylor import Taylor
from edgeprune.models import costs
from edgeprune.models.bundle import from_module
from edgeprune.prune import budget_search, stage
from edgeprune.quantities import limit
from edgeprune.recipe.schema import PruneTable
from edgeprune.records import Budget
from edgeprune.structure.allocation import Rules

NAME = "residual"
Read = Callable[[nn.Module], float]


def budget(**limits: str) -> Budget:
    return Budget({m: limit(m, text) for m, text in limits.items()})


def dense_seconds() -> float:
    return sum(s for _, s in latency_files.node_seconds(onnx.load(latency_files.exported(NAME))))


def material(folder: Path, read: Read | None = None, **probes: budget_search.Probe) -> stage.PruningInputs:
    """A device that is as its table says, unless `read` tells otherwise."""
    reader = read or (lambda net: latency_files.seconds_of(NAME, net))
    clock = latency_files.latency_model(latency_files.exported(NAME), MadeUp().bench(folder), multiple_of=1)
    probes = {"latency_p50": budget_search.Probe(dense_seconds(), reader), **probes}
    return stage.PruningInputs(None, None, probes, 1, 0, latency_model=clock)


def chosen(
    given: stage.PruningInputs,
    method: str = "magnitude",
    options: dict[str, Any] | None = None,
    **limits: str,
) -> stage.Chosen:
    bundle = from_module(nets.build(NAME), nets.example())
    return stage.run(bundle, PruneTable(method=method, options=options or {}), budget(**limits), given)


def measured(found: stage.Chosen) -> list[float]:
    return list(found.record["latency"]["measured"])


@pytest.mark.parametrize("method", ["magnitude", "uniform-random", "data-free"])
@pytest.mark.parametrize("share", [75, 50])
def test_the_time_lands_just_below_the_budget(method: str, share: int, tmp_path: Path) -> None:
    found = chosen(material(tmp_path), method, latency_p50=f"{share} %")
    target = share / 100 * dense_seconds()
    kept = {g: int(keep.sum()) for g, keep in found.masks.channels.items()}
    true = sum(s for _, s in latency_files.node_seconds(latency_files.subject_of(NAME).resizer.file(kept)))
    assert 0.9 * target <= true <= target
    assert any(t == pytest.approx(true) for t in measured(found))


@pytest.mark.parametrize("share", [75, 60])
def test_what_is_chosen_with_labels_costs_no_more_together_than_without_looking(
    share: int, tmp_path: Path
) -> None:
    images = nets.example(64, seed=3)
    bundle = from_module(nets.build(NAME), nets.example())
    with torch.no_grad():
        labels = bundle.module(images).argmax(1)
    given = replace(material(tmp_path), images=images, labels=labels)
    found = {
        measured: chosen(given, "taylor", {"measured": measured}, latency_p50=f"{share} %")
        for measured in (True, False)
    }
    assert all(min(measured(f)) <= share / 100 * dense_seconds() for f in found.values())
    counted = latency_files.subject_of(NAME).resizer.costs
    task = PruneTask(
        found[True].groups, counted, Rules({}), lambda net, x: net(x), images, labels
    )  # fmt: skip
    survey = Taylor().survey(bundle.module, task)
    assert survey.together is not None
    costs_ = {
        way: survey.together({g: int(keep.sum()) for g, keep in f.masks.channels.items()})
        for way, f in found.items()
    }
    assert costs_[True] <= costs_[False] + 1e-6


def test_a_table_that_errs_is_corrected_by_the_device(tmp_path: Path) -> None:
    """The whole network is 20 % slower than its parts say: the budget holds for what was measured."""
    dense = dense_seconds()

    def read(net: nn.Module) -> float:
        seconds = latency_files.seconds_of(NAME, net)
        return seconds if seconds >= dense else 1.2 * seconds

    found = chosen(material(tmp_path, read), latency_p50="60 %")
    record = found.record["latency"]
    assert len(record["measured"]) > 1 and min(record["measured"]) <= 0.6 * dense
    assert record["measured"][0] > 0.6 * dense
    assert any("the limit is" in note and "predicted" in note for note in found.notes)


@pytest.mark.parametrize("share", [74, 77, 80])
def test_a_cut_that_is_faster_than_it_must_be_is_followed_by_one_nearer_to_the_budget(
    share: int, tmp_path: Path
) -> None:
    """The same cut would come again: what is asked for goes both ways then, not only down."""
    dense = dense_seconds()
    first = measured(chosen(material(tmp_path), latency_p50=f"{share} %"))[0]
    target = share / 100 * dense
    factor = 0.955 * target / first

    def read(net: nn.Module) -> float:
        seconds = latency_files.seconds_of(NAME, net)
        return seconds if seconds >= dense else factor * seconds

    found = measured(chosen(material(tmp_path, read), latency_p50=f"{share} %"))
    assert found[0] == pytest.approx(0.955 * target)
    assert max(found[1:]) <= target and found[-1] > 0.965 * target


@pytest.mark.parametrize(("share", "all_kept"), [(30, False), (45, True)])
def test_a_table_of_another_precision_knows_what_that_alone_saves(
    share: int, all_kept: bool, tmp_path: Path
) -> None:
    """In int8 the whole network takes 40 %: what is left to save decides how many channels go."""
    dense = dense_seconds()
    given = material(tmp_path, lambda net: 0.4 * latency_files.seconds_of(NAME, net))
    clock: Any = given.latency_model
    given = replace(given, latency_model=lambda counted: replace(clock(counted), of_dense=0.4))
    found = chosen(given, latency_p50=f"{share} %")
    assert 0.9 * min(share, 40) / 100 * dense <= measured(found)[0] <= share / 100 * dense
    assert found.record["latency"]["predicted"][0] == pytest.approx(measured(found)[0], rel=0.1)
    assert all_kept == all(bool(keep.all()) for keep in found.masks.channels.values())


def test_a_cut_that_seemed_right_once_is_timed_again_before_it_is_taken(tmp_path: Path) -> None:
    """The first reading of every cut is 5 % too low: what is taken keeps the budget by both together."""
    dense, seen = dense_seconds(), set[float]()

    def read(net: nn.Module) -> float:
        seconds = latency_files.seconds_of(NAME, net)
        lucky = seconds < dense and seconds not in seen
        seen.add(seconds)
        return 0.95 * seconds if lucky else seconds

    found = chosen(material(tmp_path, read), latency_p50="75 %")
    kept = {g: int(keep.sum()) for g, keep in found.masks.channels.items()}
    true = sum(s for _, s in latency_files.node_seconds(latency_files.subject_of(NAME).resizer.file(kept)))
    assert 0.975 * true <= 0.99 * 0.75 * dense and true <= 1.02 * 0.75 * dense
    assert any(t == pytest.approx(0.975 * true) for t in measured(found)), "the mean of the two readings"


def test_predicted_and_measured_stand_side_by_side(tmp_path: Path) -> None:
    found = chosen(material(tmp_path), latency_p50="60 %")
    record = found.record["latency"]
    assert len(record["predicted"]) == len(record["measured"]) == len(record["iterations"])
    assert record["predicted"][-1] == pytest.approx(record["measured"][-1], rel=0.1)
    assert Path(record["table"]).is_file() and record["budget"] == pytest.approx(0.6 * dense_seconds())
    assert any(note.startswith("Channels were allocated by a latency table: ") for note in found.notes)


def test_no_channel_goes_that_saves_no_time(tmp_path: Path) -> None:
    """The made-up device works on blocks of four: counts in between would lose importance for nothing."""
    found = chosen(material(tmp_path), latency_p50="60 %")
    for group, keep in found.masks.channels.items():
        assert int(keep.sum()) % latency_files.BLOCK == 0 or bool(keep.all()), group


def test_a_time_that_no_cut_reaches_is_infeasible_and_says_how_near_it_came(tmp_path: Path) -> None:
    dense = dense_seconds()
    with pytest.raises(InfeasibleBudget, match=r"closest cut has latency_p50 .* \(limit "):
        chosen(material(tmp_path, lambda net: 0.8 * dense), latency_p50="50 %")


def test_a_budget_that_the_dense_model_meets_removes_nothing(tmp_path: Path) -> None:
    found = chosen(material(tmp_path), latency_p50="150 %")
    assert all(bool(keep.all()) for keep in found.masks.channels.values())
    assert any("nothing was removed" in note for note in found.notes)


def test_counts_hold_beside_the_time(tmp_path: Path) -> None:
    found = chosen(material(tmp_path), latency_p50="90 %", macs="30 %")
    network = latency_files.subject_of(NAME)
    kept = {g: int(keep.sum()) for g, keep in found.masks.channels.items()}
    assert network.resizer.costs.cost(kept)["macs"] <= 0.3 * network.resizer.costs.cost({})["macs"]
    assert measured(found)[-1] <= 0.9 * dense_seconds()


def test_size_and_time_hold_together(tmp_path: Path) -> None:
    """The file has a head besides its parameters, which the search does not know."""
    whole = 4 * costs.total_params(nets.build(NAME)) + 1000.0
    size = budget_search.Probe(whole, lambda net: 4 * costs.total_params(net) + 1000.0)
    found = chosen(material(tmp_path, size=size), latency_p50="90 %", size="50 %")
    network = latency_files.subject_of(NAME)
    kept = {g: int(keep.sum()) for g, keep in found.masks.channels.items()}
    assert 4 * network.resizer.costs.cost(kept)["params"] + 1000 <= 0.5 * whole
    assert any("size" in note for note in found.notes)


def test_two_latencies_hold_and_the_tighter_one_decides(tmp_path: Path) -> None:
    tail = budget_search.Probe(2 * dense_seconds(), lambda net: 2 * latency_files.seconds_of(NAME, net))
    found = chosen(material(tmp_path, latency_p99=tail), latency_p50="90 %", latency_p99="60 %")
    assert measured(found)[-1] <= 0.6 * dense_seconds()


def test_without_a_table_for_the_network_shares_are_tried_and_it_is_said(tmp_path: Path) -> None:
    def none(_costs: object) -> Any:
        raise UnsupportedModel("the reshape has no rule")

    found = chosen(replace(material(tmp_path), latency_model=none), latency_p50="60 %")
    assert any("No latency table" in n and "the reshape has no rule" in n for n in found.notes)
    assert any("Searched by building the file" in n for n in found.notes)


def test_on_a_device_without_times_of_layers_shares_are_tried_and_it_is_said(tmp_path: Path) -> None:
    bench = replace(MadeUp().bench(tmp_path), nodes=lambda _: [])
    given = replace(
        material(tmp_path), latency_model=latency_files.latency_model(latency_files.exported(NAME), bench)
    )
    found = chosen(given, latency_p50="60 %")
    assert found.notes[0].startswith("No latency table (made-up reports no time of any layer")
    assert "Searched by building" in " ".join(found.notes)


def test_the_choice_with_its_record_survives_the_disk(tmp_path: Path) -> None:
    found = chosen(material(tmp_path / "tables"), latency_p50="60 %")
    stage.write(found, tmp_path)
    assert stage.read(tmp_path).record["latency"]["measured"] == measured(found)


def test_profiling_a_table_gives_every_layer_at_its_counts_alone_and_in_its_place(tmp_path: Path) -> None:
    bundle = from_module(nets.build(NAME), nets.example())
    device = MadeUp()
    wish = layer_table.SurveyOptions(multiple_of=4)
    found = layer_table.run(bundle, latency_files.exported(NAME), device.bench(tmp_path), wish)
    rows = [row for row in found.rows if row.layer == "one.0"]
    assert [row.makes for row in rows] == [16, 12, 8, 4] and {row.reads for row in rows} == {8}
    assert all(more.seconds >= 0.99 * fewer.seconds for more, fewer in itertools.pairwise(rows))
    alone = [row for row in rows if row.alone]
    assert [row.makes for row in alone] == [16, 12, 8, 4]
    # On this device a layer takes as long alone as in its place.
    assert all(row.alone == pytest.approx(row.seconds, rel=0.1) for row in alone)
    assert found.dense == pytest.approx(dense_seconds()) and Path(found.path).is_file()
    assert [w.seconds for w in found.wholes] == sorted((w.seconds for w in found.wholes), reverse=True)
    assert found.wholes[0].seconds == pytest.approx(dense_seconds(), rel=0.03) and found.measured
    again = MadeUp()
    assert layer_table.run(bundle, latency_files.exported(NAME), again.bench(tmp_path), wish) == found
    assert again.calls == 0


def test_the_last_layer_is_in_the_table_at_what_it_reads(tmp_path: Path) -> None:
    bundle = from_module(nets.build(NAME), nets.example())
    found = layer_table.run(
        bundle,
        latency_files.exported(NAME),
        MadeUp().bench(tmp_path),
        layer_table.SurveyOptions(multiple_of=4),
    )
    rows = [row for row in found.rows if row.layer == "fc"]
    assert [(row.reads, row.makes) for row in rows] == [(8, 5)]
    assert torch.tensor([row.seconds for row in found.rows]).gt(0).all()
