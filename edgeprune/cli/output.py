"""What commands print, and the one place where an error becomes an exit code."""

from __future__ import annotations

import json
import logging
import signal
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from edgeprune.errors import EdgepruneError, line, translated_os_errors, visible
from edgeprune.serialization import to_json

if TYPE_CHECKING:
    from edgeprune.pipeline import Result

USAGE = 2
BUG = 70
INTERRUPTED = 130
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: everything is left as it is for Ctrl-C."""


def terminate(number: int, _frame: Any) -> None:
    """The handler of SIGTERM; a second one is not needed to end."""
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def tables() -> Any:
    """Tables need rich, which `--help` does without."""
    from edgeprune.cli import tables as found

    return found


def echo(text: str, err: bool = False) -> None:
    """A line on stdout or stderr: all text leaves the program here, none of it as an order to the terminal."""
    typer.echo(visible(text), err=err)


def echo_json(value: Any) -> None:
    """One JSON object on stdout. DEL may stand in JSON as it is, and is escaped as JSON does."""
    echo(json.dumps(value).replace("\x7f", "\\u007f"))


def guard(work: Callable[[], int], as_json: bool, debug: bool) -> None:
    """The only `except`: an error becomes two lines on stderr and its own exit code."""
    try:
        with translated_os_errors():
            code = work()
    except EdgepruneError as error:
        if debug:
            traceback.print_exc()
        print_error(error.message, error.hint, error.exit_code, as_json)
        code = error.exit_code
    except KeyboardInterrupt as error:
        code = print_interrupted(error, as_json)
    except Exception as error:  # a bug: everything that was foreseen is an EdgepruneError
        if debug:
            traceback.print_exc()
        text = line(f"a bug in edgeprune: {type(error).__name__}: {error}")
        print_error(text, "run again with --debug and report the traceback", BUG, as_json)
        code = BUG
    raise typer.Exit(code)


def print_interrupted(error: BaseException | None, as_json: bool) -> int:
    """Print that it was Ctrl-C or SIGTERM; gives the exit code."""
    message = "stopped by SIGTERM" if isinstance(error, Terminated) else "interrupted"
    code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    print_error(message, "start the same command again to go on", code, as_json)
    return code


def print_error(message: str, hint: str, code: int, as_json: bool) -> None:
    """Two lines on stderr; with --json also one object on stdout."""
    if as_json:
        echo_json({"error": message, "hint": hint, "exit_code": code})
    echo(f"error: {line(message)}", err=True)
    if hint:
        echo(f"hint: {hint}", err=True)


def shown(record: logging.LogRecord) -> bool:
    """Make what is logged fit for a terminal."""
    record.msg, record.args = line(record.getMessage()), ()
    return True


def log(text: str) -> None:
    """A line about progress, on stderr."""
    echo(line(text), err=True)


def print_table(table: Any) -> None:
    """A rich table on stdout."""
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(markup=False, emoji=False)
    shown = [Segment(visible(part.text), part.style, part.control) for part in console.render(table)]
    console.print(Segments(shown), end="")


def print_lines(lines: list[str]) -> None:
    """Plain lines on stdout."""
    for text in lines:
        echo(line(text))


def show_run(result: Result, as_json: bool) -> None:
    """What a finished run came to, and last, on stderr, which devices gave no readings."""
    trouble = result.trouble
    if as_json:
        fields = {"run": str(result.folder), "report": to_json(result.report), "exit_code": result.exit_code}
        echo_json({**fields, **_failure(trouble)})
    else:
        print_table(tables().report_table(result.report))
        print_lines(tables().summary(result))
    if trouble is not None:
        kept = "the readings of the others are kept; start the same command again to measure only what is missing"
        print_error(
            trouble.message, f"{trouble.hint}; {kept}" if trouble.hint else kept, trouble.exit_code, False
        )


def show_readings(readings: Any, as_json: bool, trouble: EdgepruneError | None = None) -> None:
    """Readings of one file, and last, on stderr, which devices gave none."""
    if as_json:
        echo_json({"readings": to_json(readings), **_failure(trouble)})
    else:
        print_table(tables().readings_table(readings))
    if trouble is not None:
        print_error(trouble.message, trouble.hint, trouble.exit_code, False)


def _failure(trouble: EdgepruneError | None) -> dict[str, Any]:
    if trouble is None:
        return {}
    return {"error": trouble.message, "hint": trouble.hint, "exit_code": trouble.exit_code}


def show_table(found: Any, as_json: bool) -> None:
    """A latency table."""
    if as_json:
        echo_json(to_json(found))
        return
    print_table(tables().latency_table(found))
    print_lines(tables().latency_lines(found))
