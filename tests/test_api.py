"""The Python API: its docstrings run, the user's module stays as it is, and errors are the command line's."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch

import edgeprune
from edgeprune import api
from edgeprune.errors import InfeasibleBudget, ModelError, UsageError

FAST = {"iterations": 20, "seconds": 1.0}
ROUGH = {"images": 8, "steps": 4}


def test_the_docstrings_do_what_they_say() -> None:
    tried = doctest.testmod(api, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert tried.attempted >= 6 and tried.failed == 0


def test_the_public_names_are_all_there_and_come_late() -> None:
    code = "import edgeprune, sys; assert 'torch' not in sys.modules; print(sorted(edgeprune.__all__))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(["Run", "__version__", "compress", "load"])
    assert all(hasattr(edgeprune, name) for name in edgeprune.__all__)


def test_a_module_in_memory_is_compressed_and_itself_not_changed(tmp_path: Path) -> None:
    network = nets.build("depthwise")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    run = api.compress(
        network, nets.example(), budget={"macs": "60 %"}, output=tmp_path / "run", mean=(0.5,) * 3, std=(0.2,) * 3,
        measure=FAST, synthesize=ROUGH,
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    bundle = api.load(tmp_path / "run")
    from edgeprune.models.bundle import deployed

    x = nets.example(1, seed=9)
    torch.testing.assert_close(deployed(bundle)(x), run.module(x), rtol=1e-5, atol=1e-6)
    macs = {r.artifact: r.value for r in (*run.report.before, *run.report.after) if r.metric == "macs"}
    assert (
        macs["compressed"] is not None
        and macs["dense"] is not None
        and macs["compressed"] <= 0.6 * macs["dense"]
    )


def test_errors_are_those_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudget):
        api.compress(
            nets.build("plain"),
            nets.example(),
            budget={"macs": "1 %"},
            output=tmp_path / "a",
            synthesize=ROUGH,
        )
    with pytest.raises(UsageError, match="unknown metric"):
        api.compress(nets.build("plain"), nets.example(), budget={"speed": "2"}, output=tmp_path / "b")
    with pytest.raises(ModelError):
        (tmp_path / "x.pt").write_bytes(b"no model")
        api.load(tmp_path / "x.pt")
