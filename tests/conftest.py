"""What all tests share: one thread, repeatable examples, and the way to data that may not be there."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch or numpy, and inherited by the processes that tests start: with two threads on two
# busy cores, small convolutions take several times as long as with one.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("edgeprune", deadline=None, derandomize=True, database=None)
settings.load_profile("edgeprune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Who measures holds a lock in the temporary folder: each process of the tests has its own, and its own seals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of trained models and real images that lies beside some checkouts, or the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: trained models and real images are not here")
    return folder


@pytest.fixture(autouse=True)
def fixed_chance() -> None:
    """Networks that a test makes without a seed of its own are the same every time, in whatever order tests run."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(20)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch takes two threads, as it would on a larger machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
