"""Training: bit-equal after an interruption, exact batch-norm statistics, losses worked by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.nn import objectives, progress
from edgeprune.nn.calling import logits, modes
from edgeprune.nn.checkpoint import Checkpoint
from edgeprune.nn.data import Split, in_memory
from edgeprune.nn.images import Decoded
from edgeprune.nn.train import CHECKPOINT, accuracy, augment, fit, mean_loss, recalibrate_bn
from edgeprune.recipe import TuneTable

TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)


class Small(nn.Module):
    """Convolutions, batch-norm and dropout: everything whose state or chance a resume must carry."""

    def __init__(self, seed: int = 0) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.bn = nn.BatchNorm2d(8)
            self.next = nn.Conv2d(8, 8, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn2(self.next(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Answers(nn.Module):
    """A network that answers what it was told to."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


@dataclass
class Interrupted:
    """Pixels that end the run at the n-th batch, as Ctrl-C or a kill would."""

    pixels: Tensor
    after: int
    seen: list[int] = field(default_factory=list)

    def take(self, indices: Tensor) -> Tensor:
        self.seen.append(len(indices))
        if len(self.seen) > self.after:
            raise KeyboardInterrupt
        return self.pixels[indices]

    def count(self) -> int:
        return len(self.pixels)


def stripes(count: int = 64) -> Split:
    """Upright (0) and lying (1) stripes under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    line = torch.arange(8) % 2 * 120
    clean = torch.where(labels.view(-1, 1, 1, 1) == 0, line.view(1, 1, 1, 8), line.view(1, 1, 8, 1))
    noise = torch.randint(0, 120, (count, 3, 8, 8), generator=generator)
    return in_memory("train", (clean + noise).to(torch.uint8), labels)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("teacher", [None, Small(7)])
@pytest.mark.parametrize("after", [5, 6, 10])
def test_an_interrupted_training_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, teacher: nn.Module | None, after: int
) -> None:
    split, table = stripes(), replace(TABLE, distill=0.5 if teacher else 0.0)
    whole = Small()
    history = fit(whole, split, table, teacher=teacher, seed=3, scratch=tmp_path / "whole")
    broken = Small()
    cut = replace(split, pixels=Interrupted(split.pixels.pixels, after))  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        fit(broken, cut, table, teacher=teacher, seed=3, scratch=tmp_path / "broken")
    resumed = Small()
    second = fit(resumed, split, table, teacher=teacher, seed=3, scratch=tmp_path / "broken")
    # One batch is looked at before the first step, and an epoch has four.
    assert second.resumed == (after - 1) // 4
    assert second.losses == history.losses and len(second.losses) == 3
    assert same(weights(resumed), weights(whole))


def test_training_is_decided_by_the_seed_and_leaves_the_global_chance_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = Small(), Small(), Small()
    fit(first, stripes(), TABLE, seed=1, scratch=tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    fit(second, stripes(), TABLE, seed=1, scratch=tmp_path / "b")
    fit(other, stripes(), TABLE, seed=2, scratch=tmp_path / "c")
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_training_learns(tmp_path: Path) -> None:
    module = Small()
    table = replace(TABLE, epochs=10, augment=False)
    history = fit(module, stripes(), table, seed=0, scratch=tmp_path)
    assert history.losses[-1] < 0.3 * history.losses[0]
    correct, total = accuracy(module, stripes())
    assert total == 64 and correct >= 62


def test_a_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    fit(Small(), stripes(), TABLE, seed=0, scratch=tmp_path)
    for change in (
        {"seed": 1},
        {"table": replace(TABLE, lr=0.01)},
        {"split": stripes(32)},
        {"module": Small(1)},
    ):
        asked = {"module": Small(), "split": stripes(), "table": TABLE, "seed": 0} | change
        assert fit(**asked, scratch=tmp_path).resumed == 0  # type: ignore[arg-type]
    assert fit(Small(1), stripes(), TABLE, seed=0, scratch=tmp_path).resumed == 3


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no", None])
def test_a_damaged_checkpoint_means_to_start_again(tmp_path: Path, damage: bytes | None) -> None:
    module = Small()
    fit(module, stripes(), TABLE, seed=0, scratch=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    again = Small()
    assert fit(again, stripes(), TABLE, seed=0, scratch=tmp_path).resumed == 0
    assert same(weights(again), weights(module))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"key": "k", "losses": Evil(marker)}, tmp_path / "c.pt")
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert Checkpoint(tmp_path / "c.pt", "k").restore(module, optimizer) == []
    assert not marker.exists()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.marker), "w")


def test_frozen_parameters_and_modes_stay_as_they_were(tmp_path: Path) -> None:
    module = Small()
    module.stem.requires_grad_(False)
    module.eval()
    module.drop.train()
    teacher = Small(1)
    before, teacher_before = weights(module), weights(teacher)
    fit(module, stripes(), replace(TABLE, distill=0.5), teacher=teacher, seed=0, scratch=tmp_path)
    after = weights(module)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["next.weight"], after["next.weight"])
    assert [name for name, layer in module.named_modules() if layer.training] == ["drop"]
    assert same(weights(teacher), teacher_before) and teacher.training
    assert all(p.is_contiguous() for p in module.parameters())


def test_weight_decay_leaves_biases_and_normalization_alone(tmp_path: Path) -> None:
    class Constant(nn.Module):
        """Its loss does not depend on its parameters, so that decay alone moves them."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return 0.0 * self.bn(self.conv(x)).mean((2, 3))[:, :2]

    module = Constant()
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(module, stripes(), replace(TABLE, weight_decay=0.1), seed=0, scratch=tmp_path)
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"conv.weight"}
    assert bool((module.conv.weight.abs() < before["conv.weight"].abs()).all())


