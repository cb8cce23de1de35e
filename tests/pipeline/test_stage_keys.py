"""The keys of the stages: which of them a run needs, and what each one's result depends on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune import targets
from edgeprune.errors import UsageError
from edgeprune.pipeline.context import Context, stage_keys
from edgeprune.pipeline.run_directory import STAGES, Workdir
from edgeprune.recipe import parse, schema
from edgeprune.records import Bundle, InputSpec, Source

MODEL = Bundle(None, Source("pt2", "net.pt2", "1"), InputSpec((3, 8, 8), 5))  # type: ignore[arg-type]
LEARN = SimpleNamespace(fingerprint="f", train=object())
WATCH = SimpleNamespace(fingerprint="f", train=None)
UNATTACKED = STAGES[:-1]
# A precision is chosen where there are images to choose by.
CHOOSING = ["dense", "prune", "cut", "tune", "export", "quantize", "measure"]
WITHOUT = [name for name in CHOOSING if name != "quantize"]


def keys(folder: Path, *, data: Any = None, model: Bundle = MODEL, **tables: Any) -> dict[str, str]:
    """The keys of a run; recipe tables as keywords."""
    made = parse.build({}, tables)
    target = targets.target(made.target)
    device = SimpleNamespace(where=lambda: "local here", name="local", facts=dict)
    run = Context(made, target, parse.budget(made), Workdir(folder), model, data, device, print)
    return stage_keys(run)


def changed(folder: Path, one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The stages that have other keys in the second run."""
    before, after = keys(folder, **one), keys(folder, **two)
    assert list(before) == list(after)
    return [name for name in before if before[name] != after[name]]


def test_without_data_every_stage_is_needed(tmp_path: Path) -> None:
    assert list(keys(tmp_path)) == list(UNATTACKED)
    assert list(keys(tmp_path, data=WATCH)) == list(UNATTACKED)


@pytest.mark.parametrize(
    ("data", "prune"),
    [
        (LEARN, {}),
        (None, {"repair": "none"}),
        (None, {"method": "magnitude"}),
        (WATCH, {"method": "magnitude"}),
    ],
)
def test_what_nothing_uses_is_not_made(data: Any, prune: dict[str, str], tmp_path: Path) -> None:
    assert list(keys(tmp_path, data=data, prune=prune)) == (CHOOSING if data is LEARN else WITHOUT)
    assert list(keys(tmp_path, data=data, prune=prune, export={"precision": "fp32"})) == WITHOUT


def test_a_repair_on_real_images_synthesizes_none(tmp_path: Path) -> None:
    assert list(keys(tmp_path, data=LEARN, prune={"repair": "data"})) == [
        *CHOOSING[:3],
        "repair",
        *CHOOSING[3:],
    ]
    with pytest.raises(UsageError, match="needs training images"):
        keys(tmp_path, data=WATCH, prune={"repair": "data"})


