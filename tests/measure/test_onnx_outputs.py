"""Which ONNX files are taken to be measured, which of their outputs the logits are, and what lies beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeprune.data.collection import Split, in_memory
from edgeprune.devices.fake import Fake
from edgeprune.errors import ModelError, ParityError, UnsafeModel, UsageError
from edgeprune.measure import counts
from edgeprune.measure.onnx_outputs import Judged, check, input_of, look
from edgeprune.measure.place import held
from edgeprune.onnx_graph.index import opened
from edgeprune.records import Reading
from edgeprune.runtimes.onnxruntime import OnnxRuntime


def quantized(scale: float) -> onnx.ModelProto:
    """(1, 1, 2, 2) -> quantize, dequantize, flatten -> (1, 4)."""
    constants = {"scale": np.float32(scale), "zero": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="in/Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="in/DQ"),
        helper.make_node("Flatten", ["d"], ["y"], name="flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -0.1])
def test_a_scale_that_means_nothing_is_refused_with_the_node(scale: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized(scale), path)
    with pytest.raises(ParityError, match="QuantizeLinear 'in/Q'") as caught:
        input_of(path)
    assert "finite and above 0" in caught.value.message


def test_a_whole_file_says_what_it_eats_and_an_empty_one_that_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized(0.1), path)
    assert input_of(path).shape == (1, 2, 2)
    assert input_of(path).classes == 4
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="no graph in it"):
        input_of(path)


def flat(shape: list[int | str] | None, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """(n, 1, 2, 2) -> flatten -> (n, 4), with this shape of the output in the file."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Flatten", ["x"], ["y"], name="flat")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(0, np.int64), "zero")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    made.ir_version = 10
    return made


@pytest.mark.parametrize("shape", [["n", "k"], ["n", 4], None])
def test_a_file_that_leaves_the_number_of_classes_open_is_asked(
    shape: list[int | str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(flat(shape), path)
    assert (input_of(path).shape, input_of(path).classes) == ((1, 2, 2), 4)


def test_a_file_that_leaves_it_open_and_does_not_answer_is_refused_with_what_it_does(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(flat(["n", "k"], [helper.make_node("NoSuchThing", ["x"], ["y"])]), path)
    with pytest.raises(UsageError, match="does not say how many classes") as caught:
        input_of(path)
    assert "(N, classes)" in caught.value.hint
    onnx.save(flat(None, [helper.make_node("Identity", ["x"], ["y"])]), path)
    assert input_of(path).classes == 0
    with pytest.raises(UsageError, match=r"gives 'y' float32 \(2, 1, 2, 2\): neither logits"):
        judged(path)


CLASSES = 4


def bright(count: int = 40) -> Split:
    """Images of 2x2 pixels; the class is the brightest pixel."""
    labels = torch.arange(count) % CLASSES
    pixels = torch.full((count, CLASSES), 20, dtype=torch.uint8).scatter(1, labels[:, None], 200)
    return in_memory("test", pixels.view(count, 1, 2, 2), labels)


def mirror(
    path: Path,
    outputs: dict[str, str],
    kind: int = TensorProto.FLOAT,
    shape: tuple[int | str, ...] = ("n", 1, 2, 2),
) -> Path:
    """A network whose logits are its pixels. outputs: name -> what it is."""
    make = helper.make_node
    nodes = [make("Cast", ["x"], ["f"], to=TensorProto.FLOAT), make("Flatten", ["f"], ["z"], axis=1)]
    made = {
        "logits": ([make("Identity", ["z"], ["OUT"])], TensorProto.FLOAT, ["n", 4]),
        "near": ([make("Mul", ["z", "two"], ["OUT"])], TensorProto.FLOAT, ["n", 4]),
        "turned": ([make("Gather", ["z", "turn"], ["OUT"], axis=1)], TensorProto.FLOAT, ["n", 4]),
        "wide": ([make("Concat", ["z", "z"], ["OUT"], axis=1)], TensorProto.FLOAT, ["n", 8]),
        "softmax": ([make("Softmax", ["z"], ["OUT"], axis=1)], TensorProto.FLOAT, ["n", 4]),
        "4d": ([make("Reshape", ["z", "four"], ["OUT"])], TensorProto.FLOAT, ["n", 4, 1, 1]),
        "label": ([make("ArgMax", ["z"], ["OUT"], axis=1)], TensorProto.INT64, ["n", 1]),
        "values": ([make("TopK", ["z", "k"], ["OUT", "OUT.i"])], TensorProto.FLOAT, ["n", 3]),
        "indices": ([make("TopK", ["z", "k"], ["OUT.v", "OUT"])], TensorProto.INT64, ["n", 3]),
    }
    infos = []
    for name, what in outputs.items():
        for node in made[what][0]:
            node.output[:] = [o.replace("OUT", name) for o in node.output]
            nodes.append(node)
        infos.append(helper.make_tensor_value_info(name, made[what][1], made[what][2]))
    constants = {
        "four": np.array([-1, 4, 1, 1], np.int64),
        "k": np.array([3], np.int64),
        "turn": np.array([1, 2, 3, 0], np.int64),
    }
    numbers = [
        numpy_helper.from_array(np.asarray(v), n) for n, v in {**constants, "two": np.float32(2)}.items()
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, shape)], infos, numbers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def judged(path: Path, wanted: str = "", *, attacked: bool = False) -> Judged:
    return look(path, path.parent / "copies").judged(bright(), CLASSES, wanted=wanted, attacked=attacked)


def right(found: Judged) -> float:
    """The share of images that the judged file names right."""
    split = bright()
    x = split.take(torch.arange(len(split))).numpy()
    return float((OnnxRuntime().open(found.path, 1)(x).argmax(axis=1) == split.labels.numpy()).mean())


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        ({"a": "turned", "b": "logits"}, "b"),
        ({"b": "logits", "a": "turned"}, "b"),
        ({"aux": "near", "out": "logits"}, "out"),
        ({"aux_logits": "near", "logits": "logits"}, "logits"),
        ({"p": "softmax", "s": "logits"}, "s"),
        ({"values": "values", "indices": "indices"}, "indices"),
        ({"a": "turned", "label": "label"}, "label"),
    ],
)
def test_the_logits_are_told_by_labels_and_names(outputs: dict[str, str], name: str, tmp_path: Path) -> None:
    path = mirror(tmp_path / "model.onnx", outputs)
    found = judged(path)
    assert found.output.name == name
    assert right(found) == 1.0
    assert any(repr(name) in note for note in found.notes)


