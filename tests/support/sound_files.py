"""One sound file of each kind that edgeprune reads."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import hostile_runs
import numpy as np
import paths
from PIL import Image

CLASSES = ("ant", "bee", "cow")
ARCH = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )
"""
RECIPE = """
target = "local"
seed = 3
[model]
input = "3x8x8"
[prune]
method = "magnitude"
repair = "none"
[export]
precision = "fp32"
[measure]
device = "fake:"
iterations = 10
[budget]
macs = "60 %"
"""
# A Python that answers as the agent would, whatever it is asked to run.
PYTHON = r"""#!/bin/sh
op=$(grep -a -o '"op": "[a-z]*"' | tail -n 1 | cut -d '"' -f 4)
cat "answers/${op:-about}.json"
"""
PLAIN = (
    "--set",
    "prune.method=magnitude",
    "--set",
    "prune.repair=none",
    "--precision",
    "fp32",
    "--device",
    "fake:",
)


def write_stock(stock: Path) -> None:
    """Write all sound files into a folder that does not exist yet; takes some ten seconds."""
    stock.mkdir()
    _warm()
    _write_models(stock)
    _write_images(stock)
    (stock / "recipe.toml").write_text(RECIPE)
    (stock / "budget.toml").write_text('[budget]\nmacs = "70 %"\nsize = "1 MB"\nallow-estimates = true\n')
    root = paths.ROOT
    (stock / "calibration.toml").write_text((root / "calibration/small.toml").read_text())
    (stock / "target.toml").write_text((root / "targets/raspberry-pi-4.toml").read_text())
    _write_answers(stock)
    done = hostile_runs.run(("compress", "net.pt2", "-o", "out", *PLAIN), stock)
    if done.code:
        raise RuntimeError(f"no sound run: exit {done.code}: {done.output}")
    for name in ("report.json", "baseline.json"):
        shutil.copy(stock / "out/report.json", stock / name)


def _warm() -> None:
    """Import what commands import, so that a fork has it."""
    from importlib import import_module

    import onnxruntime

    del onnxruntime
    package = Path(import_module("edgeprune").__file__ or "").parent
    for path in sorted(
        [*package.glob("pipeline/*.py"), *package.glob("methods/*.py"), *package.glob("attacks/*.py")]
    ):
        if path.stem != "__init__":
            import_module(".".join(["edgeprune", *path.relative_to(package).with_suffix("").parts]))
    import_module("edgeprune.cli.app")
    import_module("edgeprune.cli.tables")


def _write_models(stock: Path) -> None:
    import onnx
    import torch
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.torch import save_file

    (stock / "net.py").write_text(ARCH)
    made: dict[str, Any] = {}
    exec(ARCH, made)
    torch.manual_seed(0)
    net = made["build"]().eval()
    state = net.state_dict()
    torch.save(state, stock / "net.pt")
    torch.save(net, stock / "module.pt")
    torch.save(state, stock / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, stock / "net.safetensors", metadata={"format": "pt"})
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(
        torch.export.export(net, (torch.rand(2, 3, 8, 8),), dynamic_shapes=(batch,)), stock / "net.pt2"
    )
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    names = {"conv.weight": "0.weight", "conv.bias": "0.bias", "fc.weight": "7.weight", "fc.bias": "7.bias"}
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(state[key].numpy(), name) for name, key in names.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, stock / "net.onnx")
    onnx.save(model, stock / "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=0)


def _write_images(stock: Path) -> None:
    numbers = np.random.default_rng(0)
    x, y = numbers.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % 3
    np.savez(stock / "images.npz", x=x, y=y)
    for i, ending in enumerate(["png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "png", "jpg"]):
        path = stock / "photos" / CLASSES[i % 3] / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(path)
    with tarfile.open(stock / "photos.tar", "w") as tar:
        tar.add(stock / "photos", "photos")


def _write_answers(stock: Path) -> None:
    from edgeprune.devices import fake

    (stock / "fake.json").write_text(json.dumps({**fake.CANNED, "classes": len(CLASSES)}))
    requests = {
        "about": {}, "memory": {"name": "dense"}, "profile": {"name": "dense"},
        "time": {"models": ["net"], "iterations": 20, "warmup": 3},
    }  # fmt: skip
    (stock / "answers").mkdir()
    for op, request in requests.items():
        (stock / "answers" / f"{op}.json").write_text(
            json.dumps(fake.canned_row({"op": op, **request}, fake.CANNED))
        )
    energy = {"joule": None, "why": "no power sensor", "runtime": "canned 0.0"}
    (stock / "answers/energy.json").write_text(json.dumps(energy))
    (stock / "answers/build.json").write_text(
        json.dumps({"built": "net.onnx", "facts": {}, "runtime": "canned 0.0"})
    )
    (stock / "answers/predict.json").write_text(json.dumps({"images": 12, "classes": 3}))
    (stock / "python").write_text(PYTHON)
    (stock / "python").chmod(0o755)
