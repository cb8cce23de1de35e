"""Progress bars with the time left, on stderr and only when somebody looks at it."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeprune.errors import visible

T = TypeVar("T")


@contextmanager
def bar(total: int, label: str) -> Iterator[Callable[..., None]]:
    """A bar of `total` steps; gives `advance(steps=1, label=None)`. It goes when the block is left."""
    if not sys.stderr.isatty():
        yield _silent
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(visible(label), total=total)

        def advance(steps: int = 1, label: str | None = None) -> None:
            progress.update(task, advance=steps, description=label and visible(label))

        yield advance


def track(iterable: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The items of `iterable`, with a bar that moves by one for each that was dealt with."""
    with bar(total, label) as advance:
        for item in iterable:
            yield item
            advance()


def _silent(steps: int = 1, label: str | None = None) -> None:
    """No terminal, no bar."""
