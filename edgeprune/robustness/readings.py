"""The verdicts as readings, with the conditions of the measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeprune import confidence
from edgeprune.records import METRICS, Reading
from edgeprune.robustness.attack_plan import STRAIGHT, from_
from edgeprune.robustness.job import CLEAN, Job, ModelUnderAttack, Verdicts

# The stages of a run, in their order.
STAGES = ("dense", "pruned", "repaired", "bn recalibrated", "tuned", "exported", "quantized")


def readings_of(
    victim: ModelUnderAttack, job: Job, verdicts: Verdicts, *, part: str, flags: Sequence[str] = ()
) -> tuple[Reading, ...]:
    """clean_accuracy, robust_accuracy, and "broken_by_NAME" for each attack, a share of the images that it was given.

    Of a quantized file robust_accuracy's conditions have "transfer_only", without straight-through attacks.
    """
    clean, robust = sum(verdicts.clean_right), sum(verdicts.survived)
    used = _conditions(victim, job, verdicts, part)
    first = _reading("clean_accuracy", clean, len(verdicts.by), victim, {"part": part, "right": clean})
    second = _reading(
        "robust_accuracy", robust, len(verdicts.by), victim,
        {**used, "right": robust, "broken": {CLEAN: len(verdicts.by) - clean, **verdicts.broken},
         "flags": list(flags), "notes": [*victim.notes, *_quantization_words(used)]},
    )  # fmt: skip
    return (first, second, *(_broken(name, victim, job, verdicts) for name in verdicts.broken))


def ledger(
    stage: str, victim: ModelUnderAttack, job: Job, verdicts: Verdicts, *, part: str
) -> tuple[Reading, Reading]:
    """The accuracies without and under attack as lines of a run's ledger."""
    clean, robust, *_ = readings_of(victim, job, verdicts, part=part)
    extra = {"stage": stage, "images": len(verdicts.by)}
    return tuple(replace(r, conditions={**extra, **r.conditions}) for r in (clean, robust))  # type: ignore[return-value]


def merged(clean: Sequence[Reading], attacked: Sequence[Reading]) -> tuple[Reading, ...]:
    """One ledger, stage by stage: the accuracy on all images, and, when fewer were attacked, on these as well."""
    same = {(r.conditions["stage"], r.metric, r.n) for r in clean}
    more = [r for r in attacked if (r.conditions["stage"], r.metric, r.n) not in same]

    def place(reading: Reading) -> int:
        stage = reading.conditions["stage"]
        return STAGES.index(stage) if stage in STAGES else len(STAGES)

    return tuple(sorted((*clean, *more), key=place))


def describe_broken(verdicts: Verdicts) -> str:
    """Which attack broke what, in a sentence."""
    n, clean, left = len(verdicts.by), sum(verdicts.clean_right), sum(verdicts.survived)
    broken = ", ".join(f"{name} {count}" for name, count in verdicts.broken.items())
    return f"of {n} images {n - clean} are wrong as they are; broken by {broken or 'nothing'}; {left} survive"


def compare(dense: Verdicts, compressed: Verdicts) -> dict[str, dict[str, Any]]:
    """Test the difference of accuracies on the same images in pairs (McNemar's exact test, two-sided).

    gained, lost: images that only the compressed or only the dense one classifies right; change is their difference.
    """
    if len(dense.by) != len(compressed.by):
        raise ValueError(f"verdicts on {len(dense.by)} and on {len(compressed.by)} images can't be paired")
    pairs = {
        "clean_accuracy": (dense.clean_right, compressed.clean_right),
        "robust_accuracy": (dense.survived, compressed.survived),
    }
    return {metric: _paired(before, after) for metric, (before, after) in pairs.items()}


def _paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    p = confidence.mcnemar(gained, lost)
    change = (gained - lost) / len(before)
    said = "differs" if p < 1 - confidence.LEVEL else "does not differ measurably"
    words = f"{100 * change:+.1f} pp: {lost} images lost, {gained} gained, p = {p:.2g}; it {said}"
    return {"gained": gained, "lost": lost, "change": change, "p": p, "words": words}


def _transfer_only(job: Job, verdicts: Verdicts) -> dict[str, Any]:
    if not any(name.endswith(STRAIGHT) for name in verdicts.steps):
        return {}
    after = [name for name, attack in job.attacks.items() if not attack.gradients]
    seeing = sum(count for name, count in verdicts.broken.items() if name.endswith(STRAIGHT))
    right = sum(verdicts.survived) + seeing + sum(verdicts.broken.get(name, 0) for name in after)
    n = len(verdicts.by)
    spread = list(confidence.binomial(right, n))
    return {"transfer_only": {"right": right, "value": right / n, "spread": spread, "lowered": seeing / n}}


def _quantization_words(conditions: Mapping[str, Any]) -> tuple[str, ...]:
    if "transfer_only" not in conditions:
        return ()
    found = conditions["transfer_only"]
    low, high = found["spread"]
    return (
        f"Images made against the network before it was quantized leave {100 * found['value']:.1f} % standing "
        f"({100 * low:.1f} to {100 * high:.1f}). Attacks that see the quantization lower it by "
        f"{100 * found['lowered']:.1f} points.",
    )


def _conditions(victim: ModelUnderAttack, job: Job, verdicts: Verdicts, part: str) -> dict[str, Any]:
    table = job.table
    return {
        "part": part,
        "attack": table.name,
        "eps": table.eps,
        "eps_value": job.ball.eps,
        "norm": job.ball.norm,
        "seed": job.seed,
        "limit": table.limit,
        "gradients": verdicts.how,
        "also from": [
            name for name in sorted(victim.others) if any(s.endswith(from_(name)) for s in verdicts.steps)
        ],
        "parameters": job.parameters,
        "batch": verdicts.batch,
        "seconds": sum(verdicts.seconds.values()),
        **_transfer_only(job, verdicts),
    }


def _reading(
    metric: str, count: int, n: int, victim: ModelUnderAttack, conditions: Mapping[str, Any]
) -> Reading:
    spread = confidence.binomial(count, n)
    return Reading(
        metric, count / n, METRICS[metric].unit, n, spread, victim.where, victim.name, dict(conditions)
    )


def _broken(name: str, victim: ModelUnderAttack, job: Job, verdicts: Verdicts) -> Reading:
    broken, tried = verdicts.broken[name], verdicts.tried[name]
    conditions = {
        "attack": name, "broken": broken, "tried": tried, "queries": verdicts.queries[name],
        "seconds": verdicts.seconds[name], "norm": job.ball.norm, "eps_value": job.ball.eps,
    }  # fmt: skip
    spread = confidence.binomial(broken, tried)
    metric = f"broken_by_{name}"
    return Reading(metric, broken / tried, "fraction", tried, spread, victim.where, victim.name, conditions)