def test_a_loss_that_is_not_finite_ends_the_training_with_the_place(tmp_path: Path) -> None:
    module = Answers(lambda x: x.mean((2, 3))[:, :2] @ torch.full((2, 2), math.nan))
    with pytest.raises(ModelError, match="loss is nan in epoch 1, step 1 of 4") as caught:
        fit(module, stripes(), TABLE, seed=0, scratch=tmp_path)
    assert "tune.lr=0.005" in caught.value.hint
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_learning_rate_far_too_high_ends_as_a_clear_error_or_finite(tmp_path: Path) -> None:
    try:
        history = fit(Small(), stripes(), replace(TABLE, lr=100.0), seed=0, scratch=tmp_path)
        assert all(math.isfinite(loss) for loss in history.losses)
    except ModelError as error:
        assert "diverged" in error.message


def test_networks_that_need_their_features_contiguous_train_too(tmp_path: Path) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 * 6 * 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(len(x), -1))

    assert len(fit(Viewing(), stripes(), TABLE, seed=0, scratch=tmp_path).losses) == 3


def test_auxiliary_outputs_of_the_training_mode_are_left_aside(tmp_path: Path) -> None:
    class Auxiliary(Small):
        """Two heads while training, as torchvision's inception_v3 and googlenet have."""

        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            answer = Small.forward(self, x)
            return (answer, answer * math.nan) if self.training else answer

    plain, auxiliary = Small(), Auxiliary()
    fit(plain, stripes(), TABLE, seed=0, scratch=tmp_path / "a")
    fit(auxiliary, stripes(), TABLE, seed=0, scratch=tmp_path / "b")
    assert same(weights(plain), weights(auxiliary))


def test_the_main_answer_is_found_in_tuples_and_mappings() -> None:
    x, wanted = torch.rand(3, 3, 8, 8), torch.rand(3, 5)
    for answer in (
        wanted,
        (wanted, None),
        [wanted],
        {"out": wanted, "aux": 1},
        {"loss": 0, "logits": wanted},
    ):
        assert logits(Answers(lambda _, answer=answer: answer), x) is wanted
    for answer, found in (
        (None, "NoneType"),
        (torch.rand(3), "shape (3,)"),
        (torch.rand(4, 5), "shape (4, 5)"),
        ((), "tuple"),
    ):
        with pytest.raises(ModelError) as caught:
            logits(Answers(lambda _, answer=answer: answer), x)
        assert found in caught.value.message


