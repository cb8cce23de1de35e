"""edgeprune: make a trained vision network small, fast and still right on the device it ships to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.api import Run, compress, load

# ONNX Runtime >= 1.29 collects telemetry unless it is told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "compress", "load"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `--help` imports nothing heavy."""
    if name in ("Run", "compress", "load"):
        from importlib import import_module

        return getattr(import_module("edgeprune.api"), name)
    raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
