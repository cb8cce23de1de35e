"""edgeprune: make a trained vision network small, fast and still right on the device it ships to."""

import os
from typing import TYPE_CHECKING

from edgeprune.plugins import importer
from edgeprune.version import __version__

if TYPE_CHECKING:
    from edgeprune.api import Run, compress, load

# ONNX Runtime >= 1.29 collects telemetry unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Run", "__version__", "compress", "load"]
__getattr__ = importer(__name__, api="Run compress load")
