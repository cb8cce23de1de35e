"""What a bare ONNX file takes and gives, and which of its outputs are the logits; and a plain file of just that."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from edgeprune.data import Split
from edgeprune.errors import MissingDependency, ModelError, UnsupportedModel, UsageError
from edgeprune.measure import alone
from edgeprune.measure.evaluate import balanced, beats_guessing, check_scales
from edgeprune.models import TWO_LINES, image_shape
from edgeprune.onnx_graph import (
    ONNX_ERRORS,
    View,
    add_constant,
    add_node,
    copied,
    data_files,
    inputs_of,
    one_hot,
    opened,
    unused,
)
from edgeprune.records import InputSpec, Reading
from edgeprune.runtimes import OnnxRuntime
from edgeprune.serialization import scratch_folder

# What an output is, as far as its type, its shape and the node that makes it tell.
SCORES, LABELS, RANKS, VALUES, OTHER = (
    "scores",
    "class numbers",
    "class numbers in order",
    "top-k values",
    "other",
)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_WHOLE = (TensorProto.INT64, TensorProto.INT32)
_INPUTS = (*_FLOATS, TensorProto.DOUBLE, TensorProto.UINT8)
_CHANNELS = (1, 3, 4)
# An image of more numbers is none: a size in the file was damaged.
_LARGEST = 2**28
_MOST_CLASSES = 10**6
# So many images tell outputs apart.
_TRIED = 128
# Where several outputs name the classes of images, names tell.
_NAMED, _ASIDE = re.compile("logit", re.I), re.compile("aux|pre.?logit", re.I)
# What may stand between a Softmax or a TopK and the output.
_PASSING = ("Cast", "Flatten", "Identity", "Reshape", "Softmax", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Output:
    """An output of a file. kind: one of the five. size: K or k, numbers of one image. text: with type and shape."""

    name: str
    kind: str
    size: int
    text: str
    flat: bool = True


@dataclass(frozen=True)
class Judged:
    """A file from float32 (N, C, H, W) in [0, 1] to (N, K): the one that was given, or a copy of just that.

    notes: what of the file was taken, and how. scores: K are logits or probabilities; else they are 1 at the class
    that the file names and 0 elsewhere. sure: the output was named by the user or told by images.
    """

    path: Path
    spec: InputSpec
    output: Output
    notes: tuple[str, ...]
    sure: bool

    @property
    def scores(self) -> bool:
        """Whether there is something that an attack can follow."""
        return self.output.kind == SCORES


@dataclass(frozen=True)
class OnnxFile:
    """A file with one image as input, its numbers in `model`.

    folder: where copies are written. shape: of the image, (N, C, H, W) with N 0 where it is free. last: the file has C
    last. open: H or W are not in the file. beside: numbers lie in files beside it.
    """

    path: Path
    model: ModelProto
    folder: Path
    shape: tuple[int, int, int, int]
    last: bool
    open: bool
    beside: bool
    outputs: tuple[Output, ...] = ()

    @property
    def image(self) -> ValueInfoProto:
        """The input."""
        return inputs_of(self.model)[0]

    @property
    def kind(self) -> int:
        """The element type of the input."""
        return self.image.type.tensor_type.elem_type

    @property
    def listed(self) -> str:
        """All outputs with types and shapes."""
        return "; ".join(output.text for output in self.outputs)

    def spec(self, wanted: str = "") -> InputSpec:
        """What it takes and how many classes it gives; 0 classes where only images tell which output has them."""
        output = self.named(wanted) if wanted else self.outputs[0] if len(self.outputs) == 1 else None
        return InputSpec(
            self.shape[1:], output.size if output and output.kind == SCORES and output.size > 1 else 0
        )

    def named(self, name: str) -> Output:
        """The output of that name."""
        found = next((output for output in self.outputs if output.name == name), None)
        if found is None:
            raise UsageError(
                f"{self.path.name} has no output {name!r}; it has: {self.listed}", "name one of them"
            )
        if found.kind in (VALUES, OTHER):
            raise UsageError(*self.useless(found))
        return found

    def useless(self, output: Output) -> tuple[str, str]:
        """Why an output gives no accuracy, and what to do."""
        why = "neither logits (N, K) nor class numbers (N,)"
        if output.kind == VALUES:
            why = "the largest values in order, which do not say of which classes they are"
        return f"{self.path.name} gives {output.text}: {why}", "export the logits, (N, classes), as an output"

    def written(self, name: str, model: ModelProto | None = None) -> Path:
        """A copy in one file, called like the file. name: of a folder of its own."""
        out = self.folder / name / self.path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            out.write_bytes((model or self.model).SerializeToString(deterministic=True))
        except ONNX_ERRORS as error:
            raise UsageError(
                f"{self.path.name} with its data is no file of ONNX: {error}", "accepted: 2 GiB"
            ) from error
        return out

    @cached_property
    def timed(self) -> Path:
        """The file that is timed: itself, or where H and W are open a copy that has them."""
        return self.written("timed") if self.open else self.path

    @cached_property
    def alone(self) -> Path | None:
        """A copy with all numbers in it, or None where the file has them."""
        return None if not self.beside else self.written("alone")

    def with_output(self, output: Output, classes: int, *, logits: bool = False) -> Path:
        """A file from float32 (N, C, H, W) in [0, 1] to this output as (N, K); itself where it is so already."""
        name = _before_softmax(View(self.model), output.name) if logits else output.name
        plain = (
            not (self.open or self.beside or self.last) and self.kind in _FLOATS and len(self.outputs) == 1
        )
        if plain and output.kind == SCORES and output.flat and name == output.name:
            return self.path
        model = copied(self.model)
        _take_image(model, self)
        if output.kind in (LABELS, RANKS):
            name = one_hot(model, name, classes, ranked=output.kind == RANKS)
        elif not output.flat:
            name = add_node(model, "Flatten", [name], axis=1)
        _keep(
            model,
            name,
            TensorProto.FLOAT,
            [self.shape[0] or "n", output.size if output.kind == SCORES else classes],
        )
        return self.written(f"{self.outputs.index(output)}{'-logits' * logits}", model)

    def judged(self, split: Split, classes: int, *, wanted: str = "", attacked: bool = False) -> Judged:
        """What is asked about images, and what a reader must know of it."""
        if wanted:
            output, why = self.named(wanted), "as --output says"
        elif len(self.outputs) == 1:
            output, why = self.outputs[0], ""
            if output.kind in (VALUES, OTHER):
                raise UsageError(*self.useless(output))
        else:
            output, why = self._told(split, classes)
        if attacked and output.kind != SCORES:
            raise UsageError(
                f"{self.path.name} can't be attacked: {output.text} gives class numbers and no logits",
                "export the logits, (N, classes), as an output; without --attack its accuracy is measured",
            )
        if output.kind == SCORES and output.size < 2:
            raise UnsupportedModel(
                f"{self.path.name} gives one number for each image, {output.text}; accepted: logits of two classes or "
                "more, or class numbers",
                f"{TWO_LINES}  # and export it again",
            )
        path = self.with_output(output, classes, logits=attacked)
        spec = InputSpec(self.shape[1:], output.size if output.kind == SCORES else classes)
        x = split.take(torch.arange(min(len(split), alone.IMAGES)))
        alone.check(path, x, spec.classes)
        return Judged(path, spec, output, tuple(self._notes(output, why, attacked)), bool(why))

    def _notes(self, output: Output, why: str, attacked: bool) -> Sequence[str]:
        notes, image = [], _text(self.image)
        if self.last:
            notes.append(f"The input {image} has the channels last: images were given so.")
        if self.kind == TensorProto.UINT8:
            notes.append(
                f"The input {image} takes bytes: pixels were given as 0 to 255, without a mean and a std."
            )
        if why:
            notes.append(f"Of the outputs {self.listed}, the classes are read from {output.name!r}, {why}.")
        if output.kind in (LABELS, RANKS):
            first = "; the first of each image counts" if output.kind == RANKS else ""
            notes.append(f"The output {output.text} gives class numbers and no logits{first}.")
        elif not output.flat:
            notes.append(f"The output {output.text} was read as (N, {output.size}).")
        elif _before_softmax(View(self.model), output.name) != output.name:
            more = "; what was attacked are the logits before it" if attacked else ""
            notes.append(f"The output {output.text} gives probabilities: it comes from a Softmax{more}.")
        return notes

    def _told(self, split: Split, classes: int) -> tuple[Output, str]:
        few = balanced(split, _TRIED, 0)
        x, labels = few.take(torch.arange(len(few))).numpy(), few.labels.numpy()
        named: dict[Output, Any] = {}
        for output in self.outputs:
            if output.kind in (LABELS, RANKS) or (output.kind == SCORES and output.size >= classes):
                answers = OnnxRuntime().open(self.with_output(output, classes), 1)(x)
                right = np.isfinite(answers).all(axis=1) & (answers.argmax(axis=1) == labels)
                if beats_guessing(int(right.sum()), few.labels):
                    named[output] = answers
        scores = {o: a for o, a in named.items() if o.kind == SCORES} or named
        left = [o for o, a in scores.items() if not any(_follows(a, b) for b in scores.values())]
        why = f"which alone names the classes of {len(few)} images better than guessing"
        if len(left) > 1:
            plain = [o for o in left if not _ASIDE.search(o.name)]
            left = [o for o in plain if len(plain) == 1 or _NAMED.search(o.name)]
            why = f"which names the classes of {len(few)} images, as others do that are not called so"
        if len(left) != 1:
            who = ", ".join(repr(o.name) for o in named) or "none"
            raise UsageError(
                f"it is not known which output of {self.path.name} has the logits; it has: {self.listed}; "
                f"better than guessing at the classes of {len(few)} images: {who}",
                "name the output: --output NAME",
            )
        return left[0], why


def look(path: Path, folder: Path, given: str = "") -> OnnxFile:
    """An ONNX file, its input and its outputs.

    Args:
        folder: where copies may be written. given: "CxHxW", where the file leaves them open.
    """
    model = opened(path)
    check_scales(path, model)
    inputs = inputs_of(model)
    dims = _dims(inputs[0]) if len(inputs) == 1 else None
    if dims is None or len(dims) != 4 or inputs[0].type.tensor_type.elem_type not in _INPUTS:
        found = "; ".join(_text(value) for value in inputs) or "none"
        raise UsageError(
            f"{path} must take one image, float or uint8 (N, C, H, W) or (N, H, W, C); its inputs: {found}",
            "export it with the image as its only input",
        )
    if not model.graph.output:
        raise UsageError(f"{path} has no output", "export it with the logits, (N, classes), as an output")
    last = dims[3] in _CHANNELS and dims[1] not in _CHANNELS
    shape = _image_shape(path, inputs[0], last, given)
    own = (shape[2], shape[3], shape[1]) if last else shape[1:]
    for dim, size in zip(inputs[0].type.tensor_type.shape.dim[1:], own, strict=True):
        dim.dim_value = size
    found = OnnxFile(path, model, folder, shape, last, not all(dims[1:]), bool(data_files(path)))
    return replace(found, outputs=tuple(_output(found, value) for value in model.graph.output))


def input_of(path: Path) -> InputSpec:
    """What a file with one output takes and gives."""
    with scratch_folder() as folder:
        return look(path, folder).spec()


def check(reading: Reading, judged: Judged, split: Split) -> None:
    """Refuse an accuracy that nothing shows to be one: a single output of another width, no better than guessing."""
    classes = int(split.labels.max()) + 1
    if judged.sure or not judged.scores or judged.spec.classes == classes or reading.value is None:
        return
    if not beats_guessing(round(reading.value * reading.n), split.labels, share=0.0):
        raise UsageError(
            f"{judged.output.text} of {judged.path.name} names the classes of {reading.n} images no better than "
            f"guessing, and there are {classes} classes: it may not be the logits",
            f"if it is, say so: --output {judged.output.name}; or look at the normalization, which a file has inside",
        )


def _image_shape(path: Path, image: ValueInfoProto, last: bool, given: str) -> tuple[int, int, int, int]:
    """(N, C, H, W) of the input, what is open as --input says."""
    n, *rest = _dims(image) or [0]
    known = (rest[2], rest[0], rest[1]) if last else tuple(rest)
    wish = image_shape(given) if given else known
    shape = tuple(size or other for size, other in zip(known, wish, strict=True))
    if given and shape != wish:
        raise UsageError(f"--input {given}: {path} takes {_text(image)}", "leave --input out")
    if not all(shape):
        raise UsageError(
            f"{path} takes {_text(image)}, whose size is open", "give it: --input CxHxW, as in 3x224x224"
        )
    if prod(shape) * (n or 1) > _LARGEST:
        raise UsageError(
            f"{path} takes {_text(image)}: more than {_LARGEST} numbers at once", "is the file damaged?"
        )
    return n, shape[0], shape[1], shape[2]


def _output(file: OnnxFile, value: ValueInfoProto) -> Output:
    """What an output is; the file is run where it does not say the shape."""
    kind, dims, text, rows = value.type.tensor_type.elem_type, _dims(value), _text(value), file.shape[0]
    if kind not in (*_FLOATS, TensorProto.DOUBLE, *_WHOLE):
        return Output(value.name, OTHER, 0, text)
    if dims is None or not all(dims[1:]):
        dims = list(_asked(file, value))
        text = f"{value.name!r} {_type(value)} {tuple(dims)}"
        rows = file.shape[0] or 2
    large = [size for size in dims[1:] if size != 1]
    size = prod(large)
    if len(large) > 1 or size > _MOST_CLASSES or (rows and dims[:1] not in ([rows], [0])) or not dims:
        return Output(value.name, OTHER, size, text)
    if kind in _WHOLE:
        return Output(value.name, RANKS if large else LABELS, size, text)
    if len(dims) == 1:
        return Output(value.name, OTHER, size, text)
    source = _source(View(file.model), value.name, ("TopK",))
    return Output(value.name, VALUES if source else SCORES, size, text, flat=len(dims) == 2)


def _asked(file: OnnxFile, value: ValueInfoProto) -> tuple[int, ...]:
    model = copied(file.model)
    _take_image(model, file)
    del model.graph.output[:]
    model.graph.output.append(value)
    rows = file.shape[0] or 2
    try:
        session = OnnxRuntime().open(file.written("asked", model), 1)
        return session.infer(np.full((rows, *file.shape[1:]), 0.5, np.float32)).shape
    except (MissingDependency, ModelError) as error:
        raise UsageError(
            f"{file.path} does not say how many classes it answers, and can't be asked: {error.message}",
            "write the number into the shape of its output: (N, classes)",
        ) from error


def _dims(value: ValueInfoProto) -> list[int] | None:
    kind = value.type.tensor_type
    return [max(0, dim.dim_value) for dim in kind.shape.dim] if kind.HasField("shape") else None


def _type(value: ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    if not value.type.HasField("tensor_type") or kind not in TensorProto.DataType.values():
        return "no tensor"
    return {"float": "float32", "double": "float64"}.get(
        name := TensorProto.DataType.Name(kind).lower(), name
    )


def _text(value: ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    words = [
        str(d.dim_value) if d.dim_value else d.dim_param if d.dim_param.isidentifier() else "?" for d in dims
    ]
    return f"{value.name!r} {_type(value)} ({', '.join(words)})"


def _keep(model: ModelProto, name: str, kind: int, dims: Sequence[int | str]) -> None:
    same = [
        value for value in model.graph.output if value.name == name and len(_dims(value) or ()) == len(dims)
    ]
    del model.graph.output[:]
    model.graph.output.extend(same or [helper.make_tensor_value_info(name, kind, dims)])


def _take_image(model: ModelProto, file: OnnxFile) -> None:
    """Make the file take float32 (N, C, H, W) in [0, 1], whatever its input was; in place."""
    image, graph = inputs_of(model)[0], model.graph
    bytes_, narrow = file.kind == TensorProto.UINT8, file.kind in _FLOATS
    if narrow and not file.last:
        return
    name, dims = unused(View(model), "pixels"), [file.shape[0] or "n", *file.shape[1:]]
    kind = file.kind if narrow else TensorProto.FLOAT
    nodes: list[NodeProto] = []
    value = name
    if file.last:
        nodes.append(
            helper.make_node("Transpose", [value], [f"{name}.last"], f"{name}.last", perm=[0, 2, 3, 1])
        )
        value = f"{name}.last"
    if bytes_:
        # Exact, and unlike a Cast it has gradients in the network that attacks read from the file.
        scale = [add_constant(model, np.float32(1 / 255)), add_constant(model, np.uint8(0))]
        nodes.append(helper.make_node("QuantizeLinear", [value, *scale], [image.name], f"{name}.bytes"))
    elif not narrow:
        nodes.append(helper.make_node("Cast", [value], [image.name], f"{name}.cast", to=file.kind))
    else:
        nodes[-1].output[0] = image.name
    at = next(i for i, given in enumerate(graph.input) if given.name == image.name)
    graph.input[at].CopyFrom(helper.make_tensor_value_info(name, kind, dims))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _source(view: View, name: str, ops: Sequence[str]) -> NodeProto | None:
    node = view.producers.get(name)
    for _ in view.graph.node:  # no more steps than nodes: a broken graph may go in a circle
        if node is None or node.op_type in ops:
            break
        node = view.producers.get(node.input[0]) if node.op_type in _PASSING and node.input else None
    return node if node is not None and node.op_type in ops else None


def _follows(answers: Any, others: Any) -> bool:
    """Whether scores (N, K) are the softmax of others."""
    if answers is others or answers.shape != others.shape:
        return False
    return bool(torch.allclose(torch.from_numpy(answers), torch.from_numpy(others).softmax(1), atol=1e-4))


def _before_softmax(view: View, name: str) -> str:
    """What the Softmax that makes a value reads; else its own name."""
    node = view.producers.get(name)
    return node.input[0] if node is not None and node.op_type == "Softmax" else name
