"""Files of every kind, broken and made hostile: refused or read, in time, and nothing of them runs or is written.

A few examples of each kind; `-m slow` tries more, benchmarks/hostile.py as many as are asked for and counts them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mutations
import pytest
from hostile_files import KINDS, Kind, prepare, takes_seconds
from hostile_runs import Ended, run
from hypothesis import given, settings
from hypothesis import strategies as st
from sound_files import write_stock

FEW, MANY = 6, 20
SEEDS = st.integers(0, 2**32 - 1)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "stock"
    write_stock(folder)
    return folder


def check(stock: Path, kind: Kind, seed: int, *, quick: bool = False) -> None:
    folder = Path(tempfile.mkdtemp(dir=stock.parent)) / "example"
    argv = prepare(stock, kind, folder, seed, quick=quick)
    ended = run(argv, folder)
    assert not ended.faults(kind.allowed), f"{kind.name}, seed {seed}: {argv} {ended.output[-3000:]!a}"
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] * takes_seconds(kind.commands[0]))
        for kind in KINDS
    ],
)
def test_a_sound_file_is_read(kind: Kind, stock: Path, tmp_path: Path) -> None:
    ended = run(prepare(stock, kind, tmp_path / "example"), tmp_path / "example")
    assert ended.code == 0 and not ended.faults(kind.allowed), ended.output


@each_kind
def test_a_hostile_file_is_refused_or_read_and_nothing_of_it_runs(kind: Kind, stock: Path) -> None:
    @settings(max_examples=FEW // 3 if takes_seconds(kind.commands[0]) else FEW)
    @given(seed=SEEDS)
    def holds(seed: int) -> None:
        check(stock, kind, seed, quick=True)

    holds()


@pytest.mark.slow
@each_kind
@settings(max_examples=MANY)
@given(seed=SEEDS)
def test_more_hostile_files(kind: Kind, stock: Path, seed: int) -> None:
    check(stock, kind, seed)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("payload", mutations.PAYLOADS[:3])
def test_code_that_runs_is_seen(payload: bytes, trusted: bool, stock: Path, tmp_path: Path) -> None:
    """With --trust-pickle the payloads do run: what looks for them sees it."""
    kind = next(kind for kind in KINDS if kind.name == "old format of torch (.pt)")
    folder = tmp_path / "example"
    argv = prepare(stock, kind, folder)
    (folder / "old.pt").write_bytes(b"\x80\x02" + payload + b".")
    ended = run((*argv, *["--trust-pickle"] * trusted), folder)
    assert ended.canary is trusted and bool(ended.written) is trusted
    assert ended.code == 4


def test_what_must_not_be_is_named() -> None:
    held = Ended(70, f"Traceback (most recent call last)\n\x1b[2J{'n' * 20_000}\n", 61.0, ("etc",), True)
    assert held.faults(frozenset({0})) == [
        "exit 70", "over 60 s", "written outside: etc", "code ran", "a traceback", "control characters",
        "a line of 20004 characters",
    ]  # fmt: skip
    assert Ended(0, "all\twell\n", 1.0, (), False).faults(frozenset({0})) == []
