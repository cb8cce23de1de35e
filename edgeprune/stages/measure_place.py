"""Where something was measured: the device's name and processor, and whether that processor is only emulated."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.devices import Device
from edgeprune.records import Target

EMULATED = (
    "its processor is emulated: times follow the number of instructions, not any machine's time, and are never to be "
    "compared"
)


@dataclass(frozen=True)
class Place:
    """A device as readings name it, "ssh://pi aarch64", and whether an emulator stands in for its processor."""

    where: str
    emulated: bool

    @property
    def conditions(self) -> dict[str, bool]:
        """What every reading from there says besides: nothing, or that it is emulated."""
        return {"emulated": True} if self.emulated else {}


def on_target(target: Target, device: Device) -> bool:
    """Whether what is timed on a device is timed on the target.

    It is where the user named another machine for it, and on this one where its own device tree says that it is that
    board.

    Raises:
        DeviceError: this machine does not answer.
    """
    if target.device == "local" or device.name != "local":
        return True
    facts = device.facts()
    return bool(target.board) and target.board in str(facts.get("board", "")) and not facts.get("emulated")


def place(device: Device) -> Place:
    """Ask a device what it is.

    Raises:
        DeviceError: it does not answer.
    """
    facts = device.facts()
    emulated = facts.get("emulated") is True
    where = f"{device.name} {facts.get('machine', '')}".strip()
    return Place(f"{where} (emulated)" if emulated else where, emulated)
