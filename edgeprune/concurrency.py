"""Work for several devices at the same time, one thread each, so that one that fails costs the others nothing."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from edgeprune.errors import DeviceError, EdgepruneError

T = TypeVar("T")


def start(jobs: Mapping[str, Callable[[], T]]) -> dict[str, Future[T]]:
    """Start each job in a daemon thread, which Ctrl-C need not wait for; its future has the result or the error."""
    return {name: _begin(name, job) for name, job in jobs.items()}


def results(
    futures: Mapping[str, Future[T]],
) -> tuple[dict[str, T], dict[str, EdgepruneError]]:
    """Wait for all: what those that succeeded gave, and the errors of those that failed, both in their order."""
    given: dict[str, T] = {}
    failed: dict[str, EdgepruneError] = {}
    for name, future in futures.items():
        try:
            given[name] = future.result()
        except EdgepruneError as error:
            failed[name] = error
    return given, failed


def combined_error(failed: Mapping[str, EdgepruneError], count: int) -> EdgepruneError:
    """One error for the devices that failed (URL -> error), of the type of theirs where all have one type."""
    why = "; ".join(describe(url, error) for url, error in failed.items())
    kinds = {type(error) for error in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else DeviceError
    hints = dict.fromkeys(error.hint for error in failed.values() if error.hint)
    return kind(f"{len(failed)} of {count} devices gave no readings: {why}", "; ".join(hints))


def describe(url: str, error: EdgepruneError) -> str:
    """What is wrong with a device, with its name."""
    named = url.partition("?")[0] in error.message
    return error.message if named else f"{url}: {error.message}"


def names(places: Sequence[tuple[str, str]]) -> list[str]:
    """A name of its own for each place, from its (URL, where): several of one `where` are told apart by their URLs."""
    counts = Counter(where for _, where in places)
    found: list[str] = []
    for url, where in places:
        name = f"{url} {where.partition(' ')[2]}".strip() if found and counts[where] > 1 else where
        found.append(name if name not in found else f"{name} #{len(found) + 1}")
    return found


def _begin(name: str, job: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(job())
        except BaseException as error:  # whatever it is belongs to who waits for the future
            future.set_exception(error)

    Thread(target=work, name=name, daemon=True).start()
    return future
