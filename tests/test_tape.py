"""Answers to images that changed in a window: those of the network itself, wherever the window lies."""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.attacks._tape import Stale, Tape, Unfit, record
from edgeprune.attacks._tape_rules import RULES, Window, name_of
from edgeprune.attacks._windows import Asker
from edgeprune.attacks.square import Square
from edgeprune.models.queries import as_logits
from edgeprune.models.replicas import on_replicas
from edgeprune.train.adversarial import Ball


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Calls(nn.Module):
    """A stem, something in the middle, and a head that mixes all positions."""

    def __init__(self, middle: Callable[[Tensor], Tensor], channels: int = 6) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 6, 3, padding=1), middle, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


def conv(*args: int, **options: int | str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Conv2d(*args, **options)  # type: ignore[arg-type]


MIDDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu in place": lambda a: functional.relu(a, inplace=True),
    "relu6, swish and gelu": lambda a: functional.gelu(functional.silu(functional.relu6(a))),
    "stride": conv(6, 6, 3, stride=2, padding=1),
    "stride without padding": conv(6, 6, 2, stride=2),
    "stride larger than the kernel": conv(6, 6, 1, stride=3),
    "dilation": conv(6, 6, 3, padding=2, dilation=2),
    "groups": conv(6, 6, 5, padding=2, groups=3),
    "flat kernel": nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
    "reflected": conv(6, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(6, 6, 2, stride=2),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "max pool of negative numbers": lambda a: functional.max_pool2d(a - 5, 3, 1, 1),
    "average pool": nn.AvgPool2d(2),
    "average pool over a border": nn.AvgPool2d(3, 2, 1),
    "slices": lambda a: a[:, :, ::2, ::2] + a[:, :, 1::2, 1::2],
    "slice of the end": lambda a: a[:, 1:4, -5:, 3:],
    "slices of different places": lambda a: a[:, :, 2:10] * a[:, :, 1:9],
    "padding": lambda a: functional.pad(a, (1, 2, 3, 0, 1, 1))[:, 1:7],
    "shortcut of a ResNet": lambda a: a[:, :, ::2, ::2] + functional.max_pool2d(a, 2),
    "a gate of all positions": lambda a: a * torch.sigmoid(a.mean((2, 3), keepdim=True)),
    "numbers and channels": lambda a: (a * 2 - torch.arange(6.0).view(-1, 1, 1)) / 3 + 1,
    "a picture": lambda a: a + torch.linspace(0, 1, 144).view(12, 12),
    "a picture for all channels": lambda a: a * torch.linspace(0, 1, 144).view(1, 1, 12, 12),
    "joined": lambda a: torch.cat([a, a.relu()], 1)[:, 3:9],
    "joined along rows": lambda a: torch.cat([a, a.relu()], 2),
    "turned": lambda a: a.transpose(2, 3),
    "softmax over places": lambda a: a.flatten(2).softmax(2).view(a.shape),
    "batch-norm": nn.BatchNorm2d(6),
    "group norm": nn.GroupNorm(2, 6),
    "added in place": lambda a: a.relu().add_(a),
}


def explored(network: nn.Module, x: Tensor, sides: tuple[int, ...], rounds: int = 24) -> float:
    """The largest difference between the tape and the network on a search that keeps some images at each step."""
    generator, kept, worst = seeded(1), x.clone(), 0.0
    tape = record(network, kept)
    height, width = x.shape[2:]
    for number in range(rounds):
        side = sides[number % len(sides)]
        top, left = (
            int(torch.randint(size - side + 1, (1,), generator=generator)) for size in (height, width)
        )
        window, tried = Window(top, top + side, left, left + side), kept.clone()
        tried[:, :, window.rows, window.columns] = torch.rand(len(x), 3, side, side, generator=generator)
        with torch.no_grad():
            expected = network(tried)
            try:
                found = tape.look(tried, window)
            except Stale:
                tape = record(network, kept)
                found = tape.look(tried, window)
        worst = max(worst, float((found - expected).abs().max()))
        rows = (torch.rand(len(x), generator=generator) < 0.5).nonzero().squeeze(1)
        tape.keep(rows)
        kept[rows] = tried[rows]
    return worst


@pytest.mark.parametrize("name", sorted(MIDDLES))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_tape_answers_as_the_network_does(name: str, layout: torch.memory_format) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Calls(MIDDLES[name], 3 if name == "slice of the end" else 6).eval()
    x = torch.rand(5, 3, 12, 12, generator=seeded()).contiguous(memory_format=layout)
    assert explored(network, x, (1, 2, 3, 5)) < 2e-6


@pytest.mark.parametrize("name", sorted(nets.NETS))
def test_so_it_does_for_networks_of_every_kind(name: str) -> None:
    assert explored(nets.build(name), nets.example(4), (1, 2, 3, 6)) < 2e-6


def test_only_a_part_is_computed_where_only_a_part_can_change() -> None:
    network = nn.Sequential(
        *[conv(3, 3, 3, padding=1) for _ in range(4)], nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    tape = record(network.eval(), torch.rand(2, 3, 32, 32, generator=seeded()))
    tape.look(torch.rand(2, 3, 32, 32, generator=seeded(1)), Window(10, 12, 0, 2))
    assert tape._looks is not None
    windows = [window for _, window in tape._looks.changes.values()]
    # Each 3 x 3 kernel carries a change one pixel further, and windows keep their size at a border.
    assert windows[:5] == [Window(10 - i, 12 + i, 0, 2 + 2 * i) for i in range(5)]
    assert windows[-1] is None


@pytest.mark.parametrize("top", range(8))
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0), (1, 2, 0), (5, 3, 2)]
)
def test_every_output_that_a_change_reaches_is_in_the_window(
    top: int, kernel: int, stride: int, padding: int
) -> None:
    layer = nn.Conv2d(1, 1, kernel, stride, padding, bias=False)
    nn.init.ones_(layer.weight)
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.zeros(1, 1, 10, 24)
    tape = record(network, x)
    tried = x.clone()
    tried[:, :, top : top + 2, 4:6] = 1
    tape.look(tried, Window(top, top + 2, 4, 6))
    assert tape._looks is not None
    with torch.no_grad():
        reached = layer(tried)
    _, window = tape._looks.changes[1]
    if window is not None:
        reached[:, :, window.rows, window.columns] = 0
        assert not reached.any()


