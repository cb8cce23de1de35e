"""The run directory: one folder per finished stage, named by a hash of everything that went into it.

A stage writes into `tmp-KEY`, which is renamed to `KEY` when it is whole: a folder that exists is complete. Killing
a run loses the stage that was running and nothing else; deleting folders is always safe.

Of several processes (`distributed`) the first holds the directory and alone writes to it. The others go through the
same stages: they take part in those that are done together, and read what the first one has left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeprune import distributed, serialization
from edgeprune.errors import UsageError, WorkdirError
from edgeprune.pipeline import seal
from edgeprune.serialization import scratch_folder, sha256, to_json

STAGES = ("dense", "synthesize", "prune", "cut", "repair", "tune", "export", "quantize", "measure", "attack")
# What --trust-run keeps of somebody else's run; it does the rest again, where the proofs are.
LONG = ("synthesize", "prune", "repair", "tune", "attack")
LOCKFILE = "edgeprune.lock"
# What a finished run has at its top; report.json holds the hash of each (environment.files).
PUBLISHED = ("model.onnx", "model.pt2", "weights.safetensors", "plan.json", "build_engine.sh", "dense.onnx")
# A shared file system may show a new folder to other machines this much later.
SIGHT_S = 60.0


def check_shipped(run: Path) -> None:
    """Refuse a run directory whose files are not those that its report was made of. Needs no torch.

    model.onnx must be there; of the others those that are there are compared.
    """
    report, again = (
        run / "report.json",
        "give `edgeprune compress` the same command again: it writes both anew",
    )
    try:
        files = serialization.load(report)["environment"]["files"]
        recorded = {name: str(files[name]) for name in PUBLISHED if name in files}
        found = {name: sha256(run / name) for name in PUBLISHED if (run / name).is_file()}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        why = f"{run} is no finished run: {report} does not say which files it was made of"
        raise UsageError(f"{why} ({type(error).__name__}: {error})", again) from error
    for name in ("model.onnx", *found):
        if name not in found or found[name] != recorded.get(name):
            raise UsageError(
                f"{run / name} has sha256 {found.get(name, '(no such file)')}, "
                f"but {report} was made of a file with {recorded.get(name, '(no such file)')}",
                again,
            )


def check_plain(run: Path) -> None:
    """Refuse links, pipes and devices among what edgeprune reads and writes in a run directory: they lead out of it."""
    tops = (
        *PUBLISHED,
        LOCKFILE,
        ".lock",
        "recipe.toml",
        "report.json",
        "report.md",
        "report.html",
        "scratch",
    )
    folders = [run / name for name in (*map(_folder, STAGES), "scratch")]
    for path in (
        *(run / f"{n}{e}" for n in tops for e in ("", ".tmp")),
        *folders,
        *chain(*map(_below, folders)),
    ):
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
            raise WorkdirError(f"{path} is {kind}; a run directory holds files and folders", "delete it")


def _folder(stage: str) -> str:
    return f"{STAGES.index(stage)}-{stage}"


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *files))


def own_scratch(folder: Path) -> None:
    """Make a folder for what lets work go on after a kill, or empty one that somebody else has made."""
    mark, text = folder / "sealed", f"scratch {folder.name}"
    try:
        found = mark.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found = ""
    if seal.holds(found, text):
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(seal.seal(text), encoding="utf-8")
    except OSError as error:
        raise WorkdirError(f"{folder} can't be written: {error}", "make room there") from error


class Workdir:
    """A run directory that this process holds, or follows where another process of its group holds it.

    Use it with `with`. leads: whether this process is the one that writes. threads: how many this process computes
    with; made_with: stage -> how many made it, of those done. trusted: what somebody else made is believed.
    """

    def __init__(self, root: Path, threads: int = 0, *, trusted: bool = False) -> None:
        self.root, self.threads, self.trusted = root, threads, trusted
        self.made_with: dict[str, int] = {}
        self.leads = distributed.rank() == 0
        self._held: Any = None
        self._aside = root
        self._follows = ExitStack()

    def __enter__(self) -> Workdir:
        if not self.leads:
            self._aside = self._follows.enter_context(scratch_folder())
            return self
        check_plain(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._held = (self.root / ".lock").open("a")
        except OSError as error:
            raise WorkdirError(f"{self.root} can't be used as a run directory: {error.strerror}") from error
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._held.close()
            raise WorkdirError(
                f"{self.root} is in use by another edgeprune",
                "wait for it to end, or choose another directory with -o",
            ) from error
        for left_over in chain(*(self._parent(name).glob("tmp-*") for name in STAGES)):
            shutil.rmtree(left_over, ignore_errors=True)
        for place in (self.root, *map(self._parent, STAGES), self.root / "scratch"):
            serialization.sweep(
                place, serialization.LEFT_FILES if place == self.root else f"**/{serialization.LEFT_FILES}"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.leads:
            self._held.close()
        else:
            self._follows.close()

    def agree(self, keys: Mapping[str, str]) -> dict[str, str]:
        """The keys of the stages; refused where another process of the group has others."""
        led = distributed.broadcast_object(dict(keys))
        other = [name for name in {**led, **keys} if led.get(name) != keys.get(name)]
        if other:
            raise WorkdirError(
                f"process {distributed.rank()} of {distributed.size()} would do another {other[0]} than process 0",
                "give all processes the same model, data, recipe and version of edgeprune",
            )
        return led

    def claim(self, identity: dict[str, Any], facts: dict[str, Any], *, again: bool) -> None:
        """Record whose run this is: write `edgeprune.lock`; `again` gives the folder to another model."""
        path = self.root / LOCKFILE
        if path.exists() and not again:
            try:
                held = dict(serialization.load(path)["model"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise WorkdirError(
                    f"{path} is corrupt", f"delete {self.root}, or choose another directory with -o"
                ) from error
            if held != to_json(identity):
                raise WorkdirError(
                    f"{self.root} holds the run of another model "
                    f"({held.get('path', '?')}, sha256 {str(held.get('sha256'))[:12]})",
                    "choose another directory with -o, or give this one up with --force load",
                )
        serialization.write(path, {"model": identity, **facts})

    def key(self, stage: str, version: int, *inputs: Any) -> str:
        """The name of a stage's folder: a hash of its name, its version and everything that goes into it."""
        text = json.dumps([stage, version, *map(to_json, inputs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def stage(self, name: str, key: str, work: Callable[[Path], None], *, together: bool = False) -> Path:
        """The finished folder of a stage; does the work only if it is not there yet."""
        done = self._parent(name) / key
        there, threads = self.leads and done.is_dir(), self.threads
        if there:
            threads = self._verify(done)
            there = done.is_dir()
        if not distributed.broadcast_object(there):
            self._do(done, work, together)
        if not self.leads:
            _look_for(done)
        self.made_with[name] = threads
        return done

    def alone(self, name: str, key: str, work: Callable[[Path], None]) -> Path:
        """As `stage`, but by process 0 alone and without the others, so that any thread may call it."""
        done = self._parent(name) / key
        if done.is_dir():
            self._verify(done)
        if not done.is_dir():
            self._make(done, work)
        return done

    def _do(self, done: Path, work: Callable[[Path], None], together: bool) -> None:
        if self.leads:
            self._make(done, work)
        elif together:
            with scratch_folder() as folder:
                work(folder)
        distributed.barrier()

    def _make(self, done: Path, work: Callable[[Path], None]) -> None:
        key = done.name
        with serialization.replace_folder(done) as unfinished:
            work(unfinished)
            files = {
                str(p.relative_to(unfinished)): sha256(p)
                for p in sorted(unfinished.rglob("*"))
                if p.is_file()
            }
            name = done.parent.name.partition("-")[2]
            record = {"stage": name, "key": key, "threads": self.threads, "files": files}
            serialization.write(unfinished / "record.json", {**record, "seal": seal.seal(_json(record))})
        shutil.rmtree(self.root / "scratch" / key, ignore_errors=True)
        with suppress(OSError):
            (self.root / "scratch").rmdir()

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage's folder is there."""
        return (self._parent(name) / key).is_dir()

    def scratch(self, key: str) -> Path:
        """Where a stage may keep what lets it go on after a kill; gone when the stage is done.

        A follower's is empty and goes with it: what is kept, the first process keeps and broadcasts. What somebody else
        has left there is deleted.
        """
        if not self.leads:
            return self._aside / key
        folder = self.root / "scratch" / key
        if not self.trusted:
            own_scratch(folder)
        return folder

    def forget_from(self, stage: str) -> None:
        """Delete the results of a stage and of every later one ("load" means all)."""
        start = 0 if stage == "load" else STAGES.index(stage)
        for name in STAGES[start:]:
            shutil.rmtree(self._parent(name), ignore_errors=True)
        shutil.rmtree(self.root / "scratch", ignore_errors=True)

    def publish(self, source: Path, name: str) -> Path:
        """Copy a file to the top of the run directory, whole or not at all."""
        final = self.root / name
        with serialization.replace_file(final) as file:
            file.write(source.read_bytes())
        shutil.copymode(source, final)
        return final

    def _parent(self, stage: str) -> Path:
        return self.root / _folder(stage)

    def _verify(self, folder: Path) -> int:
        again = f"delete {folder}; it will be made again"
        try:
            record = dict(serialization.load(folder / "record.json"))
            found, files = record.pop("seal", None), dict(record["files"])
            stage, key, threads = str(record["stage"]), str(record["key"]), record.get("threads")
            there = {
                str(p.relative_to(folder)): p for p in _below(folder) if p.is_file() and p.name[0] != "."
            }
            del there["record.json"]
            wrong = (
                n for n in sorted({*files, *there}) if n not in there or sha256(there[n]) != files.get(n)
            )
            bad = next(wrong, "")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise WorkdirError(f"{folder} is corrupt: {error}", again) from error
        if bad:
            raise WorkdirError(f"{folder / bad} is not what was written there", again)
        if (stage, key) != (folder.parent.name.partition("-")[2], folder.name):
            raise WorkdirError(f"{folder} holds the stage {stage!r} of another run ({key!r})", again)
        if not seal.holds(found, _json(record)):
            if (
                seal.seal("") and not self.trusted
            ):  # without a home there is no seal: what proves is done again
                raise WorkdirError(
                    f"{folder} was not made by this user's edgeprune here, or was changed together with its record: "
                    f"its seal is not of {seal.key_file()}",
                    f"{again} (all of them with --force load); or give --trust-run to keep the choices and the weights "
                    "and prove them again",
                )
            if stage not in LONG:
                shutil.rmtree(folder)
                return self.threads
        return threads if isinstance(threads, int) else 0


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _look_for(folder: Path) -> None:
    until = time.monotonic() + SIGHT_S
    while not (folder / "record.json").is_file():
        if time.monotonic() > until:
            raise WorkdirError(
                f"process {distributed.rank()} of {distributed.size()} does not see {folder}, which process 0 "
                "has written",
                "put the run directory on a file system that all machines share",
            )
        time.sleep(0.2)
