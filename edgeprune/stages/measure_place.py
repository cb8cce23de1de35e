"""Where something was measured: the device's name and processor, and whether that processor is only emulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.devices import Device
from edgeprune.errors import DeviceError
from edgeprune.records import Target

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
    """A number that the agent on a device answered.

    Raises:
        DeviceError: it is none, or not between `least` and what a machine can have.
    """
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
