"""Files on a device for as long as they are measured; what an engine or an ONNX file has beside it travels along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgeprune.agent_engines import beside
from edgeprune.codec import scratch_folder
from edgeprune.devices import Device
from edgeprune.errors import UsageError
from edgeprune.nn.onnx_open import data_files, moved


@contextmanager
def held(device: Device, files: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Copies of files on the device, name -> path there, gone afterwards.

    Raises:
        UsageError, ModelError: a file is not there, or what it has beside it is not whole (`nn.onnx_open.opened`).
        DeviceError: it could not be copied.
    """
    data = {name: data_files(path) for name, path in files.items()}
    if not any(beside(path).is_file() or data[name] for name, path in files.items()):
        with device.holding(files) as paths:
            yield paths
        return
    with device.folder() as folder, scratch_folder() as scratch:
        there: dict[str, str] = {}
        for number, (name, here) in enumerate(files.items()):
            if not here.is_file():
                raise UsageError(f"no file {str(here)!r}")
            there[name] = f"{folder}/{number}{here.suffix}"
            # Two files may call their data alike, or put them into folders of their own.
            places = {old: f"{number}.{i}.data" for i, old in enumerate(data[name])}
            for old, new in places.items():
                device.put(data[name][old], f"{folder}/{new}")
            if places:
                Path(scratch, str(number)).write_bytes(moved(here, places))
            device.put(Path(scratch, str(number)) if places else here, there[name])
            if beside(here).is_file():
                device.put(beside(here), f"{there[name]}.json")
        yield there
