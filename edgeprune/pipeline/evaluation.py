"""The command `evaluate`: the accuracy of a file or a model, without and under attack."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune import devices, measure, robustness, targets
from edgeprune.data import Data, Split, open_data
from edgeprune.devices import Device
from edgeprune.errors import UsageError
from edgeprune.measure import Judged, OnnxFile, look
from edgeprune.pipeline.context import Log, load
from edgeprune.pipeline.run_directory import check_plain, check_shipped, own_scratch
from edgeprune.recipe import Recipe, attack
from edgeprune.records import Bundle, InputSpec, Reading
from edgeprune.robustness import ModelUnderAttack
from edgeprune.serialization import scratch_folder


def evaluate(
    recipe: Recipe, *, limit: int | None, log: Log, output: str = "", trust_run: bool = False
) -> tuple[Reading, ...]:
    """The accuracy of a file or a model on held-out images, without and, where the recipe says so, under attack.

    Args:
        recipe: `[attack]` with the name "auto" is none.
        limit: so many images, the same share of each class, 0 for all; None for all without an attack, and for
            `attack.limit` with one.
        output: the name of a file's output that has the logits, "" to find it.
    """
    if not recipe.data.path:
        raise UsageError("evaluate needs images", "give --data")
    if limit is not None and limit < 0:
        raise UsageError(f"--limit {limit} must be at least 0", "0 is all images")
    attacks = recipe.attack.name not in ("none", "auto")
    wanted = limit if limit is not None else recipe.attack.limit if attacks else 0
    path = Path(recipe.model.path)
    is_file = path.suffix == ".onnx" or (path / "model.onnx").is_file()
    if output and not is_file:
        raise UsageError(
            f"--output {output!r} names an output of an ONNX file, and {path} is none", "leave it out"
        )
    with scratch_folder() as folder:
        subject = look(onnx_of(path), folder, recipe.model.input) if is_file else load(recipe.model)
        return _evaluated(recipe, subject, (wanted, output, trust_run), log)


def _evaluated(
    recipe: Recipe, subject: Bundle | OnnxFile, options: tuple[int, str, bool], log: Log
) -> tuple[Reading, ...]:
    """As `evaluate`. options: limit, output, trust_run."""
    path, (limit, output, trust_run) = Path(recipe.model.path), options
    spec = subject.input if isinstance(subject, Bundle) else subject.spec(output)
    found, split = images(recipe, spec, limit)
    for note in found.notes:
        log(f"data: {note}")
    attacks = recipe.attack.name not in ("none", "auto")
    file: Judged | None = None
    if isinstance(subject, Bundle):
        measure.check_bundle(subject, split)
        judged = subject
    else:
        judged = file = subject.judged(split, len(found.labels), wanted=output, attacked=attacks)
        spec = file.spec
    if attacks:
        scratch = (path if file and path.is_dir() else Path("runs")) / "scratch"
        place = _Place(limit, found.fingerprint, scratch, log, trust_run)
        clean, *rest = _attacked(recipe, _victim(path, judged, recipe, place), split, place)
    else:
        clean, rest = _clean(path, judged, split, _device(recipe)), []
    if file is not None:
        measure.check(clean, file, split)
        clean = measure.noted(clean, file.notes)
    clean = measure.classes(measure.guessing(clean, split, attacked=attacks), split, spec.classes)
    if file is not None:
        clean = measure.normalized(measure.reported(clean, path), recipe.model)
    return (with_notes(clean, found.notes), *rest)


def check_attack(recipe: Recipe) -> None:
    """Refuse an attack that can't be run, before anything is measured."""
    if not recipe.data.path:
        raise UsageError(f"the attack {recipe.attack.name!r} needs images", "give --data")
    robustness.attack_job(attack(recipe), seed=recipe.seed, data="")


def with_notes(reading: Reading, notes: Sequence[str]) -> Reading:
    """A reading whose conditions have the notes on the images."""
    known = {"notes": [*notes, *reading.conditions.get("notes", ())]} if notes else {}
    return replace(reading, conditions={**reading.conditions, **known})


