"""The command `doctor`: what works here and on each device."""

from collections.abc import Sequence

from edgeprune import diagnose, targets
from edgeprune.diagnose import Finding
from edgeprune.errors import DeviceError, MissingDependency


def doctor(target: str | None, devices: Sequence[str]) -> tuple[Finding, ...]:
    """What works here and on each device, and the line that installs what is missing."""
    return diagnose.check_environment(targets.target(target) if target else None, *dict.fromkeys(devices))


def doctor_status(rows: Sequence[Finding]) -> int:
    """The exit status of doctor: 6 where a device fails, 3 where something else is missing."""
    missing = [row for row in rows if row.status == "missing"]
    if any(row.name.startswith("device ") for row in missing):
        return DeviceError.exit_code
    return MissingDependency.exit_code if missing else 0
