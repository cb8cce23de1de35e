"""Where the limits of a budget come from: flags, TOML files, and the pyproject.toml of the current folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune import targets
from edgeprune.errors import UsageError
from edgeprune.quantities import limit as read_limit
from edgeprune.recipe import ALLOW_ESTIMATES
from edgeprune.records import Budget, Limit

NO_BUDGET = """give limits as flags, as in
  edgeprune gate RUN --budget "latency_p50=5 ms" --budget "size=2 MB" --budget "clean_accuracy=-1 pp"
or write them into pyproject.toml:
  [tool.edgeprune.budget]
  latency_p50 = "5 ms"
  macs = "50 %"
  clean_accuracy = "-1 pp\""""


def budget_from(sources: Sequence[str], cwd: Path) -> Budget:
    """Read the limits of a budget; later sources win over earlier ones.

    Each source is "METRIC=LIMIT" or a TOML file with a table [budget], with [tool.edgeprune.budget], or with the
    limits at the top. Without sources the table [tool.edgeprune.budget] of cwd/pyproject.toml is taken. The source
    "allow-estimates", or that key with the value true in a file, lets an estimate stand for a measurement.
    """
    found = [_source(source, cwd) for source in sources]
    if not set(sources) - {ALLOW_ESTIMATES} and _is_file(cwd / "pyproject.toml"):
        found.append(_file(cwd / "pyproject.toml"))
    limits = {metric: limit for budget in found for metric, limit in budget.limits.items()}
    if not limits:
        raise UsageError("no budget was given, so there is nothing to check", NO_BUDGET)
    return Budget(limits, any(budget.allow_estimates for budget in found))


def _source(source: str, cwd: Path) -> Budget:
    if source == ALLOW_ESTIMATES:
        return Budget(allow_estimates=True)
    if _is_file(cwd / source):
        return _file(cwd / source)
    metric, equals, text = source.partition("=")
    if source.endswith(".toml") or not equals:
        hint = 'give a TOML file with a table [budget], or a limit such as "latency_p50=5 ms"'
        raise UsageError(f"--budget {source!r} is neither a file nor METRIC=LIMIT", hint)
    return Budget({metric.strip(): read_limit(metric.strip(), text)})


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A name that no file system takes, such as a limit of a thousand characters.
        return False


def _file(path: Path) -> Budget:
    table, place = _table(path)
    limits: dict[str, Limit] = {}
    for metric, value in table.items():
        if metric == ALLOW_ESTIMATES and isinstance(value, bool):
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UsageError(
                f"{place}: {metric} = {value!r} must be a text with a unit", f'write {metric} = "50 %"'
            )
        try:
            limits[metric] = read_limit(metric, value)
        except UsageError as error:
            raise UsageError(f"{place}: {error.message}", error.hint) from error
    if not limits and path.name != "pyproject.toml":
        raise UsageError(f"{place} holds no limits", 'write one a line, such as latency_p50 = "5 ms"')
    return Budget(limits, table.get(ALLOW_ESTIMATES) is True)


def _table(path: Path) -> tuple[Mapping[str, Any], str]:
    data: Any = targets.read_toml(path)
    place = str(path)
    names = (
        ("tool", "edgeprune", "budget") if path.name == "pyproject.toml" or "tool" in data else ("budget",)
    )
    if names == ("budget",) and "budget" not in data:
        return data, place
    for name in names:
        data = data.get(name, {})
        if not isinstance(data, Mapping):
            raise UsageError(f"{place}: [{'.'.join(names)}] must be a table, found {data!r:.60}")
    return data, f"{place} [{'.'.join(names)}]"
