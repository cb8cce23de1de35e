"""A trained ResNet-20 for CIFAR-10 at half of its multiply-accumulates, through the command line alone.

    python benchmarks/resnet20.py WEIGHTS DATA [-o DIR] [--method taylor] [--epochs 2]
        [--precision fp32]

WEIGHTS is a state dict for examples/resnet20_cifar10.py, DATA the images in class folders (or a tar of them). Prints
what stands in BENCHMARKS.md, from the report of the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "resnet20_cifar10.py"


def main() -> None:
    """Compress, and print the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights")
    parser.add_argument("data")
    parser.add_argument("-o", "--output", default=None)
    parser.add_argument("--method", default="taylor")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    folder = given.output or tempfile.mkdtemp(prefix="edgeprune-resnet20-")
    command = [
        sys.executable, "-m", "edgeprune", "compress", given.weights, "--arch", f"{EXAMPLE}:resnet20",
        "--input", "3x32x32", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--data", given.data,
        "--method", given.method, "--budget", "macs=50 %", "--epochs", given.epochs, "--target", "local",
        "--precision", given.precision, "-o", folder, "--json",
    ]  # fmt: skip
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    report = answer["report"]
    before = {r["metric"]: r for r in report["before"]}
    print("| metric | dense | compressed |\n|---|---|---|")
    for reading in report["after"]:
        dense = before.get(reading["metric"], {"value": None})["value"]
        print(
            f"| {reading['metric']} | {dense if dense is None else f'{dense:.6g}'} | {reading['value']:.6g} |"
        )
    for reading in report["ledger"]:
        print(f"| accuracy after: {reading['conditions']['stage']} | | {reading['value']:.4f} |")
    print("\n".join(report["notes"]))


if __name__ == "__main__":
    main()
