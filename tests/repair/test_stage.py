"""Repair of a cut network on unlabelled images: nearer to the dense one in every layer, exact where it can be."""

from __future__ import annotations

from collections.abc import Mapping

import nets
import pytest
import torch
from torch import Tensor, nn
from tracing_once import traced

from edgeprune.models.bundle import deployed, from_module
from edgeprune.prune import cut
from edgeprune.records import Bundle, Masks
from edgeprune.repair import least_squares, stage
from edgeprune.repair.stage import repair
from edgeprune.structure.groups import find_groups

Errors = Mapping[str, tuple[float, float]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "trace", traced)


def images(count: int, seed: int = 5) -> Tensor:
    """Images that differ in brightness and in colour, as photographs do and noise does not."""
    generator = torch.Generator().manual_seed(seed)
    shade = torch.rand(count, 3, 1, 1, generator=generator)
    return shade * torch.rand(count, *nets.SHAPE, generator=generator)


def without(dense: Bundle, masks: dict[str, Tensor]) -> Bundle:
    groups = find_groups(dense.module, nets.example()).groups
    return cut.run_cut(dense, groups, Masks(channels=masks), {}, nets.example())[1]


def halved(dense: Bundle) -> Bundle:
    """The network without every second channel of what can be cut."""
    groups = find_groups(dense.module, nets.example()).groups
    return without(dense, {g.name: torch.arange(g.channels) % 2 == 0 for g in groups})


def answers(bundle: Bundle, x: Tensor) -> Tensor:
    with torch.no_grad():
        return deployed(bundle)(x)


def divergence(dense: Bundle, other: Bundle, x: Tensor) -> float:
    p, q = (answers(b, x).double().log_softmax(1) for b in (dense, other))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[Errors]:
    """The squared error of each solved layer on its images, before and after; one entry for each repair."""
    seen: list[Errors] = []
    kept = stage.accepted

    def spy(*given: object) -> stage.Repaired:
        seen.append(given[-1])  # type: ignore[arg-type]
        return kept(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "accepted", spy)
    return seen


SOLVED = {
    "plain": {"b.0", "fc"},
    "residual": {"one.0", "two", "down.0", "fc"},
    "depthwise": {"up.0", "squeeze", "excite", "project", "fc"},
    "grouped": {"c.0", "fc"},
    "concat": {"b.0", "c.0", "fc"},
    "split": {"left.0", "right.0", "c.0", "fc"},
    "groupnormed": {"b", "fc"},
    "transposed": {"fc"},
}


