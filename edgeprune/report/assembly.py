"""Put a run's records together into its report."""

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from edgeprune.errors import line
from edgeprune.records import REPORT_SCHEMA, Plan, Reading, Report
from edgeprune.version import __version__

# What the note on zeros begins with; the summary moves it up.
SPARSE_NOTE = "Zeros:"
PACKAGES = (
    "torch",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxslim",
    "timm",
    "torchvision",
    "numpy",
)


def versions() -> dict[str, str]:
    """The versions of everything that the result owes something to; what is not installed is absent."""
    found = {"edgeprune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(device_facts: Mapping[str, Any], target_title: str) -> dict[str, Any]:
    """What the run ran on."""
    host = {"system": platform.system(), "python": sys.version.split()[0]}
    return {"target": target_title, "versions": versions(), "host": host, "device": machine(device_facts)}


def machine(device_facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps of the facts of a device."""
    keep = ("machine", "system", "release", "board", "cpu", "cores", "memory_bytes", "governor", "power_mode")
    return {k: device_facts[k] for k in keep if k in device_facts}


def layers(
    before: Sequence[Any],
    after: Sequence[Any],
    times: Mapping[str, Mapping[str, float]],
    why_kept: Mapping[str, str],
    *,
    nonzero: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[dict[str, Any], ...]:
    """One row for every layer."""
    small = {row.name: row for row in after}
    rows = []
    for row in before:
        now = small.get(row.name)
        left = {side: counts.get(row.name) for side, counts in (nonzero or {}).items()}
        rows.append(
            {
                "layer": row.name, "op": row.op,
                "channels_before": row.channels, "channels_after": now.channels if now else None,
                "params_before": row.params, "params_after": now.params if now else None,
                **({"nonzero_before": left.get("dense"), "nonzero_after": left.get("compressed")} if left else {}),
                "macs_before": row.macs, "macs_after": now.macs if now else None,
                "size_before": 4 * row.params, "size_after": 4 * now.params if now else None,
                "time_before_s": times.get("dense", {}).get(row.name),
                "time_after_s": times.get("compressed", {}).get(row.name),
                "why_kept": why_kept.get(row.name, ""),
            }
        )  # fmt: skip
    return tuple(rows)


def sparse_notes(granularity: str, after: Sequence[Reading]) -> list[str]:
    """What zeros inside a weight are good for, and what not; the report opens with it."""
    if granularity == "channel":
        return []
    which = (
        "single weights" if granularity == "weight" else "two of every four weights where a layer allows it"
    )
    plain = (
        f"{SPARSE_NOTE} {which} were set to zero. The file is smaller for it once it is compressed (deflate), and "
        "the model is not faster on a CPU, whose kernels are dense and multiply by zeros too."
    )
    if granularity != "2:4":
        return [plain]
    runtimes = [str(r.conditions.get("runtime") or "") for r in after if r.metric.startswith("latency")]
    timed = any("tensorrt" in runtime.lower() for runtime in runtimes)
    return [
        f"{plain} TensorRT's sparse kernels can use this pattern{'.' if timed else '; nothing was timed there.'}"
    ]


def build_sections(
    parts: Mapping[str, Any], *, ledger: Sequence[Reading], notes: Sequence[str], plan: Plan
) -> Report:
    """The report of a run."""
    return Report(
        schema=REPORT_SCHEMA, recipe=parts["recipe"], environment=parts["environment"], before=tuple(parts["before"]),
        after=tuple(parts["after"]), ledger=tuple(ledger), layers=tuple(parts["layers"]), samples=parts["samples"],
        notes=tuple(dict.fromkeys(map(line, notes))), left_out=dict(plan.left_out), history=parts.get("history", {}),
    )  # fmt: skip
