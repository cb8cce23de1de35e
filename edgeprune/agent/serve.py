"""A session on the device that stays open: images come in messages on stdin, logits go back, until stdin ends."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, Mapping, Optional, Tuple

from edgeprune.agent import protocol, timing
from edgeprune.errors import DeviceError
from edgeprune.runtimes import Runtime, Session

if TYPE_CHECKING:
    import numpy as np

# When nobody listens any more, a batch at work may end by itself for so long.
_GRACE_S = 2.0

Message = Optional[Tuple[protocol.Head, bytes]]


def serve(request: Mapping[str, Any], runtime: Runtime, source: int, sink: int) -> None:
    """What the operation "serve" does; `agent.handle` says what it asks.

    Says that it is READY, then answers message for message. It ends with its input, in the middle of a batch too.
    """
    waiting: Queue[Message] = Queue()
    # Before all else: building an engine takes minutes, and nobody may be listening any more.
    threading.Thread(target=_read, args=(source, waiting), daemon=True).start()
    session = runtime.open(Path(protocol.text(request, "model")), 1)
    # A GPU has one queue, and its session one set of buffers.
    workers = 1 if runtime.on_gpu else protocol.count(request, "workers", 0) or timing.cores()
    ready = {"runtime": runtime.version(), "input": list(session.input_shape), "workers": workers}
    listened = _write(sink, protocol.READY, json.dumps(ready).encode())
    last: Optional[np.ndarray] = None
    with ThreadPoolExecutor(workers) as pool:
        while listened and (message := waiting.get()) is not None:
            found, body = message
            last = protocol.pixels(found.kind, protocol.checked(found, body), last)
            listened = _write(sink, protocol.LOGITS, protocol.logits(_answer(session, last, pool, workers)))


def _answer(session: Session, x: np.ndarray, pool: ThreadPoolExecutor, workers: int) -> np.ndarray:
    import numpy as np

    whole = session.input_shape[0] or 1
    step = whole * max(1, -(-len(x) // (whole * workers)))
    parts = pool.map(lambda i: session(x[i : i + step]), range(0, max(1, len(x)), step))
    return np.concatenate(list(parts))


def _read(source: int, waiting: Queue[Message]) -> None:
    """Hand on what comes; at the end of input the process ends, at the latest after a moment."""
    while True:
        first = _exactly(source, protocol.HEAD_BYTES)
        if not first:
            break
        found = protocol.head(first)
        if found is None:
            waiting.put((protocol.DAMAGED, b""))
            break
        waiting.put((found, _exactly(source, found.size)))
    waiting.put(None)
    time.sleep(_GRACE_S)
    os._exit(DeviceError.exit_code)


def _exactly(source: int, count: int) -> bytes:
    """So many bytes, fewer at the end. Not of a file object, whose lock a thread would hold when Python ends."""
    found = bytearray()
    while len(found) < count:
        chunk = os.read(source, count - len(found))
        if not chunk:
            break
        found += chunk
    return bytes(found)


def _write(sink: int, kind: int, body: bytes) -> bool:
    """Whether a message could be sent; if not, nobody listens any more."""
    left = memoryview(protocol.packed(kind, body))
    try:
        while left:
            left = left[os.write(sink, left) :]
    except BrokenPipeError:
        return False
    return True
