"""Broken and hostile files of every kind that edgeprune reads: what its commands do with them.

    python benchmarks/hostile.py [--examples 200] [--seed 0] [--kind .onnx] [--verbose]

Each example is a valid file with changes that follow from its number, read by a command in its own process and folder
(sound_files.py, hostile_files.py, mutations.py and hostile_runs.py in tests/support). Printed: how the commands ended.
70 is a bug; "ended otherwise" is an exit code that docs/security.md does not allow for the kind, or a signal; "canary"
is that code out of a file ran; "wrote" that something outside of the output folder changed; "output"
that control characters, a traceback or a line of more than 10,000 characters were printed. One is repeated by
--kind KIND --seed N --examples 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import _paths  # noqa: F401
from hostile_files import KINDS, Kind, prepare
from hostile_runs import LIMIT_S, Ended, run
from sound_files import write_stock

os.environ["OMP_NUM_THREADS"] = "1"

COLUMNS = ("kind of file", "tried", "exit 0", "refused (2, 4, 7)", "other verdicts (1, 3, 5, 6, 8)", "exit 70",
           "ended otherwise", f"over {LIMIT_S:g} s", "canary", "wrote", "output")  # fmt: skip


def main() -> None:
    """Try, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first example; the others follow")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only this one")
    parser.add_argument("--verbose", action="store_true", help="on stderr, the output of what went wrong")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeprune-hostile-") as scratch:
        stock = Path(scratch) / "stock"
        write_stock(stock)
        print(f"| {' | '.join(COLUMNS)} |\n|---|{'--:|' * (len(COLUMNS) - 1)}")
        total: Counter[str] = Counter()
        for kind in KINDS:
            if given.kind in (None, kind.name):
                counts = tried(kind, range(given.seed, given.seed + given.examples), stock, given.verbose)
                total += counts
                print(row(kind.name, counts), flush=True)
        print(row("**all**", total))


def tried(kind: Kind, seeds: range, stock: Path, verbose: bool) -> Counter[str]:
    """How often each column counts, over the examples of one kind."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        folder = stock.parent / "example"
        argv = prepare(stock, kind, folder, seed)
        ended = run(argv, folder)
        counts.update(columns(ended, kind))
        faults = ended.faults(kind.allowed)
        if faults and verbose:
            print(f"--kind '{kind.name}' --seed {seed}: {faults} {argv!a}", file=sys.stderr)
            print(ascii(ended.output[-3000:]).replace("\\n", "\n"), file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return counts


def columns(ended: Ended, kind: Kind) -> list[str]:
    """The columns that one example counts in."""
    code = (
        "exit 0" if ended.code == 0
        else COLUMNS[3] if ended.code in (2, 4, 7)
        else COLUMNS[4] if ended.code in kind.allowed
        else "exit 70" if ended.code == 70
        else f"over {LIMIT_S:g} s" if ended.seconds > LIMIT_S
        else "ended otherwise"
    )  # fmt: skip
    faults = {
        "canary": ended.canary,
        "wrote": bool(ended.written),
        "output": ended.shows_too_much(),
    }
    return ["tried", code, *(name for name, holds in faults.items() if holds)]


def row(name: str, counts: Counter[str]) -> str:
    """A line of the table."""
    return f"| {name} | {' | '.join(str(counts[column]) for column in COLUMNS[1:])} |"


if __name__ == "__main__":
    main()