def _device(recipe: Recipe) -> Device:
    setup = targets.target(recipe.target).setup
    return devices.device_from_url(recipe.measure.device, setup)


def _clean(path: Path, subject: Bundle | Judged, images: Split, device: Device) -> Reading:
    if isinstance(subject, Bundle):
        return measure.of_network(subject, images, path.name)
    artifact = measure.artifact(subject.path, subject.spec)
    return measure.accuracy(artifact, images, device, name=subject.path.name)[0]


def _victim(path: Path, subject: Bundle | Judged, recipe: Recipe, place: _Place) -> ModelUnderAttack:
    """A network, the file of a run, or a bare file; a file is run on the recipe's device."""
    device = _device(recipe)
    if isinstance(subject, Bundle):
        return robustness.of_bundle(subject, path.name)
    here = devices.device_from_url("local").where()
    if path.is_dir():
        victim = robustness.of_run(path, place.scratch, here, recipe.model, trusted=place.trust_run)
    else:
        victim = robustness.of_file(path.name, subject.path, place.scratch, here)
    if not robustness.elsewhere(device):
        return victim
    there = robustness.OnDevice(device, targets.target(recipe.target), place.scratch, place.log)
    return robustness.on_device(victim, subject.path, subject.spec, there)


def warnings(readings: tuple[Reading, ...]) -> list[str]:
    """What a reader of readings must know: how they were taken, and signs that they are too good to be true."""
    lines: list[str] = []
    for reading in readings:
        facts = reading.conditions
        if reading.metric == "robust_accuracy":
            broken = ", ".join(f"{name} {count}" for name, count in facts["broken"].items())
            lines.append(f"{facts['attack']}, {facts['norm']} eps {facts['eps']}, {facts['gradients']}.")
            lines.append(f"Of {reading.n} images broken by: {broken}; {facts['right']} survived.")
        lines += [f"note: {note}" for note in facts.get("notes", ())]
        lines += [f"WARNING: {flag}" for flag in facts.get("flags", ())]
    return lines


@dataclass(frozen=True)
class _Place:
    """What an attack needs beside the victim and the images. data: their fingerprint. limit: how many; 0 is all."""

    limit: int
    data: str
    scratch: Path
    log: Log
    trust_run: bool


def _attacked(recipe: Recipe, victim: ModelUnderAttack, images: Split, place: _Place) -> tuple[Reading, ...]:
    """Readings of an attack; what lets it go on after a kill is deleted when it is done."""
    table = replace(attack(recipe), limit=place.limit)
    job = robustness.attack_job(table, seed=recipe.seed, data=f"{place.data} {images.name} {len(images)}")
    place.log(f"attack: {table.name}, {table.norm} eps {table.eps}, {len(images)} images of {victim.name}")
    victim = robustness.proven(victim, images, log=place.log)
    scratch = place.scratch / f"attack-{job.key(victim)}"
    own_scratch(scratch)
    verdicts = robustness.run(victim, images, job, scratch=scratch, log=place.log)
    place.log("attack: look for signs that the gradients mislead")
    found = robustness.flags(victim, images, job, verdicts)
    rows = robustness.readings_of(victim, job, verdicts, part=images.name, flags=found)
    shutil.rmtree(scratch, ignore_errors=True)
    for folder in (place.scratch, place.scratch.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return rows


def images(recipe: Recipe, spec: InputSpec, limit: int) -> tuple[Data, Split]:
    """The data set, and so many of its held-out images; 0 is all."""
    data = open_data(recipe.data, spec, recipe.seed)
    held_out = data.held_out
    return data, measure.balanced(held_out, limit, recipe.seed) if limit else held_out


def onnx_of(path: Path) -> Path:
    """The ONNX file that a path names: itself, or the one of a run directory."""
    found = path / "model.onnx" if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"no ONNX file at {found}", "give an .onnx file or a finished run directory")
    if path.is_dir():
        check_plain(path)
        check_shipped(path)
    return found
