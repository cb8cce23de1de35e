"""What TensorRT has timed on a device: kept here, so that the next run on the device builds its engines faster."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeprune.codec import replace_file, scratch_folder
from edgeprune.devices import Device
from edgeprune.errors import WorkdirError
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
    with scratch_folder() as folder_here:
        device.get(there, folder_here / CACHE)
        with suppress(WorkdirError), replace_file(kept) as file:
            file.write((folder_here / CACHE).read_bytes())


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
