"""doctor: what works here, what is missing, and the line that installs it.

Nothing heavy is imported: versions are read from the installed packages' records, and whether a package really
loads is tried in a child process, so that a broken one can't take this one down.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import edgeprune
from edgeprune import concurrency
from edgeprune.devices import device_from_url
from edgeprune.diagnose.device import Finding, look
from edgeprune.errors import DeviceError
from edgeprune.records import Target

PYTHON = (3, 11)
# Package, the module that it is imported by, and what for; an empty module is not tried.
REQUIRED = (
    ("torch", "torch", "load, prune, tune and export"),
    ("torch-pruning", "torch_pruning", "find which channels go together"),
    ("onnx", "onnx", "write and check ONNX files"),
    ("onnxscript", "onnxscript", "torch's ONNX exporter needs it"),
    ("onnxruntime", "onnxruntime", "run and time ONNX files"),
    ("onnxslim", "onnxslim", "simplify ONNX files"),
    ("safetensors", "safetensors", "read and write weights without code in them"),
    ("numpy", "numpy", "arrays"),
    ("Pillow", "PIL", "read images"),
    ("scikit-learn", "sklearn", "the demo's images"),
)
OPTIONAL = (
    ("torchvision", "torchvision", "models of --arch torchvision:NAME"),
    ("timm", "timm", "models of --arch timm:NAME"),
    ("tensorrt", "", "engines for NVIDIA GPUs; on a Jetson it comes with JetPack"),
)
TRTEXEC = Path("/usr/src/tensorrt/bin/trtexec")
_TORCH_INDEX = "https://download.pytorch.org/whl/"
IMPORT_S = 180.0
# Their Python part refuses to load when torchvision was built for another torch;
# models/architectures.py helps it over that.
ON_TORCHVISION = ("torchvision", "timm")
HELP = "from edgeprune.safe_loading.user_code import prepare_torchvision; prepare_torchvision()"

# Each module is named before it is tried, so that one that kills the process is known.
_TRY = """
import sys
sys.path[:] = [p for p in sys.path if p] + [sys.argv.pop(1)]
exec(sys.argv.pop(1))
for name in sys.argv[1:]:
    print("\\n@try", name, flush=True)
    try:
        __import__(name)
    except BaseException as error:
        print("\\n@bad", name, (type(error).__name__ + ": " + str(error)).splitlines()[0][:200], flush=True)
    else:
        print("\\n@ok", name, flush=True)
