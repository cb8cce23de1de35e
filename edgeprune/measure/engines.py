"""TensorRT engines: built on the device from ONNX files, copied back, and compared with ONNX Runtime's outputs."""

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgeprune.devices import Device, device_from_url
from edgeprune.errors import DeviceError, MissingDependency, ModelError, ParityError, WorkdirError
from edgeprune.measure.answers import RUNTIME, Logits, predict
from edgeprune.onnx_graph import ONNX_ERRORS
from edgeprune.records import Artifact, InputSpec, Target
from edgeprune.runtimes import CACHE, OLDEST, UNTOLD, beside, workspace_mib
from edgeprune.serialization import replace_file, scratch_folder, sha256

_ASK_S = 120.0


@contextmanager
def timings(device: Device, folder: str) -> Iterator[None]:
    """Copy TensorRT's timing cache into a folder on the device, and back afterwards.

    Kept in ~/.cache/edgeprune/timings, one for each device, board and version of TensorRT, which itself refuses the
    timings of another GPU. Where that folder can't be written nothing is kept.
    """
    kept, there = _kept(device), f"{folder}/{CACHE}"
    if kept is None:
        yield
        return
    if kept.is_file():
        device.put(kept, there)
    yield
    with scratch_folder() as folder_here:
        device.get(there, folder_here / CACHE)
        with suppress(WorkdirError), replace_file(kept) as file:
            file.write((folder_here / CACHE).read_bytes())


def _kept(device: Device) -> Path | None:
    about, facts = device.ask({"op": "about", "runtime": "tensorrt"}, timeout_s=_ASK_S), device.facts()
    words = (device.name, str(facts.get("board")), str(facts.get("cpu")), str(about.get("runtime")))
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    try:
        folder = Path("~", ".cache", "edgeprune", "timings").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\n")
    except (OSError, RuntimeError):
        return None
    return folder / f"{name}.cache"


TENSORRT = "tensorrt"
# Tactics of a large network on a small board are tried for a quarter of an hour.
_BUILD_S = 3600.0

# Largest difference of a logit, as a share of the largest logit, from ONNX Runtime's for the same file: TF32 keeps
# 10 bits of a factor, half precision 11 bits of everything, and int8 rounds at other places.
TOLERANCE = {"fp32": 5e-3, "fp16": 2e-2, "int8": 1e-1}
# Or so many answers name the same class: a rounding to the other side of an int8 step changes logits, not classes.
AGREEMENT = 0.99
IMAGES = 128


@dataclass(frozen=True)
class Place:
    """Where engines are built. folder: here, for the copies."""

    device: Device
    target: Target
    folder: Path
    sparse: bool = False


@dataclass(frozen=True)
class Engine:
    """An engine that was built on a device, and its copy here (`path`)."""

    path: Path
    onnx: Path
    precision: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """One sentence for a report: from what, by which version, in which precisions its layers run."""
        layers = self.facts.get("layers")
        counts = (
            {name: n for name, n in layers.items() if type(n) is int} if isinstance(layers, Mapping) else {}
        )
        dark = sum(counts.pop(key, 0) for key in UNTOLD)
        told = [f"{count} in {name}" for name, count in counts.items()]
        layers = ", ".join([*told, f"{dark} not told"] if dark else told) or "not told"
        if self.precision != "fp32" and self.precision not in counts:
            layers += f", so whether it runs in {self.precision} is not known"
        return (
            f"{self.onnx.name} ({self.precision}) was built by TensorRT {self.facts.get('tensorrt')} on "
            f"{self.facts.get('gpu')}; layers that multiply: {layers}."
        )


def choose(target: Target, device: Device) -> tuple[str, tuple[str, ...]]:
    """The runtime to measure with on a device, and notes: the target's, or ONNX Runtime where the device lacks it."""
    if target.runtime != TENSORRT:
        return RUNTIME, ()
    try:
        about = device.ask({"op": "about", "runtime": TENSORRT}, timeout_s=_ASK_S)
    except MissingDependency as error:
        why = f"{error.message}; {error.hint}" if error.hint else error.message
        what = "this machine, not of TensorRT" if device.name == "local" else f"{device.name}, not of its GPU"
        return RUNTIME, (f"Times are of ONNX Runtime on the CPU of {what}: {why}.",)
    found = re.match(rf"{TENSORRT} (\d{{1,4}})\.(\d{{1,4}})", str(about.get("runtime")))
    if found is None:
        return RUNTIME, ()
    if (int(found.group(1)), int(found.group(2))) < OLDEST:
        least = ".".join(str(n) for n in OLDEST)
        note = (
            f"Times are of ONNX Runtime on the CPU of {device.name}, not of its GPU: it has {about['runtime']}, and "
            f"engines are built from Python with {least} or newer; build_engine.sh builds and times one there."
        )
        return RUNTIME, (note,)
    return TENSORRT, ()


