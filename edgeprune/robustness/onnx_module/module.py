"""An ONNX file as a network in torch, so that an attack gets gradients of the very graph that ships.

The nodes are computed one by one in the file's order with the file's own numbers, all floats as float32. Quantizing and
dequantizing is computed as in the file, with gradients that pass the rounding (`fake_quantize`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.robustness.onnx_module.fake_quantize import KNOWN, Node
from edgeprune.robustness.onnx_module.plan import SHAPED, Plan, Step, compute, plan

# How far answers in a batch may be from those one by one: a share of how far the images are from each other, and,
# where all are answered alike, of the largest logit.
APART, ROUNDING = 1e-3, 1e-5
TRIED = 3


def to_torch(model: ModelProto, *, rounding: bool = True) -> nn.Module:
    """The network of an ONNX file in torch: pixels float32 (N, C, H, W) to logits float32 (N, K), for any N.

    Weights that the file dequantizes are dequantized once. Values that are float16 in the file are float32 here, as
    ONNX Runtime computes them on a CPU. All numbers are buffers: `.to(device)` moves them, and nothing is trained.

    Args:
        rounding: False leaves out the rounding of activations and keeps their ranges: the float network that a
            quantized file stands for.
    """
    found = _OnnxModule(plan(model, rounding=rounding))
    # Rounding turns a difference of 1e-7 into a whole step here and there, which would hide what is looked for.
    smooth = found if not rounding else _OnnxModule(plan(model, rounding=False))
    found.alone = found.batch > 0 and not _takes_batches(smooth)
    return found.eval()


class _Layer(nn.Module):
    """One node; a module, so that hooks see what it answers as of any layer."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *x: Tensor | None) -> Any:
        made = compute(self.node, x)
        return made[0] if len(made) == 1 else made

    def extra_repr(self) -> str:
        return f"{self.node.op} {self.node.name}"


class _OnnxModule(nn.Module):
    """The steps of a plan. batch: of the file, 0 where it is free; alone: only batches of that size come out right."""

    def __init__(self, steps: Plan) -> None:
        super().__init__()
        self.plan, self.alone = replace(steps, numbers={}), False
        self.batch = sum(steps.shape[:1])
        self.layers = nn.ModuleList(_Layer(step.node) for step in steps.steps)
        # Whole numbers are sizes and places, which Python reads: they stay on the CPU.
        self.sizes = {name: t for name, t in steps.numbers.items() if not t.is_floating_point()}
        self.places = {name: f"number{i}" for i, name in enumerate(steps.numbers) if name not in self.sizes}
        for name, place in self.places.items():
            self.register_buffer(place, steps.numbers[name])

    def forward(self, x: Tensor) -> Tensor:
        if not self.alone or len(x) == self.batch:
            return self._at_once(x)
        missing = -len(x) % self.batch
        filled = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
        return torch.cat([self._at_once(part) for part in filled.split(self.batch)])[: len(x)]

    def _given(self, step: Step, values: Mapping[str, Tensor], images: int) -> list[Tensor | None]:
        given = [values[name] if name else None for name in step.inputs]
        if self._is_scaled(step):
            given[1] = self._scaled(self.sizes[step.inputs[1]], images)
        return given

    def _at_once(self, x: Tensor) -> Tensor:
        numbers = {name: self.get_buffer(place) for name, place in self.places.items()}
        values = {self.plan.input: x, **self.sizes, **numbers}
        for step, layer in zip(self.plan.steps, self.layers, strict=True):
            made = layer(*self._given(step, values, len(x)))
            values.update(zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=False))
            for name in step.done:
                del values[name]
        return values[self.plan.output]

    def _is_scaled(self, step: Step) -> bool:
        known = step.node.get(KNOWN, {})
        shaped = self.batch > 0 and step.node.op in SHAPED
        return shaped and 1 not in known and step.inputs[1] in self.sizes

    def _scaled(self, shape: Tensor, images: int) -> Tensor:
        """A shape that was written for the file's batch, for so many images: they are what changes slowest."""
        if not len(shape) or shape[0] <= 0 or int(shape[0]) % self.batch:
            return shape
        return torch.cat([shape[:1] // self.batch * images, shape[1:]])


def _takes_batches(network: _OnnxModule) -> bool:
    """Whether it answers a batch of another size as it answers each image; a file may mix axes otherwise."""
    shape = network.plan.shape
    if 0 in shape:
        return True
    generator = torch.Generator().manual_seed(0)
    base = torch.rand((TRIED, *shape[1:]), generator=generator)
    images = base * torch.linspace(0.2, 1, TRIED).view(-1, *[1] * (len(shape) - 1))
    with torch.no_grad():
        rows = [network._at_once(image.expand(shape))[:1] for image in images]
        singly = torch.cat(rows)
        try:
            together = network._at_once(images)
        except UnsupportedModel:
            return False
    if together.shape != singly.shape:
        return False
    apart = float((singly - singly.roll(1, 0)).abs().max())
    off = float((together - singly).abs().max())
    return off <= max(APART * apart, ROUNDING * float(singly.abs().max()))