def test_outputs_that_can_not_be_told_apart_are_named_and_one_can_be_asked_for(tmp_path: Path) -> None:
    path = mirror(tmp_path / "model.onnx", {"head": "logits", "other": "near"})
    with pytest.raises(UsageError, match=r"'head' float32 \(n, 4\); 'other' float32 \(n, 4\)") as caught:
        judged(path)
    assert "--output NAME" in caught.value.hint
    assert right(judged(path, "other")) == 1.0
    with pytest.raises(UsageError, match="no output 'nothing'; it has: 'head'"):
        judged(path, "nothing")


@pytest.mark.parametrize("what", ["logits", "softmax", "4d", "label", "indices"])
@pytest.mark.parametrize(
    "kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8]
)
@pytest.mark.parametrize("shape", [("n", 1, 2, 2), ("n", 2, 2, 1), (3, 1, 2, 2)])
def test_inputs_and_outputs_of_all_forms_are_read(
    what: str, kind: int, shape: tuple[int | str, ...], tmp_path: Path
) -> None:
    found = judged(mirror(tmp_path / "model.onnx", {"out": what}, kind, shape))
    assert right(found) == 1.0
    assert found.spec.shape == (1, 2, 2)
    said = " ".join(found.notes)
    assert ("channels last" in said) == (shape[3] == 1)
    assert ("takes bytes" in said) == (kind == TensorProto.UINT8)
    assert ("probabilities" in said) == (what == "softmax")
    assert ("class numbers" in said) == (what in ("label", "indices"))


def test_top_k_values_and_labels_are_not_taken_for_logits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the largest values in order"):
        judged(mirror(tmp_path / "values.onnx", {"out": "values"}), "out")
    with pytest.raises(UsageError, match="can't be attacked: 'out' int64"):
        judged(mirror(tmp_path / "label.onnx", {"out": "label"}), attacked=True)
    logits = judged(mirror(tmp_path / "softmax.onnx", {"out": "softmax"}), attacked=True)
    assert OnnxRuntime().open(logits.path, 1)(np.ones((1, 1, 2, 2), np.float32)).sum() == 4.0


def test_a_sole_output_of_another_width_that_only_guesses_is_no_accuracy(tmp_path: Path) -> None:
    found = judged(mirror(tmp_path / "model.onnx", {"embedding": "wide"}))
    reading = Reading("clean_accuracy", 1.0, "fraction", len(bright()), None, "local", "model.onnx", {})
    check(reading, found, bright())
    with pytest.raises(UsageError, match="may not be the logits"):
        check(replace(reading, value=0.25), found, bright())


