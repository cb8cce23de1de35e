"""One run of the whole pipeline on three layers and a device that is not there, in a second or two; and its text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import chdir
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import paths
import torch
from click.testing import Result
from typer.testing import CliRunner

from edgeprune.cli.app import app

GOLDEN = paths.ROOT / "tests" / "golden"
MODEL = ["model.pt", "--arch", "net.py:Net", "--input", "3x8x8"]
COMPRESS = [
    "compress", *MODEL, "--target", "raspberry-pi-4", "--device", "fake", "--data", "images.npz", "--epochs", "0",
    "--method", "magnitude", "--precision", "fp32", "-o", "run",
]  # fmt: skip
ENV = {
    "COLUMNS": "100",
    "TERMINAL_WIDTH": "100",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
}
PACKAGES = (
    r"\b(torch|onnx|onnxruntime|numpy|python|edgeprune|onnxslim|onnxscript|torch-pruning)( |=+)\d[\w.+]*"
)
# What another machine, another day or another version of a package changes, and no result of ours does.
MASKED = ("versions", "date", "version", "files", "sha256", "python", "samples")


def prepare(folder: Path) -> None:
    """The model and its images, by fixed seeds."""
    copy(GOLDEN / "net.py", folder)
    with contained(folder):
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location("net", "net.py")
        assert spec and spec.loader
        module: Any = module_from_spec(spec)
        spec.loader.exec_module(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            torch.save(module.Net().state_dict(), "model.pt")
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (80, 40))
    np.savez(
        folder / "images.npz", x_train=train, y_train=np.arange(80) % 4, x_test=test, y_test=np.arange(40) % 4
    )


def edgeprune(folder: Path, *argv: str) -> Result:
    """A command line in a folder, as wide as a page and without colors."""
    with contained(folder):
        return CliRunner(env=ENV).invoke(app, list(argv))


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Work in another folder for a while, and in one thread, which the report names."""
    before, threads = Path.cwd(), torch.get_num_threads()
    chdir(folder)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        chdir(before)


def masked_json(value: Any, folder: Path, key: str = "") -> Any:
    """A report without what no result decides: MASKED, rounding beyond four digits, differences near zero, paths."""
    if key in MASKED:
        return "masked"
    if isinstance(value, dict):
        hidden = ("value", "conditions") if value.get("metric") == "output_difference" else ()
        return {k: "masked" if k in hidden else masked_json(v, folder, k) for k, v in value.items()}
    if isinstance(value, list):
        return [masked_json(v, folder, key) for v in value]
    if isinstance(value, float):
        return 0.0 if abs(value) < 1e-9 else float(f"{value:.4g}")
    return masked(value, folder) if isinstance(value, str) else value


def masked(text: str, folder: Path) -> str:
    """Text without what no result decides."""
    text = text.replace(str(folder.resolve()), "FOLDER").replace(str(folder), "FOLDER")
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)
    text = re.sub(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?Z?)?", "DATE", text)
    text = re.sub(r"\b(?:\d\.\d+e-\d\d|0\.0e\+00)\b", "NOISE", text)
    text = re.sub(r"\blocal \w+", "local MACHINE", text)
    text = re.sub(PACKAGES, r"\1\2VERSION", text, flags=re.IGNORECASE)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def report(folder: Path) -> str:
    """report.json as text, masked."""
    read = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return json.dumps(masked_json(read, folder), indent=1, sort_keys=True) + "\n"
