"""Where latency tables are kept: it is made and tried before anything is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import UsageError
from edgeprune.recipe import MeasureTable
from edgeprune.tabling import bench


class Asked:
    """A device that says what little a bench asks it, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def facts(self) -> dict[str, Any]:
        self.times += 1
        return {"cpu": "made up"}

    def ask(self, _request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        self.times += 1
        assert timeout_s > 0
        return {"runtime": "onnxruntime 1.0"}

    def where(self) -> str:
        return "board x"


def test_a_cache_folder_that_can_not_be_written_is_refused_before_the_device_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    device = Asked()
    with pytest.raises(
        UsageError, match=r"file/\.cache/edgeprune/tables, which can't be written: "
    ) as caught:
        bench(device, MeasureTable(), lambda _line: None, 0.0)
    assert caught.value.exit_code == 2
    assert "HOME" in caught.value.hint
    assert device.times == 0


def test_a_new_cache_folder_is_made_and_nothing_is_left_of_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    found = bench(Asked(), MeasureTable(), lambda _line: None, 0.0)
    assert found.folder == tmp_path / "new" / ".cache" / "edgeprune" / "tables"
    assert not list(found.folder.iterdir())
    assert found.place == "board x, made up, onnxruntime 1.0, 1 thread(s), fp32"
