"""The command `gate`: a report against a budget."""

from dataclasses import replace
from pathlib import Path

from edgeprune import gate as gate_module
from edgeprune import report as report_stage
from edgeprune.gate import FORMATS, budget_from, render
from edgeprune.pipeline.run_directory import LOCKFILE, check_shipped
from edgeprune.quantities import check_choice

ONLY_A_REPORT = (
    "Only a report was read and no file was checked: give the run directory to have its model.onnx checked."
)


def gate(run: Path, budget: list[str], baseline: Path | None, output_format: str) -> tuple[str, int]:
    """The verdict on a run as text, and the exit code."""
    check_choice("--format", output_format, FORMATS)
    limits = budget_from(budget, Path())
    report = report_stage.load(run)
    folder = run if run.is_dir() else run.parent
    checked = run.is_dir() or (run.name == "report.json" and (folder / LOCKFILE).is_file())
    if checked:
        check_shipped(folder)
    missing = baseline is not None and _absent(baseline)
    base = report_stage.load(baseline) if baseline is not None and not missing else None
    verdict = gate_module.run(report, limits, base, baseline_missing=missing)
    if not checked:
        verdict = replace(verdict, notes=(*verdict.notes, ONLY_A_REPORT))
    return render(verdict, output_format), verdict.exit_code


def _absent(path: Path) -> bool:
    """Whether there is nothing by that name; what is there and can't be read is not absent."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