"""


def check_environment(target: Target | None, *device_urls: str) -> tuple[Finding, ...]:
    """Look at this installation, at the devices (all at the same time) and at what a target that is named needs."""
    setup = target.setup if target else None
    devices = {url: device_from_url(url, setup) for url in device_urls}
    # First, because trying the packages is work that the load would show.
    looks = concurrency.start({url: partial(look, device, target) for url, device in devices.items()})
    found = [finding for future in looks.values() for finding in future.result()]
    return (*_python(), *check_packages(), _trtexec(target), *found)


def _python() -> tuple[Finding, ...]:
    found = ".".join(str(v) for v in sys.version_info[:3])
    if sys.version_info[:2] >= PYTHON:
        return (Finding("python", "ok", f"{found} ({sys.executable})"),)
    needed = ".".join(str(v) for v in PYTHON)
    return (
        Finding(
            "python", "missing", f"{found}; {needed} or newer is needed", f"python{needed} -m venv .venv"
        ),
    )


def check_packages() -> list[Finding]:
    """Each package that edgeprune needs or can use: whether it loads, and its version."""
    versions = {name: _version(name) for name, _, _ in (*REQUIRED, *OPTIONAL)}
    modules = [module for name, module, _ in (*REQUIRED, *OPTIONAL) if module and versions[name]]
    broken = broken_imports(modules)
    retried = [module for module in ON_TORCHVISION if module in broken]
    helped = set(retried) - set(broken_imports(retried, HELP))
    least, torch = _least(), _version("torch")
    findings: list[Finding] = []
    for name, module, use in (*REQUIRED, *OPTIONAL):
        absent = "missing" if (name, module, use) in REQUIRED else "optional"
        version = versions[name]
        pip = pip_line(name, torch)
        if module in helped:
            found = (
                f"{version}; models load, torchvision's own operators do not: it is built for another torch"
            )
            findings.append(Finding(name, "warning", found, pip))
        elif not version:
            findings.append(Finding(name, absent, f"not installed; {use}", pip))
        elif module in broken:
            findings.append(
                Finding(name, absent, f"{version} is installed, but does not load: {broken[module]}", pip)
            )
        elif is_older(version, least.get(name.lower(), "")):
            findings.append(
                Finding(name, absent, f"{version}; {least[name.lower()]} or newer is needed", pip)
            )
        else:
            findings.append(Finding(name, "ok", f"{version}; {use}"))
    return findings


def _version(name: str) -> str:
    names = [name, *(f"{name}-{tail}" for tail in ("cu12", "cu13"))] if name == "tensorrt" else [name]
    for candidate in names:
        try:
            # A package whose files were half removed has no version, or None for it.
            found = metadata.version(candidate)
        except (metadata.PackageNotFoundError, KeyError, ValueError, OSError):
            continue
        if found:
            return str(found)
    return ""


def _least() -> dict[str, str]:
    """Package, in small letters -> the oldest version that edgeprune works with; empty when run from its sources."""
    try:
        requirements = metadata.requires("edgeprune") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"^([A-Za-z0-9_.-]+)[^;]*?>=\s*([0-9.]+)", line) for line in requirements)
    return {match.group(1).lower(): match.group(2) for match in found if match}


def is_older(version: str, least: str) -> bool:
    """Whether a version comes before another."""
    numbers = [[int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]] for text in (version, least)]
    return numbers[0] < numbers[1]


def pip_line(name: str, torch_version: str) -> str:
    """The line that installs a package; torchvision must be built for the very torch that is there."""
    build = torch_version.partition("+")[2]
    if name in ("torchvision", "timm") and build:
        return f"pip install --force-reinstall --no-deps torchvision --index-url {_TORCH_INDEX}{build}" + (
            " && pip install timm" if name == "timm" else ""
        )
    return "pip install tensorrt-cu12" if name == "tensorrt" else f"pip install --upgrade {name}"


def broken_imports(modules: Sequence[str], first: str = "") -> dict[str, str]:
    """Module -> why it does not load. All of them are tried in one child; after a crash, the rest in another."""
    local, root = device_from_url("local"), str(Path(edgeprune.__file__).resolve().parent.parent)
    broken: dict[str, str] = {}
    left = list(modules)
    while left:
        try:
            answer = local.run([sys.executable, "-c", _TRY, root, first, *left], "", IMPORT_S)
        except DeviceError as error:
            return {**broken, **dict.fromkeys(left, error.message[:200])}
        lines = [line.split(" ", 2) for line in answer.stdout.splitlines() if line.startswith("@")]
        tried = [words[1] for words in lines if words[0] == "@try"]
        broken |= {
            words[1]: words[2]
            for words in lines
            if words[0] == "@bad" and words[1] in left and len(words) == 3
        }
        done = {words[1] for words in lines if words[0] in ("@ok", "@bad")}
        if not tried:
            return {**broken, **dict.fromkeys(left, f"python ended with status {answer.status}")}
        broken |= {name: f"python ended with status {answer.status}" for name in tried if name not in done}
        left = left[len(tried) :]
    return broken


def _trtexec(target: Target | None) -> Finding:
    path = shutil.which("trtexec") or (str(TRTEXEC) if TRTEXEC.is_file() else "")
    if path:
        return Finding("trtexec", "ok", path)
    if target is not None and target.runtime == "tensorrt":
        return Finding(
            "trtexec", "optional", f"not here; build_engine.sh runs it on the {target.title}, where JetPack has it",
            "sudo apt install libnvinfer-bin  # on the Jetson",
        )  # fmt: skip
    return Finding("trtexec", "optional", "not here; only needed to build TensorRT engines")