def test_a_network_that_fails_is_an_error_with_the_batch_and_the_mode() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("shape mismatch inside")

    with pytest.raises(ModelError, match=r"batch \(64, 3, 8, 8\) in evaluation mode: shape mismatch inside"):
        accuracy(Answers(fail), stripes())


def test_too_little_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training needs at least 2"):
        fit(Small(), stripes(1), TABLE, seed=0, scratch=tmp_path)
    frozen = Small().requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter that can be trained"):
        fit(frozen, stripes(), TABLE, seed=0, scratch=tmp_path)
    assert len(fit(Small(), stripes(3), TABLE, seed=0, scratch=tmp_path).losses) == 3


def test_distillation_numbers_worked_by_hand() -> None:
    teacher, student, y = (
        torch.tensor([[2.0, 1.0, 0.0]]).double(),
        torch.ones(1, 3).double(),
        torch.tensor([0]),
    )
    assert torch.softmax(teacher, 1)[0].tolist() == pytest.approx([0.66524, 0.24473, 0.09003], abs=5e-6)
    at_1 = objectives.distillation(student, teacher, y, 1.0, 1.0)
    at_4 = objectives.distillation(student, teacher, y, 1.0, 4.0)
    assert float(at_1) == pytest.approx(0.266217, abs=1e-6)
    assert float(at_4) == pytest.approx(0.328202, abs=1e-6)
    half = objectives.distillation(student, teacher, y, 0.5, 4.0)
    assert float(half) == pytest.approx(0.5 * math.log(3) + 0.5 * 0.328202, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 8.0))
def test_distillation_is_least_at_the_teacher_and_without_weight_is_cross_entropy(
    seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 4, 5, generator=generator)
    y = torch.randint(0, 5, (4,), generator=generator)
    assert float(objectives.distillation(teacher + 3.0, teacher, y, 1.0, temperature)) == pytest.approx(
        0, abs=1e-4
    )
    assert float(objectives.distillation(student, teacher, y, 1.0, temperature)) > 0
    plain = nn.functional.cross_entropy(student, y)
    assert torch.allclose(objectives.distillation(student, teacher, y, 0.0, temperature), plain)


def test_no_gradient_flows_into_the_teacher() -> None:
    teacher, student = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    objectives.distillation(student, teacher, torch.tensor([0, 1]), 0.5, 4.0).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("name", ["fgsm", "pgd", "trades", "nothing"])
def test_objectives_of_other_versions_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="accepted: natural"):
        fit(Small(), stripes(), replace(TABLE, objective=name), seed=0, scratch=tmp_path)
    assert objectives.objective("natural") is objectives.natural


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 70), batch=st.integers(2, 40))
def test_batch_norm_gets_the_exact_statistics_of_all_images(count: int, batch: int) -> None:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)) * 3
    module = Small()
    before = weights(module)
    module.eval()
    assert recalibrate_bn(module, images, batch=batch) == 2
    with torch.no_grad():
        seen = module.stem(images).double()
    variance, mean = torch.var_mean(seen, dim=(0, 2, 3), correction=1)
    assert torch.allclose(module.bn.running_mean.double(), mean, atol=1e-6)
    assert torch.allclose(module.bn.running_var.double(), variance, rtol=1e-5)
    after = weights(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"bn", "bn2"} and not any(
        "weight" in name for name in moved
    )
    assert not any(layer.training for layer in module.modules())
    assert module.bn.momentum == 0.1 and not module.bn._forward_pre_hooks