@pytest.mark.parametrize("name", nets.NETS)
def test_the_error_of_no_layer_and_not_the_divergence_goes_up(name: str, errors: list[Errors]) -> None:
    dense = from_module(nets.build(name), nets.example())
    small, x = halved(dense), images(48)
    found = repair(dense, small, x, seed=0)
    (solved,) = errors
    assert set(solved) <= SOLVED[name] and solved
    assert all(0 <= after < before for before, after in solved.values())
    before, after = (divergence(dense, b, x) for b in (small, found.bundle))
    assert after < before, "none of the nets is made worse"
    assert found.facts["kl before"] == pytest.approx(before, rel=1e-3, abs=1e-9)
    assert found.facts["kl after"] == pytest.approx(after, rel=1e-3, abs=1e-9)
    assert found.facts["layers"] == len(solved) and found.facts["images"] == 48
    assert found.facts["squared error after"] == sum(e for _, e in solved.values())
    assert found.facts["squared error before"] == sum(e for e, _ in solved.values())
    (note,) = found.notes
    assert f"{len(solved)} layers were solved in closed form on 48 images" in note


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_the_repair_repeats_itself_and_leaves_its_inputs_alone(name: str) -> None:
    dense = from_module(nets.build(name), nets.example(), mean=(0.5,) * 3, std=(0.25,) * 3)
    small = halved(dense)
    before = [{k: v.clone() for k, v in b.module.state_dict().items()} for b in (dense, small)]
    one, two = (repair(dense, small, images(40), seed=0) for _ in range(2))
    for bundle, state in zip((dense, small), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in bundle.module.state_dict().items())
    states = [r.bundle.module.state_dict() for r in (one, two)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert one.facts == two.facts and one.bundle.plans == small.plans and one.bundle.input == small.input
    assert not all(torch.equal(v, before[1][k]) for k, v in states[0].items())


def test_the_networks_get_the_images_as_they_are_normalized() -> None:
    """What is normalized by the bundle, or by a network that does it by itself, is repaired alike."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nets.build("plain")

        def forward(self, x: Tensor) -> Tensor:
            return self.network((x - 0.5) / 0.25)

    outside = from_module(nets.build("plain"), nets.example(), mean=(0.5,) * 3, std=(0.25,) * 3)
    inside = from_module(Inside().eval(), nets.example())
    found = [repair(b, halved(b), images(40), seed=0).bundle for b in (outside, inside)]
    x = images(8, seed=6)
    torch.testing.assert_close(answers(found[0], x), answers(found[1], x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(answers(found[0], x), answers(halved(outside), x), rtol=1e-3, atol=1e-4)


def doubled(network: nn.Module) -> nn.Module:
    """The second half of the channels of `a` and `b` are copies of the first."""
    with torch.no_grad():
        for block in ("a", "b"):
            for tensor in network.get_submodule(block).state_dict().values():
                if tensor.ndim:
                    tensor[len(tensor) // 2 :] = tensor[: len(tensor) // 2]
    return network


@pytest.mark.parametrize(
    ("ridge", "tolerance"),
    # The ridge holds the weights near to those that were made for other inputs.
    [(None, 0.02), (1e-6, 0.005)],
)
def test_a_network_without_its_duplicates_is_repaired_to_the_dense_one(
    ridge: float | None, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ridge is not None:
        monkeypatch.setattr(least_squares, "RIDGE", ridge)
        monkeypatch.setattr(least_squares, "RIDGE_SHORT", ridge)
    dense = from_module(doubled(nets.build("plain")), nets.example())
    small = without(dense, {"a.0": torch.arange(8) < 4, "b.0": torch.arange(12) < 6})
    found = repair(dense, small, images(512), seed=0).bundle
    x = images(64, seed=6)
    wanted = answers(dense, x)
    damage, left = (float((answers(b, x) - wanted).abs().max()) for b in (small, found))
    assert damage > 0.1 and left < tolerance * damage


def test_a_network_that_was_not_cut_stays_as_it_is() -> None:
    dense = from_module(nets.build("residual"), nets.example())
    small = without(dense, {})
    found = repair(dense, small, images(16), seed=0)
    assert found.bundle is small and found.facts["layers"] == 0
    assert "There was nothing to repair" in found.notes[0]


def test_a_repair_that_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = from_module(nets.build("plain"), nets.example())
    small = halved(dense)
    monkeypatch.setattr(stage, "divergence", lambda *_: 0.25)
    found = repair(dense, small, images(16), seed=0)
    assert found.bundle is small and found.facts["layers"] == 0
    assert found.notes == (
        "The repair was not kept: the outputs are 0.25 nats from the dense ones, 0.25 before.",
    )


def test_a_repair_that_ends_in_no_numbers_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = from_module(nets.build("plain"), nets.example())
    small = halved(dense)

    def nonsense(rows: least_squares.Rows, start: Tensor, *, constant: bool) -> Tensor:
        return start * float("nan")

    monkeypatch.setattr(least_squares.Rows, "solution", nonsense)
    monkeypatch.setattr(
        least_squares.Rows, "error", lambda rows, weights: float(bool(weights.isfinite().all()))
    )
    found = repair(dense, small, images(16), seed=0)
    assert found.bundle is small and "not kept" in found.notes[0]


def test_networks_of_other_calls_are_not_repaired_and_it_is_said() -> None:
    dense, other = (from_module(nets.build(n), nets.example()) for n in ("plain", "residual"))
    small = halved(other)
    found = repair(dense, small, images(4), seed=0)
    assert found.bundle is small and found.facts == {"layers": 0}
    assert found.notes[0].startswith(
        "The cut network was not repaired: the dense network makes 9 operator calls"
    )


class Dense(nn.Module):
    """No convolution, no batch-norm; with or without biases."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 24, bias), nn.Linear(24, 16, bias)
        self.fc = nn.Linear(16, 5, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.tanh(self.a(x.flatten(1))))))


class Bare(nn.Module):
    """Convolutions without bias and without batch-norm: no constant has a place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.fc = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


class Edges(nn.Module):
    """Paddings that torch makes by an operator of its own, in front of a convolution that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding="same")
        self.b = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.c = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), padding_mode="circular", dilation=(1, 2))
        self.d, self.fc = nn.Conv2d(8, 8, 3, padding="same"), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


class Flat(nn.Module):
    """A residual sum of linear layers with batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 16), nn.Linear(16, 24)
        self.c, self.bn, self.fc = nn.Linear(24, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.flatten(1)))
        return self.fc(torch.relu(x + self.bn(self.c(torch.relu(self.b(x))))))


class Last(nn.Module):
    """Linear layers on (N, H, W, C), channels last, with a sum and a rectifier behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = (nn.Linear(i, o) for i, o in ((3, 16), (16, 24), (24, 16), (16, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.permute(0, 2, 3, 1)))
        return self.fc(torch.relu(x + self.c(torch.relu(self.b(x)))).mean((1, 2)))


class Norms(nn.Module):
    """Batch-norms with and without scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)
        self.b, self.n = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.n(self.b(torch.relu(self.m(self.a(x)))))).mean((2, 3)))


class Shared(nn.Module):
    """A convolution that runs twice, on other inputs each time: it is not solved, what comes behind it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "network",
    [Dense(), Dense(bias=False), Bare(), Edges(), Flat(), Last(), Norms(), Shared()],
    ids=lambda network: type(network).__name__,
)
def test_networks_of_every_kind_come_nearer_to_the_dense_one(
    network: nn.Module, errors: list[Errors]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Livelier than the defaults, or there is hardly anything to repair.
                nn.init.kaiming_normal_(module.weight)
    dense = from_module(network.eval(), nets.example())
    small, x = halved(dense), images(64)
    found = repair(dense, small, x, seed=0)
    assert errors[0] and all(after < before for before, after in errors[0].values())
    assert divergence(dense, found.bundle, x) < 0.7 * divergence(dense, small, x)


def test_a_network_of_one_layer_is_left_alone() -> None:
    dense = from_module(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), nets.example())
    small = without(dense, {})
    assert repair(dense, small, images(8), seed=0).bundle is small


