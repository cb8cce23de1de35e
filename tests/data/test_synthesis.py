"""Images made from a network: repeatable, in range, nearer to what batch-norm remembers, resumed to the same end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune.data import synthesis
from edgeprune.data.synthesis import Synthesis, amount, synthesize
from edgeprune.errors import ModelError
from edgeprune.models import storage
from edgeprune.records import InputSpec

SPEC = InputSpec(nets.SHAPE, 5)


def make(network: nn.Module, scratch: Path | None = None, **wanted: int) -> Synthesis:
    asked = {"images": 12, "steps": 10, "seed": 0, **wanted}
    return synthesize(network, SPEC, scratch=scratch, **asked)


def trained(name: str) -> nn.Module:
    """A network whose batch-norms remember what they saw on images, as training leaves them."""
    network = nets.build(name).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(nets.example(64) * torch.tensor([1.0, 0.2, 0.6]).view(1, 3, 1, 1))
    return network.eval()


def distance(network: nn.Module, images: Tensor) -> float:
    """Mean distance of the channels' means from the remembered ones, in remembered deviations."""
    found: list[float] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, deviation = norm.get_buffer("running_mean"), norm.get_buffer("running_var").sqrt()
        found.append(float(((inputs[0].mean((0, 2, 3)) - mean) / deviation).abs().mean()))

    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


def test_the_same_seed_gives_the_same_images_and_another_one_others() -> None:
    network = nets.build("residual")
    one, two, other = make(network), make(network), make(network, seed=1)
    assert torch.equal(one.images, two.images) and one.facts == two.facts and one.notes == two.notes
    assert not torch.equal(one.images, other.images)
    assert one.facts["seed"] == 0 and other.facts["seed"] == 1


@pytest.mark.parametrize("name", nets.NETS)
def test_the_images_are_of_the_networks_input_and_the_network_stays_as_it_is(name: str) -> None:
    network = nets.build(name)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    spec = InputSpec(nets.SHAPE, 5, low=-1.0, high=0.5)
    made = synthesize(network, spec, images=6, steps=4, seed=0, scratch=None)
    assert made.images.shape == (6, *nets.SHAPE) and made.images.dtype == torch.float32
    assert not made.images.requires_grad
    assert float(made.images.min()) >= -1 and float(made.images.max()) <= 0.5
    assert float(made.images.min()) < -0.6 and float(made.images.max()) > 0.1, "the range is used"
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(m._forward_pre_hooks for m in network.modules())
    norms = sum(isinstance(m, _BatchNorm) for m in network.modules())
    assert made.facts["batch-norm layers"] == norms and made.facts["images"] == 6


@pytest.mark.parametrize("name", ["plain", "residual", "concat"])
def test_the_images_come_nearer_to_what_batch_norm_remembers(name: str) -> None:
    network = trained(name)
    start, end = make(network, steps=1, images=24), make(network, steps=80, images=24)
    assert distance(network, end.images) < 0.5 * distance(network, start.images)
    before, after = end.facts["distance before"], end.facts["distance after"]
    assert isinstance(before, float) and isinstance(after, float) and after < 0.5 * before
    # What is said is measured at the beginning of the last step.
    assert after == pytest.approx(distance(network, end.images), rel=0.1, abs=0.02)
    (note,) = end.notes
    assert "24 images were synthesized from the model in 80 steps" in note
    assert f"(mean distance {before:.2f} to {after:.2f} standard deviations)" in note


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(192, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.a(x.flatten(1))))


@pytest.mark.parametrize("kind", ["no batch-norm", "no convolution"])
def test_without_batch_norm_the_images_spread_over_the_classes(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nets.build("groupnormed") if kind == "no batch-norm" else Dense().eval()
    classes = torch.arange(20) % 5
    losses = []
    for steps in (1, 60):
        made = make(network, images=20, steps=steps)
        with torch.no_grad():
            answers = network(made.images)
        losses.append(float(nn.functional.cross_entropy(answers, classes)))
    assert losses[1] < losses[0]
    if kind == "no convolution":
        assert (answers.argmax(1) == classes).float().mean() > 0.7
    assert "it has no batch-norm that remembers its training data" in made.notes[0]
    assert made.facts["batch-norm layers"] == 0 and made.facts["distance after"] == 0


def test_a_batch_norm_that_remembers_nothing_is_not_matched() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(144, 5)).eval()
    assert make(network, steps=2).facts["batch-norm layers"] == 0


def test_a_batch_norm_of_rows_is_matched_too() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    assert make(network.eval(), steps=2).facts["batch-norm layers"] == 1


