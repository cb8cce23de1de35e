"""A file's session on a device that stays open during an attack."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgeprune import agent, serialization
from edgeprune.devices import SLOWEST, START_S, InteractiveCommand, ShellDevice
from edgeprune.errors import DeviceError
from edgeprune.measure import held

# Opening a session may build an engine, which takes a small board a quarter of an hour.
OPEN_S = 3600.0
# Of one image; an emulated processor takes seconds for what a slow one does in a tenth.
IMAGE_S = 30.0

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """A file on a device. file: the ONNX file, or its engine. wait_s: how long to wait for the device to be free."""

    device: ShellDevice
    runtime: str
    file: Callable[[], Path]
    wait_s: float
    log: Callable[[str], None]


@dataclass
class Asked:
    """A file's logits on a device. Within `open` there is one session for all queries, else one for each.

    sent: bytes.
    """

    place: Place
    images: int = 0
    sent: int = 0
    _stack: ExitStack | None = field(default=None, repr=False)
    _talk: InteractiveCommand | None = field(default=None, repr=False)
    _last: Pixels | None = field(default=None, repr=False)
    _classes: int = field(default=0, repr=False)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the session from the first query to the end, alone on the device. Not to be nested."""
        with ExitStack() as stack:
            self._stack = stack
            try:
                yield
            finally:
                self._stack, self._talk, self._last = None, None, None

    def __call__(self, x: Tensor) -> Tensor:
        """The logits float32 (N, K) of pixels (N, C, H, W), on the CPU."""
        if self._stack is None:
            with self.open():
                return self(x)
        if self._talk is None:
            self._talk = self._stack.enter_context(self._opened())
        images = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
        step = max(1, agent.MOST_BYTES // max(1, images[:1].nbytes))
        parts = [self._answers(self._talk, images[i : i + step]) for i in range(0, max(1, len(images)), step)]
        return torch.from_numpy(np.concatenate(parts))

    @contextmanager
    def _opened(self) -> Iterator[InteractiveCommand]:
        place = self.place
        file = place.file()
        with (
            place.device.exclusively(wait_s=place.wait_s, log=place.log),
            held(place.device, {"model": file}) as paths,
            place.device.talking({"op": "serve", "runtime": place.runtime, "model": paths["model"]}) as talk,
        ):
            ready = self._heard(talk, agent.READY, OPEN_S)
            try:
                runtime = serialization.parse(ready.decode())["runtime"]
            except (ValueError, LookupError, TypeError) as error:
                raise DeviceError(
                    f"{place.device.name} began with {ready[:80]!r} and not its runtime"
                ) from error
            if not self.images:
                place.log(f"attack: {file.name} answers on {place.device.name} ({runtime})")
            yield talk

    def _answers(self, talk: InteractiveCommand, x: Pixels) -> Pixels:
        message = agent.packed(*agent.images(x, self._last))
        limit_s = START_S + len(message) / SLOWEST
        talk.send(message, limit_s)
        self._last = x.copy()
        body = self._heard(talk, agent.LOGITS, limit_s + IMAGE_S * len(x))
        answer = agent.read_logits(agent.LOGITS, body)
        self._classes = self._classes or answer.shape[1]
        if answer.shape != (len(x), self._classes) or not self._classes:
            raise DeviceError(f"{self.place.device.name} answered {len(x)} images with {answer.shape}")
        self.images, self.sent = self.images + len(x), self.sent + len(message)
        return answer

    def _heard(self, talk: InteractiveCommand, kind: int, timeout_s: float) -> bytes:
        first = talk.hear(agent.HEAD_BYTES, timeout_s)
        found = agent.head(first)
        if found is None:
            # Anything but a message is text: why the agent ended, or could not start.
            ended = talk.end()
            words = first.decode(errors="replace") + ended.stdout
            device = self.place.device
            device.told(device.agent(), ended._replace(stdout=words))
            raise DeviceError(f"the agent on {device.name} answered no message but {words[:200]!r}")
        body = agent.checked(found, talk.hear(found.size, timeout_s))
        if found.kind != kind:
            raise DeviceError(f"the agent on {self.place.device.name} sent a message of kind {found.kind}")
        return body
