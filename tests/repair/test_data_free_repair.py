"""The stage that repairs a cut without training: which images it takes, and what it leaves in the ledger."""

from __future__ import annotations

from dataclasses import replace

import nets
import pytest
import torch
from torch import Tensor

from edgeprune.data.collection import in_memory
from edgeprune.errors import ModelError, UsageError
from edgeprune.models.bundle import deployed, from_module
from edgeprune.prune import cut
from edgeprune.recipe.schema import PruneTable
from edgeprune.records import Bundle, Masks
from edgeprune.repair import stage
from edgeprune.repair.stage import Repaired
from edgeprune.structure.groups import find_groups
from edgeprune.train.evaluation import accuracy


def halved(dense: Bundle) -> Bundle:
    """The network without every second channel of what can be cut."""
    groups = find_groups(dense.module, nets.example()).groups
    masks = Masks(channels={g.name: torch.arange(g.channels) % 2 == 0 for g in groups})
    return cut.run_cut(dense, groups, masks, {}, nets.example())[1]


@pytest.mark.parametrize(
    ("wish", "method", "trainable", "source"),
    [
        ("auto", "data-free", False, "synthetic"),
        ("auto", "data-free", True, "data"),
        ("auto", "magnitude", False, "none"),
        ("auto", "taylor", True, "none"),
        ("none", "data-free", False, "none"),
        ("synthetic", "taylor", True, "synthetic"),
        ("synthetic", "magnitude", False, "synthetic"),
        ("data", "magnitude", True, "data"),
        ("data", "data-free", True, "data"),
    ],
)
def test_the_images_are_those_that_the_recipe_and_the_data_come_to(
    wish: str, method: str, trainable: bool, source: str
) -> None:
    assert stage.source_of(PruneTable(repair=wish), method, trainable) == source


def test_a_repair_with_data_needs_data_to_learn_from() -> None:
    with pytest.raises(UsageError) as caught:
        stage.source_of(PruneTable(repair="data"), "taylor", False)
    assert "there are none" in caught.value.message and "--data-use evaluate" in caught.value.hint


def test_the_ledger_has_the_accuracy_of_the_cut_and_of_the_repaired_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = from_module(nets.build("residual"), nets.example(), mean=(0.5,) * 3, std=(0.25,) * 3)
    small, seen = halved(dense), []

    def mend(whole: Bundle, given: Bundle, images: Tensor, *, seed: int) -> Repaired:
        seen.append((whole, given, images, seed))
        module = nets.build("residual", seed=9)
        return Repaired(replace(given, module=module), ("mended",), {"layers": 3})

    monkeypatch.setattr(stage, "repair", mend)
    pixels = (nets.example(40) * 255).to(torch.uint8)
    split = in_memory("test", pixels, torch.arange(40) % 5)
    images = nets.example(4)
    repaired, ledger = stage.run(dense, small, images, held_out=split, seed=3)
    assert seen == [(dense, small, images, 3)]
    assert (repaired.notes, repaired.facts) == (("mended",), {"layers": 3})
    assert [r.conditions["stage"] for r in ledger] == ["pruned", "repaired"]
    for reading, network in zip(ledger, (small, repaired.bundle), strict=True):
        assert reading.value == accuracy(deployed(network), split)[0] / 40 and reading.n == 40
    assert ledger[1].conditions["repair"] == {"layers": 3}


def test_without_held_out_images_there_is_no_accuracy() -> None:
    dense = from_module(nets.build("plain"), nets.example())
    _, ledger = stage.run(dense, halved(dense), nets.example(16), held_out=None, seed=0)
    assert ledger == ()


@pytest.mark.parametrize("name", ["plain", "residual", "concat"])
def test_the_repair_brings_the_answers_nearer_and_leaves_its_inputs_alone(name: str) -> None:
    dense = from_module(nets.build(name), nets.example())
    small = halved(dense)
    before = [{k: v.clone() for k, v in b.module.state_dict().items()} for b in (dense, small)]
    images = nets.example(64, seed=5)
    repaired, _ = stage.run(dense, small, images, held_out=None, seed=0)
    with torch.no_grad():
        wanted, cut_down, mended = (deployed(b)(images) for b in (dense, small, repaired.bundle))
    far, near = (float((found - wanted).square().mean()) for found in (cut_down, mended))
    assert near < far
    for bundle, state in zip((dense, small), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in bundle.module.state_dict().items())


def test_edited_weights_are_cut_and_the_counts_before_stay_those_of_the_dense_network() -> None:
    dense = from_module(nets.build("plain"), nets.example())
    groups = find_groups(dense.module, nets.example()).groups
    masks = Masks(channels={"a.0": torch.arange(8) < 4})
    edited = {"b.0.weight": torch.zeros_like(dense.module.state_dict()["b.0.weight"])}
    edited["b.0.weight"][:, 1] = 1.0
    plan, small = cut.run_cut(dense, groups, masks, {}, nets.example(), edited=edited)
    kept = small.module.state_dict()["b.0.weight"]
    assert torch.equal(kept, edited["b.0.weight"][:, :4]) and "a.0" in plan.removed
    assert plan.params_before == sum(int(p.count_nonzero()) for p in dense.module.parameters())
    assert float(dense.module.state_dict()["b.0.weight"].abs().min()) > 0


def test_edited_weights_of_another_network_are_refused() -> None:
    dense = from_module(nets.build("plain"), nets.example())
    for name, says in (("nowhere.weight", "which is not there"), ("fc.bias", r"which is \(5,\) there")):
        with pytest.raises(ModelError, match=says):
            cut.run_cut(dense, (), Masks(), {}, nets.example(), edited={name: torch.zeros(3)})
