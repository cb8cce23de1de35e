"""Loading from every kind of file: the same network comes out, and every wrong file gets its own clear message."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import paths
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeprune import serialization
from edgeprune.errors import EdgepruneError, ModelError, UnsafeModel, UnsupportedModel, UsageError
from edgeprune.models import architectures, bundle
from edgeprune.models.bundle import deployed, from_module, load_bundle, sha256_file
from edgeprune.recipe.schema import ModelTable
from edgeprune.records import InputSpec, Plan, Source

ARCHITECTURE = """
from torch import nn

def net(classes=5):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )
"""
SHAPE = "3x12x12"


def make(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    nn.init.uniform_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 0.5, 1.5)
    return net.eval()


@pytest.fixture
def arch(tmp_path: Path) -> str:
    path = tmp_path / "architecture.py"
    path.write_text(ARCHITECTURE)
    return f"{path}:net"


def as_pickle(net: nn.Module, path: Path) -> None:
    torch.save(net, path)


def as_state_dict(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path)


def as_old_state_dict(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)


def as_checkpoint(net: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "model": {"state_dict": nn.DataParallel(net).state_dict()}}, path)


def as_safetensors(net: nn.Module, path: Path) -> None:
    save_file(net.state_dict(), path)


def as_pt2(net: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(net, (torch.rand(1, 3, 12, 12),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def as_torchscript(net: nn.Module, path: Path) -> None:
    torch.jit.trace(net, torch.rand(2, 3, 12, 12)).save(str(path))


KINDS: dict[str, Callable[[nn.Module, Path], None]] = {
    "pickle": as_pickle,
    "state_dict": as_state_dict,
    "old_state_dict": as_old_state_dict,
    "checkpoint": as_checkpoint,
    "safetensors": as_safetensors,
    "pt2": as_pt2,
}


def written(kind: str, path: Path, net: nn.Module | None = None) -> Path:
    KINDS[kind](net or make(), path)
    return path


def table(path: Path, arch: str = "", **more: Any) -> ModelTable:
    return ModelTable(path=str(path), **{"arch": arch, "input": SHAPE, **more})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_network_that_was_saved(kind: str, tmp_path: Path, arch: str) -> None:
    # The name says nothing: what a file is, is told by its content.
    path = written(kind, tmp_path / "model.bin")
    needs_arch = kind in ("state_dict", "old_state_dict", "checkpoint", "safetensors")
    bundle = load_bundle(table(path, arch if needs_arch else ""))
    x = torch.rand(4, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(bundle.module(x), make()(x))
    assert bundle.module.state_dict().keys() == make().state_dict().keys()
    assert not bundle.module.training and all(p.requires_grad for p in bundle.module.parameters())
    assert len(list(bundle.module.parameters())) == len(list(make().parameters()))
    assert bundle.input == InputSpec((3, 12, 12), 5) and bundle.plans == ()
    source = bundle.source
    assert source.path == str(path.resolve()) and source.sha256 == sha256_file(path)
    assert source.kind == {"old_state_dict": "state_dict", "checkpoint": "state_dict"}.get(kind, kind)
    assert source.arch == (arch if needs_arch else "")


def test_a_relative_architecture_file_is_remembered_with_its_whole_path(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = load_bundle(table(written("state_dict", Path("a.pt")), "architecture.py:net"))
    assert bundle.source.arch == arch and bundle.source.path == str(tmp_path / "a.pt")


def test_normalization_goes_inside_and_pixels_stay_outside(tmp_path: Path) -> None:
    path = written("pickle", tmp_path / "a.pt")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    bundle = load_bundle(table(path, mean=mean, std=std))
    pixels = torch.rand(3, 3, 12, 12)
    wanted = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.equal(deployed(bundle)(pixels), make()(wanted))
        assert torch.equal(bundle.module(pixels), make()(pixels))
    assert deployed(bundle).get_submodule("network") is bundle.module


@pytest.mark.parametrize(
    ("spec", "normalized"), [("torchvision:squeezenet1_1", False), ("timm:mobilenetv3_small_050", True)]
)
def test_a_network_of_a_zoo_needs_no_other_flag(spec: str, normalized: bool, tmp_path: Path) -> None:
    try:
        net = architectures.architecture(f"{spec}?num_classes=6")
    except EdgepruneError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    bundle = load_bundle(ModelTable(path=str(written("pickle", tmp_path / "a.pth", net))))
    assert bundle.input.shape == (3, 224, 224) and bundle.input.classes == 6
    assert bool(bundle.input.mean) is normalized


def test_auxiliary_answers_in_training_are_left_out_when_deployed() -> None:
    class Answers(NamedTuple):
        logits: Tensor
        aux: Tensor

    class Auxiliary(nn.Module):
        def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.conv, self.wrap = nn.Conv2d(3, 4, 1), wrap

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x).mean((2, 3))
            return self.wrap(y) if self.training else y

    x = torch.rand(2, 3, 8, 8)
    wraps = (
        lambda y: Answers(y, 2 * y),
        lambda y: (y, 2 * y),
        lambda y: {"aux": 2 * y, "logits": y},
        lambda y: y,
    )
    for wrap in wraps:
        bundle = from_module(Auxiliary(wrap), x)
        network = deployed(bundle)
        assert torch.equal(network.train()(x), network.eval()(x))


def error_of(path: Path | str, arch: str = "", **more: Any) -> EdgepruneError:
    with pytest.raises(EdgepruneError) as caught:
        load_bundle(table(Path(path), arch, **more))
    return caught.value


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    error = error_of(tmp_path / "none.pt")
    assert isinstance(error, UsageError) and "no such file" in error.message


def test_no_model_at_all_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no model was given"):
        load_bundle(ModelTable())


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "a.pt", "is empty"),
        (b"", "a.pt2", "is empty"),
        (b"\x00" * 100, "a.pt", "corrupt or no model file"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x031.0", "a.onnx", "ONNX graph"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x031.0", "a.pt", "ONNX graph"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 99, "a.h5", "HDF5"),
        (b"\x1c\x00\x00\x00TFL3" + b"0" * 99, "a.tflite", "TensorFlow Lite"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a.pt", "git lfs pull"),
        (b"<!doctype html><html>", "a.pt", "web page"),
        (b"import torch\n", "a.py", "--arch"),
        (b"\x1f\x8b" + b"0" * 99, "a.pt.gz", "gzip"),
        (b"not tensors at all", "a.safetensors", "corrupt or truncated safetensors"),
    ],
)
def test_a_file_that_is_no_model_is_told_by_what_it_is(
    content: bytes, name: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = error_of(path)
    assert isinstance(error, ModelError) and words in f"{error.message} {error.hint}"
    assert str(path) in error.message


def test_an_onnx_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"anything")
    error = error_of(path)
    assert isinstance(error, UnsupportedModel)
    assert "can't be trained or cut" in error.message and "torch.export" in error.hint


def test_a_zip_of_something_else_is_not_called_truncated(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        out.writestr("x.npy", b"1")
    assert "holds no model: x.npy" in error_of(tmp_path / "a.pt").message


@pytest.mark.parametrize("kind", ["pickle", "pt2", "safetensors", "old_state_dict"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.98])
def test_a_truncated_file_is_called_so(kind: str, share: float, tmp_path: Path, arch: str) -> None:
    path = written(kind, tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    error = error_of(path, arch)
    assert isinstance(error, ModelError)
    assert any(word in error.message for word in ("truncated", "corrupt", "breaks off"))


def test_weights_without_an_architecture_say_which_flag_is_missing(tmp_path: Path) -> None:
    error = error_of(written("state_dict", tmp_path / "a.pt"))
    assert "0.weight, 0.bias" in error.message and "--arch" in error.hint and error.exit_code == 4


def test_weights_of_another_architecture_name_what_is_missing_and_what_is_too_much(
    tmp_path: Path, arch: str
) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(2, 2)).state_dict(), tmp_path / "a.pt")
    error = error_of(tmp_path / "a.pt", arch)
    assert "4 missing (1.running_mean, 1.running_var, 5.weight, 5.bias)" in error.message


def test_weights_of_other_shapes_name_both_and_suggest_the_number_of_classes(
    tmp_path: Path, arch: str
) -> None:
    error = error_of(written("state_dict", tmp_path / "a.pt", make(classes=7)), arch)
    assert "5.weight is 7x8, the architecture's is 5x8" in error.message
    assert f"{arch}?num_classes=7" in error.hint


@pytest.mark.parametrize("kind", ["pickle", "safetensors", "pt2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_with_nan_names_the_tensors_and_how_many(
    kind: str, value: float, tmp_path: Path, arch: str
) -> None:
    net = make()
    net[0].weight.data[0, 0, 0, :2] = value
    net[1].running_var[3] = value
    error = error_of(written(kind, tmp_path / "a.bin", net), arch)
    assert "0.weight (2 of 216)" in error.message and "1.running_var (1 of 8)" in error.message


def test_a_mask_of_infinities_that_is_not_saved_is_fine() -> None:
    net = make()
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
    assert from_module(net, torch.rand(1, 3, 12, 12)).input.classes == 5


def test_prefixes_of_wrappers_are_taken_off_and_told(
    tmp_path: Path, arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "edgeprune")
    load_bundle(table(written("checkpoint", tmp_path / "a.pt"), arch))
    assert "['model']['state_dict']" in caplog.text and "prefix 'module.'" in caplog.text


def test_tied_weights_that_safetensors_leaves_out_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    m = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten())\n"
        "    m[1].weight = m[0].weight\n    return m\n"
    )
    net = architectures.architecture(f"{tmp_path / 'tied.py'}:net")
    state = net.state_dict()
    del state["1.weight"]
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_bundle(table(tmp_path / "a.safetensors", f"{tmp_path / 'tied.py'}:net")).module
    assert loaded[1].weight is loaded[0].weight and torch.equal(loaded[0].weight, net[0].weight)


def test_half_precision_is_loaded_as_float32_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "edgeprune")
    bundle = load_bundle(table(written("pickle", tmp_path / "a.pt", make().half())))
    assert {p.dtype for p in bundle.module.parameters()} == {torch.float32}
    assert "float16" in caplog.text


@pytest.mark.parametrize("text", ["3x12", "3x12x12x1", "12", "axbxc", "0x12x12", "3,12,12", "-3x12x12"])
def test_an_input_that_is_no_shape_says_how_to_write_it(text: str, tmp_path: Path) -> None:
    error = error_of(written("pickle", tmp_path / "a.pt"), input=text)
    assert isinstance(error, UsageError) and "--input 3x224x224" in error.hint


def test_an_unknown_input_shape_is_never_guessed(tmp_path: Path) -> None:
    error = error_of(written("pickle", tmp_path / "a.pt"), input="")
    assert isinstance(error, UsageError) and "--input" in error.hint


def test_an_input_that_the_network_can_not_eat_names_the_layer(tmp_path: Path) -> None:
    error = error_of(written("pickle", tmp_path / "a.pt"), input="4x12x12")
    assert isinstance(error, UnsupportedModel) and "fails in 0 on 2 images of 4x12x12" in error.message


def test_an_exported_program_knows_its_input_and_refuses_another(tmp_path: Path) -> None:
    path = written("pt2", tmp_path / "a.pt2")
    assert load_bundle(table(path, input="")).input.shape == (3, 12, 12)
    assert "was exported for 3x12x12" in error_of(path, input="3x16x16").message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_unread_and_the_lines_that_convert_it_work(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    as_torchscript(make(), path)
    monkeypatch.setattr(torch.jit, "load", None)
    error = error_of(path)
    assert isinstance(error, UnsupportedModel) and "is TorchScript" in error.message
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    exec(error.hint.split("python -c '")[1].split("'")[0])
    bundle = load_bundle(table(tmp_path / "weights.pt", arch))
    assert torch.equal(bundle.module(torch.ones(1, 3, 12, 12)), make()(torch.ones(1, 3, 12, 12)))


@pytest.mark.parametrize("content", [b"PYTORCH1" + bytes(99), bytes(4) + b"PTMF" + bytes(99)])
def test_other_files_of_torchscript_are_told_too(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert "TorchScript" in error_of(tmp_path / "a.pt").message


@pytest.mark.parametrize("kind", ["pickle", "state_dict", "pt2"])
def test_a_flipped_bit_in_any_member_is_found_with_its_name(kind: str, tmp_path: Path, arch: str) -> None:
    whole = written(kind, tmp_path / "a.bin").read_bytes()
    for member in zipfile.ZipFile(io.BytesIO(whole)).infolist():
        if not member.file_size:
            continue
        head = whole[member.header_offset :][:30]
        start = (
            member.header_offset
            + 30
            + int.from_bytes(head[26:28], "little")
            + int.from_bytes(head[28:30], "little")
        )
        for at in (start + member.file_size // 2, member.header_offset + 31):
            data = bytearray(whole)
            data[at] ^= 4
            (tmp_path / "b.bin").write_bytes(data)
            error = error_of(tmp_path / "b.bin", arch)
            assert isinstance(error, ModelError) and member.filename in error.message


def test_a_file_written_without_checksums_loads_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = written("pickle", tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_bundle(table(path)).input.classes == 5 and "no checksums" in caplog.text


def test_an_archive_that_unpacks_to_many_times_its_size_is_refused_before(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/version", "3\n")
        out.writestr("a/data.pkl", bytes(10_000_000))
    assert "100 times its size" in error_of(tmp_path / "a.pt").message


def named(name: str) -> nn.Sequential:
    net = make()
    net._modules = {name if key == "0" else key: part for key, part in net._modules.items()}
    return net


HOSTILE = [
    'training") or exec("raise SystemExit") or getattr(self,"x',
    "a b",
    "a\nb",
    "",
    'a"b',
    "a'b",
    "a\x1bb",
]


def test_a_stride_that_would_end_the_process_is_refused_with_the_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2**20), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    with pytest.raises(
        UnsupportedModel, match=r"0 has the stride \(1048576, 1048576\), accepted are at most 4096"
    ):
        from_module(net, torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_could_be_source_is_refused_whatever_the_network_comes_from(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "a.py").write_text(
        f"from torch import nn\ndef net():\n    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())\n"
        f"    m._modules = {{{name!r}: m[0], '1': m[1]}}\n    return m\n"
    )
    torch.save(architectures.architecture(f"{tmp_path / 'a.py'}:net").state_dict(), tmp_path / "a.pt")
    torch.save(named(name), tmp_path / "b.pt")
    parameter, buffer = make(), make()
    parameter._parameters[name] = nn.Parameter(torch.ones(1))
    buffer._buffers[name] = torch.ones(1)
    errors = [error_of(tmp_path / "a.pt", f"{tmp_path / 'a.py'}:net"), error_of(tmp_path / "b.pt")]
    for net in (named(name), parameter, buffer):
        with pytest.raises(EdgepruneError) as caught:
            from_module(net, torch.rand(1, 3, 12, 12))
        errors.append(caught.value)
    assert all(isinstance(e, UnsafeModel) and "accepted: letters, digits" in e.message for e in errors)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [((0.5,), (0.5,), "1 values"), ((0.5,) * 3, (), "--std has 0 values"), ((), (0.5,) * 3, "--mean has 0 values"),
     ((0.5,) * 3, (0.5, 0.0, 0.5), "more than 0"), ((0.5,) * 3, (0.5, -1.0, 0.5), "more than 0"),
     ((float("nan"),) * 3, (0.5,) * 3, "finite")],
)  # fmt: skip
def test_a_normalization_that_does_not_fit_is_refused(
    mean: Any, std: Any, words: str, tmp_path: Path
) -> None:
    error = error_of(written("pickle", tmp_path / "a.pt"), mean=mean, std=std)
    assert isinstance(error, UsageError) and words in error.message


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(lambda x: x, "(2, 3, 8, 8)"), (lambda x: {"out": x, "aux": x}, "a dict with out, aux"),
     (lambda x: (x, x), "a tuple of 2 values"), (lambda x: x.mean(), "float32 tensor ()"),
     (lambda x: x.mean((2, 3)).long(), "int64 tensor (2, 3)"), (lambda x: None, "a NoneType"),
     (lambda x: x.mean((2, 3))[:1], "(1, 3)")],
)  # fmt: skip
def test_an_answer_that_is_no_logits_is_told(answer: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        from_module(Answering(answer), torch.rand(1, 3, 8, 8))
    assert words in caught.value.message


def test_a_module_in_memory_is_never_changed() -> None:
    net = make().train()
    net[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    bundle = from_module(net, (torch.rand(2, 3, 12, 12),), mean=(0.5,) * 3, std=(0.5,) * 3)
    for parameter in bundle.module.parameters():
        parameter.data.zero_()
    assert net.training and not net[0].weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert (
        bundle.input == InputSpec((3, 12, 12), 5, (0.5,) * 3, (0.5,) * 3) and bundle.source.kind == "memory"
    )


def test_two_networks_in_memory_are_told_apart_by_their_weights() -> None:
    x = torch.rand(1, 3, 12, 12)
    one, same, other = make(), make(), make()
    other[5].bias.data += 1
    digests = [from_module(net, x).source.sha256 for net in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "wrong", [torch.rand(3, 8, 8), "x", (torch.rand(1, 3, 8, 8), 1), torch.rand(0, 3, 8, 8)]
)
def test_example_inputs_of_another_kind_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="example_inputs"):
        from_module(make(), wrong)


def cut_plan() -> Plan:
    """Channels 1 and 4 of the first convolution go."""
    gone = (1, 4)
    first = {f"0.{n}": ((0, gone),) for n in ("weight", "bias")}
    norm = {f"1.{n}": ((0, gone),) for n in ("weight", "bias", "running_mean", "running_var")}
    attributes = {"0": {"out_channels": 6}, "1": {"num_features": 6}, "5": {"in_features": 6}}
    tensors = {**first, **norm, "5.weight": ((1, gone),)}
    return Plan({"0": gone}, tensors, attributes, {}, params=215, macs=0, params_before=285, macs_before=0)


def cut_network() -> nn.Sequential:
    keep = [0, 2, 3, 5, 6, 7]
    net, small = (
        make(),
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ),
    )
    state = {
        key: value[:, keep] if key == "5.weight" else value[keep] if key[0] in "01" and value.ndim else value
        for key, value in net.state_dict().items()
    }
    small.load_state_dict(state)
    return small.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["pickle", "state_dict", "safetensors", "pt2"])
def test_a_cut_network_is_rebuilt_from_its_source_plan_and_weights(
    kind: str, tmp_path: Path, arch: str
) -> None:
    dense = load_bundle(
        table(written(kind, tmp_path / "a.bin"), arch if kind in ("state_dict", "safetensors") else "")
    )
    small = cut_network()
    save_file(small.state_dict(), tmp_path / "weights.safetensors")
    again = bundle.rebuild(dense.source, dense.input, (cut_plan(),), tmp_path / "weights.safetensors")
    x = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(again.module(x), small(x))
    assert again.plans == (cut_plan(),) and again.input == dense.input and not again.module.training


def test_rebuilding_from_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = written("pickle", tmp_path / "a.pt")
    dense = load_bundle(table(path))
    save_file(cut_network().state_dict(), tmp_path / "weights.safetensors")
    written("pickle", path, make(classes=9))
    with pytest.raises(ModelError, match="not the file any more"):
        bundle.rebuild(dense.source, dense.input, (cut_plan(),), tmp_path / "weights.safetensors")
    path.unlink()
    with pytest.raises(ModelError, match="is gone"):
        bundle.rebuild(dense.source, dense.input, (cut_plan(),), tmp_path / "weights.safetensors")


def test_rebuilding_what_came_from_memory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        bundle.rebuild(Source("memory"), InputSpec((3, 12, 12), 5), (), tmp_path / "weights.safetensors")
    assert "model.pt2" in caught.value.hint


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run directory as compress leaves it, as far as loading looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text('target = "local"\n')
    bundle = from_module(make(), torch.rand(1, 3, 12, 12), mean=(0.5,) * 3, std=(0.25,) * 3)
    program = torch.export.export(deployed(bundle), (torch.rand(1, 3, 12, 12),))
    torch.export.save(program, folder / "model.pt2")
    serialization.write(folder / "plan.json", {"labels": list("abcde")})
    return folder


def test_a_run_directory_loads_its_network_with_the_normalization_inside(finished: Path) -> None:
    bundle = load_bundle(ModelTable(path=str(finished)))
    pixels = torch.rand(3, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(deployed(bundle)(pixels), make()((pixels - 0.5) / 0.25), atol=1e-6)
    assert bundle.input == InputSpec((3, 12, 12), 5) and bundle.labels == tuple("abcde")
    assert bundle.source.path == str(finished / "model.pt2")


def test_labels_that_do_not_fit_are_left_out(finished: Path) -> None:
    (finished / "plan.json").write_text(json.dumps({"labels": ["a"]}))
    assert load_bundle(ModelTable(path=str(finished))).labels == ()


def test_a_directory_that_is_no_run_and_a_run_that_is_not_finished_are_told_apart(finished: Path) -> None:
    (finished / "model.pt2").unlink()
    assert "isn't finished" in error_of(finished).message
    (finished / "recipe.toml").unlink()
    assert "no run of edgeprune" in error_of(finished).message


class Mixing(nn.Module):
    """Its answers for one image depend on the others, so its batch size can't be changed."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.fc = batch, nn.Linear(3 * 8 * 8 * batch, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(1, 3 * 8 * 8 * self.batch)).repeat(self.batch, 1)


