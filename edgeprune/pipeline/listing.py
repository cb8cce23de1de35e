"""The command `list`: the members of a family."""

from edgeprune import plugins, targets
from edgeprune.errors import UsageError
from edgeprune.quantities import suggest

FAMILIES = ("methods", "targets", "attacks", "runtimes", "devices", "calibration")


def members(family: str) -> list[dict[str, str]]:
    """The members of a family with one line each."""
    if family not in FAMILIES:
        raise UsageError(f"no family is named {family!r}", suggest(family, FAMILIES))
    if family in ("targets", "calibration"):
        return [{"name": n, "about": _title(family, n)} for n in targets.names(family)]
    return [{"name": n, "about": plugins.describe(family, n)} for n in plugins.names(family)]


def _title(family: str, name: str) -> str:
    table = targets.read_toml(targets.resolve(family, name))
    return str(table.get("title") or f"the same as {table.get('alias')}")
