"""Certified accuracy: exact on a linear model, never more than an attack leaves, and honest where there is no bound."""

from __future__ import annotations

from pathlib import Path

import nets
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgeprune.attacks.pgd import Pgd
from edgeprune.confidence import binomial
from edgeprune.data.dataset import Split, in_memory
from edgeprune.models.torch_export import quiet
from edgeprune.robustness.certified import SHARES, certified, proven
from edgeprune.robustness.onnx_module.module import settled, to_torch
from edgeprune.train.adversarial import Ball


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Normalization, a linear layer of the pixels, and, if asked for, something behind it that changes nothing."""

    def __init__(self, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.behind = nn.Linear(12, 4), behind or nn.Identity()
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(4, 12, generator=seeded(1)))
            self.fc.bias.copy_(torch.randn(4, generator=seeded(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.fc(((x - 0.4) / 0.2).flatten(1)))

    def least_margins(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """The smallest margin in the box, in closed form: every pixel goes its own way to its own wall."""
        weight, bias = self.fc.weight.detach().double() / 0.2, self.fc.bias.detach().double()
        flat = x.double().flatten(1)
        low, high = (flat - eps).clamp(0, 1), (flat + eps).clamp(0, 1)
        apart = weight[y].unsqueeze(1) - weight
        shift = (bias[y].unsqueeze(1) - bias) - 0.4 * apart.sum(2)
        least = torch.where(apart > 0, apart * low.unsqueeze(1), apart * high.unsqueeze(1)).sum(2) + shift
        return least.scatter(1, y.unsqueeze(1), torch.inf).amin(1)


def pixels(count: int, shape: tuple[int, ...] = (3, 2, 2)) -> Tensor:
    return torch.randint(256, (count, *shape), generator=seeded(3)).to(torch.uint8)


def right(network: nn.Module, images: Tensor) -> Split:
    """Images with the classes that the network gives them."""
    with torch.no_grad():
        return in_memory("test", images, network(images / 255).argmax(1))


@pytest.mark.parametrize("eps", [0.002, 0.01, 0.03, 0.1])
def test_of_a_linear_model_it_is_the_exact_accuracy_under_the_best_attack(eps: float) -> None:
    network = Linear().eval()
    split = right(network, pixels(200))
    x, y = split.take(torch.arange(200)), split.labels
    margins = network.least_margins(x, y, eps)
    assert (margins.abs() > 1e-4).all(), "or rounding decides"
    assert torch.equal(proven(network, x, y, eps), margins > 0)
    (reading,) = certified(network, split, Ball("Linf", eps), artifact="dense", shares=(1,))
    count = int((margins > 0).sum())
    assert 0 < count < 200
    assert (reading.value, reading.spread, reading.n) == (count / 200, binomial(count, 200), 200)


def test_images_that_are_wrong_are_never_certified() -> None:
    network = Linear().eval()
    split = right(network, pixels(60))
    x, others = split.take(torch.arange(60)), (split.labels + 1) % 4
    assert not proven(network, x, others, 1e-6).any()
    assert proven(network, x, split.labels, 1e-6).any()


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise"])
def test_what_is_certified_no_attack_breaks(name: str) -> None:
    network = nets.build(name, seed=4).eval()
    split = right(network, pixels(48, nets.SHAPE))
    x, y = split.take(torch.arange(48)), split.labels
    for eps in (1e-5, 3e-4):
        sure = proven(network, x, y, eps)
        for norm in ("Linf", "L2"):
            broken = Pgd(steps=10, restarts=2)(network, x, y, Ball(norm, eps), seeded(5)).broken
            assert not (sure & broken).any()
        if eps == 1e-5:
            assert sure.float().mean() > 0.3, "or the test says nothing"


def test_a_larger_ball_certifies_fewer_images() -> None:
    network = nets.build("plain").eval()
    split = right(network, pixels(80, nets.SHAPE))
    found = certified(network, split, Ball("Linf", 0.01), artifact="dense", shares=(1, 1 / 8, 1 / 64))
    values = [reading.value for reading in found]
    assert values == sorted(v for v in values if v is not None) and values[0] != values[-1]
    assert [r.conditions["eps_value"] for r in found] == [0.01, 0.01 / 8, 0.01 / 64]
    x, y = split.take(torch.arange(80)), split.labels
    for reading in found:
        assert reading.value == float(proven(network, x, y, reading.conditions["eps_value"]).double().mean())


def test_of_an_l2_ball_the_box_around_it_is_followed_and_the_reading_says_so() -> None:
    network = Linear().eval()
    split = right(network, pixels(50))
    (round_one,) = certified(network, split, Ball("L2", 0.02), artifact="dense", shares=(1,))
    (box,) = certified(network, split, Ball("Linf", 0.02), artifact="dense", shares=(1,))
    assert round_one.value == box.value
    assert "encloses" in round_one.conditions["box"] and "box" not in box.conditions


def test_the_reading_says_that_it_is_a_lower_bound_of_what_and_at_which_radius() -> None:
    network = Linear().eval()
    found = certified(network, right(network, pixels(20)), Ball("Linf", 8 / 255), artifact="compressed")
    assert [r.conditions["eps"] for r in found] == ["8/255", "1/255", "0.125/255"] and len(SHARES) == 3
    for reading in found:
        assert (reading.metric, reading.unit, reading.artifact) == (
            "certified_accuracy",
            "fraction",
            "compressed",
        )
        assert reading.where == "computed: interval bounds"
        assert "lower bound" in reading.conditions["bound"] and "in torch" in reading.conditions["of"]


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * x.sort(dim=1).values


def test_where_an_operator_has_no_bound_there_is_no_number_and_the_reason_is_said() -> None:
    network = Linear(Sorted()).eval()
    for reading in certified(network, right(network, pixels(20)), Ball("Linf", 0.01), artifact="dense"):
        assert reading.value is None and reading.spread is None
        assert "sort" in reading.conditions["why"]


def test_a_network_that_does_not_end_in_a_linear_layer_is_bounded_too() -> None:
    plain, scaled = Linear().eval(), Linear(nn.Hardtanh(-50, 50)).eval()
    split = right(plain, pixels(60))
    x, y = split.take(torch.arange(60)), split.labels
    exact, loose = proven(plain, x, y, 0.003), proven(scaled, x, y, 0.003)
    assert loose.any() and not (loose & ~exact).any()


def test_many_images_of_which_none_is_proven_are_left_alone_after_the_first() -> None:
    network = nets.build("plain").eval()
    split = right(network, pixels(300, nets.SHAPE))
    taken: list[int] = []

    class Watched:
        def take(self, indices: Tensor) -> Tensor:
            taken.append(len(indices))
            return split.pixels.take(indices)

        def count(self) -> int:
            return 300

    found = certified(
        network, Split("test", split.labels, Watched()), Ball("Linf", 1.0), artifact="dense", shares=(1,)
    )
    assert found[0].value == 0 and found[0].n == 300
    assert sum(taken) <= 1 + 128


def file_of(network: nn.Module, path: Path, x: Tensor, *, free: bool) -> onnx.ModelProto:
    """As torch's older exporter writes it: group-norm in five nodes with sizes that the graph computes."""
    with quiet():
        torch.onnx.export(
            network, (x,), path, input_names=["input"], opset_version=17, dynamo=False,
            dynamic_axes={"input": {0: "batch"}} if free else None,
        )  # fmt: skip
    return onnx.load(path)


