"""Text with a unit to a number and back, against values worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import UsageError
from edgeprune.quantities import eps_of, limit, number, show, suggest
from edgeprune.records import METRICS, Limit

RELATIVE = 1e-12  # one multiplication of doubles


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("12 ms", "s", 0.012),
        ("12ms", "s", 0.012),
        ("  1.5 s ", "s", 1.5),
        ("700 us", "s", 0.0007),
        ("700 µs", "s", 0.0007),
        ("3e2 ns", "s", 3e-7),
        (".5 s", "s", 0.5),
        ("5. s", "s", 5.0),
        ("2 MB", "B", 2_000_000),
        ("2 MiB", "B", 2_097_152),
        ("8 GB", "B", 8e9),
        ("1 KB", "B", 1000),
        ("1 kB", "B", 1000),
        ("0 B", "B", 0),
        ("5 mJ", "J", 0.005),
        ("7 µJ", "J", 7e-6),
        ("40.6 M", "", 40_600_000),
        ("2 GMACs", "", 2e9),
        ("1000000", "", 1e6),
        ("8/255", "fraction", 8 / 255),
        ("8 / 255", "fraction", 8 / 255),
        ("45 %", "fraction", 0.45),
        ("45%", "fraction", 0.45),
        ("-1", "fraction", -1.0),
    ],
)
def test_a_quantity_is_its_number_in_the_base_unit(text: str, unit: str, value: float) -> None:
    assert number(text, unit) == pytest.approx(value, rel=RELATIVE)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", "s"),
        ("ms", "s"),
        ("12", "s"),
        ("12 MB", "s"),
        ("12 ms", "B"),
        ("12 Ms", "s"),
        ("1,5 ms", "s"),
        ("1 2 ms", "s"),
        ("1.2.3 ms", "s"),
        ("0x10 B", "B"),
        ("nan", "fraction"),
        ("inf s", "s"),
        ("1e999 s", "s"),
        ("8/0", "fraction"),
        ("8/0.0", "fraction"),
        ("8/-255", "fraction"),
        ("8/", "fraction"),
        ("50 %", "s"),
        ("5 pp", "fraction"),
        ("--5 s", "s"),
        ("\u0665 s", "s"),
        ("\uff15 s", "s"),
        ("1_000 B", "B"),
        ("5 s\u200b", "s"),
    ],
)
def test_text_that_is_no_quantity_is_refused_and_quoted(text: str, unit: str) -> None:
    with pytest.raises(UsageError) as caught:
        number(text, unit)
    assert repr(text) in caught.value.message
    assert caught.value.exit_code == 2


def test_a_wrong_unit_names_the_accepted_ones() -> None:
    with pytest.raises(UsageError) as caught:
        number("3 hours", "s")
    assert caught.value.hint == "give a number with one of: s, ms, us, µs, ns"


@given(st.text(max_size=30), st.sampled_from(["s", "B", "J", "", "fraction"]))
def test_any_text_gives_a_finite_number_or_a_usage_error(text: str, unit: str) -> None:
    try:
        value = number(text, unit)
    except UsageError:
        return
    assert math.isfinite(value)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (0.000_760, "s", "760 us"),
        (1.0, "s", "1 s"),
        (0.9996, "s", "1000 ms"),
        (0.0009996, "s", "1000 us"),
        (5e-9, "s", "0.005 us"),
        (0, "s", "0 us"),
        (-0.002, "s", "-2 ms"),
        (2_097_152, "B", "2.1 MB"),
        (999, "B", "999 B"),
        (999_999, "B", "1000 kB"),
        (1.5e12, "B", "1500 GB"),
        (0.5, "J", "500 mJ"),
        (272_474, "", "272 k"),
        (40_600_000, "", "40.6 M"),
        (12, "", "12"),
        (0.913, "fraction", "91.30 %"),
        (1.0, "fraction", "100.00 %"),
        (None, "s", "-"),
    ],
)
def test_a_number_reads_as_people_write_it(value: float | None, unit: str, text: str) -> None:
    assert show(value, unit) == text


@given(
    st.floats(min_value=1e-6, max_value=1e12) | st.floats(min_value=-1e12, max_value=-1e-6),
    st.sampled_from(["s", "B", "J", "", "fraction"]),
)
def test_what_is_shown_reads_back_within_its_three_digits(value: float, unit: str) -> None:
    # three digits are off by at most half of the third, 0.5 %; a fraction has two decimals of a percent
    assert number(show(value, unit), unit) == pytest.approx(
        value, rel=0.005, abs=0.5e-4 if unit == "fraction" else 0
    )


@pytest.mark.parametrize(
    ("metric", "text", "expected"),
    [
        ("size", "2 MB", Limit("size", "absolute", 2e6, "2 MB")),
        ("latency_p50", "5ms", Limit("latency_p50", "absolute", 0.005, "5ms")),
        ("macs", "50 %", Limit("macs", "share", 0.5, "50 %")),
        ("macs", " 50% ", Limit("macs", "share", 0.5, "50%")),
        ("macs", 1_000_000, Limit("macs", "absolute", 1e6, "1000000")),
        ("params", "70 k", Limit("params", "absolute", 70_000, "70 k")),
        ("peak_memory", "120 %", Limit("peak_memory", "share", 1.2, "120 %")),
        ("clean_accuracy", "90 %", Limit("clean_accuracy", "absolute", 0.9, "90 %")),
        ("clean_accuracy", 0.9, Limit("clean_accuracy", "absolute", 0.9, "0.9")),
        ("clean_accuracy", "-1 pp", Limit("clean_accuracy", "delta", -0.01, "-1 pp")),
        ("robust_accuracy", "-0.5pp", Limit("robust_accuracy", "delta", -0.005, "-0.5pp")),
        ("agreement", "-.5 pp", Limit("agreement", "delta", -0.005, "-.5 pp")),
        ("agreement", "99.5 %", Limit("agreement", "absolute", 0.995, "99.5 %")),
    ],
)
def test_a_limit_is_absolute_a_share_or_points(metric: str, text: object, expected: Limit) -> None:
    found = limit(metric, text)
    assert (found.metric, found.kind, found.text) == (expected.metric, expected.kind, expected.text)
    assert found.value == pytest.approx(expected.value, rel=RELATIVE)


@pytest.mark.parametrize(
    ("metric", "text", "part"),
    [
        ("latency", "5 ms", "unknown metric 'latency'"),
        ("size", "100", "has no unit"),
        ("latency_p99", "0.005", "has no unit"),
        ("size", "0 B", "must be more than 0"),
        ("latency_p50", "-5 ms", "must be more than 0"),
        ("macs", "0 %", "must be more than 0 %"),
        ("macs", "-50 %", "must be more than 0 %"),
        ("macs", "-1 pp", "percentage points are for accuracies"),
        ("clean_accuracy", "90", "must be between 0 and 100 %"),
        ("clean_accuracy", "-5 %", "must be between 0 and 100 %"),
        ("clean_accuracy", "-150 pp", "must be between -100 and 100 pp"),
        ("clean_accuracy", "5 ms", "is not a quantity of that kind"),
        ("size", "5 ms", "is not a quantity of that kind"),
        ("size", "1e300 B", "must be between 1 and 1e+13 B"),
        ("latency_p50", "1e-12 s", "must be between 1e-09 and 100000 s"),
        ("macs", "1e9 %", "must be at most 10000 %"),
        ("sqnr", "-1 pp", "percentage points are for accuracies"),
        ("clean_accuracy", "-\u0661 pp", "is not a quantity of that kind"),
        ("params", True, "is not a quantity of that kind"),
        ("params", "", "is not a quantity of that kind"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_with_a_hint(metric: str, text: object, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        limit(metric, text)
    assert part in caught.value.message
    if not part.startswith(("must be more than 0", "must be between 1")):
        assert caught.value.hint


@given(st.sampled_from(sorted(METRICS)), st.text(max_size=20) | st.integers() | st.floats())
def test_any_limit_is_read_or_refused_and_never_off_its_range(metric: str, text: object) -> None:
    try:
        found = limit(metric, text)
    except UsageError:
        return
    low, high = {"absolute": (0, math.inf), "share": (0, math.inf), "delta": (-1, 1)}[found.kind]
    assert low <= found.value <= high
    assert (found.kind == "delta") <= (not METRICS[metric].less_is_better)


def test_a_close_name_is_suggested_and_a_far_one_gets_the_list() -> None:
    assert suggest("latency_p5", ["latency_p50", "macs"]) == "did you mean 'latency_p50'?"
    assert suggest("zzz", ["b", "a"]) == "accepted: a, b"
    assert suggest("zzz", []) == ""


@pytest.mark.parametrize(
    ("text", "norm", "hint"),
    [
        ("8", "Linf", "did you mean 8/255?"),
        ("127", "Linf", "did you mean 127/255?"),
        ("255", "Linf", "for example 8/255"),
        ("128", "Linf", "for example 8/255"),
        ("128", "L2", "did you mean 128/255?"),
        ("9999", "L2", "for example 128/255"),
    ],
)
def test_a_radius_in_levels_is_answered_with_what_was_likely_meant(text: str, norm: str, hint: str) -> None:
    with pytest.raises(UsageError, match="too large") as caught:
        eps_of(text, norm)
    assert caught.value.hint == hint
