"""What names and values of a file can not do to what is printed: begin a line, move the cursor, fill the screen."""

from __future__ import annotations

import json
import logging

import pytest

from edgeprune.cli import output
from edgeprune.errors import UsageError, line, shortened

NAME = "a\x1b[2J\x07\x9b\u202e\nerror: forged\r"


def test_every_message_is_one_line_that_orders_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("edgeprune", logging.WARNING, "", 0, "%s", (NAME,), None)
    output.shown(record)
    output.log(NAME)
    output.print_lines([NAME])
    output.print_error(NAME, "", 2, False)
    out, err = capsys.readouterr()
    for text in (*out.splitlines(), *err.splitlines(), record.getMessage(), UsageError(NAME).message):
        assert text.removeprefix("error: ") == r"a\x1b[2J\x07\x9b\u202e error: forged\r"


def test_json_stays_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    output.echo_json({"name": f"{NAME}\x7f"})
    said = capsys.readouterr().out
    assert json.loads(said) == {"name": f"{NAME}\x7f"} and "\x7f" not in said


@pytest.mark.parametrize("length", [10, 2000, 2001, 70_000])
def test_a_message_of_any_length_is_shortened_once(length: int) -> None:
    found = line("x" * length)
    assert len(found) <= 2000 and shortened(found) == found
    left_out = int(found.partition("[")[2].partition(" ")[0] or 0)
    assert found.count("x") + left_out == length
