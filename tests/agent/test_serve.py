"""The session on a device that stays open: its messages, that bytes arrive as they are, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import write_net

import edgeprune
from edgeprune.agent import protocol
from edgeprune.errors import DeviceError

SHAPE = (5, 3, 4, 4)
ORT = {"op": "serve", "runtime": "onnxruntime"}


def sent(x: Any, last: Any) -> tuple[int, bytes, Any]:
    """Kind and body of a message, and the images that it arrives as."""
    kind, body = protocol.images(x, last)
    return kind, body, protocol.pixels(kind, body, last)


@given(seed=st.integers(0, 2**32 - 1), changed=st.integers(0, 5 * 3 * 4 * 4))
def test_images_arrive_bit_by_bit_as_they_were_sent(seed: int, changed: int) -> None:
    """Any bits at all: numbers that are none, both zeros, denormal ones."""
    rng = np.random.default_rng(seed)
    last = rng.integers(0, 2**32, SHAPE, dtype=np.uint32).view(np.float32)
    x = last.copy()
    x.reshape(-1)[rng.permutation(x.size)[:changed]] = rng.integers(0, 2**32, changed, np.uint32).view("f4")
    kind, body, back = sent(x, last)
    assert back.dtype == np.float32 and back.tobytes() == x.tobytes()
    assert sent(x, None)[2].tobytes() == x.tobytes()
    whole = protocol.images(x, None)[1]
    assert len(body) <= len(whole) + 4
    assert changed > 0.9 * x.size or kind == protocol.CHANGED


def test_only_what_changed_is_sent() -> None:
    rng = np.random.default_rng(0)
    last = rng.random((64, 3, 32, 32), dtype=np.float32)
    x = last.copy()
    x[:, :, 4:8, 9:13] = 0.5
    kind, body, back = sent(x, last)
    values = 64 * 3 * 4 * 4 * 4
    assert kind == protocol.CHANGED and values < len(body) < values + 5000 < x.nbytes / 20
    assert (back == x).all() and (last[:, :, 4:8, 9:13] != 0.5).any(), "the ones before stay as they were"
    assert sent(x[:60], last)[0] == protocol.WHOLE, "other images have nothing to change"
    assert sent(last[:0], None)[2].shape == (0, 3, 32, 32)


def test_a_message_that_was_changed_on_its_way_is_noticed() -> None:
    message = protocol.packed(*protocol.images(np.ones(SHAPE, np.float32), None))
    first, body = message[: protocol.HEAD_BYTES], message[protocol.HEAD_BYTES :]
    found = protocol.head(first)
    assert found is not None and protocol.checked(found, body) == body
    for wrong in (body[:-1], body + b"x", body.replace(b"\x80", b"\x81", 1)):
        with pytest.raises(DeviceError, match="not what was sent"):
            protocol.checked(found, wrong)
    assert protocol.head(b'{"error": "no such file", "kind": ""}'[: protocol.HEAD_BYTES]) is None
    assert protocol.head(first[:-1]) is None


def test_what_is_no_message_of_images_or_of_logits_is_refused() -> None:
    x = np.ones(SHAPE, np.float32)
    _, whole = protocol.images(x, None)
    kind, changes = protocol.images(x, x)
    for wrong, body, last in (
        (kind, changes, None), (protocol.LOGITS, whole, x), (protocol.WHOLE, whole[:-4], None),
        (protocol.WHOLE, b"", None),
        (kind, changes[:-3], x), (kind, changes[:21] + bytes(3), x), (kind, whole, x),
    ):  # fmt: skip
        with pytest.raises(DeviceError):
            protocol.pixels(wrong, body, last)
    logits = protocol.logits(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert protocol.read_logits(protocol.LOGITS, logits).tolist() == [[0, 1, 2], [3, 4, 5]]
    for wrong, body in ((protocol.WHOLE, logits), (protocol.LOGITS, logits[:-1]), (protocol.LOGITS, b"")):
        with pytest.raises(DeviceError):
            protocol.read_logits(wrong, body)


class Agent:
    """The agent as a process of this machine."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgeprune.agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=Path(edgeprune.__file__).parent.parent,
        )  # fmt: skip
        self.send(json.dumps(request).encode() + b"\n")

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def hear(self) -> tuple[int, bytes]:
        assert self.process.stdout is not None
        found = protocol.head(self.process.stdout.read(protocol.HEAD_BYTES))
        assert found is not None
        return found.kind, protocol.checked(found, self.process.stdout.read(found.size))

    def end(self) -> tuple[str, str]:
        out, errors = self.process.communicate(timeout=60)
        return out.decode(), errors.decode()


