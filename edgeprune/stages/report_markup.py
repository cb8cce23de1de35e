"""HTML and SVG by construction: a plain string is always escaped, only what `element` made is taken as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = ("meta", "wbr")
# Characters that no XML or HTML document may hold, and halves of surrogate pairs, which UTF-8 can't write.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def element(tag: str, /, *children: str | Iterable[str], **attributes: object) -> Markup:
    """One element. Children that are not `Markup` are escaped; attributes that are None or False are left out.

    An attribute's name is written with "_" for "-", and with a trailing "_" where it is a Python keyword.
    """
    opening = tag
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        opening += f' {key.rstrip("_").replace("_", "-")}="{escape("" if value is True else str(value))}"'
    if tag in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(*children)}</{tag}>")


def join(*children: str | Iterable[str]) -> Markup:
    """Children one after the other, escaped where they are plain text."""
    parts: list[str] = []
    for child in children:
        items = [child] if isinstance(child, str) else child
        parts += [item if isinstance(item, Markup) else escape(item) for item in items]
    return Markup("".join(parts))


def escape(text: str) -> Markup:
    """Text that shows as itself in HTML, in SVG and inside a quoted attribute."""
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", text), quote=True))
