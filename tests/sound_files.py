"""One sound file of each kind that edgeprune reads, the commands that read it, and how it is made hostile."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import hostile_runs
import mutations
import numpy as np
from hostile_runs import CANARY, REFUSED
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
EVALUATE = ("evaluate", "--data", "images.npz")
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
# A gate also says that a limit is missed (1) or that it can't tell (8).
GATE = REFUSED | {1, 8}
# What names a package that is not installed (3), a network that answers differently (5), or a machine that does not
# answer as it must (6).
NAMES_MACHINES = REFUSED | {3, 5, 6}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    files: what of the stock is needed. change: makes it hostile, in place. commands: each of them reads it; what
    stands in the file `extra`, a JSON list, is added to their arguments.
    """

    name: str
    files: tuple[str, ...]
    change: Callable[[Path, Random], None]
    commands: tuple[tuple[str, ...], ...]
    allowed: frozenset[int] = REFUSED


def prepare(stock: Path, kind: Kind, folder: Path, seed: int | None = None) -> tuple[str, ...]:
    """Put the kind's files into a new folder, changed as the seed says; gives the command to run there."""
    for name in kind.files:
        if (stock / name).is_dir():
            shutil.copytree(stock / name, folder / name, symlinks=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(stock / name, folder / name)
    random = Random(seed)
    if seed is None:
        return kind.commands[0]
    kind.change(folder, random)
    extra = folder / "extra"
    added = json.loads(extra.read_text()) if extra.exists() else []
    return (*random.choice(kind.commands), *added)


def write_stock(stock: Path) -> None:
    """Write all sound files into a folder that does not exist yet; takes some ten seconds."""
    stock.mkdir()
    _warm()
    _write_models(stock)
    _write_images(stock)
    (stock / "recipe.toml").write_text(RECIPE)
    (stock / "budget.toml").write_text('[budget]\nmacs = "70 %"\nsize = "1 MB"\nallow-estimates = true\n')
    root = Path(__file__).resolve().parents[1]
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
    import torch._dynamo
    import torch.export

    del onnxruntime
    package = Path(import_module("edgeprune").__file__ or "").parent
    for path in sorted(
        [*package.glob("nn/*.py"), *package.glob("stages/*.py"), *package.glob("methods/*.py")]
    ):
        if path.stem != "__init__":
            import_module(".".join(["edgeprune", *path.relative_to(package).with_suffix("").parts]))
    import_module("edgeprune.cli")
    import_module("edgeprune.tables")


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
    weights = {"conv.weight": state["0.weight"], "conv.bias": state["0.bias"], "fc.weight": state["7.weight"], "fc.bias": state["7.bias"]}  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
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

    (stock / "fake.json").write_text(json.dumps({**fake._CANNED, "classes": len(CLASSES)}))
    requests = {
        "about": {}, "memory": {"name": "dense"}, "profile": {"name": "dense"},
        "time": {"models": ["net"], "iterations": 20, "warmup": 3},
    }  # fmt: skip
    (stock / "answers").mkdir()
    for op, request in requests.items():
        (stock / "answers" / f"{op}.json").write_text(
            json.dumps(fake._answer({"op": op, **request}, fake._CANNED))
        )
    energy = {"joule": None, "why": "no power sensor", "runtime": "canned 0.0"}
    (stock / "answers/energy.json").write_text(json.dumps(energy))
    (stock / "answers/build.json").write_text(
        json.dumps({"built": "net.onnx", "facts": {}, "runtime": "canned 0.0"})
    )
    (stock / "answers/predict.json").write_text(json.dumps({"images": 12, "classes": 3}))
    (stock / "python").write_text(PYTHON)
    (stock / "python").chmod(0o755)


# How each is changed.

Bytes = Callable[[bytes, Random], bytes]


def _rewrite(*names: str, by: Bytes) -> Callable[[Path, Random], None]:
    def change(folder: Path, random: Random) -> None:
        path = folder / random.choice(names)
        path.write_bytes(by(path.read_bytes(), random))

    return change


def _member(name: str) -> Bytes:
    if name.endswith(".json"):
        return mutations.json_bytes
    if name.endswith(".pkl") or "sample_inputs" in name:
        return mutations.pickled
    return mutations.npy if name.endswith(".npy") else mutations.flat


def _archive(data: bytes, random: Random) -> bytes:
    return mutations.zipped(data, random, _member)


def _safetensors(data: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return mutations.flat(data, random)
    size = int.from_bytes(data[:8], "little")
    header = mutations.json_bytes(data[8 : 8 + size], random)
    length = random.choice([len(header)] * 5 + [0, 2**63, 10**8, len(header) + 1])
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _toml(data: bytes, random: Random) -> bytes:
    return mutations.toml(tomllib.loads(data.decode()), random)


def _photos(folder: Path, random: Random) -> None:
    paths = sorted(p for p in (folder / "photos").rglob("*") if p.is_file())
    for _ in range(random.choice([1, 1, 2])):
        path = random.choice(paths)
        {
            "bytes": lambda: path.exists() and path.write_bytes(mutations.flat(path.read_bytes(), random)),
            "rename": lambda: _to(path, path.with_name(mutations.name_on_disk(random) + path.suffix)),
            "class": lambda: _to(path.parent, path.parent.with_name(mutations.name_on_disk(random))),
            "link": lambda: _link(path, random),
            "huge": lambda: _huge(path, random),
            "odd": lambda: _odd(path, random),
            "deep": lambda: (path.parent / "/".join("d" * 40)).mkdir(parents=True, exist_ok=True),
        }[random.choice(["bytes", "bytes", "bytes", "rename", "class", "link", "huge", "odd", "deep"])]()


def _to(path: Path, new: Path) -> None:
    if path.exists() and not os.path.lexists(new):
        path.rename(new)


def _link(path: Path, random: Random) -> None:
    name = path.parent / f"link-{random.randrange(9)}{random.choice(['', '.png'])}"
    target = random.choice(
        [".", "..", name.name, "/", "/dev/zero", "/etc/passwd", "/proc/self", "no.png", path.name]
    )
    if path.parent.is_dir() and not os.path.lexists(name):
        name.symlink_to(target)


def _huge(path: Path, random: Random) -> None:
    """A picture whose header says that it is as large as a format can hold, or one that unpacks to much."""
    out = io.BytesIO()
    image = Image.new("RGB", (1, 1)) if random.random() < 0.5 else Image.new("1", (9000, 9000))
    image.save(out, random.choice(["png", "tiff", "bmp", "gif"]))
    data = out.getvalue()
    if data.startswith(b"\x89PNG"):
        import zlib

        chunk = b"IHDR" + random.choice([2**31 - 1, 60_000, 0, 1]).to_bytes(4, "big") * 2 + data[24:29]
        data = data[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]
    if path.parent.is_dir():
        path.write_bytes(data)


def _odd(path: Path, random: Random) -> None:
    if path.exists():
        path.unlink()
        random.choice(
            [lambda: os.mkfifo(path), lambda: path.mkdir(), lambda: path.touch(), lambda: path.touch(0)]
        )()


def _tar(folder: Path, random: Random) -> None:
    path = folder / "photos.tar"
    if random.random() < 0.4:
        path.write_bytes(mutations.flat(path.read_bytes(), random))
        return
    with tarfile.open(path) as tar:
        found = [
            (info, (tar.extractfile(info) or io.BytesIO()).read() if info.isfile() else b"") for info in tar
        ]
    i = random.randrange(len(found))
    info, content = found[i]
    how = random.choice(["name", "type", "size", "content", "double"])
    if how == "name":
        info.name = random.choice(
            [random.choice(mutations.NAMES), info.name + random.choice(mutations.NAMES)]
        )
    elif how == "type":
        info.type = random.choice(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        )
        info.linkname = random.choice([info.name, "..", "/etc/passwd", found[-1][0].name])
    elif how == "content":
        found[i] = (info, mutations.flat(content, random))
    elif how == "double":
        found.append(found[i])
    with tarfile.open(
        path, random.choice(["w", "w:gz", "w:xz"]), format=tarfile.PAX_FORMAT, errors="surrogatepass"
    ) as tar:
        for one, held in found:
            one.size = len(held) if how != "size" else random.choice([len(held), 2**40, 0])
            tar.addfile(one, io.BytesIO(held) if len(held) == one.size else None)


def _run(folder: Path, random: Random) -> None:
    run = folder / "out"
    path = random.choice(sorted(p for p in run.rglob("*") if p.is_file()))
    how = random.choice(["change"] * 5 + ["remove", "link", "folder", "rename", "add", "forge", "forge"])
    if how == "remove":
        path.unlink()
    elif how == "rename":
        _to(path, path.with_name(mutations.name_on_disk(random)))
    elif how == "add":
        (path.parent / mutations.name_on_disk(random)).write_bytes(b"x")
    elif how in ("link", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        else:
            path.symlink_to(
                random.choice(["/etc/passwd", path.name, "../..", "/dev/zero", str(folder / CANARY)])
            )
    elif how == "forge":
        _forge(run, random)
    else:
        path.write_bytes(_by_name(path.name)(path.read_bytes(), random))


def _by_name(name: str) -> Bytes:
    if name == "edgeprune.lock":
        return mutations.json_bytes
    ways = {".json": mutations.json_bytes, ".toml": _toml, ".safetensors": _safetensors, ".onnx": mutations.protobuf, ".pt2": _archive}  # fmt: skip
    return ways.get(Path(name).suffix, mutations.flat)


def _forge(run: Path, random: Random) -> None:
    """Change a file and the hash of it in the report and in the records, as somebody would who has no key."""
    import hashlib

    whole = [p for p in sorted(run.rglob("*")) if p.suffix in (".onnx", ".pt2", ".safetensors", ".toml")]
    path = random.choice(whole)
    before = path.read_bytes()
    after = _by_name(path.name)(before, random)
    old, new = (hashlib.sha256(data).hexdigest().encode() for data in (before, after))
    for other in run.rglob("*"):
        if other.is_file() and other.read_bytes() == before:
            other.write_bytes(after)
        elif other.suffix in (".json", ".lock"):
            other.write_bytes(other.read_bytes().replace(old, new))


def _budget_text(folder: Path, random: Random) -> None:
    metric = random.choice(
        [
            "macs",
            "size",
            "latency_p50",
            "clean_accuracy",
            "params",
            "allow-estimates",
            random.choice(mutations.NAMES),
        ]
    )
    text = random.choice(
        [
            f"{metric}={random.choice(_LIMITS)}",
            f"{metric}{random.choice(mutations.NAMES)}",
            f"{metric}={random.choice(mutations.NAMES)}",
        ]
    )
    (folder / "extra").write_text(json.dumps(["--budget", text.replace("\0", "")]))


_LIMITS = (
    "", " ", "50 %", "50\u00a0%", "\u0665\u0660 %", "-1 pp", "1e999 ms", "nan %", "inf", "-5 ms", "5 s s", "1_0 %", "0x5 ms", "9" * 5000,
    "5 \x1b[31m", "5" + " " * 100_000 + "x", "1e400 B", "1/3 ms", "+5 ms", "5.5.5 ms", "%", "-0 %", "5e-324 s", "true", "1e5000",
)  # fmt: skip


def _extra(*values: Any) -> Callable[[Path, Random], None]:
    """A value of an option: some of those given, mixed with the hostile names."""

    def change(folder: Path, random: Random) -> None:
        option, sound = random.choice(values)
        cut = random.randrange(len(sound) + 1)
        text = random.choice(
            [sound[:cut] + random.choice(mutations.NAMES) + sound[cut:], random.choice(_LIMITS)]
        )
        (folder / "extra").write_text(json.dumps([option, text.replace("\0", "")]))

    return change


def _answers(folder: Path, random: Random) -> None:
    path = (
        folder
        / "answers"
        / random.choice(
            ["about.json", "time.json", "time.json", "memory.json", "profile.json", "energy.json"]
        )
    )
    data = path.read_bytes()
    changed = mutations.json_bytes(data, random)
    path.write_bytes(
        random.choice([changed] * 4 + [data + changed, b"\x1b[2J" + data, b"\xff" * 10_000_000, b""])
    )


FAKE = ("--set", "measure.device='fake:fake.json'")
STAND_IN = ("--device", "local://?python=./python")
KINDS = (
    Kind("state dict (.pt)", ("net.pt", "net.py", "images.npz"), _rewrite("net.pt", by=_archive),
         ((*EVALUATE, "net.pt", "--arch", "net.py:build", "--input", "3x8x8"),)),
    Kind("pickled network (.pt)", ("module.pt", "images.npz"), _rewrite("module.pt", by=_archive),
         ((*EVALUATE, "module.pt", "--input", "3x8x8"),)),
    Kind("old format of torch (.pt)", ("old.pt", "net.py", "images.npz"), _rewrite("old.pt", by=mutations.pickled),
         ((*EVALUATE, "old.pt", "--arch", "net.py:build", "--input", "3x8x8"),)),
    Kind(".safetensors", ("net.safetensors", "net.py", "images.npz"), _rewrite("net.safetensors", by=_safetensors),
         ((*EVALUATE, "net.safetensors", "--arch", "net.py:build", "--input", "3x8x8"),)),
    Kind(".pt2", ("net.pt2", "images.npz"), _rewrite("net.pt2", by=_archive), ((*EVALUATE, "net.pt2"),)),
    Kind(".onnx", ("net.onnx", "images.npz", "fake.json"), _rewrite("net.onnx", by=mutations.protobuf),
         ((*EVALUATE, "net.onnx", *FAKE), (*EVALUATE, "net.onnx"), ("profile", "net.onnx", *FAKE),
          (*EVALUATE, "net.onnx", "--attack", "fgsm", "--eps", "1/255")), REFUSED | {6}),
    Kind(".onnx with external data", ("ext.onnx", "ext.data", "images.npz", "fake.json"),
         _rewrite("ext.onnx", "ext.onnx", "ext.onnx", "ext.data", by=lambda data, random: (
             mutations.protobuf if len(data) < 2000 else mutations.flat)(data, random)),
         ((*EVALUATE, "ext.onnx", *FAKE), (*EVALUATE, "ext.onnx"), ("profile", "ext.onnx", *FAKE)), REFUSED | {6}),
    Kind(".npz", ("images.npz", "net.pt", "net.py"), _rewrite("images.npz", by=_archive),
         ((*EVALUATE, "net.pt", "--arch", "net.py:build", "--input", "3x8x8"),)),
    Kind("folder of images", ("photos", "net.pt", "net.py"), _photos,
         (("evaluate", "net.pt", "--arch", "net.py:build", "--input", "3x8x8", "--data", "photos"),)),
    Kind("tar of images", ("photos.tar", "net.pt", "net.py"), _tar,
         (("evaluate", "net.pt", "--arch", "net.py:build", "--input", "3x8x8", "--data", "photos.tar"),)),
    Kind("recipe", ("recipe.toml", "net.pt2"), _rewrite("recipe.toml", by=_toml),
         (("compress", "net.pt2", "--recipe", "recipe.toml", "-o", "out"),), NAMES_MACHINES),
    Kind("target", ("target.toml", "net.onnx", "net.pt2", "fake.json"), _rewrite("target.toml", by=_toml),
         (*[("profile", "net.onnx", *FAKE, "--target", "./target.toml")] * 5,
          ("compress", "net.pt2", "-o", "out", *PLAIN, "--target", "./target.toml")),
         NAMES_MACHINES),
    Kind("calibration", ("calibration.toml", "net.pt2", "images.npz"), _rewrite("calibration.toml", by=_toml),
         (("compress", "net.pt2", "--data", "images.npz", "-o", "out", *PLAIN, "--set", "data.calibration=./calibration.toml"),)),
    Kind("run directory", ("out", "config", "net.pt2", "images.npz"), _run,
         (("gate", "out", "--budget", "macs=60 %"), (*EVALUATE, "out", "--set", "measure.device=fake:"), ("profile", "out", "--device", "fake:"),
          ("why", "out", "--set", "measure.device=fake:"), ("compress", "out", "-o", "out/again", *PLAIN), ("compress", "net.pt2", "-o", "out", *PLAIN)), GATE),
    Kind("report", ("report.json",), _rewrite("report.json", by=mutations.json_bytes),
         tuple(("gate", "report.json", "--budget", "macs=60 %", "--format", f) for f in ("text", "json", "markdown", "junit")),
         GATE),
    Kind("baseline", ("report.json", "baseline.json"), _rewrite("baseline.json", by=mutations.json_bytes),
         (("gate", "report.json", "--baseline", "baseline.json", "--budget", "macs=100 %"),), GATE),
    Kind("budget file", ("report.json", "budget.toml"), _rewrite("budget.toml", by=_toml),
         (("gate", "report.json", "--budget", "budget.toml"),), GATE),
    Kind("budget on the command line", ("report.json",), _budget_text,
         (("gate", "report.json", "--budget", "macs=60 %"),), GATE),
    Kind("options", ("net.pt", "net.py", "images.npz"),
         _extra(("--input", "3x8x8"), ("--mean", "0.5,0.5,0.5"), ("--std", "1,1,1"), ("--eps", "1/255"), ("--limit", "5"), ("--seed", "1"),
                ("--arch", "net.py:build"), ("--set", "data.val_share=0.5"), ("--set", "target=local"), ("--data", "images.npz"),
                ("--allow-class", "torch.nn.Linear"), ("--output", "logits"), ("--attack", "fgsm")),
         ((*EVALUATE, "net.pt", "--arch", "net.py:build", "--input", "3x8x8"),), NAMES_MACHINES),
    Kind("canned readings", ("fake.json", "net.onnx", "images.npz"), _rewrite("fake.json", by=mutations.json_bytes),
         (("profile", "net.onnx", "--device", "fake:fake.json"), (*EVALUATE, "net.onnx", *FAKE)), REFUSED | {6}),
    Kind("answers of a device", ("answers", "python", "net.onnx"), _answers, (("profile", "net.onnx", *STAND_IN),), REFUSED | {6}),
)  # fmt: skip
