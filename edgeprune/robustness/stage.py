"""attack: the worst case for every image over several attacks, judged on the artifact itself; goes on after a kill."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from edgeprune import serialization
from edgeprune.data import Split
from edgeprune.errors import UsageError, WorkdirError
from edgeprune.progress import bar
from edgeprune.records import Reading
from edgeprune.robustness.attack_plan import (
    Reach,
    Step,
    batch_size,
    describe_gradients,
    placed,
    reaches,
    steps_of,
)
from edgeprune.robustness.gradient_masking import flags
from edgeprune.robustness.job import CLEAN, Job, ModelUnderAttack, Verdicts, ask, wrong
from edgeprune.robustness.readings import compare, describe_broken, ledger, readings_of
from edgeprune.robustness.surrogate_check import proven
from edgeprune.train import ExecutionConfig, seeded_generator

STATE = "attack.json"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Attacked:
    """before, after: robust_accuracy of the first and of the last stage."""

    before: tuple[Reading, ...]
    after: tuple[Reading, ...]
    ledger: tuple[Reading, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _State:
    """Progress of an evaluation: number of the current step, its images, and how many of them are done."""

    key: str
    verdicts: Verdicts
    step: int
    todo: tuple[int, ...]
    done: int


def run(victim: ModelUnderAttack, split: Split, job: Job, *, scratch: Path, log: Log) -> Verdicts:
    """Attack every image until something breaks it on the artifact; the cheapest attacks first.

    Gradients come from `victim.twin` and, for a quantized file, then from `victim.straight`; an image is broken when
    `victim.answers` misclassifies it. After every batch the state is written to `scratch`, where the same job resumes.
    """
    if not len(split):
        raise UsageError(
            f"the part {split.name!r} of the data has no images", "give held-out images with --data"
        )
    with placed(victim, split) as placement:
        one = placement.images(split.take(torch.arange(1)))
        reach = Reach(reaches(victim.twin, one), reaches(victim.straight, one))
        steps = steps_of(victim, job, placement, reach)
        names = tuple(step.name for step in steps[1:])
        state = _resumed(scratch, job.key(victim), len(split), names)
        if state is None:
            _check_labels(victim, split, placement)
            batch = job.table.batch or min(batch_size(n, one) for n in (victim.twin, victim.straight))
            none = Verdicts(("",) * len(split), {}, {}, {}, describe_gradients(victim, reach), batch, names)
            state = _State(job.key(victim), none, 0, tuple(range(len(split))), 0)
        else:
            log(
                f"attack: goes on at {steps[state.step].name}"
                if state.step < len(steps)
                else "attack: all done"
            )
        while state.step < len(steps):
            step = steps[state.step]
            state = _attacked(state, step, (victim, split, job), scratch)
            if state.todo:
                log(_describe(state.verdicts, step.name))
            left = tuple(row for row, by in enumerate(state.verdicts.by) if not by)
            state = replace(state, step=state.step + 1, todo=left, done=0)
    return state.verdicts


def run_stages(
    victims: Mapping[str, ModelUnderAttack], split: Split, job: Job, *, scratch: Path, log: Log
) -> Attacked:
    """Attack a network after every stage of a run on the same images, to see where robustness was lost."""
    found: dict[str, Verdicts] = {}
    lines: list[Reading] = []
    victims = {stage: proven(victim, split, log=log) for stage, victim in victims.items()}
    for stage, victim in victims.items():
        log(f"attack: {stage}")
        found[stage] = run(victim, split, job, scratch=scratch / stage, log=log)
        lines += ledger(stage, victim, job, found[stage], part=split.name)
    first, last = next(iter(victims)), list(victims)[-1]
    rows = {}
    for stage, name in ((first, "dense"), (last, "compressed")):
        signs = flags(victims[stage], split, job, found[stage])
        robust = readings_of(victims[stage], job, found[stage], part=split.name, flags=signs)[1]
        rows[stage] = replace(robust, artifact=name)
    pair = compare(found[first], found[last])
    after = replace(rows[last], conditions={**rows[last].conditions, "paired": pair["robust_accuracy"]})
    notes = [f"Accuracy under attack, dense to {last}: {pair['robust_accuracy']['words']}."]
    for stage in dict.fromkeys((first, last)):
        notes.append(f"{rows[stage].artifact} under {job.table.name}: {describe_broken(found[stage])}.")
        more = (*rows[stage].conditions["flags"], *rows[stage].conditions["notes"])
        notes += [f"{rows[stage].artifact}: {line}" for line in more]
    return Attacked((rows[first],), (after,), tuple(lines), tuple(notes))


def _attacked(state: _State, step: Step, what: tuple[ModelUnderAttack, Split, Job], scratch: Path) -> _State:
    """The state after an attack on all images that are left; written after each batch."""
    victim, split, job = what
    label = f"{step.name} on {victim.name}"
    with bar(len(state.todo), label) as advance:
        advance(state.done)
        while state.done < len(state.todo):
            rows = torch.tensor(state.todo[state.done : state.done + state.verdicts.batch])
            start = time.monotonic()
            generator = seeded_generator(job.seed, "attack", step.name, int(rows[0]))
            x, y = step.images(_pixels(split, rows)), split.labels[rows]
            images, queries = step.craft(x, y, generator, advance)
            broken = wrong(victim.answers, job.ball.project(images, x.to(images)), y)
            spent = time.monotonic() - start
            verdicts = _counted(state.verdicts, step.name, (rows[broken], len(rows)), (queries, spent))
            state = replace(state, verdicts=verdicts, done=state.done + len(rows))
            write_state(scratch, state)
    return state


def _counted(verdicts: Verdicts, name: str, images: tuple[Tensor, int], cost: tuple[int, float]) -> Verdicts:
    """Add a batch. images: which were broken, and how many were tried. cost: forward passes and seconds."""
    by = list(verdicts.by)
    for row in images[0].tolist():
        by[row] = name
    return replace(
        verdicts,
        by=tuple(by),
        tried={**verdicts.tried, name: verdicts.tried.get(name, 0) + images[1]},
        queries={**verdicts.queries, name: verdicts.queries.get(name, 0) + cost[0]},
        seconds={**verdicts.seconds, name: verdicts.seconds.get(name, 0.0) + cost[1]},
    )


def _pixels(split: Split, rows: Tensor) -> Tensor:
    x = split.take(rows)
    low, high = float(x.min()), float(x.max())
    if not (0 <= low <= high <= 1):
        raise UsageError(
            f"the images of {split.name!r} go from {low:g} to {high:g}; attacks need pixels in [0, 1]",
            "give images that are not normalized, and the normalization to the model (--mean, --std)",
        )
    return x


def _check_labels(victim: ModelUnderAttack, split: Split, placement: ExecutionConfig) -> None:
    x = _pixels(split, torch.arange(1))
    classes = ask(victim.answers, placement.images(x) if victim.is_network else x).shape[1]
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"the labels of {split.name!r} go from {low} to {high}, {victim.name} answers {classes} classes",
            "give the data set that the model was trained for, with its classes in the same order",
        )


def _describe(verdicts: Verdicts, name: str) -> str:
    left = verdicts.by.count("")
    if name == CLEAN:
        return f"attack: {left} of {len(verdicts.by)} images are right without an attack"
    broken, tried = verdicts.broken.get(name, 0), verdicts.tried.get(name, 0)
    return (
        f"attack: {name} broke {broken} of {tried}; {left} left after {verdicts.seconds.get(name, 0.0):.0f} s"
    )


def _resumed(scratch: Path, key: str, count: int, steps: tuple[str, ...]) -> _State | None:
    if not (scratch / STATE).is_file():
        return None
    try:
        state = serialization.read(_State, scratch / STATE, WorkdirError)
    except WorkdirError:
        # It starts again.
        return None
    same = state.key == key and len(state.verdicts.by) == count and state.verdicts.steps == steps
    return state if same else None


def write_state(scratch: Path, state: _State) -> None:
    """Write how far the attack is, whole or not at all."""
    serialization.write(scratch / STATE, state)
