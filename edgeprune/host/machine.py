"""What a machine says about itself: one shell script that asks, and what its answer means in base units."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, FrozenSet

CPU_KINDS = ("avx512", "avx2", "arm64", "other")


@dataclass(frozen=True)
class Machine:
    """One machine. cpu: one of CPU_KINDS; memory_bytes is 0 where the system does not say."""

    architecture: str
    cpu: str
    memory_bytes: int
    cores: int


def architecture(name: str) -> str:
    """One spelling for the names that systems give the same architecture: "x86_64", "aarch64", else as given."""
    lower = name.strip().lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(lower, lower)


def cpu_flags(cpuinfo: str) -> FrozenSet[str]:
    """The instruction sets of the first core in the text of /proc/cpuinfo ("flags" on x86, "Features" on arm64)."""
    match = re.search(r"^(?:flags|Features)[ \t]*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def memory_bytes(meminfo: str) -> int:
    """The installed memory in the text of /proc/meminfo, or 0 when it does not say."""
    match = re.search(r"^MemTotal:\s*(\d+)\s*kB\s*$", meminfo, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def cpu_kind(arch: str, flags: FrozenSet[str]) -> str:
    """Which of CPU_KINDS a CPU is, by the widest vectors that it has."""
    if arch == "aarch64":
        return "arm64"
    if arch == "x86_64":
        return next(
            (kind for kind, flag in (("avx512", "avx512f"), ("avx2", "avx2")) if flag in flags), "other"
        )
    return "other"


def this(proc: Path = Path("/proc")) -> Machine:
    """The machine it runs on. `proc` is where the kernel says it."""
    arch = architecture(platform.machine())
    return Machine(
        architecture=arch,
        cpu=cpu_kind(arch, cpu_flags(_read(proc / "cpuinfo"))),
        memory_bytes=memory_bytes(_read(proc / "meminfo")),
        cores=os.cpu_count() or 1,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or a sandbox without /proc
        return ""


# One script, so that a far machine is asked once; a line that can't be had is left out or empty. A program that is
# run by an emulator sees a faked /proc/self, so the shell is looked at by its children. A container does not see the
# device tree: those for a Jetson are commonly given its model in /tmp/nv_jetson_model.
FACTS = r"""
PATH=$PATH:/usr/sbin:/sbin
say() { printf '%s=%s\n' "$1" "$2"; }
first() { for f in "$@"; do [ -r "$f" ] && head -n 1 "$f" 2>/dev/null | tr -d '\000' && return; done; }
freq=/sys/devices/system/cpu/cpu0/cpufreq
machine=$(uname -m)
say machine "$machine"
say system "$(uname -s)"
say release "$(uname -r)"
say cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null)"
say board "$(first /proc/device-tree/model /tmp/nv_jetson_model)"
say board "$(getprop ro.product.model 2>/dev/null)"
say cpu "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say flags "$(sed -n -e 's/^flags[^:]*: *//p' -e 's/^Features[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
say memory_free_kb "$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
base=${TMPDIR:-/tmp}
[ -w "$base" ] || base=/data/local/tmp
say disk_free_kb "$(df -P -k "$base" 2>/dev/null | { read -r _ && read -r _ _ _ free _ && echo "$free"; })"
say governor "$(first $freq/scaling_governor)"
say clock_khz "$(first $freq/scaling_cur_freq $freq/cpuinfo_cur_freq)"
say clock_max_khz "$(first $freq/cpuinfo_max_freq)"
say clock_mhz "$(sed -n 's/^cpu MHz[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say load "$(first /proc/loadavg)"
for zone in /sys/class/thermal/thermal_zone*/temp; do say temperature "$(first $zone)"; done
say power_mode "$(nvpmodel -q 2>/dev/null | sed -n 's/^NV Power Mode: *//p')"
say l4t "$(first /etc/nv_tegra_release)"
say brand "$(sysctl -n machdep.cpu.brand_string 2>/dev/null)"
by=$(readlink /proc/$$/exe 2>/dev/null)
for word in $(tr '\000' '\n' 2>/dev/null </proc/$$/cmdline | head -n 1); do by="$by $word"; done
case $by in *qemu-* | *rosetta* | *box64* | *FEXInterpreter*) say emulator "$by" ;; esac
case $machine in aarch64 | arm*) grep -q '^vendor_id' /proc/cpuinfo 2>/dev/null && say emulator cpuinfo ;; esac
grep -q '^model name.*TCG' /proc/cpuinfo 2>/dev/null && say emulator TCG
[ "$(systemd-detect-virt --vm 2>/dev/null)" = qemu ] && say emulator qemu
true
"""
_TEXTS = ("machine", "system", "release", "board", "cpu", "governor", "power_mode", "l4t")
_NUMBERS: tuple[tuple[str, str, float], ...] = (
    ("cores", "cores", 1),
    ("memory_bytes", "memory_kb", 1024),
    ("memory_free_bytes", "memory_free_kb", 1024),
    ("disk_free_bytes", "disk_free_kb", 1024),
    ("clock_hz", "clock_mhz", 1e6),
    ("clock_hz", "clock_khz", 1e3),
    ("clock_max_hz", "clock_max_khz", 1e3),
    ("load", "load", 1),
)
# More than any machine has of anything; what says so is not heard.
_MOST = 1e18
_WHOLE = ("cores", "memory_bytes", "memory_free_bytes", "disk_free_bytes")


def parse(text: str) -> dict[str, Any]:
    """The facts in what the script printed; what it does not say is absent."""
    pairs = [line.partition("=")[::2] for line in text.splitlines() if "=" in line]
    said: dict[str, str] = {key: value.strip() for key, value in pairs if value.strip()}
    facts: dict[str, Any] = {key: said[key] for key in _TEXTS if key in said}
    if "cpu" not in facts and "brand" in said:
        facts["cpu"] = said["brand"]
    for key, source, scale in _NUMBERS:
        value = _leading_number(said.get(source, ""))
        if value is not None and 0 <= value * scale <= _MOST:
            facts[key] = int(value * scale) if key in _WHOLE else value * scale
    zones = [_leading_number(value) for key, value in pairs if key == "temperature"]
    heat = [z / 1000.0 for z in zones if z is not None and 0 < z < _MOST]
    if heat:
        facts["temperature_c"] = max(heat)
    if "flags" in said:
        facts["flags"] = sorted(said["flags"].split())
    if "emulator" in said:
        facts["emulated"] = True
    return facts


def _leading_number(text: str) -> float | None:
    match = re.match(r"\s*\d+(?:\.\d+)?", text)
    return float(match.group()) if match else None
