"""What a device has, and what stands in the way of measuring on it, with the command that helps."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.devices import Device
from edgeprune.errors import DeviceError, EdgepruneError
from edgeprune.quantities import show
from edgeprune.records import Target

# Above this many waiting programs for each core, timings are noisy.
BUSY = 0.5
# Less free space than this, and models or their outputs on held-out images may not fit.
LITTLE_DISK = 10**9
# Below this share of its highest clock a core is saving power.
SLOW_CLOCK = 0.9
_DEVICE_S = 120.0
# What sets the clock of the cores for as long as one measures. Android has no sudo, and lets only root do it.
_STEADY = "sudo cpupower frequency-set -g performance  # for steady timings"
_STEADY_JETSON = "sudo jetson_clocks  # for steady timings"
_STEADY_ANDROID = (
    "Android sets the clock and only root may hold it, so mind how far the times spread; on a rooted phone: "
    "adb shell su -c 'for f in /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor; do echo performance >$f; done'"
)
_TRTEXEC = """
for path in "$(command -v trtexec)" /usr/src/tensorrt/bin/trtexec; do
    [ -x "$path" ] && echo "$path" && exit 0
done
exit 1
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    status: "ok", "warning" (works, but mind this), "missing" (needed), "optional" (missing, needed for some things
    only). found: what is there. fix: what to do, a line to run where there is one; "" when nothing is to be done.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def look(device: Device, target: Target | None) -> list[Finding]:
    """What the device says about itself, its runtimes, and whether it suits the target."""
    try:
        facts = device.facts()
    except EdgepruneError as error:
        return [
            Finding(f"device {device.name}", "missing", error.message, error.hint),
            *_target(target, device, {}),
        ]
    jetson = "l4t" in facts or "power_mode" in facts or "Jetson" in str(facts.get("board", ""))
    # Of this very Python the rows above have it already.
    own = device.name == "local" and device.agent()[0] == sys.executable
    tensorrt = jetson or (target is not None and target.runtime == "tensorrt" and not own)
    rows = [_runtime(device, "onnxruntime", needed=target is None or target.runtime == "onnxruntime")]
    if tensorrt:
        rows += [_runtime(device, "tensorrt", needed=target is not None and target.runtime == "tensorrt")]
        rows += [_trtexec(device)]
    return [
        *rows,
        *_machine(device.name, facts),
        *_clocks(device.name, facts),
        *_use(device),
        *_target(target, device, facts),
    ]


def _runtime(device: Device, runtime: str, *, needed: bool) -> Finding:
    name = f"device {device.name}" if runtime == "onnxruntime" else f"{device.name} {runtime}"
    try:
        about = device.ask({"op": "about", "runtime": runtime}, timeout_s=_DEVICE_S)
    except EdgepruneError as error:
        return Finding(name, "missing" if needed else "optional", error.message, error.hint)
    found = f"Python {about.get('python')}, {about.get('runtime')}, {about.get('cores')} cores to use"
    return Finding(name, "ok", found)


def _trtexec(device: Device) -> Finding:
    name = f"{device.name} trtexec"
    try:
        return Finding(name, "ok", device.check(["sh", "-c", _TRTEXEC]).strip())
    except DeviceError:
        found = "not in PATH or /usr/src/tensorrt/bin; build_engine.sh needs it"
        return Finding(name, "optional", found, "sudo apt install libnvinfer-bin")


def _machine(name: str, facts: Mapping[str, Any]) -> list[Finding]:
    cores = int(facts.get("cores", 1))
    keys = ("board", "cpu", "machine", "system", "l4t")
    board = ", ".join(str(facts[key]) for key in keys if key in facts)
    rows = [Finding(f"{name} cpu", "ok", f"{board}, {cores} cores")]
    if facts.get("emulated"):
        found = "a program plays the processor: times follow its instructions, and are no machine's"
        rows.append(Finding(f"{name} emulated", "warning", found, "measure on the machine itself"))
    if facts.get("flags"):
        found = ", ".join(_vectors(facts["flags"])) or "none that speed this up"
        rows.append(Finding(f"{name} vectors", "ok", found))
    if "memory_bytes" in facts:
        free = f", {show(facts['memory_free_bytes'], 'B')} free" if "memory_free_bytes" in facts else ""
        rows.append(Finding(f"{name} memory", "ok", f"{show(facts['memory_bytes'], 'B')}{free}"))
    if "disk_free_bytes" in facts:
        little = facts["disk_free_bytes"] < LITTLE_DISK
        found = f"{show(facts['disk_free_bytes'], 'B')} free for temporary files"
        else_there = "" if _is_android(name) else ", or set TMPDIR for its logins to a larger disk"
        fix = f"free some space there{else_there}" if little else ""
        rows.append(Finding(f"{name} disk", "warning" if little else "ok", found, fix))
    return rows


