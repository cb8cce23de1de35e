"""A network that mixes the images of a batch, or gives one logit, is refused; others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.measure import alone
from edgeprune.models.bundle import from_module, load_bundle
from edgeprune.models.from_export import remodulify
from edgeprune.models.inference import TWO_LINES, check_alone, count_classes
from edgeprune.recipe import ModelTable

Function = Callable[[Tensor], Tensor]
X = torch.rand(2, 3, 16, 16)


class Net(nn.Module):
    def __init__(
        self, middle: nn.Module | None = None, end: Function | None = None, classes: int = 5
    ) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.middle, self.head = middle or nn.Identity(), nn.Linear(8, classes)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.middle(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))
        return self.end(x) if self.end else x


class Less(nn.Module):
    """Less the mean of the batch; in a layer of its own, behind one that is honest."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.fine = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fine(x)
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (Net(nn.BatchNorm2d(8, track_running_stats=False)), "middle (BatchNorm2d)"),
        (Net(nn.Sequential(nn.ReLU(), Less(), nn.ReLU())), "middle.1 (Less)"),
        (Net(end=lambda x: x.softmax(0)), "the network"),
        (Net(end=lambda x: x - x.max(0).values), "the network"),
        (Net(end=lambda x: x + x.roll(1, 0)), "the network"),
    ],
)
def test_the_layer_that_mixes_the_images_of_a_batch_is_named(network: nn.Module, layer: str) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        from_module(network, X)
    assert f"in a batch of 2 than alone: {layer} mixes" in refused.value.message
    assert "track_running_stats=True" in refused.value.hint


@pytest.mark.parametrize(
    "network",
    [
        Net(),
        Net(nn.InstanceNorm2d(8)),
        Net(nn.GroupNorm(2, 8)),
        Net(nn.BatchNorm2d(8, momentum=None)),
        Net(end=lambda x: x + 1e4),
        Net(end=lambda x: x * 1e-7),
        Net(end=lambda x: x.view(-1, 5, 1).repeat(1, 1, 2).view(len(x) * 5, 2).mean(1).view(len(x), 5)),
    ],
)
def test_what_computes_every_image_by_itself_is_taken(network: nn.Module) -> None:
    assert from_module(network, X).input.classes == 5


class Coarse(nn.Module):
    """Rounds to eighths what another kernel computes in another batch, by a hair off."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x.flatten(1) * 8 * (1 + 1e-7 * (len(x) - 2))) / 8


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_what_rounds_may_be_a_step_further_in_a_batch_and_is_taken() -> None:
    between = torch.full((4, 12, 1, 1), 2.5 / 8)
    network = Coarse().eval()
    assert not torch.equal(network(between), torch.cat([network(x) for x in between.split(1)]))
    check_alone(network, between, "it")
    with pytest.raises(UnsupportedModel, match=r"1 \(Centered\) mixes"):
        check_alone(nn.Sequential(Coarse(), Centered()).eval(), torch.rand(4, 12, 1, 1), "it")


def test_chance_is_not_taken_for_a_mixture() -> None:
    with pytest.raises(UnsupportedModel, match="other outputs at every call: the network is random"):
        from_module(Net(end=F.dropout), X)


def test_what_only_other_images_show_is_seen_on_them() -> None:
    network = Net(end=lambda x: x - x.mean(0) if float(x.detach().abs().max()) > 1 else x).eval()
    check_alone(network, torch.zeros(3, 3, 16, 16), "it")
    with pytest.raises(UnsupportedModel, match="it gives an image another output"):
        check_alone(network, 100 * torch.rand(3, 3, 16, 16), "it")


@pytest.mark.parametrize("end", [None, lambda x: x[:, 0]])
def test_one_logit_is_refused_with_the_lines_that_make_it_two(end: Function | None) -> None:
    network = Net(end=end, classes=1).eval()
    with pytest.raises(UnsupportedModel, match=r"one number for each image, \(2,") as refused:
        from_module(network, X)
    assert refused.value.hint == TWO_LINES
    names = {"torch": torch, "network": network}
    exec(TWO_LINES.partition("\n")[2], names)
    two = names["network"]
    assert from_module(two, X).input.classes == 2  # type: ignore[arg-type]
    with torch.no_grad():
        logits, one = two(X), network(X).reshape(-1)  # type: ignore[operator]
    assert torch.equal(logits, torch.stack([torch.zeros_like(one), one], 1))


def test_a_program_exported_for_one_image_is_refused_where_it_would_mix_more(tmp_path: Path) -> None:
    network = Net(nn.BatchNorm2d(8, track_running_stats=False)).eval()
    torch.export.save(torch.export.export(network, (X[:1],)), tmp_path / "one.pt2")
    with pytest.raises(UnsupportedModel, match=r"in a batch of 2 than alone: middle \(BatchNorm2d\) mixes"):
        load_bundle(ModelTable(path=str(tmp_path / "one.pt2")))


def test_what_is_exported_for_one_image_and_fails_on_more_is_taken() -> None:
    network = remodulify(torch.export.export(Net().eval(), (X[:1],)))
    network.register_forward_pre_hook(only_one)
    network.fixed_batch = 1  # type: ignore[assignment]
    assert count_classes(network, (3, 16, 16), ((), ()), "it") == 5


def only_one(_: nn.Module, inputs: tuple[Tensor]) -> None:
    if len(inputs[0]) != 1:
        raise RuntimeError("one image")


def test_logits_that_are_all_nan_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="is NaN only"):
        from_module(Net(end=lambda x: (x - x.abs() - 1).log()), X)


def write(path: Path, axis: int, batch: int | str = "n") -> Path:
    """Means of the channels, a softmax over an axis, a ReLU."""
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["means"], "pool"),
            helper.make_node("Flatten", ["means"], ["flat"], "flat"),
            helper.make_node("Softmax", ["flat"], ["shares"], "shares", axis=axis),
            helper.make_node("Relu", ["shares"], ["logits"], "relu"),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_a_file_that_mixes_the_images_of_a_batch_is_refused_with_the_node(tmp_path: Path) -> None:
    x = torch.rand(5, 3, 16, 16)
    alone.check(write(tmp_path / "fine.onnx", 1), x, 3)
    path = write(tmp_path / "mixed.onnx", 0)
    with pytest.raises(UnsupportedModel, match=r"in a batch of 5 than alone: shares \(Softmax\) mixes"):
        alone.check(path, x, 3)


@pytest.mark.parametrize("batch", [4, 20])
def test_a_file_with_a_fixed_batch_of_several_images_is_asked_with_one_image_in_all_rows(
    tmp_path: Path, batch: int
) -> None:
    x = torch.rand(5, 3, 16, 16)
    alone.check(write(tmp_path / "fine.onnx", 1, batch), x, 3)
    with pytest.raises(
        UnsupportedModel, match=rf"in a batch of {batch} than alone: shares \(Softmax\) mixes"
    ):
        alone.check(write(tmp_path / "mixed.onnx", 0, batch), x, 3)


def test_a_file_for_single_images_can_not_mix_them(tmp_path: Path) -> None:
    path = write(tmp_path / "one.onnx", 0, 1)
    alone.check(path, torch.rand(5, 3, 16, 16), 3)


def test_an_output_of_another_width_than_the_file_says_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "three.onnx", 1)
    with pytest.raises(UnsupportedModel, match=r"output of shape \(5, 3\), but says it is \(N, 10\)"):
        alone.check(path, torch.rand(5, 3, 16, 16), 10)
