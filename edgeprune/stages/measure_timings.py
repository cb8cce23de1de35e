"""What TensorRT has timed on a device: kept here, so that the next run on the device builds its engines faster."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeprune.devices import Device
from edgeprune.runtimes.tensorrt import CACHE

_ASK_S = 120.0


@contextmanager
def timings(device: Device, folder: str) -> Iterator[None]:
    """Lay what was timed before into a folder on the device, and fetch what is there in the end.

    It lies in ~/.cache/edgeprune/timings, a file for each device, board and version of TensorRT, which itself refuses
    what another GPU timed. Where that folder can't be written nothing is kept.

    Raises:
        DeviceError: a file could not be copied. MissingDependency: the device has no TensorRT.
    """
    kept, there = _kept(device), f"{folder}/{CACHE}"
    if kept is None:
        yield
        return
    if kept.is_file():
        device.put(kept, there)
    yield
    fetched = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    try:
        device.get(there, fetched)
        with suppress(OSError):
            os.replace(fetched, kept)
    finally:
        with suppress(OSError):
            fetched.unlink()


def _kept(device: Device) -> Path | None:
    about, facts = device.ask({"op": "about", "runtime": "tensorrt"}, timeout_s=_ASK_S), device.facts()
    words = (device.name, str(facts.get("board")), str(facts.get("cpu")), str(about.get("runtime")))
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    try:
        folder = Path("~", ".cache", "edgeprune", "timings").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\n")
    except (OSError, RuntimeError):
        return None
    return folder / f"{name}.cache"
