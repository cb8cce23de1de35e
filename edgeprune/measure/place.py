"""Where something was measured: the device's name and processor, and whether that processor is only emulated."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.devices import Device
from edgeprune.errors import DeviceError, UsageError
from edgeprune.onnx_graph import data_files, moved
from edgeprune.records import Target
from edgeprune.runtimes import beside
from edgeprune.serialization import scratch_folder


@contextmanager
def held(device: Device, files: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Copies of files on the device, name -> path there, gone afterwards."""
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


EMULATED = (
    "its processor is emulated: times follow the number of instructions, not any machine's time, and are never to be "
    "compared"
)
# More than any machine has of anything.
MOST = 1e18


@dataclass(frozen=True)
class Place:
    """A device as readings name it, "ssh://pi aarch64", and whether an emulator stands in for its processor."""

    where: str
    emulated: bool

    @property
    def conditions(self) -> dict[str, bool]:
        """What every reading from there says besides: nothing, or that it is emulated."""
        return {"emulated": True} if self.emulated else {}


def number_of(answer: Mapping[str, Any], key: str, device: str, least: float = 0.0) -> float:
    """A number that the agent on a device answered."""
    value: Any = answer.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= MOST:
        raise DeviceError(
            f"the agent on {device} answered {key} = {value!r:.80}; expected a number from {least:g} to {MOST:g}"
        )
    return float(value)


def on_target(target: Target, device: Device) -> bool:
    """Whether what is timed on a device is timed on the target.

    It is where the user named another machine for it, and on this one where its own device tree says that it is that
    board.
    """
    if target.device == "local" or device.name != "local":
        return True
    facts = device.facts()
    return bool(target.board) and target.board in str(facts.get("board", "")) and not facts.get("emulated")


def place(device: Device) -> Place:
    """Ask a device what it is."""
    facts = device.facts()
    emulated = facts.get("emulated") is True
    where = f"{device.name} {facts.get('machine', '')}".strip()
    return Place(f"{where} (emulated)" if emulated else where, emulated)
