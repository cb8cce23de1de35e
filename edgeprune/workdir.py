"""The run directory: one folder per finished stage, named by a hash of everything that went into it.

A stage writes into `tmp-KEY`, which is renamed to `KEY` when it is whole: a folder that exists is complete. Killing
a run loses the stage that was running and nothing else; deleting folders is always safe.

Of several processes (`nn.team`) the first holds the directory and alone writes to it. The others go through the same
stages: they take part in those that are done together, and read what the first one has left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeprune import codec
from edgeprune.codec import scratch_folder, to_json
from edgeprune.errors import WorkdirError
from edgeprune.nn import team

STAGES = ("dense", "synthesize", "prune", "cut", "repair", "tune", "export", "quantize", "measure", "attack")
LOCKFILE = "edgeprune.lock"
# A shared file system may show a new folder to other machines this much later.
SIGHT_S = 60.0


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


class Workdir:
    """A run directory that this process holds, or follows where another process of its team holds it.

    Use it with `with`. leads: whether this process is the one that writes.
    """

    def __init__(self, root: Path) -> None:
        """Only remembers the folder; `with` creates and locks it."""
        self.root = root
        self.leads = team.rank() == 0
        self._held: Any = None
        self._aside = root
        self._follows = ExitStack()

    def __enter__(self) -> Workdir:
        """Create the folder and lock it for this process.

        Raises:
            WorkdirError: another process holds it, or it can't be created.
        """
        if not self.leads:
            self._aside = self._follows.enter_context(scratch_folder())
            return self
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
        for left_over in self.root.glob("*/tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        codec.sweep(self.root, f"**/{codec.LEFT_FILES}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the folder."""
        if self.leads:
            self._held.close()
        else:
            self._follows.close()

    def agree(self, keys: Mapping[str, str]) -> dict[str, str]:
        """The keys of the stages, when every process of the team came to the same.

        Raises:
            WorkdirError: this process has other inputs than the first one.
        """
        led = team.tell(dict(keys))
        other = [name for name in {**led, **keys} if led.get(name) != keys.get(name)]
        if other:
            raise WorkdirError(
                f"process {team.rank()} of {team.size()} would do another {other[0]} than process 0",
                "give all processes the same model, data, recipe and version of edgeprune",
            )
        return led

    def claim(self, identity: dict[str, Any], facts: dict[str, Any], *, again: bool) -> None:
        """Say whose run this is, and write `edgeprune.lock`; `again` gives the folder to another model.

        Raises:
            WorkdirError: the folder holds the run of another model, or its lock file is not readable.
        """
        path = self.root / LOCKFILE
        if path.exists() and not again:
            try:
                held = dict(json.loads(path.read_text(encoding="utf-8"))["model"])
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
        codec.write(path, {"model": identity, **facts})

    def key(self, stage: str, version: int, *inputs: Any) -> str:
        """The name of a stage's folder: a hash of its name, its version and everything that goes into it."""
        text = json.dumps([stage, version, *map(to_json, inputs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def stage(self, name: str, key: str, work: Callable[[Path], None], *, together: bool = False) -> Path:
        """The finished folder of a stage; does the work only if it is not there yet.

        Args:
            name: one of STAGES. key: of `key`. work: writes the stage's files into the folder it is given.
            together: every process of the team does the work; the folders of all but the first are thrown away.

        Raises:
            WorkdirError: the folder is there but a file in it is not what was written; or a process of the team
                does not see it.
        """
        done = self._parent(name) / key
        there = self.leads and done.is_dir()
        if there:
            self._verify(done)
        if not team.tell(there):
            self._do(done, work, together)
        if not self.leads:
            _look_for(done)
        return done

    def alone(self, name: str, key: str, work: Callable[[Path], None]) -> Path:
        """As `stage`, but by process 0 alone and without a word to the others, so that any thread may call it.

        Raises:
            WorkdirError: the folder is there but a file in it is not what was written.
        """
        done = self._parent(name) / key
        if done.is_dir():
            self._verify(done)
        else:
            self._make(done, work)
        return done

    def _do(self, done: Path, work: Callable[[Path], None], together: bool) -> None:
        if self.leads:
            self._make(done, work)
        elif together:
            with scratch_folder() as folder:
                work(folder)
        team.wait()

    def _make(self, done: Path, work: Callable[[Path], None]) -> None:
        key = done.name
        with codec.replace_folder(done) as unfinished:
            work(unfinished)
            files = {
                str(p.relative_to(unfinished)): digest(p)
                for p in sorted(unfinished.rglob("*"))
                if p.is_file()
            }
            name = done.parent.name.partition("-")[2]
            codec.write(unfinished / "record.json", {"stage": name, "key": key, "files": files})
        shutil.rmtree(self.scratch(key), ignore_errors=True)

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage's folder is there."""
        return (self._parent(name) / key).is_dir()

    def scratch(self, key: str) -> Path:
        """Where a stage may keep what lets it go on after a kill; gone when the stage is done.

        A follower's is empty and goes with it: what is kept, the first process keeps, and tells.
        """
        return self.root / "scratch" / key if self.leads else self._aside / key

    def forget_from(self, stage: str) -> None:
        """Delete the results of a stage and of every later one ("load" means all)."""
        start = 0 if stage == "load" else STAGES.index(stage)
        for name in STAGES[start:]:
            shutil.rmtree(self._parent(name), ignore_errors=True)
        shutil.rmtree(self.root / "scratch", ignore_errors=True)

    def publish(self, source: Path, name: str) -> Path:
        """Copy a file to the top of the run directory, whole or not at all."""
        final = self.root / name
        with codec.replace_file(final) as file:
            file.write(source.read_bytes())
        shutil.copymode(source, final)
        return final

    def _parent(self, stage: str) -> Path:
        return self.root / f"{STAGES.index(stage)}-{stage}"

    def _verify(self, folder: Path) -> None:
        try:
            files = dict(json.loads((folder / "record.json").read_text(encoding="utf-8"))["files"])
            bad = next((name for name, sha in files.items() if digest(folder / name) != sha), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkdirError(
                f"{folder} is corrupt: {error}", f"delete {folder}; it will be made again"
            ) from error
        if bad:
            raise WorkdirError(
                f"{folder / bad} is not what was written there", f"delete {folder}; it will be made again"
            )


def _look_for(folder: Path) -> None:
    """Wait until a folder that another process has made is to be seen here."""
    until = time.monotonic() + SIGHT_S
    while not (folder / "record.json").is_file():
        if time.monotonic() > until:
            raise WorkdirError(
                f"process {team.rank()} of {team.size()} does not see {folder}, which process 0 has written",
                "put the run directory on a file system that all machines share",
            )
        time.sleep(0.2)
