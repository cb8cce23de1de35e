"""What commands print, and the one place where an error becomes an exit code."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import typer

from edgeprune.codec import to_json
from edgeprune.context import Result
from edgeprune.errors import EdgepruneError

USAGE = 2
BUG = 70
INTERRUPTED = 130


def tables() -> Any:
    """Tables need rich, which `--help` does without."""
    from importlib import import_module

    return import_module("edgeprune.tables")


def guard(work: Callable[[], int], as_json: bool, debug: bool) -> None:
    """The only `except`: an error becomes two lines on stderr and its own exit code."""
    try:
        code = work()
    except EdgepruneError as error:
        if debug:
            traceback.print_exc()
        print_error(error.message, error.hint, error.exit_code, as_json)
        code = error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted", "start the same command again to go on", INTERRUPTED, as_json)
        code = INTERRUPTED
    except Exception as error:  # a bug: everything that was foreseen is an EdgepruneError
        if debug:
            traceback.print_exc()
        text = f"a bug in edgeprune: {type(error).__name__}: {error}"
        print_error(text, "run again with --debug and report the traceback", BUG, as_json)
        code = BUG
    raise typer.Exit(code)


def print_error(message: str, hint: str, code: int, as_json: bool) -> None:
    """Two lines on stderr; with --json also one object on stdout."""
    if as_json:
        typer.echo(json.dumps({"error": message, "hint": hint, "exit_code": code}))
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)


def say(text: str) -> None:
    """A line about progress, on stderr."""
    typer.echo(text, err=True)


def print_table(table: Any) -> None:
    """A rich table on stdout."""
    from rich.console import Console

    Console().print(table)


def print_lines(lines: list[str]) -> None:
    """Plain lines on stdout."""
    for line in lines:
        typer.echo(line)


def show_run(result: Result, as_json: bool) -> None:
    """What a finished run came to, and last, on stderr, which devices gave no readings."""
    trouble = result.trouble
    if as_json:
        said = {"run": str(result.folder), "report": to_json(result.report), "exit_code": result.exit_code}
        typer.echo(json.dumps({**said, **_told(trouble)}))
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
        typer.echo(json.dumps({"readings": to_json(readings), **_told(trouble)}))
    else:
        print_table(tables().readings_table(readings))
    if trouble is not None:
        print_error(trouble.message, trouble.hint, trouble.exit_code, False)


def _told(trouble: EdgepruneError | None) -> dict[str, Any]:
    """An error in the one object that --json prints."""
    if trouble is None:
        return {}
    return {"error": trouble.message, "hint": trouble.hint, "exit_code": trouble.exit_code}


def show_table(found: Any, as_json: bool) -> None:
    """A latency table."""
    if as_json:
        typer.echo(json.dumps(to_json(found)))
        return
    print_table(tables().latency_table(found))
    print_lines(tables().latency_lines(found))
