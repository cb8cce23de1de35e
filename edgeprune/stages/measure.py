"""Measure what ships: time, memory, size and accuracy of the files themselves, in child processes on a device.

Only the agent (edgeprune/agent.py) touches the runtime; here its raw samples become readings.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from edgeprune import intervals
from edgeprune.devices import Device
from edgeprune.errors import DeviceError, ModelError, UsageError
from edgeprune.nn.progress import bar
from edgeprune.recipe import MeasureTable
from edgeprune.records import METRICS, Artifact, Reading
from edgeprune.runtimes import NodeTime
from edgeprune.stages.measure_speed import Clues, Ratio, words

RESULT_VERSION = 1
RUNTIME = "onnxruntime"
QUANTILES = (("latency_p50", 0.5), ("latency_p90", 0.9), ("latency_p99", 0.99))
# Above this, the median run waited for other work on the machine.
CONTENDED = 1.05
# Fewer blocks than this give no useful interval of their median, so single runs are paired instead.
LEAST_BLOCKS = 12
MEMORY_RUNS = 3
# glibc's own threshold moves while it runs, which alone makes peaks differ by 10 %; a fixed one repeats within 1 %.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
CHUNK_BYTES = 128 * 2**20
CHUNK_IMAGES = 2500
_START_S = 120.0
_ANSWER_S = 3600.0
_BATCH = 256


class Images(Protocol):
    """Held-out images: `edgeprune.nn.data.Split` is one."""

    @property
    def name(self) -> str:
        """What the part is called."""

    def __len__(self) -> int:
        """How many images there are."""

    def batches(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Tensors x float32 (n, C, H, W) in [0, 1] and y int64 (n,), n <= size, in a fixed order."""


@dataclass(frozen=True)
class Latency:
    """Timings that were taken together, alternately, in one process.

    readings: model -> latency_p50, latency_p90, latency_p99. samples: model -> wall time of each run in s, in order.
    ratios: "wall", and with one thread "cpu": dense over compressed, empty unless both were timed.
    contended: other work ran on the machine, so the wall times are too long and the CPU times are to be believed.
    """

    where: str
    threads: int
    readings: Mapping[str, tuple[Reading, ...]]
    samples: Mapping[str, tuple[float, ...]]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    contended: bool = False


def latency(models: Mapping[str, Path], device: Device, table: MeasureTable) -> Latency:
    """Time models on one image, alternately, so that noise hits all of them.

    Args:
        models: name -> ONNX file; "dense" and "compressed" are compared with each other.

    Raises:
        DeviceError: the process on the device crashed, took too long or answered nonsense.
        MissingDependency: the device has no ONNX Runtime.
        ModelError: ONNX Runtime refuses a file.
    """
    with _on_device(device, models) as paths:
        answer = device.ask(
            {
                "op": "time", "runtime": RUNTIME, "models": paths, "threads": table.threads, "warmup": table.warmup,
                "iterations": table.iterations, "seconds": table.seconds,
            },
            timeout_s=_START_S + 10.0 * table.seconds * len(models),
        )  # fmt: skip
    timed = {name: _samples(answer, name, table.threads, device.name) for name in models}
    where, threads = device.where(), table.threads
    contended = any(_contention(wall, cpu) > CONTENDED for wall, cpu in timed.values() if cpu)
    return Latency(
        where=where,
        threads=threads,
        readings={name: _latency_readings(name, timed[name], answer, where, table) for name in models},
        samples={name: tuple(wall) for name, (wall, _) in timed.items()},
        ratios=_ratios(timed, int(answer.get("block", 1))),
        contended=contended,
    )
