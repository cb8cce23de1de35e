"""A node of an ONNX graph, and how its inputs and attributes are read by what computes it in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgeprune.errors import UnsupportedModel

__all__ = ["KNOWN", "Inputs", "Node", "Operator", "at", "ints", "need", "number", "read", "refuse"]

# What is noted at a node: inputs that no image changes, place -> their numbers as Python has them. To read them out of
# tensors would wait for a GPU, and torch.export can't.
KNOWN = "twin.known"

Inputs = Sequence[Tensor | None]


@dataclass(frozen=True)
class Node:
    """One node. options: its attributes. opset: the version of the operator set. outputs: how many it has."""

    op: str
    name: str
    options: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def get(self, option: str, default: Any) -> Any:
        """An attribute, or what the operator's document says where it is left out."""
        return self.options.get(option, default)


Operator = Callable[[Node, Inputs], Tensor | tuple[Tensor, ...]]


def refuse(node: Node, why: str) -> UnsupportedModel:
    """That a node can't be computed in torch."""
    return UnsupportedModel(f"{node.op} {node.name!r} of the file has no form in torch: {why}")


def at(x: Inputs, place: int) -> Tensor | None:
    """An optional input."""
    return x[place] if place < len(x) else None


def need(x: Inputs, place: int) -> Tensor:
    """An input that the operator's document says is there."""
    found = at(x, place)
    if found is None:
        raise ValueError(f"input {place} is missing")
    return found


def ints(node: Node, x: Inputs, place: int, option: str) -> list[int] | None:
    """Whole numbers that are an input in newer operator sets and an attribute in older ones; None: left out."""
    found = read(node, x, place)
    if found is not None:
        return [int(n) for n in found]
    return None if option not in node.options else [int(n) for n in node.options[option]]


def read(node: Node, x: Inputs, place: int) -> list[Any] | None:
    """An input's numbers, one after the other, as Python has them; None: left out."""
    known = node.get(KNOWN, {})
    found = at(x, place)
    return known[place] if place in known else None if found is None else found.reshape(-1).tolist()


def number(node: Node, x: Inputs, place: int) -> Any:
    """An input that is one number, as Python has it; None: left out."""
    found = read(node, x, place)
    if found is not None and len(found) != 1:
        raise ValueError(f"input {place} is {len(found)} numbers, accepted is one")
    return None if found is None else found[0]
