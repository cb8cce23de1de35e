"""Timing on the device: models take turns until their medians are known well enough, or a cap is reached."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from edgeprune import confidence, host
from edgeprune.agent import protocol
from edgeprune.runtimes import Runtime, Session

# Models take turns in blocks, not run by run: a turn after each run left the caches cold (MobileNetV2 at half width
# 3.1 ms instead of 2.57 ms). The first run of each block only warms them up again and is not counted.
BLOCK = 5
LEAST = 10
# A network so slow that a quarter of its time is gone needs no more runs than its median does.
PATIENCE = 0.25
_PRIORITY = 10


@dataclass(frozen=True)
class Rule:
    """When timing ends.

    iterations, seconds: the caps, of each model; LEAST runs are made even so.
    precision: how far, as a share of the median, either end of its 95 % interval may be from it; None for never mind.
    least: so many runs before the precision counts, or a quarter of the time.
    apart: a model that is precise leaves the turns; otherwise all go on until all are.
    """

    iterations: int
    seconds: float
    precision: float | None = None
    least: int = LEAST
    apart: bool = False


@dataclass(frozen=True)
class Samples:
    """Times of one model in ns, in order: by the wall clock or the runtime's own, and by the thread's CPU clock."""

    wall: list[int]
    cpu: list[int]


def answer(request: Mapping[str, Any], runtime: Runtime) -> dict[str, Any]:
    """What the operation "time" answers; `agent.handle` says what it asks and gets."""
    threads, warmup = protocol.count(request, "threads"), protocol.count(request, "warmup", 0)
    rule = Rule(
        iterations=max(LEAST, protocol.count(request, "iterations")), seconds=protocol.positive(request, "seconds"),
        precision=protocol.optional(request, "precision"), least=protocol.count(request, "least", LEAST),
        apart=request.get("apart") is True,
    )  # fmt: skip
    paths, shape = protocol.models(request), protocol.shape(request)
    before = host.state(gpu=runtime.on_gpu)
    with first_in_line(threads) as priority:
        # Opened in here, because the threads of a session inherit the priority.
        sessions = {name: runtime.open(Path(path), threads) for name, path in paths.items()}
        turns = {name: ready(session, shape) for name, session in sessions.items()}
        warmed = _warm_up(list(turns.values()), warmup, rule.seconds * len(turns) / 4)
        samples, stopped = take_turns(turns, rule)
    # The clock of a GPU knows nothing of the CPU; and only with one thread is all the work on the thread whose clock
    # is read.
    mine = threads == 1 and not runtime.on_gpu
    models = {
        name: {
            "wall_ns": found.wall, "cpu_ns": found.cpu if mine else [], "batch": sessions[name].input_shape[0] or 1,
            "precision": precision(found.wall),
        }
        for name, found in samples.items()
    }  # fmt: skip
    return {
        "models": models, "stopped": stopped, "warmup": warmed, "block": BLOCK, "runtime": runtime.version(),
        "clock": runtime.clock, "load": before.get("load"), "priority": priority,
        "powered": host.available(), "before": before, "after": host.state(gpu=runtime.on_gpu),
    }  # fmt: skip


def precision(samples: Sequence[int]) -> float | None:
    """How far the 95 % interval of the median reaches to its farther side, as a share of it; None for too few."""
    ordered = sorted(samples)
    found = confidence.quantile_interval(ordered, 0.5)
    if found is None:
        return None
    median = confidence.quantile(ordered, 0.5)
    return max(found[1] - median, median - found[0]) / median if median > 0 else None


def take_turns(
    turns: Mapping[str, Callable[[], int | None]], rule: Rule, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, Samples], str]:
    """Time every model by the rule.

    Args:
        turns: model -> one run; it gives its own time in ns, or None to be timed from outside.
    """
    samples = {name: Samples([], []) for name in turns}
    order, done, look_at, start = list(turns), 0, 0, clock()
    span = rule.seconds * len(turns)
    while True:
        block = min(BLOCK, rule.iterations - done)
        for name in order:
            _block(turns[name], samples[name], block)
        done += block
        order.reverse()  # A B, B A, A B: a slow drift hits both alike
        spent = clock() - start
        due = done >= rule.least or spent >= PATIENCE * span
        if rule.precision is not None and due and done >= look_at:
            # Looking takes longer than many a run, so it is done after every tenth more of them.
            look_at = done + done // 10
            wide = [name for name in order if not _precise(samples[name], rule.precision)]
            if not wide:
                return samples, "precise"
            order = wide if rule.apart else order
        if done >= rule.iterations:
            return samples, "iterations"
        if done >= LEAST and spent >= span:
            return samples, "seconds"


def _precise(samples: Samples, wanted: float) -> bool:
    found = precision(samples.wall)
    return found is not None and found <= wanted


def _block(run: Callable[[], int | None], samples: Samples, runs: int) -> None:
    run()
    for _ in range(runs):
        wall, cpu = _one(run)
        samples.wall.append(wall)
        samples.cpu.append(cpu)


def ready(session: Session, shape: tuple[int, int, int] | None) -> Callable[[], int | None]:
    """One run of a session on one batch, after a first one; what it answers may have any shape."""
    x = session.image(shape)
    session.infer(x)
    return session.ready(x)


def _warm_up(turns: Sequence[Callable[[], Any]], runs: int, seconds: float) -> int:
    stop_at = time.perf_counter() + seconds
    for done in range(runs):
        if time.perf_counter() >= stop_at:
            return done
        for run in turns:
            run()
    return runs


def _one(run: Callable[[], int | None]) -> tuple[int, int]:
    cpu = time.thread_time_ns()
    wall = time.perf_counter_ns()
    own = run()
    wall = time.perf_counter_ns() - wall
    return wall if own is None else own, time.thread_time_ns() - cpu


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def first_in_line(threads: int) -> Iterator[str]:
    """Run before all normal programs where that is allowed; gives "real-time" or "normal".

    Other work on the machine then no longer interrupts a run. Not where it would leave no core to that work.
    """
    if not hasattr(os, "sched_setscheduler") or cores() <= threads:
        yield "normal"
        return
    before, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except OSError:
        yield "normal"
        return
    try:
        yield "real-time"
    finally:
        os.sched_setscheduler(0, before, param)
