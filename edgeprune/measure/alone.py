"""Whether an ONNX file gives an image the same output in a batch as alone, and at which node that ends."""

from pathlib import Path

import onnx
import torch
from torch import Tensor

from edgeprune.data import Split
from edgeprune.errors import UnsupportedModel
from edgeprune.models import HINT, check_alone, deployed, differs, nudged
from edgeprune.onnx_graph import ORT_ERRORS, batch_of, open_session, opened
from edgeprune.records import Bundle
from edgeprune.runtimes import OnnxRuntime

# So many images are given together and each alone.
IMAGES = 8


def check_bundle(bundle: Bundle, split: Split) -> None:
    """Refuse a network whose outputs depend on the other images of a batch, looking at real images."""
    x = split.take(torch.arange(min(len(split), IMAGES)))
    check_alone(deployed(bundle), x, bundle.source.path or "the network")


def check(path: Path, x: Tensor, classes: int) -> None:
    """Refuse a file whose output has another width than it says, or depends on the other images of a batch."""
    model, x = opened(path), x[:IMAGES]
    session = OnnxRuntime().open(path, 1)
    together = torch.from_numpy(session(x.numpy()))
    if together.shape[1] != classes:
        raise UnsupportedModel(
            f"{path.name} gives {len(x)} images an output of shape {tuple(together.shape)}, but says it is "
            f"(N, {classes})",
            "export it again",
        )
    batch = batch_of(model)
    if batch == 1 or len(x) < 2:
        return
    # A fixed batch is filled up with the same images again; of an image that is alone, with itself.
    x = x if batch is None else x[torch.arange(batch) % len(x)]
    parts = [image.repeat(batch or 1, 1, 1, 1) for image in x[:IMAGES].split(1)]
    alone = torch.cat([torch.from_numpy(session(part.numpy()))[:1] for part in parts])
    together, shaken = (torch.from_numpy(session(whole.numpy()))[: len(parts)] for whole in (x, nudged(x)))
    if together.shape != alone.shape or differs(together, alone, shaken):
        raise UnsupportedModel(
            f"{path.name} gives an image another output in a batch of {len(x)} than alone: {_first(model, x, parts)} "
            "mixes the images of a batch",
            HINT,
        )


def _first(model: onnx.ModelProto, x: Tensor, alone: list[Tensor]) -> str:
    told = onnx.ModelProto()
    told.CopyFrom(model)
    nodes = {name: node for node in told.graph.node for name in node.output if name}
    known = {value.name for value in told.graph.output}
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in known)
    try:
        session = open_session(told, optimized=False)
        given = session.get_inputs()[0]
        kind = torch.float16 if "float16" in given.type else x.dtype
        together, near, *parts = (
            session.run(list(nodes), {given.name: images.to(kind).numpy()})
            for images in (x, nudged(x), *alone)
        )
    except (UnsupportedModel, *ORT_ERRORS):
        return "it"
    for number, (name, node) in enumerate(nodes.items()):
        rows, close, *ones = (torch.as_tensor(values[number]) for values in (together, near, *parts))
        if not rows.is_floating_point() or not rows.ndim or len(rows) != len(x):
            continue
        if any(len(one) != len(images) for one, images in zip(ones, alone, strict=True)):
            continue
        if differs(rows[: len(ones)], torch.cat([one[:1] for one in ones]), close[: len(ones)]):
            return f"{node.name or name} ({node.op_type})"
    return "it"