@pytest.fixture
def agents() -> Iterator[list[Agent]]:
    started: list[Agent] = []
    yield started
    for agent in started:
        agent.process.kill()
        agent.process.communicate()


@pytest.mark.parametrize(("batch", "workers"), [("N", 1), ("N", 3), (1, 2), (4, 2)])
def test_it_answers_message_for_message_until_its_input_ends(
    tmp_path: Path, agents: list[Agent], batch: Any, workers: int
) -> None:
    from edgeprune.runtimes.onnxruntime import OnnxRuntime

    net = write_net(tmp_path / "net.onnx", 4)
    freed(net, batch)
    session = OnnxRuntime().open(net, 1)
    agent = Agent({**ORT, "model": str(net), "workers": workers})
    agents.append(agent)
    kind, ready = agent.hear()
    assert kind == protocol.READY and json.loads(ready)["workers"] == workers
    assert json.loads(ready)["runtime"].startswith("onnxruntime ")
    rng, last = np.random.default_rng(0), None
    for count in (7, 7, 1, 0, 33):
        x = rng.random((count, 3, 8, 8), dtype=np.float32)
        if last is not None and last.shape == x.shape:
            x[1:] = last[1:]
        agent.send(protocol.packed(*protocol.images(x, last)))
        kind, body = agent.hear()
        np.testing.assert_allclose(protocol.read_logits(kind, body), session(x), atol=1e-4)
        last = x
    assert agent.end() == ("", "") and agent.process.returncode == 0


def freed(path: Path, batch: Any) -> None:
    """Another batch size for a file."""
    import onnx

    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        first.Clear()
        if batch == "N":
            first.dim_param = batch
        else:
            first.dim_value = batch
    onnx.save(model, path)


@pytest.mark.parametrize("how", ["no file", "another shape", "damaged", "no runtime"])
def test_what_goes_wrong_is_said_in_words_and_ends_it(tmp_path: Path, agents: list[Agent], how: str) -> None:
    net = str(write_net(tmp_path / "net.onnx", 4))
    model = str(tmp_path / "none.onnx") if how == "no file" else net
    agent = Agent({**ORT, "model": model, **({"runtime": "none"} if how == "no runtime" else {})})
    agents.append(agent)
    if how in ("another shape", "damaged"):
        assert agent.hear()[0] == protocol.READY
        size = (2, 3, 8, 8) if how == "damaged" else (2, 1, 8, 8)
        message = protocol.packed(*protocol.images(np.ones(size, np.float32), None))
        agent.send(message[:-1] + b"\x00" if how == "damaged" else message)
    out, errors = agent.end()
    answer = json.loads(out)
    expected = {"no file": "ModelError", "damaged": "DeviceError"}.get(how, "UsageError")
    assert answer["kind"] == expected and agent.process.returncode in (2, 4, 6), answer
    assert "Traceback" not in errors and "Fatal" not in errors


def test_it_ends_with_its_input_even_in_the_middle_of_a_batch(tmp_path: Path, agents: list[Agent]) -> None:
    code = (
        "import sys, time\n"
        "from edgeprune import agent\nfrom edgeprune.runtimes import onnxruntime as ort\n"
        "ort._OrtSession.infer = lambda self, x: print('busy', file=sys.stderr, flush=True) or time.sleep(600)\n"
        "from edgeprune.agent.program import main\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    agent = Agent.__new__(Agent)
    agent.process = process
    agents.append(agent)
    agent.send(json.dumps({**ORT, "model": str(write_net(tmp_path / "net.onnx", 4))}).encode() + b"\n")
    assert agent.hear()[0] == protocol.READY
    agent.send(protocol.packed(*protocol.images(np.ones((1, 3, 8, 8), np.float32), None)))
    assert process.stderr is not None and process.stderr.readline() == b"busy\n"
    agent.end()
    assert process.returncode == DeviceError.exit_code


def test_it_ends_quietly_when_nobody_listens_any_more(tmp_path: Path, agents: list[Agent]) -> None:
    agent = Agent({**ORT, "model": str(write_net(tmp_path / "net.onnx", 4))})
    agents.append(agent)
    assert agent.hear()[0] == protocol.READY
    assert agent.process.stdout is not None
    agent.process.stdout.close()
    agent.send(protocol.packed(*protocol.images(np.ones((1, 3, 8, 8), np.float32), None)))
    assert agent.process.wait(60) == 0
    assert agent.process.stderr is not None and b"Traceback" not in agent.process.stderr.read()
