"""Architectures by name: each of the four forms builds, and each way of being wrong says what would be right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.errors import EdgepruneError, MissingDependency, ModelError, UsageError
from edgeprune.models import architectures
from edgeprune.safe_loading import user_code

FILE = """
from torch import nn
import helper_of_the_user

class Net(nn.Module):
    def __init__(self, width=4, act=None, bias=True, name="", scale=1.0):
        super().__init__()
        self.given = (width, act, bias, name, scale)

def number(): return 3
def broken(): raise RuntimeError("out of coffee")
constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_the_user.py").write_text("value = 1\n")
    path = tmp_path / "my net.py"
    path.write_text(FILE)
    return path


def installed(package: str) -> None:
    try:
        architectures.architecture(f"{package}:resnet18")
    except MissingDependency as error:
        pytest.skip(f"{error.message}: {error.hint}")


def test_a_callable_in_a_file_builds_with_typed_arguments(file: Path) -> None:
    net = architectures.architecture(f"{file}:Net?width=8&act=None&bias=false&name=abc&scale=0.5")
    assert net.given == (8, None, False, "abc", 0.5)
    assert [type(v) for v in net.given] == [int, type(None), bool, str, float]


def test_a_file_may_import_its_neighbors_and_leaves_the_import_path_as_it_was(file: Path) -> None:
    before = list(sys.path)
    architectures.architecture(f"{file}:Net")
    assert sys.path == before


def test_a_package_may_lie_in_the_working_directory_but_shadows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_architectures.py").write_text("from torch.nn import Linear\n")
    (tmp_path / "torch.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(
        architectures.architecture("my_architectures:Linear?in_features=2&out_features=3"), nn.Linear
    )
    assert str(tmp_path) not in sys.path
    del sys.modules["my_architectures"]


def test_the_path_of_a_file_is_made_absolute(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert architectures.canonical(f"{file.name}:Net?width=2") == f"{file}:Net?width=2"
    assert architectures.canonical("timm:resnet18?num_classes=3") == "timm:resnet18?num_classes=3"


def test_a_link_in_a_circle_is_no_file(tmp_path: Path) -> None:
    loop = tmp_path / "net.py"
    loop.symlink_to(loop)
    assert architectures.canonical(f"{loop}:net") == f"{loop}:net"
    with pytest.raises(UsageError, match="no file"):
        architectures.architecture(f"{loop}:net")


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("resnet18", UsageError, "names no architecture"),
        ("", UsageError, "names no architecture"),
        ("timm:", UsageError, "names no architecture"),
        ("torch.nn:Linear?in_features", UsageError, "key=value"),
        ("nowhere.py:net", UsageError, "no file"),
        ("torch.nn:Linaer", UsageError, "no 'Linaer'"),
        ("torch.nn:modules", UsageError, "is a module"),
        ("torch.no_such_module:Net", UsageError, "no module"),
        ("no_such_package_here.net:Net", MissingDependency, "needs the package no_such_package_here"),
        ("torch.nn:Linear", ModelError, "missing 2 required positional arguments"),
        ("torch.nn:Linear?in_features=2&width=3", ModelError, "unexpected keyword argument"),
        ("torch:zeros?size=3", ModelError, "building it failed|not a torch.nn.Module"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec: str, error: type[EdgepruneError], words: str) -> None:
    with pytest.raises(error, match=words):
        architectures.architecture(spec)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "gave a int"),
        ("broken", "RuntimeError: out of coffee"),
        ("constant", "is a int"),
        ("Nett", "no 'Nett'"),
    ],
)
def test_a_wrong_callable_in_a_file_says_what_is_wrong(file: Path, name: str, words: str) -> None:
    with pytest.raises(EdgepruneError, match=words):
        architectures.architecture(f"{file}:{name}")


def test_the_closest_callable_is_suggested(file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        architectures.architecture(f"{file}:Nett")
    assert caught.value.hint == "did you mean Net?"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [("import no_such_package_here", MissingDependency, "no_such_package_here"), ("def f(:", ModelError, "SyntaxError"),
     ("1 / 0", ModelError, "ZeroDivisionError")],
)  # fmt: skip
def test_a_file_that_can_not_be_run_says_why(
    tmp_path: Path, text: str, error: type[EdgepruneError], words: str
) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(error, match=words):
        architectures.architecture(f"{tmp_path / 'bad.py'}:net")


def test_a_network_of_timm_brings_its_input_and_normalization() -> None:
    installed("timm")
    shape, mean, std = architectures.default_input(architectures.architecture("timm:resnet18")) or (
        (),
        (),
        (),
    )
    assert shape == (3, 224, 224)
    assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)


def test_a_gray_network_of_timm_brings_no_normalization_for_colors() -> None:
    installed("timm")
    assert architectures.default_input(architectures.architecture("timm:resnet18?in_chans=1")) == (
        (1, 224, 224),
        (),
        (),
    )


def test_a_network_of_torchvision_brings_its_input_but_no_normalization() -> None:
    installed("torchvision")
    assert architectures.default_input(architectures.architecture("torchvision:resnet18")) == (
        (3, 224, 224),
        (),
        (),
    )
    assert architectures.default_input(architectures.architecture("torchvision:inception_v3")) == (
        (3, 299, 299),
        (),
        (),
    )


def test_another_network_has_no_known_input() -> None:
    assert architectures.default_input(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("timm:resnet81", "resnet18"), ("torchvision:resnet81", "resnet18"), ("timm:qqqqqqqq", "list_models")],
)
def test_an_unknown_network_of_a_zoo_gets_a_suggestion(spec: str, hint: str) -> None:
    installed(spec.split(":", maxsplit=1)[0])
    with pytest.raises(UsageError) as caught:
        architectures.architecture(spec)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "spec",
    [
        "timm:resnet18?pretrained=true",
        "torchvision:resnet18?weights=DEFAULT",
        "timm:resnet18?checkpoint_path=/x",
    ],
)
def test_nothing_is_ever_downloaded(spec: str) -> None:
    installed(spec.split(":", maxsplit=1)[0])
    with pytest.raises(UsageError, match="never downloaded"):
        architectures.architecture(spec)


def test_networks_that_are_no_classifiers_are_not_offered() -> None:
    installed("torchvision")
    with pytest.raises(UsageError, match="no classification model"):
        architectures.architecture("torchvision:fasterrcnn_resnet50_fpn")


def test_weights_are_random_and_arguments_reach_the_network() -> None:
    installed("torchvision")
    net = architectures.architecture("torchvision:resnet18?num_classes=7")
    assert net.fc.out_features == 7
    assert not torch.equal(
        net.fc.weight, architectures.architecture("torchvision:resnet18?num_classes=7").fc.weight
    )


def test_preparing_torchvision_twice_is_harmless() -> None:
    user_code.prepare_torchvision()
    user_code.prepare_torchvision()
    installed("torchvision")


def test_a_missing_zoo_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency) as caught:
        architectures.architecture("timm:resnet18")
    assert caught.value.hint == "pip install timm"
