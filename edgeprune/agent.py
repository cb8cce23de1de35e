"""The program that runs on the device: one JSON request on stdin, one JSON object on stdout, nothing else there.

Requests have "op" and "runtime"; times come back in ns, sizes in bytes. What goes wrong comes back as
{"error", "kind", "hint"} with the exit status of that kind of error. Python 3.8; no package but the runtime's own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from edgeprune.errors import DeviceError, EdgepruneError, UsageError
from edgeprune.runtimes import FREE_BATCH, Runtime, Session

# Models take turns in blocks, not run by run: a turn after each run left the caches cold (MobileNetV2 at half width
# 3.1 ms instead of 2.57 ms). The first run of each block only warms them up again and is not counted.
BLOCK = 5
LEAST = 10
_MEMORY_RUNS = 3
_PRIORITY = 10

_Turn = Tuple[str, Callable[[], Any]]


def main() -> int:
    """Answer the request on stdin; gives the exit status."""
    # Libraries print where they like; descriptor 1 goes to stderr, and only the answer to the real stdout.
    sys.stdout.flush()
    answer_to = os.dup(1)
    os.dup2(2, 1)
    status = 0
    answer: Dict[str, Any] = {}
    try:
        answer = handle(_request(sys.stdin.read()))
    except EdgepruneError as error:
        status = error.exit_code
        answer = {"error": error.message, "kind": type(error).__name__, "hint": error.hint}
    with os.fdopen(answer_to, "w", encoding="utf-8") as out:
        out.write(json.dumps(answer) + "\n")
    return status


def handle(request: Mapping[str, Any]) -> Dict[str, Any]:
    """Do what one request asks, and give the answer.

    about: python, runtime, cores.
    time: models {name: path}, threads, warmup, iterations, seconds (for each model), shape -> models {name:
        {wall_ns, cpu_ns, batch}}, warmup (done), block, load, priority. cpu_ns is empty with more than one thread.
    memory: model, threads, shape -> peak and at_load, both added to baseline; peak null, with why, if it can't be had.
    predict: model, x (.npy of images), out (.npy of logits, to be written), workers -> images, classes.
    profile: model, threads, iterations, shape -> nodes [{name, op, seconds, macs, bytes}].

    Raises:
        UsageError: no such operation or runtime, or a field is missing or wrong.
        MissingDependency: the runtime is not installed here.
        ModelError: the runtime refuses the model.
    """
    operations: Dict[str, Callable[[Mapping[str, Any], Runtime], Dict[str, Any]]] = {
        "about": _about, "time": _time, "memory": _memory, "predict": _predict, "profile": _profile,
    }  # fmt: skip
    op = request.get("op")
    if op not in operations:
        raise UsageError(f"the agent has no operation {op!r}; accepted: {', '.join(operations)}")
    return operations[str(op)](request, _runtime(request.get("runtime")))


def _request(text: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"the request must be an object, got {type(data).__name__}")
    return data


def _runtime(name: Any) -> Runtime:
    # Not plugins.build: that lists a folder, and on a device this package lies in a zip file.
    if not isinstance(name, str) or not re.match(r"^[a-z][a-z0-9_]*$", name):
        raise UsageError(f"runtime must be a name, got {name!r}")
    module_name = f"edgeprune.runtimes.{name}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"no runtime is named {name!r}: {error}") from error
    found = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module_name]
    return next(c for c in found if issubclass(c, Runtime))()


def _about(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    python = ".".join(str(v) for v in sys.version_info[:3])
    return {"python": python, "runtime": runtime.version(), "cores": _cores()}


def _time(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    threads, warmup = _count(request, "threads"), _count(request, "warmup", 0)
    iterations, seconds = max(LEAST, _count(request, "iterations")), _positive(request, "seconds")
    paths = request.get("models")
    if not isinstance(paths, dict) or not paths:
        raise UsageError(f"models must map a name to a path, got {paths!r}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with _first_in_line(threads) as priority:
        # Opened in here, because the threads of a session inherit the priority.
        sessions = {name: runtime.open(Path(path), threads) for name, path in paths.items()}
        turns = [(name, _runner(session, request)) for name, session in sessions.items()]
        warmup = _warm_up(turns, warmup, seconds * len(turns) / 4)
        samples = _take_turns(turns, iterations, seconds * len(turns))
    models = {
        name: {
            "wall_ns": wall,
            # Only with one thread is all the work on the thread whose clock is read.
            "cpu_ns": cpu if threads == 1 else [],
            "batch": sessions[name].input_shape[0] or 1,
        }
        for name, (wall, cpu) in samples.items()
    }
    about = {
        "warmup": warmup,
        "block": BLOCK,
        "runtime": runtime.version(),
        "load": load,
        "priority": priority,
    }
    return {"models": models, **about}


@contextmanager
def _first_in_line(threads: int) -> Iterator[str]:
    """Run before all normal programs where that is allowed; gives "real-time" or "normal".

    Other work on the machine then no longer interrupts a run. Not where it would leave no core to that work.
    """
    if not hasattr(os, "sched_setscheduler") or _cores() <= threads:
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


def _take_turns(
    turns: List[_Turn], iterations: int, seconds: float
) -> Dict[str, Tuple[List[int], List[int]]]:
    """Wall and CPU times of each model in ns, until there are enough or the time is up."""
    samples: Dict[str, Tuple[List[int], List[int]]] = {name: ([], []) for name, _ in turns}
    order, done, stop_at = list(turns), 0, time.perf_counter() + seconds
    while done < iterations and (done < LEAST or time.perf_counter() < stop_at):
        block = min(BLOCK, iterations - done)
        for name, run in order:
            run()
            for _ in range(block):
                wall, cpu = _one(run)
                samples[name][0].append(wall)
                samples[name][1].append(cpu)
        done += block
        order.reverse()  # A B, B A, A B: a slow drift hits both alike
    return samples


def _runner(session: Session, request: Mapping[str, Any]) -> Callable[[], Any]:
    x = session.image(_shape(request))
    session(x)  # checks the shape of the answer, once
    return lambda: session.infer(x)


def _warm_up(turns: List[_Turn], runs: int, seconds: float) -> int:
    stop_at = time.perf_counter() + seconds
    for done in range(runs):
        if time.perf_counter() >= stop_at:
            return done
        for _, run in turns:
            run()
    return runs


def _one(run: Callable[[], Any]) -> Tuple[int, int]:
    """Wall and thread CPU time of one run, in ns; the CPU clock costs more to read, so it stands outside."""
    cpu = time.thread_time_ns()
    wall = time.perf_counter_ns()
    run()
    wall = time.perf_counter_ns() - wall
    return wall, time.thread_time_ns() - cpu


def _memory(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    version = runtime.version()
    before = _status("VmRSS")
    if before is None:
        return {"peak": None, "why": "this system has no /proc/self/status", "runtime": version}
    # VmHWM starts again from here; where that is not allowed, the check below notices if it matters.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    old_peak = _status("VmHWM") or 0
    session = runtime.open(Path(_text(request, "model")), _count(request, "threads"))
    loaded = _status("VmHWM") or 0
    run = _runner(session, request)
    for _ in range(_MEMORY_RUNS):
        run()
    peak = _status("VmHWM") or 0
    if peak <= old_peak and old_peak > before:
        why = "the import of the runtime took more memory than the model, and /proc/self/clear_refs can't be written"
        return {"peak": None, "why": why, "runtime": version}
    return {"peak": peak - before, "at_load": max(0, loaded - before), "baseline": before, "runtime": version}


def _status(key: str) -> Optional[int]:
    """A line of /proc/self/status in bytes, or None where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _predict(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    import numpy as np

    session = runtime.open(Path(_text(request, "model")), 1)
    try:
        x = np.load(_text(request, "x"), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"x is not a readable .npy file: {error}") from error
    # One thread a run and several runs at once: for single images that beats many threads in one run.
    workers = _count(request, "workers", 0) or _cores()
    step = max(FREE_BATCH, -(-len(x) // (4 * workers)))
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda i: session(x[i : i + step]), range(0, max(1, len(x)), step)))
    logits = np.concatenate(parts)
    try:
        np.save(_text(request, "out"), logits)
    except OSError as error:
        raise DeviceError(f"the answers can't be written: {error}") from error
    return {"images": len(logits), "classes": logits.shape[1]}


def _profile(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    runs, threads = _count(request, "iterations"), _count(request, "threads")
    with _first_in_line(threads):
        nodes = runtime.profile(Path(_text(request, "model")), threads, runs, _shape(request))
    rows = [
        {"name": n.name, "op": n.op, "seconds": n.seconds, "macs": n.macs, "bytes": n.bytes} for n in nodes
    ]
    return {"nodes": rows, "runtime": runtime.version()}


def _cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(request: Mapping[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{key} must be a path, got {value!r}")
    return value


def _count(request: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = request.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{key} must be a whole number >= {least}, got {value!r}")
    return value


def _positive(request: Mapping[str, Any], key: str) -> float:
    value = request.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{key} must be a number > 0, got {value!r}")
    return float(value)


def _shape(request: Mapping[str, Any]) -> Optional[Tuple[int, int, int]]:
    value = request.get("shape")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
        raise UsageError(f"shape must be [C, H, W], got {value!r}")
    return value[0], value[1], value[2]


if __name__ == "__main__":
    sys.exit(main())
