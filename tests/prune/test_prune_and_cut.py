"""The two stages between load and tune: budgets that only a built file can tell, and a cut that is never wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import training_tasks
from torch import nn

from edgeprune import models
from edgeprune.errors import InfeasibleBudget, ModelError, UnsupportedModel, UsageError, WorkdirError
from edgeprune.methods import dnr
from edgeprune.methods._data_free import progressive
from edgeprune.models import costs
from edgeprune.models.bundle import from_module
from edgeprune.prune import budget_search, cut, stage
from edgeprune.quantities import limit
from edgeprune.recipe.schema import PruneTable
from edgeprune.records import Budget, Bundle, Masks
from edgeprune.structure.groups import find_groups
from edgeprune.train import loop


def bundle(name: str = "residual") -> Bundle:
    return from_module(nets.build(name), nets.example())


def budget(**limits: str) -> Budget:
    return Budget({m: limit(m, text) for m, text in limits.items()})


def material(**probes: budget_search.Probe) -> stage.PruningInputs:
    return stage.PruningInputs(None, None, probes, 1, 0)


def slow_as_macs(dense: Bundle) -> budget_search.Probe:
    """A device whose time is 10 ms for the dense model and in proportion to the multiply-accumulates."""
    whole = costs.total_macs(dense.module, nets.example())
    return budget_search.Probe(0.01, lambda net: 0.01 * costs.total_macs(net, nets.example()) / whole)


def macs_after(dense: Bundle, chosen: stage.Chosen) -> float:
    plan, _ = cut.run_cut(dense, chosen.groups, chosen.masks, chosen.left_out, nets.example())
    return plan.macs / plan.macs_before


@pytest.mark.parametrize(("text", "share"), [("60 %", 0.6), ("4 ms", 0.4)])
def test_a_latency_budget_is_met_on_the_device_and_cuts_no_more_than_it_must(text: str, share: float) -> None:
    dense = bundle("plain")
    chosen = stage.run(
        dense, PruneTable(), budget(latency_p50=text), material(latency_p50=slow_as_macs(dense))
    )
    assert 0.75 * share <= macs_after(dense, chosen) <= share
    assert any("Searched by building the file" in note for note in chosen.notes)


def as_large_as_params(dense: Bundle) -> budget_search.Probe:
    """A file of 4 bytes a parameter, and one byte after a cut."""
    whole = sum(p.numel() for p in dense.module.parameters())
    return budget_search.Probe(4.0 * whole, lambda net: float(sum(p.numel() for p in net.parameters())))


def test_an_int8_file_is_held_to_its_share_when_only_the_macs_are_limited() -> None:
    dense = bundle()
    light = replace(material(size=as_large_as_params(dense)), file_share=0.3)
    chosen = stage.run(dense, PruneTable(), budget(macs="50 %"), light)
    _, small = cut.run_cut(dense, chosen.groups, chosen.masks, chosen.left_out, nets.example())
    whole, left = (sum(p.numel() for p in b.module.parameters()) for b in (dense, small))
    assert left <= 0.15 * 4 * whole and macs_after(dense, chosen) <= 0.5
    assert any("limited to 15.0% of the dense file" in note for note in chosen.notes)
    # A budget that says how small it is to become is left as it is.
    told = stage.run(dense, PruneTable(), budget(macs="50 %", params="90 %"), light)
    assert not any("limited to" in note for note in told.notes)


def test_an_int8_file_that_can_not_be_so_small_is_said_and_pruned_for_macs_alone() -> None:
    dense = bundle()
    light = replace(material(size=as_large_as_params(dense)), file_share=0.001)
    chosen = stage.run(dense, PruneTable(), budget(macs="50 %"), light)
    alone = stage.run(dense, PruneTable(), budget(macs="50 %"), material())
    assert {g: k.tolist() for g, k in chosen.masks.channels.items()} == {
        g: k.tolist() for g, k in alone.masks.channels.items()
    }
    assert any("its size is not limited" in note for note in chosen.notes)


def test_counted_and_measured_limits_hold_together() -> None:
    dense = bundle()
    wanted = budget(latency_p50="90 %", macs="30 %")
    chosen = stage.run(dense, PruneTable(), wanted, material(latency_p50=slow_as_macs(dense)))
    assert macs_after(dense, chosen) <= 0.3


def test_a_latency_that_pruning_can_not_reach_says_how_far_it_got() -> None:
    floor = budget_search.Probe(0.01, lambda net: 0.008)
    with pytest.raises(InfeasibleBudget, match=r"closest cut has latency_p50 8 ms \(limit 5 ms\)"):
        stage.run(bundle(), PruneTable(), budget(latency_p50="5 ms"), material(latency_p50=floor))


def test_a_metric_that_nobody_can_read_while_pruning_is_refused() -> None:
    with pytest.raises(UsageError, match="energy can't be measured while pruning"):
        stage.run(bundle(), PruneTable(), budget(energy="1 mJ"), material())


def test_a_budget_that_holds_already_is_said_and_nothing_is_cut() -> None:
    dense = bundle()
    chosen = stage.run(dense, PruneTable(), budget(macs="100 %"), material())
    assert macs_after(dense, chosen) == 1 and any("nothing was removed" in n for n in chosen.notes)


def test_the_choice_survives_the_disk(tmp_path: Path) -> None:
    chosen = stage.run(bundle("concat"), PruneTable(), budget(macs="50 %"), material())
    stage.write(chosen, tmp_path)
    again = stage.read(tmp_path)
    assert again.groups == chosen.groups and again.left_out == chosen.left_out and again.notes == chosen.notes
    assert all(torch.equal(again.masks.channels[g], m) for g, m in chosen.masks.channels.items())


def test_what_a_method_edited_goes_with_the_choice_and_survives_the_disk(tmp_path: Path) -> None:
    """Merged units: the readers of what stays have other weights than in the dense network, and nothing else has."""
    dense = bundle("plain")
    chosen = stage.run(dense, PruneTable(options={"mode": "baseline"}), budget(macs="60 %"), material())
    assert "Mode baseline: " in chosen.notes[0]
    # What went is zero everywhere; of what stays only the readers changed.
    before, keep = dense.module.state_dict(), chosen.masks.channels["a.0"]
    assert "b.0.weight" in chosen.edited
    assert not torch.equal(chosen.edited["b.0.weight"][:, keep], before["b.0.weight"][:, keep])
    assert torch.equal(chosen.edited["a.0.weight"][keep], before["a.0.weight"][keep])
    stage.write(chosen, tmp_path)
    again = stage.read(tmp_path)
    assert set(again.edited) == set(chosen.edited)
    assert all(torch.equal(again.edited[k], v) for k, v in chosen.edited.items())
    cuts = [
        cut.run_cut(dense, c.groups, c.masks, c.left_out, nets.example(), edited=edited)[1].module
        for c, edited in ((chosen, chosen.edited), (again, again.edited), (chosen, None))
    ]
    x = nets.example(6)
    with torch.no_grad():
        merged, same, plain = (network(x) for network in cuts)
    assert torch.equal(merged, same) and not torch.allclose(merged, plain, atol=1e-4)
    (tmp_path / "edited.safetensors").unlink()
    with pytest.raises(WorkdirError, match=r"edited\.safetensors"):
        stage.read(tmp_path)


def test_with_images_to_repair_on_the_weights_are_left_to_the_repair() -> None:
    dense = bundle("plain")
    given = replace(material(), unlabelled=nets.example(32))
    chosen = stage.run(dense, PruneTable(), budget(macs="60 %"), given)
    assert chosen.edited == {} and chosen.notes == () and macs_after(dense, chosen) <= 0.6


def test_searching_on_the_device_tries_counts_and_merges_but_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, runs = bundle("plain"), []
    run = progressive.Thinning.run

    def counted(thinning: progressive.Thinning, *given: object) -> None:
        runs.append(given[0])
        run(thinning, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(progressive.Thinning, "run", counted)
    probes = material(latency_p50=slow_as_macs(dense))
    chosen = stage.run(dense, PruneTable(), budget(latency_p50="5 ms"), probes)
    assert len(runs) == 1 and macs_after(dense, chosen) <= 0.5
    assert runs[0] == {g: int(keep.sum()) for g, keep in chosen.masks.channels.items()}


def test_searching_on_the_device_trains_but_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dense, runs = bundle("plain"), []
    fit = loop.fit

    def counted(*given: Any) -> Any:
        runs.append(given)
        return fit(*given)

    monkeypatch.setattr(dnr, "fit", counted)
    table = training_tasks.TABLE
    images = training_tasks.images(60, 1)
    probes = replace(
        material(latency_p50=slow_as_macs(dense)), train=images, images=images.take(torch.arange(60)),
        labels=images.labels, table=table, scratch=tmp_path,
    )  # fmt: skip
    chosen = stage.run(dense, PruneTable(method="dnr"), budget(latency_p50="5 ms"), probes)
    assert len(runs) == 1 and macs_after(dense, chosen) <= 0.5


def test_skipped_layers_keep_their_channels() -> None:
    chosen = stage.run(bundle(), PruneTable(skip=("one.*",)), budget(macs="70 %"), material())
    assert "one.0" not in chosen.masks.channels and "skipped by request" in chosen.left_out["one.0"]


def test_a_network_of_one_layer_can_not_be_cut_and_is_told_so() -> None:
    one = from_module(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), nets.example())
    with pytest.raises(UnsupportedModel, match="no channel of this network can be removed"):
        stage.run(one, PruneTable(), budget(macs="50 %"), material())


def test_a_group_that_fails_its_proof_is_left_whole_and_named() -> None:
    dense = bundle("plain")
    groups = find_groups(dense.module, nets.example()).groups
    wrong = tuple(
        replace(m, positions=(*m.positions[1:], m.positions[0])) if m.role == "consumer" else m
        for m in groups[0].members
    )
    masks = Masks(channels={g.name: torch.arange(g.channels) % 2 == 0 for g in groups})
    plan, small = cut.run_cut(
        dense, (replace(groups[0], members=wrong), groups[1]), masks, {}, nets.example()
    )
    assert set(plan.removed) == {"b.0"} and "differ by" in plan.left_out["a.0"]
    assert small.module.a[0].out_channels == 8 and small.module.b[0].out_channels == 6  # type: ignore[index, union-attr]


def test_a_cut_that_removes_nothing_that_counts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As happens when a graph is misread: tensors are listed as cut, and the network costs what it did."""
    dense = bundle("plain")
    groups = find_groups(dense.module, nets.example()).groups
    masks = Masks(channels={g.name: torch.arange(g.channels) % 2 == 0 for g in groups})
    monkeypatch.setattr(models, "cut", lambda *_: ())
    with pytest.raises(ModelError, match="nothing was removed where it counts"):
        cut.run_cut(dense, groups, masks, {}, nets.example())


def test_the_plan_says_what_is_left_and_what_there_was() -> None:
    dense = bundle()
    chosen = stage.run(dense, PruneTable(), budget(macs="50 %"), material())
    plan, small = cut.run_cut(dense, chosen.groups, chosen.masks, chosen.left_out, nets.example())
    assert plan.macs == costs.total_macs(small.module, nets.example()) <= 0.5 * plan.macs_before
    assert plan.macs_before == costs.total_macs(dense.module, nets.example())
    assert plan.params == costs.total_params(small.module) < plan.params_before
    assert small.plans == (plan,) and dense.plans == ()