class Clipped(nn.Module):
    """Convolutions of every kind, a group-norm, a clip, a SiLU and an odd padding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(4, 4, 2, groups=4), nn.SiLU(), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(75, 4),
        )  # fmt: skip
        for number, weight in enumerate(self.parameters()):
            nn.init.normal_(weight, std=0.3, generator=seeded(number))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("free", [True, False])
def test_a_file_is_certified_as_the_network_that_it_was_made_from(tmp_path: Path, free: bool) -> None:
    network = Clipped().eval()
    images = pixels(24, (3, 4, 4))
    split = right(network, images)
    x = split.take(torch.arange(2))
    found = to_torch(file_of(network, tmp_path / "net.onnx", x[: 1 if free else 2], free=free))
    shares = (1, 1 / 4, 1 / 8)
    read, wanted = (
        [r.value for r in certified(n, split, Ball("Linf", 0.06), artifact="a", shares=shares)]
        for n in (found, network)
    )
    assert read == wanted and 0 < sum(v or 0 for v in wanted) < 3, (read, wanted)
    once = settled(found, x[:1])
    torch.testing.assert_close(once(x[:1]), found(x[:1]), rtol=1e-6, atol=1e-6)
    assert settled(network, x) is network


def test_why_a_file_has_no_bound_is_one_short_sentence(tmp_path: Path) -> None:
    class Hard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x.flatten(1)[:, :4].argmax(1), 4).float()

    split = right(Hard(), pixels(4))
    x = split.take(torch.arange(1))
    found = to_torch(file_of(Hard(), tmp_path / "net.onnx", x, free=True))
    for reading in certified(found, split, Ball("Linf", 0.01), artifact="a"):
        why = reading.conditions["why"]
        assert reading.value is None and "argmax" in why and "\n" not in why and len(why) <= 160
