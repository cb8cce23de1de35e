"""The program that runs on the device: one JSON request on stdin, one JSON object on stdout, nothing else there.

Requests have "op" and "runtime"; times come back in ns, sizes in bytes. What goes wrong comes back as
{"error", "kind", "hint"} with the exit status of that kind of error. Only "serve" stays open: behind its request, which
is one line, come messages with images (`agent.serve`). Python 3.8; no package but the runtime's own.
What it measures is in agent_time, agent_memory and agent_energy; docs/measurement.md has every field.
"""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Callable, Dict, Mapping

from edgeprune import host, runtimes, serialization
from edgeprune.agent import protocol, resources, serve, timing
from edgeprune.errors import EdgepruneError, UsageError, translated_os_errors
from edgeprune.runtimes import FREE_BATCH, Runtime


def main() -> int:
    """Answer the request on stdin; gives the exit status."""
    # Libraries print where they like; descriptor 1 goes to stderr, and only the answer to the real stdout.
    sys.stdout.flush()
    answer_to = os.dup(1)
    os.dup2(2, 1)
    status = 0
    try:
        request = _request(sys.stdin)
        if request.get("op") == "serve":
            runtime = runtime_of(request.get("runtime"), request.get("options", {}))
            serve.serve(request, runtime, sys.stdin.fileno(), answer_to)
            return 0
        with translated_os_errors():
            answer = handle(request)
    except EdgepruneError as error:
        status = error.exit_code
        answer = {"error": error.message, "kind": type(error).__name__, "hint": error.hint}
    with os.fdopen(answer_to, "w", encoding="utf-8") as out:
        out.write(json.dumps(answer) + "\n")
    return status


def handle(request: Mapping[str, Any]) -> Dict[str, Any]:
    """Do what one request asks, and give the answer. Every request may have "options" of its runtime.

    about: python, runtime, cores, state (clocks, governor, power mode, temperature).
    build: model, out, precision -> built, facts (what is known of the engine; empty for a runtime that builds none).
    time: models {name: path}, threads, warmup, iterations, seconds (caps, for each model), shape; and to stop
        earlier precision (of the median, as a share), least (runs before that counts), apart (each by itself)
        -> models {name: {wall_ns, cpu_ns, batch, precision}}, stopped, warmup (done), block, clock, load, priority,
        powered (its power can be measured), before and after (state). cpu_ns is empty on a GPU and with more than
        one thread.
    memory: model, threads, shape -> peak and at_load, both added to baseline, pss_added, private_dirty_added, and
        with a GPU host, gpu, shared; peak null, with why, if it can't be had.
    energy: model, threads, seconds, idle_seconds, shape -> joule of one image, spread, watts, idle_watts, images,
        seconds, samples, source, rails; joule null, with why, if it can't be had.
    predict: model, x (.npy of images), out (.npy of logits, to be written), workers -> images, classes.
    profile: model, threads, iterations, shape -> nodes [{name, op, seconds, macs, bytes}].
    serve (of `main` alone): model, workers -> messages of `agent.protocol` until stdin ends: READY {runtime, input,
        workers}, and for each message of images one of LOGITS.
    """
    operations: Dict[str, Callable[[Mapping[str, Any], Runtime], Dict[str, Any]]] = {
        "about": _about, "build": _build, "time": timing.answer, "memory": resources.memory_reply,
        "energy": resources.energy_reply, "predict": _predict, "profile": _profile,
    }  # fmt: skip
    op = request.get("op")
    if op not in operations:
        raise UsageError(f"the agent has no operation {op!r}; accepted: {', '.join(operations)}")
    return operations[str(op)](request, runtime_of(request.get("runtime"), request.get("options", {})))


def _request(stream: IO[str]) -> Mapping[str, Any]:
    """The request: the first line where it is one, or else all there is."""
    text = stream.readline()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = _parsed(text + stream.read())
    if not isinstance(data, dict):
        raise UsageError(f"the request must be an object, got {type(data).__name__}")
    return data


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON: {error}") from error


def runtime_of(name: Any, options: Any) -> Runtime:
    """The runtime of a request, by name, with its options."""
    # Not plugins.build: that lists a folder, and on a device this package lies in a zip file.
    if not isinstance(name, str) or not re.match(r"^[a-z][a-z0-9_]*$", name):
        raise UsageError(f"runtime must be a name, got {name!r}")
    if not isinstance(options, dict):
        raise UsageError(f"options must be an object, got {options!r}")
    module_name = f"edgeprune.runtimes.{name}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"no runtime is named {name!r}: {error}") from error
    found = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module_name]
    member = next(c for c in found if issubclass(c, Runtime))
    try:
        return member(**options)
    except TypeError as error:
        raise UsageError(f"{name}: {error}") from error


def _about(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    python = ".".join(str(v) for v in sys.version_info[:3])
    return {
        "python": python, "runtime": runtime.version(), "cores": timing.cores(),
        "state": host.state(gpu=runtime.on_gpu),
    }  # fmt: skip


def _build(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    onnx, out = Path(protocol.text(request, "model")), Path(protocol.text(request, "out"))
    built = runtime.build(onnx, out, protocol.text(request, "precision"))
    known = runtimes.beside(built)
    facts = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    return {"built": str(built), "facts": facts, "runtime": runtime.version()}


def _predict(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    import numpy as np

    session = runtime.open(Path(protocol.text(request, "model")), 1)
    try:
        x = np.load(protocol.text(request, "x"), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"x is not a readable .npy file: {error}") from error
    # One thread a run and several runs at once: for single images that beats many threads in one run.
    # A GPU has one queue, and its session one set of buffers.
    workers = 1 if runtime.on_gpu else protocol.count(request, "workers", 0) or timing.cores()
    step = max(FREE_BATCH, -(-len(x) // (4 * workers)))
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda i: session(x[i : i + step]), range(0, max(1, len(x)), step)))
    logits = np.concatenate(parts)
    with serialization.replace_file(Path(protocol.text(request, "out"))) as file:
        np.save(file, logits)
    return {"images": len(logits), "classes": logits.shape[1]}


def _profile(request: Mapping[str, Any], runtime: Runtime) -> Dict[str, Any]:
    runs, threads = protocol.count(request, "iterations"), protocol.count(request, "threads")
    with timing.first_in_line(threads):
        nodes = runtime.profile(Path(protocol.text(request, "model")), threads, runs, protocol.shape(request))
    rows = [
        {"name": n.name, "op": n.op, "seconds": n.seconds, "macs": n.macs, "bytes": n.bytes} for n in nodes
    ]
    return {"nodes": rows, "runtime": runtime.version()}
