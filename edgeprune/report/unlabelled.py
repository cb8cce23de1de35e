"""What a report says without labels: answers to synthetic images and bounds, each marked for what it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.quantities import show
from edgeprune.records import Reading, Report
from edgeprune.report.rows import (
    UNLABELLED,
    find,
    how_had,
    interval_of,
    number_in,
    quantity,
    text_of,
    unit_of,
    value_of,
)

TITLE = "Without labels"

INTRODUCTION = (
    "Synthetic images are made from the dense network itself. How alike the two files answer them is no accuracy; a "
    "bound holds for every image of the input's range."
)

HEAD = ("metric", "value", "what it is", "what it says", "images", "how and where")

NO_ACCURACY = "synthetic images, not accuracy"

FITTED = "the repair was solved on these images"

ABOUT = {
    "synthetic_agreement": "share of the images that both classify alike",
    "synthetic_kl": "mean divergence of the compressed model's class probabilities from the dense one's",
    "certified_logit_change": "no logit changes by more, whatever the image",
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
    return [UnlabelledRow(r.metric, _with_interval(r), _mark(r), _about(r), r.n, how_had(r)) for r in found]


def sentences(report: Report) -> Iterator[str]:
    """The same in plain words."""
    same, kl = (find(report.after, metric) for metric in UNLABELLED[:2])
    if same is not None and value_of(same) is not None:
        kept = f", KL {_with_interval(kl)}" if kl is not None and value_of(kl) is not None else ""
        fitted = f"; {FITTED}" if same.conditions.get("fitted") is True else ""
        yield (
            f"On {same.n} synthetic images (not accuracy{fitted}) {_with_interval(same)} of the answers are the dense "
            f"model's{kept}."
        )
    bound = find(report.after, "certified_logit_change")
    if bound is None:
        return
    if value_of(bound) is None:
        yield f"How far a logit can change at most is not known: {_why(bound)}."
        return
    yield (
        f"Whatever the image, no logit changes by more than {value_of(bound):.4g} ({_mark(bound)}): "
        f"{_certified(bound)}."
    )


def _mark(reading: Reading) -> str:
    if reading.metric != "certified_logit_change":
        return NO_ACCURACY
    if value_of(reading) is None:
        return "no bound"
    vacuous = reading.conditions.get("vacuous")
    return "bound, vacuous" if vacuous is True else "bound" if vacuous is False else "bound, untried"


def _about(reading: Reading) -> str:
    about = ABOUT[reading.metric]
    if reading.metric != "certified_logit_change":
        return f"{about}; {FITTED}" if reading.conditions.get("fitted") is True else about
    return _why(reading) if value_of(reading) is None else f"{about}; {_certified(reading)}"


def _certified(bound: Reading) -> str:
    """For how many images the bound proves the answer unchanged."""
    share = number_in(bound.conditions, "certified_share")
    if share is None:
        return "there are no images to say what it certifies"
    of = f"{bound.n} synthetic images"
    if share == 0:
        return f"it certifies the answer to none of {of}"
    return f"it certifies the answer to {show(share, 'fraction')} of {of}"


def _why(reading: Reading) -> str:
    return str(reading.conditions.get("why") or "no reason was recorded")


def _with_interval(reading: Reading) -> str:
    interval, unit = interval_of(reading), unit_of(reading)
    if not interval:
        return text_of(reading)
    return f"{text_of(reading)} ({quantity(interval[0], unit)} to {quantity(interval[1], unit)})"
