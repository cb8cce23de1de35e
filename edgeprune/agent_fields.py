"""The fields of a request to the agent, read with their type, or refused by name.

Light: runs on the device.
"""

from __future__ import annotations

from typing import Any, Mapping

from edgeprune.errors import UsageError


def text(request: Mapping[str, Any], key: str) -> str:
    """A path that must be there.

    Raises:
        UsageError: it is missing, empty or no text.
    """
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{key} must be a path, got {value!r}")
    return value


def count(request: Mapping[str, Any], key: str, least: int = 1) -> int:
    """A whole number of at least `least`, which is also what a missing one is.

    Raises:
        UsageError: it is smaller, or no whole number.
    """
    value = request.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{key} must be a whole number >= {least}, got {value!r}")
    return value


def positive(request: Mapping[str, Any], key: str) -> float:
    """A number above 0.

    Raises:
        UsageError: it is missing, not above 0, or no number.
    """
    value = request.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{key} must be a number > 0, got {value!r}")
    return float(value)


def optional(request: Mapping[str, Any], key: str) -> float | None:
    """A number above 0, or None where the request does not name one.

    Raises:
        UsageError: it is not above 0, or no number.
    """
    return None if request.get(key) is None else positive(request, key)


def shape(request: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The "shape" [C, H, W] of an image, or None where the request does not name one.

    Raises:
        UsageError: it is no list of three whole numbers above 0.
    """
    value = request.get("shape")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
        raise UsageError(f"shape must be [C, H, W], got {value!r}")
    return value[0], value[1], value[2]


def models(request: Mapping[str, Any]) -> Mapping[str, str]:
    """The "models" {name: path} of a request, at least one.

    Raises:
        UsageError: there are none, or a path is no text.
    """
    value = request.get("models")
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) and v for v in value.values()):
        raise UsageError(f"models must map a name to a path, got {value!r:.200}")
    return value
