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
        tables = {n: targets.read_toml(targets.resolve(family, n)) for n in targets.names(family)}
        return [
            {"name": n, "about": str(table.get("title") or f"the same as {table.get('alias')}")}
            for n, table in tables.items()
        ]
    return [{"name": n, "about": plugins.describe(family, n)} for n in plugins.names(family)]