def test_recalibration_is_that_of_torch_for_one_batch_and_uses_no_dropout() -> None:
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = Small(), Small()
    for layer in (theirs.bn, theirs.bn2):
        layer.momentum = None
    theirs.train()
    with torch.no_grad():
        theirs(images)
    recalibrate_bn(ours, images)
    assert ours.drop.training and ours.training
    for name in ("bn", "bn2"):
        assert torch.allclose(
            ours.get_buffer(f"{name}.running_mean"), theirs.get_buffer(f"{name}.running_mean"), atol=1e-6
        )
        assert torch.allclose(
            ours.get_buffer(f"{name}.running_var"), theirs.get_buffer(f"{name}.running_var"), rtol=1e-5
        )
    assert int(ours.bn.num_batches_tracked) == 1


def test_recalibration_repairs_statistics_that_were_lost(tmp_path: Path) -> None:
    module, split = Small(), stripes()
    fit(module, split, replace(TABLE, epochs=8), seed=0, scratch=tmp_path)
    good = accuracy(module, split)[0]
    for layer in (module.bn, module.bn2):
        layer.running_mean.fill_(5.0)  # type: ignore[union-attr]
    broken = accuracy(module, split)[0]
    recalibrate_bn(module, split.take(torch.arange(64)))
    assert accuracy(module, split)[0] >= good - 2 > broken


def test_networks_without_batch_norm_or_with_too_few_images() -> None:
    assert recalibrate_bn(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), torch.rand(4, 3, 8, 8)) == 0
    with pytest.raises(UsageError, match="at least 2"):
        recalibrate_bn(Small(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ModelError, match="input of bn is not finite"):
        recalibrate_bn(Small(), torch.full((4, 3, 8, 8), math.inf))


def test_a_batch_norm_that_is_not_used_keeps_its_statistics() -> None:
    module = Small()
    module.spare = nn.BatchNorm2d(4)
    module.spare.running_mean.fill_(3.0)  # type: ignore[union-attr]
    assert recalibrate_bn(module, torch.rand(4, 3, 8, 8)) == 2
    assert module.spare.running_mean.tolist() == [3.0] * 4  # type: ignore[union-attr]


def test_accuracy_counts_and_an_answer_that_is_not_finite_is_wrong() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    answers = torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 1.0], [math.nan, 0.0], [0.0, math.inf]])
    split = Split("test", labels, Decoded(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)))
    module = Answers(lambda x: answers[(x.flatten() * 255).round().long()])
    assert accuracy(module, split, batch=2) == (2, 5)
    assert module.training


def test_mean_loss_is_the_mean_over_images_whatever_the_batch() -> None:
    split = stripes(10)
    images, module = split.take(torch.arange(10)), Small().eval()
    expected = float(nn.functional.cross_entropy(module(images), split.labels).detach())
    for batch in (3, 10, 100):
        assert mean_loss(module, images, split.labels, batch) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_an_augmented_image_is_a_window_of_the_mirrored_or_plain_image(
    height: int, width: int, seed: int
) -> None:
    x = torch.rand(6, 2, height, width, generator=torch.Generator().manual_seed(seed))
    out = augment(x, torch.Generator().manual_seed(seed))
    reach = min(height // 8, width - 1)
    padded = nn.functional.pad(x, (reach,) * 4, mode="reflect") if reach else x
    assert out.shape == x.shape
    for image, source in zip(out, padded, strict=True):
        windows = [
            source[:, a : a + height, b : b + width]
            for a in range(2 * reach + 1)
            for b in range(2 * reach + 1)
        ]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)


def test_augmentation_is_off_when_the_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(x: Tensor, generator: torch.Generator) -> Tensor:
        raise AssertionError("augmented")

    monkeypatch.setattr("edgeprune.nn.train.augment", never)
    fit(Small(), stripes(), replace(TABLE, epochs=1, augment=False), seed=0, scratch=tmp_path)


def test_modes_are_put_back_after_an_error() -> None:
    first, second = Small(), Small().eval()
    first.bn.eval()
    with pytest.raises(KeyError), modes(second, first):
        assert second.drop.training and not first.training
        raise KeyError
    assert first.training and not first.bn.training and not second.drop.training


def test_bars_are_silent_when_nobody_looks_and_shown_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(_slowly(), 3, "letters")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "letters" in err and "left" in err


def _slowly() -> Iterator[int]:
    yield from range(3)
