"""The wheel: built as a release is, installed in an empty environment, used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import edgeprune
from edgeprune import targets as targets_module
from edgeprune.targets import names

ROOT = Path(__file__).resolve().parents[1]


def run(argv: list[str], cwd: Path) -> str:
    """Run a command without this process's Python settings; gives its stdout, or fails with its stderr."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with the build tools that are installed (no network)."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    return next(out.glob("edgeprune-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, this environment's packages behind it, and no checkout."""
    home = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", str(home)], home)
    python = home / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], home)
    site = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip()
    )
    # A line in a .pth adds the folder but does not read its .pth files, so an editable checkout stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("targets", "calibration"):
        packed = {n.rpartition("/")[2] for n in names if n.startswith(f"edgeprune/_data/{folder}/")}
        assert packed == {p.name for p in (ROOT / folder).iterdir()}
    tops = {n.partition("/")[0] for n in names}
    assert tops == {"edgeprune", f"edgeprune-{edgeprune.__version__}.dist-info"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "edgeprune").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources
    templates = {str(p.relative_to(ROOT)) for p in (ROOT / "edgeprune" / "report" / "templates").iterdir()}
    assert templates and templates <= set(names)
    assert not [n for n in names if "__pycache__" in n or n.endswith(".pyc")]


def test_the_wheel_names_its_license_and_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"edgeprune-{edgeprune.__version__}.dist-info/METADATA").decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: torch>=" in metadata
    assert archive.read(f"edgeprune-{edgeprune.__version__}.dist-info/licenses/LICENSE").startswith(
        b"MIT License"
    )


def test_an_installed_wheel_loads_every_profile_from_its_own_data(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, edgeprune; from edgeprune import targets as bundled; "
        "print(json.dumps([edgeprune.__file__, str(bundled.folder('targets')), str(bundled.folder('calibration')), "
        "{n: bundled.target(n).title for n in bundled.names('targets')}, bundled.names('calibration')]))"
    )
    module, targets, calibration, titles, calibrations = json.loads(
        run([str(installed), "-c", code], tmp_path)
    )
    home = str(installed.parents[1])
    assert module.startswith(home)
    assert targets.startswith(home)
    assert calibration.startswith(home)
    assert titles == {n: targets_module.target(n).title for n in names("targets")}
    assert calibrations == names("calibration")


def test_the_installed_command_lists_the_targets(installed: Path, tmp_path: Path) -> None:
    text = run([str(installed.parent / "edgeprune"), "list", "targets"], tmp_path)
    for name in names("targets"):
        assert name in text


def test_the_constraints_fix_every_dependency_and_agree_with_it() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["zoo"], *extras["dev"]]:
        need = packaging.Requirement(text)
        assert need.name.lower() in pins, f"{need.name} has no line in constraints.txt"
        assert need.specifier.contains(pins[need.name.lower()]), (
            f"constraints.txt has {pins[need.name.lower()]}, needed {need}"
        )
    assert "+" not in pins["torch"], "a local version would tie the installation to one index"
