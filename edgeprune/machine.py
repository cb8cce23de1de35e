"""What the machine it runs on is: the kind of its CPU, its memory and its cores, read from /proc."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet

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
