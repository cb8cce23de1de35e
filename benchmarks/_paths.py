"""Imported for its effect: modules of examples/ and tests/support/ can be imported, wherever a benchmark is started."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples"), str(ROOT / "tests" / "support")]
