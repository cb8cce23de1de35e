"""The gate: where its limits come from, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.errors import UsageError
from edgeprune.gate import budget
from edgeprune.records import Budget


def texts(found: Budget) -> dict[str, str]:
    return {metric: one.text for metric, one in found.limits.items()}


def test_limits_come_from_flags_and_files_and_later_ones_win(tmp_path: Path) -> None:
    (tmp_path / "budget.toml").write_text('[budget]\nlatency_p50 = "5 ms"\nsize = "2 MB"\n')
    (tmp_path / "flat.toml").write_text('macs = "50 %"\nparams = 100000\nclean_accuracy = 0.9\n')
    found = budget.budget_from(["budget.toml", "flat.toml", "size=1 MB", " latency_p90 = 7 ms"], tmp_path)
    assert texts(found) == {
        "latency_p50": "5 ms",
        "size": "1 MB",
        "macs": "50 %",
        "params": "100000",
        "clean_accuracy": "0.9",
        "latency_p90": "7 ms",
    }
    assert found.limits["params"].value == 100000
    assert (
        texts(budget.budget_from(["size=1 MB", str(tmp_path / "budget.toml")], Path("/")))["size"] == "2 MB"
    )


def test_estimates_are_allowed_by_a_flag_or_by_a_key_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "budget.toml").write_text('allow-estimates = true\nlatency_p50 = "5 ms"\n')
    (tmp_path / "not.toml").write_text('[budget]\nallow-estimates = false\nlatency_p50 = "5 ms"\n')
    assert budget.budget_from(["budget.toml"], tmp_path).allow_estimates
    assert not budget.budget_from(["not.toml"], tmp_path).allow_estimates
    assert budget.budget_from(["not.toml", "allow-estimates"], tmp_path).allow_estimates
    assert texts(budget.budget_from(["budget.toml"], tmp_path)) == {"latency_p50": "5 ms"}
    (tmp_path / "pyproject.toml").write_text('[tool.edgeprune.budget]\nsize = "2 MB"\n')
    assert texts(budget.budget_from(["allow-estimates"], tmp_path)) == {"size": "2 MB"}
    (tmp_path / "wrong.toml").write_text('allow-estimates = "yes"\nsize = "2 MB"\n')
    with pytest.raises(UsageError, match="allow-estimates"):
        budget.budget_from(["wrong.toml"], tmp_path)


def test_a_recipe_is_a_budget_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('target = "local"\n[budget]\nmacs = "50 %"\n[tune]\nepochs = 2\n')
    assert texts(budget.budget_from(["recipe.toml"], tmp_path)) == {"macs": "50 %"}


def test_without_a_source_pyproject_is_read(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[tool.edgeprune.budget]\nsize = "2 MB"\n'
    )
    assert texts(budget.budget_from([], tmp_path)) == {"size": "2 MB"}
    assert texts(budget.budget_from(["pyproject.toml"], tmp_path)) == {"size": "2 MB"}
    assert texts(budget.budget_from(["macs=50 %"], tmp_path)) == {"macs": "50 %"}


@pytest.mark.parametrize(
    "text", [None, "", '[project]\nname = "x"', "[tool.edgeprune]", "[tool.edgeprune.budget]"]
)
def test_no_budget_at_all_shows_how_to_give_one(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UsageError, match="no budget was given") as caught:
        budget.budget_from([], tmp_path)
    assert caught.value.exit_code == 2
    # The example is a budget: what it says to write is accepted.
    example = caught.value.hint
    flags = [part.split('"')[0] for part in example.split('--budget "')[1:]]
    assert len(budget.budget_from(flags, tmp_path).limits) == 3
    table = example[example.index("[tool.edgeprune.budget]") :].replace("\n  ", "\n")
    (tmp_path / "pyproject.toml").write_text(table)
    assert len(budget.budget_from([], tmp_path).limits) == 3


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("nowhere.toml", "neither a file nor METRIC=LIMIT"),
        ("latency_p50", "neither a file nor METRIC=LIMIT"),
        ("x" * 5000, "neither a file nor METRIC=LIMIT"),
        ("", "neither a file nor METRIC=LIMIT"),
        ("latency=5 ms", "unknown metric 'latency'"),
        ("latency_p50<=5 ms", "unknown metric"),
        ("latency_p50=5", "no unit"),
        ("size=-2 MB", "more than 0"),
        ("size=", "not a quantity"),
        ("clean_accuracy=120 %", "between 0 and 100"),
        ("macs=-1 pp", "for accuracies"),
    ],
)
def test_a_source_that_is_no_limit_is_refused(tmp_path: Path, source: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        budget.budget_from([source], tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "holds no limits"),
        ("[budget]", "holds no limits"),
        ("budget = 5", r"\[budget\] must be a table"),
        ("[budget]\nsize = true", "size = True must be a text"),
        ("[budget]\nsize = [1]", r"size = \[1\] must be a text"),
        ("[budget]\nsize = 2000000", "no unit"),
        ("[budget]\nsiez = '2 MB'", r"b\.toml \[budget\]: unknown metric 'siez'"),
        ("[budget\n", "b.toml"),
        ("[tool]\nedgeprune = 1", r"\[tool\.edgeprune\.budget\] must be a table"),
        ("macs = inf", "not a"),
        ("params = 1e999", "not a"),
        ("latency_p50 = '\u0665 ms'", "not a"),
        (f"params = {'1' * 5000}", "digits"),
    ],
)
def test_a_file_that_is_no_budget_is_refused_by_name(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(UsageError, match=found) as caught:
        budget.budget_from(["b.toml"], tmp_path)
    assert "b.toml" in caught.value.message
