"""Code that the user named, or a library's: what it may raise, and how it is imported."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from pickle import PickleError
from types import ModuleType

import torch
from torch._export.verifier import SpecViolationError

from edgeprune.errors import MissingDependency

# What a user's module, a library's constructor or an unpickler may raise.
USER_CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    PickleError,
    RuntimeError,
    SpecViolationError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
)
_TORCHVISION_OPS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
}


def prepare_torchvision() -> None:
    """Make `import torchvision` (and timm, which needs it) work beside another build of torch; harmless to repeat.

    torchvision's Python part refuses to be imported when its compiled operators can't be loaded, as with a CUDA wheel
    beside torch's CPU build. Then the schemas that it looks for are declared; the operators serve detection only.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations or "torchvision" in sys.modules:
        return
    if hasattr(torch.ops.torchvision, "nms") or _operators_load(Path(found.submodule_search_locations[0])):
        return
    for name, schema in _TORCHVISION_OPS.items():
        torch.library.define(f"torchvision::{name}", schema)


def import_library(package: str, user: str) -> ModuleType:
    """Import timm or torchvision, which `user` needs."""
    prepare_torchvision()
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).split(".")[0]
        raise MissingDependency(f"{user} needs the package {missing}", f"pip install {missing}") from error
    except USER_CODE_ERRORS as error:
        raise MissingDependency(
            f"{package} is installed but can't be imported: {error}", f"pip install --upgrade {package}"
        ) from error


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """The working directory at the END of the import path, so that it can't shadow an installed package."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]


def _operators_load(folder: Path) -> bool:
    for library in sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))
            return True
    return False
