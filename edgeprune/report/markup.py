"""HTML and SVG by construction: a plain string is always escaped, only what `element` made is taken as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from edgeprune.errors import visible

# Tables with more rows than this scroll.
LONG_TABLE = 24
_VOID = ("meta", "wbr")
# Characters that no XML or HTML document may hold, besides those that `visible` writes as escapes.
_FORBIDDEN = re.compile("[\ufdd0-\ufdef\ufffe\uffff]")


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
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", visible(text)), quote=True))


def table(
    caption: str, head: Sequence[tuple[str, str]], body: Sequence[Markup], kind: str | None = None
) -> Markup:
    """A table of rows that scrolls when it is long; head: (heading, class) of each column."""
    headings = element("tr", [element("th", text, scope="col", class_=c or None) for text, c in head])
    parts = (element("caption", caption), element("thead", headings), element("tbody", body))
    size = "scroll long" if len(body) > LONG_TABLE else "scroll"
    made = element("table", *parts, class_=kind)
    return element("div", made, class_=size, tabindex="0", role="region", aria_label=caption)


def cells(texts: Sequence[str], numbers: Sequence[int] = ()) -> Markup:
    """A row whose first cell is its heading; the columns in `numbers` are aligned to the right."""
    rest = [
        element("td", text, class_="number" if i in numbers else None) for i, text in enumerate(texts[1:], 1)
    ]
    return element("tr", element("th", texts[0], scope="row"), rest)


def fold(title: str, content: Markup) -> Markup:
    """What is shown only when one asks for it."""
    return element("details", element("summary", title), content)