@pytest.mark.parametrize("count", [1, 3])
def test_very_few_images_are_enough_to_run(count: int) -> None:
    dense = from_module(nets.build("residual"), nets.example())
    small = halved(dense)
    found = repair(dense, small, images(count), seed=0)
    assert divergence(dense, found.bundle, images(count)) < divergence(dense, small, images(count))


class Sum(nn.Module):
    """Two linear branches into one sum. The shortcut loses what it can't do without; the main branch loses copies."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.narrow, self.shortcut = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.wide, self.main = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, bias=not norm)
        self.bn = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        short = self.shortcut(self.narrow(x))
        return self.fc(torch.tanh(short + self.bn(self.main(self.wide(x)))).mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_makes_up_for_what_the_shortcut_of_its_sum_lost(
    norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four units that are left of `wide` still span the three colours, so `main` can give the sum exactly.

    Solved for its own answer alone it would leave all that the shortcut lost.
    """
    monkeypatch.setattr(least_squares, "RIDGE", 1e-9)
    network = Sum(norm)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
        if norm:
            network.bn.weight[0] *= -1
            network.bn.running_var.copy_(torch.rand(6) + 0.5)
    dense = from_module(network.eval(), nets.example())
    small = without(dense, {"narrow": torch.arange(4) < 1, "wide": torch.arange(8) < 4})
    found = repair(dense, small, images(64), seed=0).bundle
    x = images(16, seed=7)
    wanted = answers(dense, x)
    assert float((answers(small, x) - wanted).abs().max()) > 0.3
    torch.testing.assert_close(answers(found, x), wanted, rtol=1e-3, atol=1e-3)
    # One unit of `narrow` can't say what four said: the sum is right because of `main` alone.
    with torch.no_grad():
        short = [b.module.shortcut(b.module.narrow(x)) for b in (dense, found)]  # type: ignore[operator, union-attr]
    assert float((short[0] - short[1]).abs().max()) > 0.1


def test_a_very_wide_layer_is_solved_through_its_rows_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch, errors: list[Errors]
) -> None:
    """96 inputs from 48 rows."""
    dense = from_module(nets.build("plain"), nets.example())
    small, x = halved(dense), images(48)
    expected = repair(dense, small, x, seed=0).bundle.module.state_dict()
    monkeypatch.setattr(stage, "WIDEST", 50)
    asked: list[bool] = []
    made = least_squares.Rows.__init__

    def spy(rows: least_squares.Rows, *, wide: bool) -> None:
        asked.append(wide)
        made(rows, wide=wide)

    monkeypatch.setattr(least_squares.Rows, "__init__", spy)
    found = repair(dense, small, x, seed=0).bundle.module.state_dict()
    assert asked == [False, True], "b.0 has 36 inputs"
    for name, tensor in expected.items():
        # The one way adds up in float32, which the small ridge of few rows makes more of.
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
    assert errors[1]["fc"] == pytest.approx(errors[0]["fc"], rel=1e-2)


def test_the_rows_of_a_layer_are_limited_in_number_and_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all positions of all images evenly, whatever the chunks of images are."""
    dense = from_module(nets.build("plain"), nets.example())
    small, x = halved(dense), images(80)
    seen: dict[int, int] = {}
    add = least_squares.Rows.add

    def spy(rows: least_squares.Rows, x: Tensor, y: Tensor, edge: object = None) -> None:
        seen[x.shape[1]] = seen.get(x.shape[1], 0) + len(x)
        add(rows, x, y, edge)  # type: ignore[arg-type]

    monkeypatch.setattr(least_squares.Rows, "add", spy)
    monkeypatch.setattr(stage, "ROWS", 800)
    repair(dense, small, x, seed=0)
    # b.0 has 36 inputs at 64 positions of 80 images, fc 96 at one; both with the constant.
    assert seen == {37: 800, 97: 80}
    seen.clear()
    monkeypatch.setattr(stage, "CELLS", 37 * 400)
    found = repair(dense, small, x, seed=0).bundle
    assert seen == {37: 400, 97: 80} and divergence(dense, found, x) < divergence(dense, small, x)
