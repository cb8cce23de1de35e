"""Power sensors of a board: INA chips in the kernel's file system, else NVIDIA's tegrastats, read by a thread."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

ROOT = Path("/")
# The sensors average over some milliseconds each; reading them faster shows nothing new.
EVERY_S = 0.02
LEAST_SAMPLES = 10
_PLACES = (
    "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*",
    "sys/bus/i2c/drivers/ina3221*/*/iio:device*",
    "sys/class/hwmon/hwmon*",
)
_SENSORS = re.compile(r"^ina(2|3)\w+$")
# The rail through which all others are fed, where the board measures it: VDD_IN (Orin Nano and NX, Xavier NX),
# POM_5V_IN (Nano), VIN (Thor). AGX boards have none; there the rails add up, but for those that hang on another one.
_INPUT = re.compile(r"^(VDD_IN|VIN|\w+_IN)$")
_WITHIN = re.compile(r"^VDDQ")
_TEGRASTATS = re.compile(r"\b((?:VDD|VIN|POM|GPU|CPU|SOC|CV|SYS|DDR|VDDRQ)\w*) (\d+)(?:mW)?/\d+(?:mW)?")


@dataclass(frozen=True)
class Rail:
    """One rail of the board; `watts` reads it now, None where it can't be read."""

    name: str
    watts: Callable[[], float | None]


@dataclass(frozen=True)
class Meter:
    """What measures the board's power. source: "ina" or "tegrastats". rails: those that are added up."""

    source: str
    rails: tuple[str, ...]
    watts: Callable[[], float | None]


def available(root: Path = ROOT) -> bool:
    """Whether this machine has something to measure its power with; takes no time."""
    return bool(rails(root)) or shutil.which("tegrastats") is not None


def integral(samples: Sequence[tuple[float, float]], start: float, end: float) -> float | None:
    """Joules between two moments from samples (s, W) in order: trapezoids, the outer samples held to the ends.

    None with fewer than LEAST_SAMPLES samples, or none between the two moments.
    """
    inside = [(t, w) for t, w in samples if start <= t <= end]
    if len(inside) < LEAST_SAMPLES:
        return None
    points = [(start, inside[0][1]), *inside, (end, inside[-1][1])]
    return sum((points[i + 1][0] - t) * (points[i + 1][1] + w) / 2.0 for i, (t, w) in enumerate(points[:-1]))


@contextmanager
def sampled(
    watts: Callable[[], float | None], every_s: float = EVERY_S
) -> Iterator[list[tuple[float, float]]]:
    """Readings (s of time.perf_counter, W) that a thread takes while the block runs; those that fail are left out."""
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            before = time.perf_counter()
            value = watts()
            if value is not None:
                samples.append(((before + time.perf_counter()) / 2.0, value))
            done.wait(every_s)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


@contextmanager
def metered(
    root: Path = ROOT, tegrastats: Sequence[str] = ("tegrastats", "--interval", "100")
) -> Iterator[Meter | None]:
    """The meter of this machine, or None. tegrastats runs as long as the block does."""
    found = _used(rails(root))
    if found:
        yield Meter("ina", tuple(r.name for r in found), lambda: _sum(r.watts() for r in found))
        return
    try:
        child = subprocess.Popen(
            list(tegrastats),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        yield None
        return
    try:
        yield _tegrastats(child)
    finally:
        child.kill()
        child.communicate()


def _tegrastats(child: Any) -> Meter | None:
    latest = [parsed(child.stdout.readline())]
    names = tuple(r.name for r in _used([Rail(name, lambda: None) for name in latest[0]]))
    if not names:
        return None

    def read() -> None:
        # The block ends by closing the pipe under this thread.
        with suppress(ValueError, OSError):
            for line in child.stdout:
                latest[0] = parsed(line)

    threading.Thread(target=read, daemon=True).start()
    return Meter("tegrastats", names, lambda: _sum(latest[0].get(name) for name in names))


def parsed(line: str) -> dict[str, float]:
    """Rail -> watts in a line of tegrastats, which writes "VDD_IN 4856mW/4702mW": now and on average."""
    return {name: float(now) * 1e-3 for name, now in _TEGRASTATS.findall(line)}


def rails(root: Path) -> list[Rail]:
    """Every rail that the INA sensors of the machine measure."""
    found: dict[Path, list[Rail]] = {}
    for pattern in _PLACES:
        for folder in sorted(root.glob(pattern)):
            place = folder.resolve()
            if place in found:
                continue
            if folder.name.startswith("iio"):
                found[place] = _old_rails(folder)
            elif pattern.startswith("sys/bus") or _SENSORS.match(_line(folder / "name")):
                found[place] = _rails(folder)
    return [rail for group in found.values() for rail in group]


def _rails(folder: Path) -> list[Rail]:
    """hwmon: millivolts times milliamperes of each channel with a current; or microwatts, where the chip multiplies."""
    found: list[Rail] = []
    for current in sorted(folder.glob("curr[0-9]*_input")):
        number = re.sub(r"\D", "", current.name)
        volts, label = folder / f"in{number}_input", _line(folder / f"in{number}_label")
        if volts.is_file() and label not in ("", "NC"):
            found.append(Rail(label, lambda v=volts, a=current: _product(_number(v, 1e-3), _number(a, 1e-3))))
    power = folder / "power1_input"
    if not found and power.is_file():
        found.append(Rail(_line(folder / "power1_label") or "VIN", lambda: _number(power, 1e-6)))
    return found


def _old_rails(folder: Path) -> list[Rail]:
    """JetPack 4's own driver: rail_name_N and in_powerN_input in milliwatts."""
    numbers = sorted(p.name.rsplit("_", 1)[1] for p in folder.glob("rail_name_[0-9]*"))
    names = [(_line(folder / f"rail_name_{n}"), folder / f"in_power{n}_input") for n in numbers]
    return [Rail(name, lambda p=path: _number(p, 1e-3)) for name, path in names if name and path.is_file()]


def _used(found: Sequence[Rail]) -> list[Rail]:
    inputs = [r for r in found if _INPUT.match(r.name)]
    return inputs[:1] or [r for r in found if not _WITHIN.match(r.name)]


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def _number(path: Path, scale: float) -> float | None:
    line = _line(path)
    return float(line) * scale if re.match(r"^-?[0-9]+$", line) else None


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip().split("\n")[0]
    except OSError:
        return ""
