"""Files of every kind that edgeprune reads, made hostile, and the commands that read them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations
from hostile_runs import CANARY, REFUSED
from PIL import Image
from sound_files import PLAIN

EVALUATE = ("evaluate", "--data", "images.npz")
# A gate also says that a limit is missed (1) or that it can't tell (8).
GATE = REFUSED | {1, 8}
# What names a package that is not installed (3), a network that answers differently (5), or a machine that does not
# answer as it must (6).
NAMES_MACHINES = REFUSED | {3, 5, 6}
DEVICE = REFUSED | {6}
# Damaged weights may be too large for float32: then the exported file answers differently (5).
NETWORK = REFUSED | {5}


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


def prepare(
    stock: Path, kind: Kind, folder: Path, seed: int | None = None, *, quick: bool = False
) -> tuple[str, ...]:
    """Put the kind's files into a new folder, changed as the seed says; gives the command to run there.

    seed: None for sound files and the kind's first command. quick: none that takes seconds, where there is another.
    """
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
    short = [command for command in kind.commands if not takes_seconds(command)]
    return (*random.choice((quick and short) or kind.commands), *added)


def takes_seconds(command: tuple[str, ...]) -> bool:
    """Whether a command does a whole run, where it reads what it is given."""
    return command[0] in ("compress", "why")


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
        random.choice([_bytes, _bytes, _bytes, _rename, _class, _link, _huge, _odd])(
            random.choice(paths), random
        )


def _bytes(path: Path, random: Random) -> None:
    if path.is_file():
        path.write_bytes(mutations.flat(path.read_bytes(), random))


def _rename(path: Path, random: Random) -> None:
    _to(path, path.with_name(mutations.name_on_disk(random) + path.suffix))


def _class(path: Path, random: Random) -> None:
    _to(path.parent, path.parent.with_name(mutations.name_on_disk(random)))


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
        chunk = b"IHDR" + random.choice([2**31 - 1, 60_000, 0, 1]).to_bytes(4, "big") * 2 + data[24:29]
        data = data[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]
    if path.parent.is_dir():
        path.write_bytes(data)


def _odd(path: Path, random: Random) -> None:
    """What is no file, or an empty one, in the place of a picture; or folders in folders beside it."""
    if path.exists():
        path.unlink()
        random.choice([os.mkfifo, os.mkdir, Path.touch, _deep])(path)


def _deep(path: Path) -> None:
    path.joinpath(*"d" * 40).mkdir(parents=True)


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
    info.name = info.name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    with tarfile.open(path, random.choice(["w", "w:gz", "w:xz"])) as tar:
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
    ways = {
        ".json": mutations.json_bytes, ".lock": mutations.json_bytes, ".toml": _toml, ".safetensors": _safetensors,
        ".onnx": mutations.protobuf, ".pt2": _archive,
    }  # fmt: skip
    return ways.get(Path(name).suffix, mutations.flat)


def _forge(run: Path, random: Random) -> None:
    """Change a file and the hash of it in the report and in the records, as somebody would who has no key."""
    whole = [p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix != ".html"]
    path = random.choice(whole)
    before = path.read_bytes()
    after = _by_name(path.name)(before, random)
    old, new = (hashlib.sha256(data).hexdigest().encode() for data in (before, after))
    for other in run.rglob("*"):
        if other.is_file() and other.read_bytes() == before:
            other.write_bytes(after)
        elif other.suffix in (".json", ".lock"):
            other.write_bytes(other.read_bytes().replace(old, new))


LIMITS = (
    "", " ", "50 %", "50\u00a0%", "\u0665\u0660 %", "-1 pp", "1e999 ms", "nan %", "inf", "-5 ms", "5 s s", "1_0 %",
    "0x5 ms", "9" * 5000, "5 \x1b[31m", "5" + " " * 100_000 + "x", "1e400 B", "1/3 ms", "+5 ms", "5.5.5 ms", "%",
    "-0 %", "5e-324 s", "true", "1e5000",
)  # fmt: skip


def _given(folder: Path, option: str, text: str) -> None:
    """Add an option to the command; no argument of a command can hold a NUL."""
    (folder / "extra").write_text(json.dumps([option, text.replace("\0", "")]))


def _budget_text(folder: Path, random: Random) -> None:
    name = random.choice(mutations.NAMES)
    metrics = ("macs", "size", "latency_p50", "clean_accuracy", "params", "allow-estimates", name)
    limit = random.choice([*LIMITS, name])
    _given(folder, "--budget", random.choice(metrics) + random.choice(["=", "=", "=", ""]) + limit)


def _options(folder: Path, random: Random) -> None:
    option, sound = random.choice(OPTIONS)
    cut = random.randrange(len(sound) + 1)
    name = random.choice(mutations.NAMES)
    _given(folder, option, random.choice([sound[:cut] + name + sound[cut:], random.choice(LIMITS)]))


def _answers(folder: Path, random: Random) -> None:
    path = folder / "answers" / random.choice(["about", "time", "time", "memory", "profile", "energy"])
    path = path.with_suffix(".json")
    data = path.read_bytes()
    changed = mutations.json_bytes(data, random)
    path.write_bytes(
        random.choice([changed] * 4 + [data + changed, b"\x1b[2J" + data, b"\xff" * 10_000_000, b""])
    )


def _external(folder: Path, random: Random) -> None:
    if random.random() < 0.3:
        _rewrite("ext.data", by=mutations.flat)(folder, random)
    else:
        _rewrite("ext.onnx", by=mutations.protobuf)(folder, random)


FAKE = ("--set", "measure.device='fake:fake.json'")
BUILT = ("--arch", "net.py:build", "--input", "3x8x8")
STATE = (*EVALUATE, "net.pt", *BUILT)
MACS = ("--budget", "macs=60 %")
OPTIONS = (
    ("--input", "3x8x8"), ("--mean", "0.5,0.5,0.5"), ("--std", "1,1,1"), ("--eps", "1/255"), ("--limit", "5"),
    ("--seed", "1"), ("--arch", "net.py:build"), ("--set", "data.val_share=0.5"), ("--set", "target=local"),
    ("--data", "images.npz"), ("--allow-class", "torch.nn.Linear"), ("--output", "logits"), ("--attack", "fgsm"),
)  # fmt: skip


def _of_onnx(name: str) -> tuple[tuple[str, ...], ...]:
    return (
        (*EVALUATE, name, *FAKE),
        (*EVALUATE, name),
        ("profile", name, *FAKE),
        (*EVALUATE, name, "--attack", "fgsm", "--eps", "1/255"),
    )


# What a run directory is given to; the last goes on from its stages.
OF_A_RUN = (
    ("gate", "out", *MACS),
    (*EVALUATE, "out", "--set", "measure.device=fake:"),
    ("profile", "out", "--device", "fake:"),
    ("why", "out", "--set", "measure.device=fake:"),
    (*EVALUATE, "out", "--attack", "fgsm", "--eps", "1/255"),
    ("compress", "out", "-o", "out/again", *PLAIN),
    ("compress", "net.pt2", "-o", "out", *PLAIN),
)


def _of_network(name: str, *flags: str) -> tuple[tuple[str, ...], ...]:
    """What a network in torch is given to, the quick one as often as the others together."""
    return (
        (*EVALUATE, name, *flags),
        (*EVALUATE, name, *flags),
        ("why", name, *flags, "--set", "measure.device=fake:"),
        ("compress", name, *flags, "-o", "out", *PLAIN),
    )


KINDS = (
    Kind("state dict (.pt)", ("net.pt", "net.py", "images.npz"), _rewrite("net.pt", by=_archive),
         _of_network("net.pt", *BUILT), NETWORK),
    Kind("pickled network (.pt)", ("module.pt", "images.npz"), _rewrite("module.pt", by=_archive),
         _of_network("module.pt", "--input", "3x8x8"), NETWORK),
    Kind("old format of torch (.pt)", ("old.pt", "net.py", "images.npz"), _rewrite("old.pt", by=mutations.pickled),
         _of_network("old.pt", *BUILT), NETWORK),
    Kind(".safetensors", ("net.safetensors", "net.py", "images.npz"), _rewrite("net.safetensors", by=_safetensors),
         _of_network("net.safetensors", *BUILT), NETWORK),
    Kind(".pt2", ("net.pt2", "images.npz"), _rewrite("net.pt2", by=_archive), _of_network("net.pt2"), NETWORK),
    Kind(".onnx", ("net.onnx", "images.npz", "fake.json"), _rewrite("net.onnx", by=mutations.protobuf),
         _of_onnx("net.onnx")),
    Kind(".onnx with external data", ("ext.onnx", "ext.data", "images.npz", "fake.json"), _external,
         _of_onnx("ext.onnx")),
    Kind(".npz", ("images.npz", "net.pt", "net.py"), _rewrite("images.npz", by=_archive), (STATE,)),
    Kind("folder of images", ("photos", "net.pt", "net.py"), _photos,
         (("evaluate", "net.pt", *BUILT, "--data", "photos"),)),
    Kind("tar of images", ("photos.tar", "net.pt", "net.py"), _tar,
         (("evaluate", "net.pt", *BUILT, "--data", "photos.tar"),)),
    Kind("recipe", ("recipe.toml", "net.pt2"), _rewrite("recipe.toml", by=_toml),
         (("compress", "net.pt2", "--recipe", "recipe.toml", "-o", "out"),), NAMES_MACHINES),
    Kind("target", ("target.toml", "net.onnx", "net.pt2", "fake.json"), _rewrite("target.toml", by=_toml),
         (*[("profile", "net.onnx", *FAKE, "--target", "./target.toml")] * 4,
          ("compress", "net.pt2", "-o", "out", *PLAIN, "--target", "./target.toml")), NAMES_MACHINES),
    Kind("calibration", ("calibration.toml", "net.pt2", "images.npz"), _rewrite("calibration.toml", by=_toml),
         (("compress", "net.pt2", "--data", "images.npz", "-o", "out", *PLAIN,
           "--set", "data.calibration=./calibration.toml"),)),
    Kind("run directory", ("out", "config", "net.pt2", "images.npz"), _run, OF_A_RUN, GATE),
    Kind("report", ("report.json",), _rewrite("report.json", by=mutations.json_bytes),
         tuple(("gate", "report.json", *MACS, "--format", name) for name in ("text", "json", "markdown", "junit")),
         GATE),
    Kind("baseline", ("report.json", "baseline.json"), _rewrite("baseline.json", by=mutations.json_bytes),
         (("gate", "report.json", "--baseline", "baseline.json", "--budget", "macs=100 %"),), GATE),
    Kind("budget file", ("report.json", "budget.toml"), _rewrite("budget.toml", by=_toml),
         (("gate", "report.json", "--budget", "budget.toml"),), GATE),
    Kind("budget on the command line", ("report.json",), _budget_text, (("gate", "report.json", *MACS),), GATE),
    Kind("other options", ("net.pt", "net.py", "images.npz"), _options, (STATE,), NAMES_MACHINES),
    Kind("canned readings", ("fake.json", "net.onnx", "images.npz"), _rewrite("fake.json", by=mutations.json_bytes),
         (("profile", "net.onnx", "--device", "fake:fake.json"), (*EVALUATE, "net.onnx", *FAKE)), DEVICE),
    Kind("answers of a device", ("answers", "python", "net.onnx"), _answers,
         (("profile", "net.onnx", "--device", "local://?python=./python"),), DEVICE),
)  # fmt: skip
