"""What must start fast, and what must run on a bare device, imports nothing heavy: each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import edgeprune
from edgeprune.cli.app import app

HEAVY = {
    "torch",
    "torch_pruning",
    "torchvision",
    "timm",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxslim",
    "safetensors",
    "tensorrt",
    "scipy",
    "sklearn",
    "PIL",
    "jinja2",
}
PACKAGE = Path(edgeprune.__file__).parent
COMMANDS = sorted(getattr(typer.main.get_command(app), "commands"))  # noqa: B009  # the type has no such field
RUN = """
import json, sys
sys.argv = ["edgeprune", *json.loads(sys.argv[1])]
from edgeprune.cli.app import main
try:
    main()
except SystemExit as end:
    code = end.code or 0
print(json.dumps({"code": code, "modules": sorted({m.partition(".")[0] for m in sys.modules})}), file=sys.stderr)
"""


def heavy_modules(code: str, *argv: str) -> tuple[subprocess.CompletedProcess[str], set[str], int]:
    """Run code in a fresh interpreter; gives what it left, the heavy modules it imported, and the code it saw."""
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip(), done
    seen = json.loads(done.stderr.strip().splitlines()[-1])
    return done, HEAVY & set(seen["modules"]), seen["code"]


def test_all_commands_of_the_contract_are_there() -> None:
    assert set(COMMANDS) >= {"compress", "profile", "evaluate", "gate", "why", "doctor", "list", "demo"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    argv = [command, "--help"] if command else ["--help"]
    done, heavy, code = heavy_modules(RUN, json.dumps(argv))
    assert code == 0
    assert "Usage" in done.stdout
    assert not heavy


@pytest.mark.parametrize("family", ["methods", "targets", "runtimes", "devices", "calibration"])
def test_listing_imports_nothing_heavy(family: str) -> None:
    done, heavy, code = heavy_modules(RUN, json.dumps(["list", family]))
    assert code == 0
    assert done.stdout.strip()
    assert not heavy


def test_the_measurement_of_it_would_notice_a_heavy_import() -> None:
    _, heavy, _ = heavy_modules("import numpy\n" + RUN, json.dumps(["--help"]))
    assert heavy == {"numpy"}


FAR = sorted(
    ".".join(("edgeprune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in [
        *(
            PACKAGE / f"{n}.py"
            for n in ("errors", "plugins", "quantities", "records", "serialization", "targets")
        ),
        *(PACKAGE / name for name in ("pipeline/run_directory.py", "gate/verdict.py", "recipe/parse.py")),
        *(
            path
            for name in ("agent", "host", "runtimes", "devices")
            for path in (PACKAGE / name).rglob("[!_]*.py")
        ),
    ]
)


def test_the_light_files_import_nothing_heavy() -> None:
    code = (
        "import importlib, json, sys\nfor name in json.loads(sys.argv[1]):\n    importlib.import_module(name)\n"
        "print(json.dumps({'code': 0, 'modules': sorted({m.partition('.')[0] for m in sys.modules})}), file=sys.stderr)"
    )
    _, heavy, _ = heavy_modules(code, json.dumps(FAR))
    assert not heavy


def test_what_runs_on_a_device_imports_without_any_installed_package() -> None:
    # -S and -E: no site-packages, no PYTHONPATH; only the standard library and the package's own folder
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); "
    code = path + "import edgeprune.agent.program, edgeprune.runtimes.onnxruntime"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