def test_what_it_can_not_follow_it_refuses() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made = x * 2
            made[:, 0] = 0
            return made.mean((2, 3))

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 3)

    around = nn.Sequential(conv(3, 4, 3, padding=1, padding_mode="circular"), nn.Flatten())
    for network in (InPlace(), Blind(), around):
        with pytest.raises(Unfit):
            record(network, nets.example(2))


def test_every_rule_is_of_an_operator_that_there_is() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in RULES)
    assert name_of(torch.ops.aten.relu.default) == "relu"


# The asker


class Chancy(nn.Module):
    """Answers otherwise when it is asked again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.build("plain")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.rand(len(x), 1)


def looked(asker: Asker, network: nn.Module, window: Window, x: Tensor) -> Tensor:
    tried = x.clone()
    tried[:, :, window.rows, window.columns] = 0.5
    answer = asker.look(x, tried, window)
    with torch.no_grad():
        assert torch.allclose(answer, network(tried), atol=2e-6)
    return tried


def test_small_windows_are_looked_at_with_tapes_and_all_else_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []

    def counted(network: nn.Module, images: Tensor) -> Tape:
        written.append(len(images))
        return record(network, images)

    monkeypatch.setattr("edgeprune.attacks._windows.record", counted)
    network, x = nets.build("residual"), nets.example(6)
    asker = Asker(as_logits(network), network)
    looked(asker, network, Window(0, 6, 0, 6), x)
    assert not written
    tried = looked(asker, network, Window(2, 4, 2, 4), x)
    looked(asker, network, Window(1, 2, 2, 4), x)
    assert written == [6], "written down once"
    asker.keep(torch.tensor([True, False] * 3))
    kept = x.clone()
    tried = x.clone()
    tried[:, :, 1:2, 2:4] = 0.5
    kept[::2] = tried[::2]
    looked(asker, network, Window(5, 7, 5, 7), kept)
    whole = looked(asker, network, Window(0, 8, 0, 8), kept)
    asker.keep(torch.ones(6, dtype=torch.bool))
    looked(asker, network, Window(5, 7, 5, 7), whole)
    assert written == [6, 6], "and again when images were kept that changed everywhere"


@pytest.mark.parametrize("network", [Chancy(), nets.build("plain")])
def test_a_network_that_does_not_fit_is_asked_itself(network: nn.Module) -> None:
    x = nets.example(4)
    asker = Asker(as_logits(network), network if isinstance(network, Chancy) else None)
    asker.look(x, x, Window(0, 2, 0, 2))
    assert asker.network is None


def test_what_seems_wrong_is_asked_again_of_the_network_itself() -> None:
    network, x = nets.build("plain"), nets.example(4)
    asker = Asker(as_logits(network), network)
    tried = looked(asker, network, Window(0, 2, 0, 2), x)
    rows = torch.tensor([False, True, False, True])
    answer = asker.sure(tried, rows, torch.zeros(4, 5))
    with torch.no_grad():
        assert torch.equal(answer[rows], network(tried[rows])) and not answer[~rows].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_square_finds_the_same_with_tapes_and_without(threads: int) -> None:
    network, x = nets.build("residual"), torch.rand(16, 3, 12, 12, generator=seeded(5))
    with torch.no_grad():
        network.fc.bias -= network(x).mean(0)
        y = network(x).argmax(1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with on_replicas(network, x) as lanes:
            assert (lanes is network) == (threads == 1)
        attack, ball = Square(queries=300, first=0.05), Ball("Linf", 0.01)
        fast = attack(network, x, y, ball, seeded())
        slow = attack(lambda images: network(images).detach(), x, y, ball, seeded())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fast.broken, slow.broken) and torch.equal(fast.queries, slow.queries)
    assert fast.broken.any() and not fast.broken.all()
    # Where a change that rounding calls better is kept, images part.
    assert (fast.images != slow.images).flatten(1).any(1).sum() <= 2
