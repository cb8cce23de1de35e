"""How long a ResNet-50 without data takes from its file to the verified ONNX file; random weights, default settings.

    python benchmarks/resnet50_data_free.py [-o DIR]

Prints the seconds of each stage of `edgeprune compress`, and what it says of work and time. Needs torchvision.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from edgeprune.models.architectures import architecture

KEPT = ("latency_p50", "Compared with", "Speed:", "Budget")


def main() -> None:
    """Write the network, compress it, and time what is said of each stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "resnet50.safetensors"
        torch.manual_seed(0)
        save_file(architecture("torchvision:resnet50").state_dict(), str(weights))
        run(weights, folder / "run")


def run(weights: Path, out: Path) -> None:
    """One run, from the start of the process; stages that are finished in `out` take no time."""
    command = [
        sys.executable, "-m", "edgeprune", "compress", str(weights), "--arch", "torchvision:resnet50", "--input",
        "3x224x224", "--target", "local", "--budget", "macs=50 %", "-o", str(out),
    ]  # fmt: skip
    began = last = time.monotonic()
    stage = "start"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        name, colon, _ = line.partition(":")
        if colon and name.islower() and name.isalpha() and name != stage:
            now = time.monotonic()
            print(f"{stage:12} {now - last:6.0f} s", flush=True)
            if name == "measure":
                print(f"{'to the file':12} {now - began:6.0f} s")
            stage, last = name, now
        if any(word in line for word in KEPT):
            print(line.rstrip())
    print(f"{stage:12} {time.monotonic() - last:6.0f} s, and the report")
    if process.wait():
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
