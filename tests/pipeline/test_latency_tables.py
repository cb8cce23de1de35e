"""Where latency tables are kept: it is made and tried before anything is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latency_files
import paths
import pytest
from typer.testing import CliRunner

from edgeprune import targets
from edgeprune.cli.app import app
from edgeprune.devices._base import device_from_url
from edgeprune.errors import UsageError
from edgeprune.latency.layer_table import ALONE
from edgeprune.latency.segments import attribute_times
from edgeprune.measure.trials import Trials
from edgeprune.pipeline.latency_tables import Written, bench
from edgeprune.quantize import finalize
from edgeprune.recipe.schema import MeasureTable


class Asked:
    """A device that says what little a bench asks it, and counts how often."""

    name = "board"

    def __init__(self, **facts: Any) -> None:
        self.times = 0
        self.about = facts

    def facts(self) -> dict[str, Any]:
        self.times += 1
        return {"cpu": "made up", **self.about}

    def ask(self, _request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        self.times += 1
        assert timeout_s > 0
        return {"runtime": "onnxruntime 1.0"}

    def where(self) -> str:
        return "board x"


def trials(device: Any) -> Trials:
    return Trials(device, targets.target("local"), lambda _line: None, 0.0)


def test_a_cache_folder_that_can_not_be_written_is_refused_before_the_device_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    device = Asked()
    with pytest.raises(
        UsageError, match=r"file/\.cache/edgeprune/tables, which can't be written: "
    ) as caught:
        bench(trials(device), MeasureTable(), lambda _line: None)
    assert caught.value.exit_code == 2
    assert "HOME" in caught.value.hint
    assert device.times == 0


def test_a_new_cache_folder_is_made_and_nothing_is_left_of_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    found = bench(trials(Asked()), MeasureTable(), lambda _line: None)
    assert found.folder == tmp_path / "new" / ".cache" / "edgeprune" / "tables"
    assert not list(found.folder.iterdir())
    assert found.place == "board x, made up, onnxruntime 1.0, 1 thread(s), fp32"


def test_a_table_of_an_emulated_processor_says_so_and_is_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = bench(trials(Asked(emulated=True)), MeasureTable(), lambda _line: None)
    assert found.place.startswith("board x (emulated), made up, ")


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_files_are_timed_in_the_precision_that_is_asked_for_and_every_layer_is_told(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[str] = []

    def rewrite(path: Path) -> bytes:
        model = finalize.rough(path, precision, "u8")
        seen.append(path.name)
        return model.SerializeToString()

    there = Trials(device_from_url("local"), targets.target("local"), lambda _line: None, 0.0)
    quick = MeasureTable(iterations=10, warmup=1, seconds=1.0)
    found = bench(there, quick, lambda _line: None, Written(precision, rewrite))
    assert found.place.endswith(f", 1 thread(s), {precision}")
    network = latency_files.subject_of("residual")
    assert found.time({"dense": network.file})["dense"] > 0
    spent = dict(
        zip(
            (p.layer for p in network.segments),
            attribute_times(network.segments, found.nodes(network.file)),
            strict=True,
        )
    )
    layers = [n.name for n in network.resizer.model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert all(spent[name] > 0 for name in layers), spent
    assert seen == [network.file.name] * 2


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--device", "local", "--device", "fake"], "a second --device"),
        (["--data", "x", "--attack", "pgd"], "--data and --attack"),
    ],
)
def test_what_a_table_has_no_use_for_is_refused_before_anything_is_loaded(more: list[str], what: str) -> None:
    done = CliRunner().invoke(app, ["profile", "no-such-model.pt2", "--table", *more])
    assert done.exit_code == 2 and f"but {what} was given" in " ".join(done.output.split())


def test_the_page_names_the_shares_that_layers_are_timed_alone_at() -> None:
    page = paths.ROOT / "docs" / "latency.md"
    if not page.is_file():
        pytest.skip("not in this checkout")
    *first, last = (f"{100 * share:g}" for share in ALONE)
    said = " ".join(page.read_text(encoding="utf-8").split())
    assert f"a layer is timed at the counts nearest to {', '.join(first)} and {last} %" in said
