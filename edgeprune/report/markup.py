"""HTML and SVG by construction: a plain string is always escaped, only what is `Markup` is taken as it is."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import markupsafe
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgeprune.errors import visible

# Tables with more rows than this scroll.
LONG_TABLE = 24
# Characters that no XML or HTML document may hold, besides those that `visible` writes as escapes.
_FORBIDDEN = re.compile("[\ufdd0-\ufdef\ufffe\uffff]")


def escape(text: object) -> Markup:
    """Text that shows as itself in HTML, in SVG and inside a quoted attribute."""
    return (
        text if isinstance(text, Markup) else markupsafe.escape(_FORBIDDEN.sub("\ufffd", visible(str(text))))
    )


@cache
def templates() -> Environment:
    """The templates of this folder; what they print is escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=escape, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shared: dict[str, Any] = {"long_table": LONG_TABLE}
    made.globals.update(shared)
    return made


def element(tag: str, /, *children: str | Iterable[str], **attributes: object) -> Markup:
    """One element. Children that are not `Markup` are escaped; attributes that are None are left out.

    An attribute's name is written with "_" for "-", and with a trailing "_" where it is a Python keyword.
    """
    opening = tag
    for key, value in attributes.items():
        if value is not None:
            opening += f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
    return Markup(f"<{opening}>{join(*children)}</{tag}>")


def join(*children: str | Iterable[str]) -> Markup:
    """Children one after the other, escaped where they are plain text."""
    items = [item for child in children for item in ([child] if isinstance(child, str) else child)]
    return Markup("".join(escape(item) for item in items))
