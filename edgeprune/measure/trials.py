"""Timing trials during a run, with the runtime of the final measurement."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from edgeprune.devices import Device
from edgeprune.measure import engines, latency, layer_times
from edgeprune.measure.latency import Latency
from edgeprune.measure.place import place
from edgeprune.recipe import MeasureTable
from edgeprune.records import Target
from edgeprune.runtimes import NodeTime
from edgeprune.serialization import scratch_folder, sha256

_ASK_S = 120.0


@dataclass(frozen=True)
class Trials:
    """Times files on a device; where the target has TensorRT, their engines.

    wait_s: how long to wait for the device to be free; None where the caller holds it already.
    sparse: the files hold the 2:4 pattern.
    """

    device: Device
    target: Target
    log: Callable[[str], None]
    wait_s: float | None
    sparse: bool = False
    _engines: dict[str, engines.Engine] = field(default_factory=dict, repr=False)

    @cached_property
    def runtime(self) -> str:
        """What runs the files there."""
        runtime, notes = engines.choose(self.target, self.device)
        for note in notes:
            self.log(note)
        return runtime

    @cached_property
    def version(self) -> str:
        """The runtime with its version, as in "onnxruntime 1.30.0"."""
        return str(self.device.ask({"op": "about", "runtime": self.runtime}, timeout_s=_ASK_S)["runtime"])

    @cached_property
    def emulated(self) -> bool:
        """Whether times there follow the number of instructions, so that nothing is to be decided by them."""
        return place(self.device).emulated

    def latency(self, files: Mapping[str, Path], table: MeasureTable) -> Latency:
        """Files timed in turn."""
        with self._alone():
            ready = self._ready(files)
            return latency.latency(ready, self.device, table, runtime=self.runtime)

    def nodes(self, file: Path, table: MeasureTable) -> tuple[NodeTime, ...]:
        """Every node of an ONNX file that the runtime ran, in order, by the names of the file."""
        with self._alone():
            ready = self._ready({"model": file}, keep=True)["model"]
            return layer_times.node_times(ready, self.device, table, runtime=self.runtime, onnx_file=file)

    @cached_property
    def _folder(self) -> Path:
        stack = ExitStack()
        weakref.finalize(self, stack.close)
        return stack.enter_context(scratch_folder())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.wait_s is None:
            yield
            return
        with self.device.exclusively(wait_s=self.wait_s, log=self.log):
            yield

    def _ready(self, files: Mapping[str, Path], *, keep: bool = False) -> dict[str, Path]:
        """What the device runs for each file: itself, or its engine; those of other files go unless `keep`."""
        if self.runtime != engines.TENSORRT:
            return dict(files)
        keys = {name: sha256(path)[:16] for name, path in files.items()}
        for key in [k for k in self._engines if not keep and k not in keys.values()]:
            self._engines.pop(key).path.unlink(missing_ok=True)
        missing = {key: files[name] for name, key in keys.items() if key not in self._engines}
        if missing:
            self.log(f"build {len(missing)} engines on {self.device.where()}")
            spot = engines.Place(self.device, self.target, self._folder, self.sparse)
            self._engines.update(engines.built_engines(missing, spot))
        return {name: self._engines[key].path for name, key in keys.items()}