def test_one_image_is_enough() -> None:
    assert make(nets.build("residual"), images=1, steps=2).images.shape == (1, *nets.SHAPE)


def test_more_images_than_a_batch_are_made_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "BATCH", 5)
    made = make(nets.build("plain"), images=12, steps=3)
    assert made.images.shape == (12, *nets.SHAPE)
    assert torch.equal(made.images[:5], make(nets.build("plain"), images=5, steps=3).images)
    assert not torch.equal(made.images[5:10], made.images[:5])


def told_of_progress(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """All that the progress is told; after so many steps it interrupts, as Ctrl-C does."""
    told: list[int] = []

    @contextmanager
    def bar(total: int, label: str) -> Iterator[Callable[..., None]]:
        def advance(steps: int = 1, label: str | None = None) -> None:
            told.append(steps)
            if sum(told) >= stop:
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(synthesis, "bar", bar)
    return told


def test_an_interrupted_synthesis_goes_on_to_the_very_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nets.build("residual")
    expected = make(network)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        told_of_progress(patch, 7)
        make(network, tmp_path)
    # Every second of the ten steps is saved, and the last one before the seventh is the sixth.
    with monkeypatch.context() as patch:
        told = told_of_progress(patch, 1000)
        again = make(network, tmp_path)
    assert told[0] == 6 and sum(told) == 10
    assert torch.equal(again.images, expected.images) and again.facts == expected.facts


def test_a_finished_synthesis_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nets.build("plain")
    first = make(network, tmp_path)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(synthesis, "logits", refuse)
    again = make(network, tmp_path)
    assert torch.equal(again.images, first.images) and again.facts == first.facts


@pytest.mark.parametrize("other", [{"seed": 1}, {"steps": 12}, {"images": 11}, {}])
def test_what_another_synthesis_left_is_not_gone_on_from(tmp_path: Path, other: dict[str, int]) -> None:
    """With nothing else changed it is the network."""
    make(nets.build("plain"), tmp_path)
    network = nets.build("plain", seed=0 if other else 1)
    assert torch.equal(make(network, tmp_path, **other).images, make(network, **other).images)


def test_a_broken_file_is_begun_again(tmp_path: Path) -> None:
    network = nets.build("plain")
    expected = make(network, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(make(network, tmp_path).images, expected.images)


def test_nothing_is_saved_without_a_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("there is no folder")

    monkeypatch.setattr(storage.Checkpoint, "save", refuse)
    make(nets.build("plain"))


class Strange(nn.Module):
    """A network whose answers have no gradient, or no finite one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(192, 5), kind

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.kind == "nan":
            return self.fc(torch.log(x - 2))
        if self.kind == "infinite":
            return self.fc(1 / (x - x))
        return self.fc(x.detach())


@pytest.mark.parametrize("kind", ["nan", "infinite", "no gradient"])
def test_a_network_without_finite_gradient_is_refused_with_a_way_out(kind: str) -> None:
    with pytest.raises(ModelError, match="gives no finite gradient for its input") as caught:
        make(Strange(kind).eval())
    assert "prune.repair=none" in caught.value.hint


def test_weights_that_are_no_numbers_are_refused() -> None:
    network = nets.build("plain")
    with torch.no_grad():
        network.a[0].weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="gives no finite gradient for its input"):
        make(network)


def test_a_network_that_does_not_classify_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5), nn.Unflatten(1, (5, 1)))
    with pytest.raises(ModelError, match="not logits"):
        make(network.eval())


def test_as_many_images_and_steps_as_asked_for() -> None:
    assert amount(1e15, 3, 7) == (3, 7)
    assert amount(1e6, 0, 7)[1] == 7 and amount(1e6, 3, 0)[0] == 3
    # Few images are moved for longer, if the work allows it.
    assert amount(1e9, 4, 0)[1] > amount(1e9, 40, 0)[1]


def test_the_amount_is_what_the_work_pays_for() -> None:
    # A ResNet-20 at 32 x 32, a ResNet-50 at 224 x 224.
    assert amount(41e6, 0, 0) == (256, 100) and amount(4.1e9, 0, 0) == (16, 20)
    assert amount(1e13, 0, 0) == (synthesis.LEAST_IMAGES, synthesis.LEAST_STEPS)
    amounts = [amount(10 ** (k / 4), 0, 0) for k in range(20, 52)]
    assert [images for images, _ in amounts] == sorted((images for images, _ in amounts), reverse=True)
    for k, (images, steps) in enumerate(amounts):
        work = synthesis.PASSES * 10 ** ((k + 20) / 4) * images * steps
        assert work <= synthesis.WORK or steps == synthesis.LEAST_STEPS