def test_a_class_number_that_is_no_class_is_never_right(tmp_path: Path) -> None:
    file = look(mirror(tmp_path / "model.onnx", {"out": "label"}), tmp_path / "copies")
    answers = OnnxRuntime().open(file.with_output(file.outputs[0], 2), 1)(
        bright(4).take(torch.arange(4)).numpy()
    )
    assert np.isfinite(answers).all(axis=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("what", "message"), [("no output", "has no output"), ("two inputs", "'x' float32.*'more' float32")]
)
def test_a_file_without_outputs_or_with_several_inputs_is_refused(
    what: str, message: str, tmp_path: Path
) -> None:
    model = onnx.load(mirror(tmp_path / "model.onnx", {"out": "logits"}))
    if what == "no output":
        del model.graph.output[:]
    else:
        model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=message):
        judged(tmp_path / "model.onnx")


def test_an_open_height_is_asked_for_and_taken_from_the_user(tmp_path: Path) -> None:
    path = mirror(tmp_path / "model.onnx", {"out": "logits"}, shape=("n", 1, "h", "w"))
    with pytest.raises(UsageError, match="whose size is open") as caught:
        look(path, tmp_path)
    assert "--input" in caught.value.hint
    file = look(path, tmp_path / "copies", "1x2x2")
    assert OnnxRuntime().open(file.timed, 1).input_shape == (None, 1, 2, 2)
    with pytest.raises(UsageError, match="--input 3x2x2"):
        look(path, tmp_path / "copies", "3x2x2")


def outside(folder: Path, **entries: str) -> Path:
    """A file whose weights lie in w.bin beside it; entries: what it says of them, instead of the truth."""
    folder.mkdir()
    model = onnx.load(mirror(folder / "model.onnx", {"out": "near"}))
    big = numpy_helper.from_array(np.ones((64, 4), np.float32), "unused")
    model.graph.initializer.append(big)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=512)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"location": "gone.bin"}, UsageError),
        ({"location": "../w.bin"}, UnsafeModel),
        ({"location": "/dev/zero"}, UnsafeModel),
        ({"location": ""}, UnsafeModel),
        ({"location": "link.bin"}, UnsafeModel),
        ({"offset": "4096"}, ModelError),
        ({"offset": "-1"}, ModelError),
        ({"offset": "x"}, ModelError),
        ({"length": "8"}, ModelError),
    ],
)
def test_data_that_are_missing_short_or_outside_the_folder_are_refused(
    entries: dict[str, str], error: type[Exception], tmp_path: Path
) -> None:
    path = outside(tmp_path / "a", **entries)
    (tmp_path / "a" / "link.bin").symlink_to(tmp_path / "a" / "w.bin")
    with pytest.raises(error, match=r"model.onnx: the data of 'unused'") as caught:
        look(path, tmp_path)
    assert entries.get("location", "w.bin") in str(caught.value)


def test_data_beside_a_file_count_in_its_size_and_travel_with_it(tmp_path: Path) -> None:
    files = {name: outside(tmp_path / name) for name in ("dense", "compressed")}
    one = files["dense"]
    assert counts.size(one).value == one.stat().st_size + one.with_name("w.bin").stat().st_size
    with held(Fake(), files) as there:
        for path in there.values():
            assert OnnxRuntime().open(Path(path), 1).input_shape == (None, 1, 2, 2)
    assert right(judged(one)) == 1.0
    assert not [t for t in opened(judged(one).path).graph.initializer if t.external_data]


def test_a_name_that_is_not_utf8_is_told_and_not_met_later(tmp_path: Path) -> None:
    path = mirror(tmp_path / "model.onnx", {"out": "logits"})
    path.write_bytes(path.read_bytes().replace(b"Flatten", b"Fl\xd1tten"))
    with pytest.raises(UsageError, match=r"'Fl\\xd1tten', which is not UTF-8"):
        look(path, tmp_path)


def test_an_output_of_billions_of_classes_is_none(tmp_path: Path) -> None:
    model = quantized(0.1)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2**31
    onnx.save(model, tmp_path / "m.onnx")
    found = look(tmp_path / "m.onnx", tmp_path)
    assert found.spec().classes == 0
    with pytest.raises(UsageError, match=r"\(1, 2147483648\): neither logits"):
        found.named("y")