def precision_of(path: Path) -> str:
    """The precision of an ONNX file: "int8" with Q/DQ, "fp16" with half-precision weights, or "fp32"."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except ONNX_ERRORS as error:
        raise ModelError(f"{path} is not a readable ONNX file: {error}") from error
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return "int8"
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
    return "fp16" if halves else "fp32"


def built_engines(files: Mapping[str, Path], place: Place) -> dict[str, Engine]:
    """Build an engine of each ONNX file on the device and copy it here as NAME.engine, with NAME.engine.json."""
    device = place.device
    options = {"workspace_mib": workspace_mib(place.target.memory_bytes), "sparse": place.sparse}
    with device.holding(files) as paths, timings(device, str(Path(next(iter(paths.values()))).parent)):
        return {name: _built(name, files[name], path, place, options) for name, path in paths.items()}


def _built(name: str, onnx_file: Path, path: str, place: Place, options: Mapping[str, Any]) -> Engine:
    precision, here, there = precision_of(onnx_file), place.folder / f"{name}.engine", f"{path}.engine"
    request = {
        "op": "build",
        "runtime": TENSORRT,
        "model": path,
        "out": there,
        "precision": precision,
        "name": name,
    }
    answer = place.device.ask({**request, "options": dict(options)}, timeout_s=_BUILD_S)
    facts = answer.get("facts")
    if not isinstance(facts, dict):
        raise DeviceError(f"the agent on {place.device.name} built {name!r} and answered {answer!r:.200}")
    place.device.get(there, here)
    place.device.get(f"{there}.json", beside(here))
    if facts.get("onnx") != sha256(onnx_file) or facts.get("engine") != sha256(here):
        raise ParityError(
            f"the engine of {onnx_file.name} that came from {place.device.name} is not the one that was built there",
            "was the connection lost? build it again",
        )
    return Engine(here, onnx_file, precision, facts)


def compare(engine: Engine, spec: InputSpec, images: npt.NDArray[np.float32], device: Device) -> str:
    """Compare an engine's outputs on a device with ONNX Runtime's here for its ONNX file, on the same images."""
    expected = engine_logits(engine.onnx, spec, images, device_from_url("local"), RUNTIME)
    found = engine_logits(engine.path, spec, images, device, TENSORRT)
    worst, same = _apart(expected, found)
    said = (
        f"the engine of {engine.onnx.name} answers {len(images)} images as ONNX Runtime does but for {worst:.1e} of "
        f"the largest logit, with the same class for {100 * same:.1f} %"
    )
    if not np.isfinite(found).all():
        raise ParityError(f"the engine of {engine.onnx.name} gives answers that are not finite")
    if worst > TOLERANCE[engine.precision] and (engine.precision != "int8" or same < AGREEMENT):
        wanted = f"in {engine.precision} it should be within {TOLERANCE[engine.precision]:.0e}"
        raise ParityError(f"{said}; {wanted}", "does the ONNX file give the right answers itself?")
    return f"T{said[1:]}."


def _apart(expected: Logits, found: Logits) -> tuple[float, float]:
    if expected.shape != found.shape:
        raise ParityError(f"the engine answers {found.shape} where ONNX Runtime answers {expected.shape}")
    scale = float(np.abs(expected).max()) or 1.0
    worst = float(np.abs(expected - found).max()) / scale
    return worst, float((expected.argmax(axis=1) == found.argmax(axis=1)).mean())


def engine_logits(
    path: Path, spec: InputSpec, images: npt.NDArray[np.float32], device: Device, runtime: str
) -> Logits:
    """The logits (N, K) of a file on a device."""
    made = Artifact(str(path), "onnx", "fp32", spec, "", path.stat().st_size)
    return predict(made, [images], device, total=len(images), label=f"{path.name}: answers", runtime=runtime)