def test_a_program_for_one_batch_size_only_is_refused_unless_it_is_one(tmp_path: Path) -> None:
    for batch in (1, 2):
        program = torch.export.export(Mixing(batch), (torch.rand(batch, 3, 8, 8),))
        torch.export.save(program, tmp_path / f"{batch}.pt2")
    assert "batches of 2" in error_of(tmp_path / "2.pt2", input="").message
    assert load_bundle(table(tmp_path / "1.pt2", input="")).input.classes == 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "architecture.py").write_text(ARCHITECTURE)
    kinds = ("pickle", "state_dict", "old_state_dict", "safetensors", "pt2")
    return folder, {kind: written(kind, folder / f"{kind}.bin").read_bytes() for kind in kinds}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["pickle", "state_dict", "old_state_dict", "safetensors", "pt2"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    share=st.one_of(st.just(1.0), st.floats(0, 1)),
)
@example(kind="pickle", changes=[], share=0.0)
def test_a_damaged_file_loads_or_is_refused_but_never_crashes(
    kind: str, changes: list[tuple[float, int]], share: float, files: tuple[Path, dict[str, bytes]]
) -> None:
    folder, contents = files
    data = bytearray(contents[kind])
    for where, value in changes:
        # Half of the damage goes where the structure is, not the weights.
        at = int(where * 2 * min(len(data), 2000)) if where < 0.5 else int(where * len(data))
        data[min(at, len(data) - 1)] = value
    path = folder / "damaged.bin"
    path.write_bytes(bytes(data[: int(len(data) * share)]))
    needs_arch = kind not in ("pickle", "pt2")
    try:
        load_bundle(table(path, f"{folder / 'architecture.py'}:net" if needs_arch else ""))
    except EdgepruneError as error:
        assert error.exit_code in (2, 4) and error.message


def test_a_real_trained_network_loads_with_its_architecture_file(shared: Path) -> None:
    examples = paths.ROOT / "examples" / "resnet20_cifar10.py"
    weights = shared / "models" / "resnet20-cifar10-clean.pt"
    if not examples.is_file() or not weights.is_file():
        pytest.skip(f"{examples} or {weights} is not here")
    bundle = load_bundle(ModelTable(path=str(weights), arch=f"{examples}:resnet20", input="3x32x32"))
    assert bundle.input.classes == 10
    assert sum(p.numel() for p in bundle.module.parameters()) == 269_722
