"""Files on a device for as long as they are measured; what is known of an engine travels with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgeprune.agent_engines import beside
from edgeprune.devices import Device
from edgeprune.errors import UsageError


@contextmanager
def held(device: Device, files: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Copies of files on the device, name -> path there, gone afterwards.

    Raises:
        UsageError: a file is not there.
        DeviceError: it could not be copied.
    """
    if not any(beside(path).is_file() for path in files.values()):
        with device.holding(files) as paths:
            yield paths
        return
    with device.folder() as folder:
        there: dict[str, str] = {}
        for number, (name, here) in enumerate(files.items()):
            if not here.is_file():
                raise UsageError(f"no file {str(here)!r}")
            there[name] = f"{folder}/{number}{here.suffix}"
            device.put(here, there[name])
            if beside(here).is_file():
                device.put(beside(here), f"{there[name]}.json")
        yield there
