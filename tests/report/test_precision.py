"""The report's table of what was built for the file that ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from reports import ODD, check_page, html_of, sample

from edgeprune.records import Report
from edgeprune.report.page import document, page
from edgeprune.report.rows import TITLE, candidates

TRIED: list[dict[str, Any]] = [
    {"name": "fp32", "clean_accuracy": 0.9, "size_bytes": 1000, "chosen": False, "why_not": "slower than int8"},
    {
        "name": "int8 mse, equalized", "clean_accuracy": 0.89, "agreement": 0.98, "sqnr_db": 31.25, "size_bytes": 300,
        "fallback": ["conv1", "fc"], "chosen": True, "why_not": "",
    },
]  # fmt: skip


def made(tried: Any) -> Report:
    return replace(sample(), history={"precision": tried})


def test_every_candidate_is_a_row_and_only_what_was_read_is_a_column() -> None:
    head, rows = candidates(made(TRIED))
    assert head == ["candidate", "accuracy", "agreement", "SQNR", "size", "outcome"]
    assert rows == [
        ["fp32", "90.00 %", "-", "-", "1 kB", "slower than int8"],
        ["int8 mse, equalized", "89.00 %", "98.00 %", "31.2 dB", "300 B", "ships; float: conv1, fc"],
    ]


def test_the_table_stands_in_the_page_and_in_the_markdown(tmp_path: Path) -> None:
    text = html_of(made(TRIED), tmp_path)
    check_page(text)
    assert f"<h2>{TITLE}</h2>" in text
    assert "int8 mse, equalized" in text
    assert "| int8 mse, equalized | 89.00 % |" in document(made(TRIED), [])
    assert f"## {TITLE}" not in document(replace(sample(), history={}), [])


@given(
    st.one_of(
        ODD,
        st.lists(
            st.dictionaries(
                st.sampled_from(["name", "sqnr_db", "size_bytes", "fallback", "chosen", "why_not"]), ODD
            )
        ),
    )
)
def test_whatever_a_report_from_elsewhere_holds_gives_a_page(tried: Any) -> None:
    check_page(page(made(tried), []))
