"""What the machine says of its own state: clocks, governor, power mode and temperature, now.

What it does not say is absent from the answer, never 0. Light: runs on the device.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Callable, Sequence

ROOT = Path("/")
_CPU = "sys/devices/system/cpu"
_ASK_S = 10.0
# What the devfreq folders of the GPUs of Jetsons end in: 17000000.gpu, 17000000.ga10b, 17000000.gv11b, 57000000.gpu.
_GPU = re.compile(r"\.(gpu|g[apvb][0-9]+[a-z]?)$")
_SMI = ("clocks.sm", "temperature.gpu", "power.draw", "pstate")


def run(argv: Sequence[str]) -> str:
    """What a command prints, or "" where there is none, it fails or it takes too long."""
    try:
        done = subprocess.run(
            list(argv), stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def state(*, gpu: bool, root: Path = ROOT, ask: Callable[[Sequence[str]], str] = run) -> dict[str, Any]:
    """The state of the machine, as far as it shows.

    Returns:
        governor, power_mode, gpu_state: text. clock_hz (the fastest core), clock_max_hz, gpu_clock_hz,
        temperature_c (the hottest zone), gpu_temperature_c, gpu_watts: numbers. load: of the last minute.
    """
    found = {
        "governor": _line(root / _CPU / "cpu0/cpufreq/scaling_governor"),
        "clock_hz": _clock(root),
        "clock_max_hz": _scaled(_line(root / _CPU / "cpu0/cpufreq/cpuinfo_max_freq"), 1e3),
        "temperature_c": _hottest(root),
        "gpu_clock_hz": _gpu_clock(root),
        "load": _scaled(_line(root / "proc/loadavg").split(" ")[0], 1.0),
        "power_mode": _power_mode(ask(["nvpmodel", "-q"])),
    }
    if gpu:
        found.update(
            _smi(ask(["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]))
        )
    return {key: value for key, value in found.items() if value not in (None, "")}


def board(root: Path = ROOT) -> str:
    """The board's model as the device tree calls it; "" where it is not told, as on PCs and in most containers."""
    return _line(root / "proc/device-tree/model").strip("\0 ")


def _clock(root: Path) -> float | None:
    names = root.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [c for c in (_scaled(_line(path), 1e3) for path in names) if c]
    if clocks:
        return max(clocks)
    megahertz = re.findall(r"^cpu MHz\s*:\s*([0-9.]+)", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return max(float(m) for m in megahertz) * 1e6 if megahertz else None


def _hottest(root: Path) -> float | None:
    """Degrees of the hottest zone; a zone that is switched off says a number far below freezing."""
    zones = (_scaled(_line(path), 1e-3) for path in root.glob("sys/class/thermal/thermal_zone*/temp"))
    return max((z for z in zones if z is not None and z > 0), default=None)


def _gpu_clock(root: Path) -> float | None:
    paths = (p for p in root.glob("sys/class/devfreq/*/cur_freq") if _GPU.search(p.parent.name))
    return max((c for c in (_scaled(_line(p), 1.0) for p in paths) if c), default=None)


def _power_mode(said: str) -> str:
    match = re.search(r"^NV Power Mode: *(.+)$", said, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _smi(said: str) -> dict[str, Any]:
    """What nvidia-smi says of the first GPU; it writes [N/A] for what it does not know."""
    values = [v.strip() for v in said.splitlines()[0].split(",")] if said.strip() else []
    if len(values) != len(_SMI):
        return {}
    clock, heat, watts = (_scaled(v, s) for v, s in ((values[0], 1e6), (values[1], 1.0), (values[2], 1.0)))
    state = values[3] if re.match(r"^P[0-9]+$", values[3]) else ""
    found = {"gpu_temperature_c": heat, "gpu_watts": watts, "gpu_state": state}
    return {"gpu_clock_hz": clock, **found} if clock else found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _line(path: Path) -> str:
    lines = _text(path).splitlines()
    return lines[0].strip() if lines else ""


def _scaled(value: str, scale: float) -> float | None:
    return float(value) * scale if re.match(r"^-?[0-9]+(\.[0-9]+)?$", value) else None