LATER = list(UNATTACKED[2:])


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ({}, {"budget": {"macs": "70 %"}}, LATER),
        ({}, {"prune": {"floor": 0.2}}, LATER),
        ({}, {"synthesize": {"images": 64}}, ["synthesize", *LATER]),
        ({}, {"synthesize": {"steps": 64}}, ["synthesize", *LATER]),
        ({}, {"seed": 1}, ["synthesize", *LATER]),
        ({}, {"tune": {"batch": 64}}, ["tune", "export", "quantize", "measure"]),
        ({}, {"measure": {"iterations": 50}}, ["quantize", "measure"]),
        (
            {"export": {"precision": "int8"}},
            {"export": {"precision": "int8"}, "measure": {"iterations": 50}},
            ["measure"],
        ),
        ({}, {"quantize": {"calibrator": "mse"}}, ["quantize", "measure"]),
        ({}, {"export": {"opset": 18}}, ["dense", *LATER]),
        (
            {"prune": {"method": "magnitude"}},
            {"prune": {"method": "magnitude"}, "synthesize": {"images": 9}},
            [],
        ),
    ],
)
def test_a_stage_is_redone_when_what_it_depends_on_changes_and_only_then(
    one: dict[str, Any], two: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    assert changed(tmp_path, one, two) == expected


def test_held_out_images_change_what_is_measured_and_not_what_is_pruned(tmp_path: Path) -> None:
    assert changed(tmp_path, {}, {"data": WATCH}) == ["repair", "tune", "export", "quantize", "measure"]


def test_a_choice_that_may_look_at_the_images_of_the_repair_depends_on_which_they_are(tmp_path: Path) -> None:
    found = {wish: keys(tmp_path, data=LEARN, prune={"repair": wish}) for wish in schema.REPAIRS}
    assert found["auto"]["prune"] == found["none"]["prune"]
    assert len({k["prune"] for k in found.values()}) == len({k["tune"] for k in found.values()}) == 3


def test_synthetic_and_real_images_give_different_repairs(tmp_path: Path) -> None:
    found = [
        keys(tmp_path, data=LEARN, prune={"method": "magnitude", "repair": wish})
        for wish in ("synthetic", "data")
    ]
    assert found[0]["repair"] != found[1]["repair"]


def test_another_network_is_another_key_everywhere(tmp_path: Path) -> None:
    other = Bundle(None, Source("pt2", "net.pt2", "2"), MODEL.input)  # type: ignore[arg-type]
    assert changed(tmp_path, {}, {"model": other}) == list(UNATTACKED)


def test_what_trains_robustly_is_attacked_where_there_are_images(tmp_path: Path) -> None:
    robust = {"tune": {"objective": "pgd"}}
    assert list(keys(tmp_path, data=LEARN, **robust)) == [*CHOOSING, "attack"]
    assert "attack" not in keys(tmp_path, **robust)
    assert "attack" not in keys(tmp_path, data=LEARN, attack={"name": "none"}, **robust)
    assert "attack" in keys(tmp_path, data=WATCH, attack={"name": "fgsm"})
    assert changed(
        tmp_path, {"data": LEARN, **robust}, {"data": LEARN, **robust, "attack": {"limit": 9}}
    ) == ["attack"]


def test_another_precision_is_built_from_the_same_network(tmp_path: Path) -> None:
    auto, named = keys(tmp_path), keys(tmp_path, export={"precision": "fp32"})
    assert [name for name in named if auto[name] != named[name]] == ["measure"]
    alone = {"multiple_of": 8, "int8_file": 0.0}
    int8, same = keys(tmp_path, export={"precision": "int8"}, prune=alone), keys(tmp_path, prune=alone)
    assert [name for name in int8 if int8[name] != same[name]] == ["quantize", "measure"]
    # For fewer multiply-accumulates an int8 file is cut so that it is small as well.
    macs = {"budget": {"macs": "50 %"}, "export": {"precision": "int8"}}
    assert changed(tmp_path, macs, {**macs, "prune": {"int8_file": 0.0}})[:2] == ["prune", "cut"]


def test_a_limit_on_time_is_held_by_files_in_the_precision_that_is_named(tmp_path: Path) -> None:
    timed = {"budget": {"latency_p50": "50 %"}, "prune": {"method": "magnitude"}}
    int8, fp16 = (keys(tmp_path, export={"precision": name}, **timed) for name in ("int8", "fp16"))
    assert int8["dense"] == fp16["dense"] and int8["prune"] != fp16["prune"]


def test_int8_without_any_images_makes_some_from_the_network(tmp_path: Path) -> None:
    wish = {"prune": {"method": "magnitude"}, "export": {"precision": "int8"}}
    assert list(keys(tmp_path, **wish)) == ["dense", "synthesize", *CHOOSING[1:]]
    assert list(keys(tmp_path, data=LEARN, **wish)) == CHOOSING


def test_images_that_precisions_are_judged_by_are_attacked_where_that_matters(tmp_path: Path) -> None:
    plain = keys(tmp_path, data=LEARN, attack={"name": "none"})
    robust = keys(
        tmp_path, data=LEARN, attack={"name": "none"}, budget={"robust_accuracy": "-2 pp", "macs": "50 %"}
    )
    assert plain["quantize"] != robust["quantize"]
