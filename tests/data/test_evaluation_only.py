"""--data-use evaluate: accuracy is measured, and nothing of the training part is learned from, or even opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from edgeprune.data import collection, splits
from edgeprune.data.collection import Split
from edgeprune.errors import UsageError
from edgeprune.models.bundle import from_module
from edgeprune.pipeline import compression
from edgeprune.pipeline.context import Result
from edgeprune.recipe import parse
from edgeprune.records import InputSpec

CLASSES = 5
TABLES = {
    "measure": {"iterations": 10, "seconds": 0.5, "warmup": 1},
    "synthesize": {"images": 8, "steps": 4},
    "budget": {"macs": "60 %"},
}


class Opened(Exception):
    """The training part was looked at."""


class Poison:
    """Pixels of a training part that nobody may take."""

    def take(self, indices: Tensor) -> Tensor:
        raise Opened(f"{len(indices)} training images were taken")

    def count(self) -> int:
        return 40


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders whose test images are images and whose training images are none."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        for part, count in (("train", 8), ("test", 4)):
            folder = tmp_path / "set" / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                if part == "test":
                    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
                else:
                    (folder / f"{i}.png").write_bytes(b"\x89PNG no image follows")
    return tmp_path / "set"


def compressed(data: Path, out: Path, use: str, said: list[str], **tables: object) -> Result:
    flags = {**TABLES, "data": {"path": str(data), "use": use}, **tables}
    bundle = from_module(nets.build("residual"), nets.example())
    return compression.compress(parse.build({}, flags), out, log=said.append, bundle=bundle)


def check(result: Result, said: Sequence[str]) -> None:
    report = result.report
    accuracies = [r for r in (*report.before, *report.after) if r.metric == "clean_accuracy"]
    assert [r.n for r in accuracies] == [20, 20] and all(r.value is not None for r in accuracies)
    assert [r.conditions["stage"] for r in report.ledger] == ["pruned", "repaired"]
    assert all(r.conditions["images"] == 20 for r in report.ledger)
    assert "tune: nothing (the data is for evaluation only)" in said
    assert "The method is data-free, because there is no training data." in report.notes


@pytest.mark.slow
def test_the_training_part_is_neither_opened_nor_learned_from(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are no images, and its pixels raise when they are taken; each control run dies of its poison."""
    with pytest.raises(UsageError, match="can.t be decoded"):
        compressed(folders, tmp_path / "control", "all", [])
    decode = collection.decode_set

    def poisoned(part: splits.Part, spec: InputSpec, at_once: bool) -> Split:
        if part.name == "test":
            return decode(part, spec, at_once)
        return Split(part.name, torch.from_numpy(part.labels), Poison())

    monkeypatch.setattr(collection, "decode_set", poisoned)
    said: list[str] = []
    check(compressed(folders, tmp_path / "run", "evaluate", said), said)
    monkeypatch.setattr(collection, "notes_on", lambda *_: ())  # it reads the size of some training images
    for tables in ({}, {"prune": {"method": "magnitude", "repair": "data"}}, {"tune": {"epochs": 1}}):
        with pytest.raises(Opened):
            compressed(folders, tmp_path / "control", "all", [], **tables)


def test_what_would_learn_is_refused_before_anything_is_made(folders: Path, tmp_path: Path) -> None:
    for tables, says in (
        ({"prune": {"repair": "data"}}, "needs training images"),
        ({"prune": {"options": {"batch": 8}}}, "data-free has no option 'batch'"),
        ({"tune": {"epochs": 1}}, "needs images to train on"),
    ):
        with pytest.raises(UsageError, match=says):
            compressed(folders, tmp_path / "run", "evaluate", [], **tables)
        assert not list((tmp_path).glob("run/[0-9]-*"))