def _clocks(name: str, facts: Mapping[str, Any]) -> list[Finding]:
    """What moves the clock while one measures: power mode, governor, load, heat."""
    cores = int(facts.get("cores", 1))
    rows: list[Finding] = []
    if "power_mode" in facts:
        full = str(facts["power_mode"]).upper().startswith("MAXN")
        fix = (
            "" if full else "sudo nvpmodel -m 0  # all cores at full power; nvpmodel -q says which there are"
        )
        rows.append(Finding(f"{name} power mode", "ok" if full else "warning", str(facts["power_mode"]), fix))
    rows += _speed(name, facts)
    if "load" in facts:
        busy = facts["load"] > BUSY * cores
        fix = (
            "stop other work before you measure; one thread's CPU time is reported beside wall time"
            if busy
            else ""
        )
        found = f"{facts['load']:.2f} on {cores} cores"
        rows.append(Finding(f"{name} load", "warning" if busy else "ok", found, fix))
    if "temperature_c" in facts:
        rows.append(Finding(f"{name} temperature", "ok", f"{facts['temperature_c']:.0f} °C"))
    return rows


def _speed(name: str, facts: Mapping[str, Any]) -> list[Finding]:
    rows: list[Finding] = []
    if "governor" in facts:
        steady = facts["governor"] == "performance"
        command = _STEADY_JETSON if "power_mode" in facts else _STEADY
        fix = "" if steady else _STEADY_ANDROID if _is_android(name) else command
        rows.append(Finding(f"{name} governor", "ok" if steady else "warning", str(facts["governor"]), fix))
    if "clock_hz" in facts:
        most = facts.get("clock_max_hz")
        slow = most is not None and facts["clock_hz"] < SLOW_CLOCK * most
        found = f"{facts['clock_hz'] / 1e9:.2f} GHz" + (f" of {most / 1e9:.2f} GHz" if most else "")
        hold = "" if _is_android(name) else "; hold it there for steady timings"
        fix = f"the governor raises it under load{hold}" if slow else ""
        rows.append(Finding(f"{name} clock", "ok", found, fix))
    return rows


def _is_android(name: str) -> bool:
    return name.startswith("adb:")


def _use(device: Device) -> list[Finding]:
    try:
        with device.exclusively():
            return []
    except DeviceError as error:
        return [Finding(f"{device.name} in use", "warning", error.message, error.hint)]


def _vectors(flags: Sequence[str]) -> list[str]:
    known = (
        "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "sve", "bf16",
    )  # fmt: skip
    return [name for name in known if name in flags]


def _target(target: Target | None, device: Device, facts: Mapping[str, Any]) -> list[Finding]:
    if target is None:
        return []
    found = f"{target.title}, {target.runtime}: {', '.join(target.precisions)}"
    if target.name != "local" and device.name in ("local", "fake"):
        form = "adb://SERIAL" if target.device == "adb" else "ssh://USER@HOST"
        fix = f"times are taken on {device.name}, and say so; to measure on it: --device {form}"
        return [Finding(f"target {target.name}", "warning", found, fix)]
    rows = [Finding(f"target {target.name}", "ok", found)]
    flags = facts.get("flags", [])
    fast = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(flags)
    if "int8" in target.precisions and target.runtime == "onnxruntime" and flags and not fast:
        fix = "keep fp32: without dot-product instructions int8 makes files smaller, seldom faster"
        rows.append(Finding("int8", "warning", "this CPU has no VNNI or dot-product instructions", fix))
    return rows
