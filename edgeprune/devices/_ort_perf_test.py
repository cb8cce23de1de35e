"""onnxruntime_perf_test, ONNX Runtime's own benchmark program, in the agent's place: for phones without Python.

Latency only. Its flags and its result file are those of ONNX Runtime's sources (onnxruntime/test/perftest), the same
from 1.9 to 1.27: one row a run, "model,seconds,peak bytes,CPU %,number".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, EdgepruneError, UsageError

PROGRAM = "onnxruntime_perf_test"
# The command that stands for it in the agent's place, and what it leaves open.
AGENT = "edgeprune-native-benchmark"
TIMES_ALONE = f"{PROGRAM} tells the times of whole files alone"
# Models take turns in so many rounds, each of them a block of runs: `measure` compares medians of blocks, and wants so
# many. The first runs of each model find out how long one takes.
ROUNDS = 12
_FIRST = 5
_START_S = 60.0
# Of one run; what takes longer was not read right.
_LONGEST_S = 1e5

Run = Callable[[Sequence[str], float], Answer]


def respond(text: str, folder: str, run: Run) -> Answer:
    """Answer a request to the agent with the program that lies in a folder on the device.

    `run` runs a command there, for at most so many seconds. What can't be had this way is null, and says why.
    """
    request = json.loads(text)
    op = request.get("op")
    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "about": lambda: _about(run),
        "time": lambda: _time(request, folder, run),
        "memory": lambda: {"peak": None, "why": _why("memory"), "runtime": PROGRAM},
        "energy": lambda: {"joule": None, "why": _why("energy"), "runtime": PROGRAM},
        "profile": lambda: {"nodes": [], "why": _why("the time of each layer"), "runtime": PROGRAM},
    }
    try:
        if op not in answers:
            raise UsageError(
                f"{PROGRAM} can't do {op!r}: it tells latency alone",
                "answers need Python there",
            )
        return Answer(0, json.dumps(answers[op]()), "")
    except EdgepruneError as error:
        said = {"error": error.message, "kind": type(error).__name__, "hint": error.hint}
        return Answer(error.exit_code, json.dumps(said), "")


def samples(rows: str) -> list[float]:
    """The times in s, in order, from the text of a result file."""
    found = [fields for line in rows.splitlines() if len(fields := line.rsplit(",", 4)) == 5]
    times = [_number(fields[1]) for fields in found]
    good = [t for t in times if t is not None and 1e-9 <= t <= _LONGEST_S]
    if not good or len(good) < len(times):
        raise DeviceError(
            f"{PROGRAM} wrote no times: {rows.strip()[:200]!r}", "is it a build for this phone?"
        )
    return good


def _why(what: str) -> str:
    return f"{PROGRAM} does not tell {what}"


def _about(run: Run) -> dict[str, Any]:
    cores = run(["sh", "-c", "getconf _NPROCESSORS_ONLN || nproc"], _START_S).stdout.strip()
    return {
        "python": "none",
        "runtime": PROGRAM,
        "cores": int(cores) if re.fullmatch(r"\d{1,6}", cores) else 1,
    }


def _time(request: Mapping[str, Any], folder: str, run: Run) -> dict[str, Any]:
    models: Mapping[str, str] = request["models"]
    threads, seconds = int(request["threads"]), float(request["seconds"])
    iterations, warmup = int(request["iterations"]), int(request.get("warmup", 0))
    first = {name: _runs(folder, path, threads, _FIRST, run, _START_S) for name, path in models.items()}
    slowest = {name: max(times) for name, times in first.items()}
    # One number of runs for all models, or blocks of one round would not stand side by side in their lists.
    share = seconds * len(models) / sum(slowest.values())
    block = min(math.ceil(iterations / ROUNDS), max(2, int(share / ROUNDS)))
    # A process of its own each time: its first runs are no more counted than ours.
    unsettled = min(math.ceil(warmup / ROUNDS), block)
    wall: dict[str, list[int]] = {name: [] for name in models}
    order = list(models)
    for _ in range(ROUNDS):
        for name in order:
            limit = _START_S + 10.0 * slowest[name] * (block + unsettled)
            times = _runs(folder, models[name], threads, block + unsettled, run, limit)
            wall[name] += [round(t * 1e9) for t in times[unsettled:]]
        order.reverse()
    # The program does not tell how many images one run is: whoever asks has the file.
    return {
        "models": {name: {"wall_ns": times, "cpu_ns": []} for name, times in wall.items()},
        "stopped": "iterations" if block * ROUNDS >= iterations else "seconds", "warmup": warmup,
        "runtime": PROGRAM, "clock": "wall", "block": block, "priority": "normal", "load": None,
    }  # fmt: skip


def _runs(folder: str, model: str, threads: int, count: int, run: Run, timeout_s: float) -> list[float]:
    result = f"{folder}/result.csv"
    run(["rm", "-f", result], _START_S)
    # -I: random images; -m times -r: so many runs; -x: threads; -o 99: all optimizations; -S: the same images.
    argv = [
        f"{folder}/{PROGRAM}",
        "-I",
        "-m",
        "times",
        "-r",
        str(count),
        "-x",
        str(threads),
        "-o",
        "99",
        "-S",
        "1",
    ]
    done = run(["env", f"LD_LIBRARY_PATH={folder}", *argv, model, result], timeout_s)
    if done.status != 0:
        last = " | ".join((done.stderr + done.stdout).strip().splitlines()[-3:])
        raise DeviceError(f"{PROGRAM} ended with status {done.status}: {last or 'it said nothing'}")
    times = samples(run(["cat", result], _START_S).stdout)
    if len(times) != count:
        raise DeviceError(f"{PROGRAM} wrote {len(times)} times of {count} runs")
    return times


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*", text, re.ASCII | re.IGNORECASE)
    return float(found.group(1)) if found else None
