"""What a report says without labels: outputs for synthetic images, marked for what they are not."""

from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.records import Reading, Report
from edgeprune.report.rows import (
    UNLABELLED,
    find,
    interval_of,
    provenance,
    quantity,
    text_of,
    unit_of,
    value_of,
)

TITLE = "Without labels"
INTRODUCTION = (
    "Synthetic images are made from the dense network itself. "
    "How alike the outputs of both files are is no accuracy."
)

HEAD = ("metric", "value", "what it is", "what it says", "images", "how and where")
NO_ACCURACY = "synthetic images, not accuracy"
FITTED = "the repair was solved on these images"
ABOUT = {
    "synthetic_agreement": "share of the images that both classify alike",
    "synthetic_kl": "mean divergence of the compressed model's class probabilities from the dense one's",
}


@dataclass(frozen=True)
class UnlabelledRow:
    """One reading as text. mark: what it is and is not. about: what it says. n: images, 0 for none."""

    metric: str
    text: str
    mark: str
    about: str
    n: int
    how: str


def without_labels(report: Report) -> list[UnlabelledRow]:
    """The readings that need no labels; empty when the run took none."""
    found = [r for r in (find(report.after, metric) for metric in UNLABELLED) if r is not None]
    rows = []
    for r in found:
        about = ABOUT[r.metric] + (f"; {FITTED}" if r.conditions.get("fitted") is True else "")
        rows.append(UnlabelledRow(r.metric, _with_interval(r), NO_ACCURACY, about, r.n, provenance(r)))
    return rows


def sentences(report: Report) -> Iterator[str]:
    """The same in plain words."""
    same, kl = (find(report.after, metric) for metric in UNLABELLED[:2])
    if same is not None and value_of(same) is not None:
        kept = f", KL {_with_interval(kl)}" if kl is not None and value_of(kl) is not None else ""
        fitted = f"; {FITTED}" if same.conditions.get("fitted") is True else ""
        yield (
            f"On {same.n} synthetic images (not accuracy{fitted}) {_with_interval(same)} of the outputs are the dense "
            f"model's{kept}."
        )


def _with_interval(reading: Reading) -> str:
    interval, unit = interval_of(reading), unit_of(reading)
    if not interval:
        return text_of(reading)
    return f"{text_of(reading)} ({quantity(interval[0], unit)} to {quantity(interval[1], unit)})"
