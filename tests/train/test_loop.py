"""The training loop: what it learns, leaves alone and refuses, the order of hooks, and the choice of an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from image_sets import Answers, Small, same, stripes, weights
from torch import Tensor, nn

from edgeprune.data.collection import in_memory
from edgeprune.errors import ModelError, UsageError
from edgeprune.recipe.schema import TuneTable
from edgeprune.train import loop
from edgeprune.train.evaluation import accuracy, robust_accuracy
from edgeprune.train.job import Hooks, TrainingJob, lr_factor, momentum
from edgeprune.train.loop import CHECKPOINT, fit
from edgeprune.train.objectives import objective_of

TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)


def course(scratch: Path, table: TuneTable = TABLE, **more: Any) -> TrainingJob:
    return TrainingJob(**({"split": stripes(), "table": table, "seed": 0, "scratch": scratch} | more))


def test_training_is_decided_by_the_seed_and_leaves_the_global_chance_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = Small(), Small(), Small()
    fit(first, course(tmp_path / "a", seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    fit(second, course(tmp_path / "b", seed=1))
    fit(other, course(tmp_path / "c", seed=2))
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": "adamw", "lr": 0.01},
        {"mixed": "bf16"},
        {"objective": "fgsm", "eps": "16/255", "beta": 0.5},
        {"objective": "pgd", "eps": "1", "norm": "L2", "attack_steps": 2},
        {"objective": "trades", "eps": "16/255", "attack_steps": 2, "trades": 2.0},
    ],
    ids=lambda change: "-".join(map(str, change.values())) or "sgd",
)
def test_training_learns(tmp_path: Path, change: dict[str, Any]) -> None:
    module = Small()
    table = replace(TABLE, epochs=10, augment="off", **change)
    objective = objective_of(table, None)
    before = robust_accuracy(module, stripes(), objective, seed=0)[0]
    history = fit(module, course(tmp_path, table))
    assert history.losses[-1] < (0.5 if objective.attacks else 0.3) * history.losses[0]
    correct, total = robust_accuracy(module, stripes(), objective, seed=0)
    assert total == 64 and correct >= 58 > before
    assert accuracy(module, stripes())[0] >= 62
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("name", sorted(nets.NETS))
def test_a_network_of_any_kind_trains_and_its_tree_stays(tmp_path: Path, name: str) -> None:
    module = nets.build(name)
    tree = [(name, type(layer), id(layer)) for name, layer in module.named_modules()]
    parameters = [(name, id(value)) for name, value in module.named_parameters()]
    split = in_memory("train", (nets.example(6) * 255).to(torch.uint8), torch.arange(6) % 5)
    before = weights(module)
    fit(module, course(tmp_path, replace(TABLE, epochs=1, batch=3, objective="fgsm"), split=split))
    assert [(name, type(layer), id(layer)) for name, layer in module.named_modules()] == tree
    assert [(name, id(value)) for name, value in module.named_parameters()] == parameters
    assert weights(module).keys() == before.keys() and not same(weights(module), before)
    assert not module.training


def test_frozen_parameters_and_modes_stay_as_they_were(tmp_path: Path) -> None:
    module = Small()
    module.stem.requires_grad_(False)
    module.eval()
    module.drop.train()
    teacher = Small(1)
    before, teacher_before = weights(module), weights(teacher)
    fit(module, course(tmp_path, replace(TABLE, distill=0.5), teacher=teacher))
    after = weights(module)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["next.weight"], after["next.weight"])
    assert [name for name, layer in module.named_modules() if layer.training] == ["drop"]
    assert same(weights(teacher), teacher_before) and teacher.training
    assert all(p.is_contiguous() for p in [*module.parameters(), *teacher.parameters()])


class Constant(nn.Module):
    """Its loss does not depend on its parameters, so that decay and penalties alone move them."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * self.bn(self.conv(x)).mean((2, 3))[:, :2]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_leaves_biases_and_normalization_alone(tmp_path: Path, optimizer: str) -> None:
    module = Constant()
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(module, course(tmp_path, replace(TABLE, weight_decay=0.1, optimizer=optimizer)))
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"conv.weight"}
    assert bool((module.conv.weight.abs() < before["conv.weight"].abs()).all())


def test_the_decay_of_adamw_is_decoupled_from_its_gradients(tmp_path: Path) -> None:
    """Without a gradient, w shrinks by 1 - lr * decay at each step (Loshchilov and Hutter 2019, algorithm 2)."""
    module, rates = Constant(), []
    start = module.conv.weight.detach().clone()
    table = replace(TABLE, weight_decay=0.1, optimizer="adamw")
    fit(module, course(tmp_path, table), Hooks(after_step=lambda _, lr: rates.append(lr)))
    assert torch.allclose(module.conv.weight, start * math.prod(1 - rate * 0.1 for rate in rates))


@pytest.mark.parametrize("total", [1, 2, 12, 400])
def test_the_learning_rate_warms_up_and_falls_by_half_a_cosine(total: int, tmp_path: Path) -> None:
    shares = [lr_factor(step, total) for step in range(total)]
    top = shares.index(1.0)
    assert top == max(1, round(0.05 * total)) - 1
    assert shares[: top + 1] == sorted(shares[: top + 1]) and all(share > 0 for share in shares)
    assert shares[top:] == sorted(shares[top:], reverse=True)
    if total == 400:
        assert shares[:2] == [0.05, 0.1] and shares[20 + 190] == pytest.approx(0.5)
        assert shares[-1] == pytest.approx((math.pi / 380) ** 2 / 4, rel=1e-3)
    if total == 12:
        rates: list[float] = []
        fit(Small(), course(tmp_path), Hooks(after_step=lambda _, rate: rates.append(rate)))
        assert rates == [0.05 * share for share in shares]


@dataclass
class Diary:
    """Writes down the hooks' calls in their order."""

    network: nn.Module
    lines: list[str] = field(default_factory=list)

    def hooks(self) -> Hooks:
        return Hooks(self.loss, self.penalty, self.before_step, self.after_step, self.after_epoch, self.state)

    def loss(self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        assert module is self.network and module.training and len(x) == len(y)
        self.lines.append("loss")
        return nn.functional.cross_entropy(module(x), y)

    def penalty(self) -> Tensor:
        self.lines.append("penalty")
        return torch.zeros(())

    def before_step(self) -> None:
        self.lines.append("before_step")
        self.start = weights(self.network)
        assert all(parameter.grad is not None for parameter in self.network.parameters())

    def after_step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        self.lines.append("after_step")
        assert not same(self.start, weights(self.network))
        assert all(group["lr"] == lr for group in optimizer.param_groups)

    def after_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        self.lines.append(f"after_epoch {epoch}")

    def state(self) -> dict[str, Any]:
        self.lines.append("state")
        return {}


def test_hooks_are_called_in_their_order(tmp_path: Path) -> None:
    module = Small()
    diary = Diary(module)
    fit(module, course(tmp_path, replace(TABLE, epochs=2)), diary.hooks())
    step = ["loss", "penalty", "before_step", "after_step"]
    epochs = [[*step * 4, f"after_epoch {epoch}", "state"] for epoch in range(2)]
    assert diary.lines == ["state", *epochs[0], *epochs[1]]


def test_hooks_that_do_nothing_change_nothing(tmp_path: Path) -> None:
    plain, hooked = Small(), Small()
    objective = objective_of(TABLE, None)
    hooks = Hooks(loss=objective, penalty=lambda: torch.zeros(()))
    assert fit(plain, course(tmp_path / "a")) == fit(hooked, course(tmp_path / "b"), hooks)
    assert same(weights(plain), weights(hooked))


def test_a_penalty_pulls(tmp_path: Path) -> None:
    module = Constant()
    before = float(module.bn.weight.detach().norm())
    hooks = Hooks(penalty=lambda: module.bn.weight.square().sum())
    history = fit(module, course(tmp_path, replace(TABLE, weight_decay=0.0)), hooks)
    # The loss of two equal logits, and the penalty of four ones before the first step.
    assert math.log(2) < history.losses[-1] < history.losses[0] < math.log(2) + 4
    assert float(module.bn.weight.detach().norm()) < 0.9 * before


def test_a_masked_gradient_does_not_shrink_the_step_of_the_others(tmp_path: Path) -> None:
    """The kept weight's gradient is far below the bound of the clip, the masked one's far above."""

    def run(masked: bool, place: str) -> float:
        module = Answers(lambda x: x.mean((2, 3))[:, :2] @ torch.eye(2))
        module.keep, module.gone = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def mask() -> None:
            assert module.keep.grad is not None and module.gone.grad is not None
            if masked:
                module.gone.grad.zero_()

        hooks = Hooks(
            loss=lambda network, x, y, generator: module.keep + 1e4 * module.gone + 0 * network.weight.sum(),
            before_step=mask,
        )
        fit(module, course(tmp_path / place, replace(TABLE, epochs=1, batch=64)), hooks)
        return float(module.keep.detach())

    # One step of SGD with Nesterov momentum on a gradient g: lr (1 + 0.9) g.
    assert run(True, "a") == pytest.approx(-0.05 * 1.9)
    assert run(False, "b") == pytest.approx(-0.05 * 1.9 * loop.MAX_GRAD_NORM / 1e4, rel=1e-4)


def test_momentum_is_what_the_optimizer_remembers(tmp_path: Path) -> None:
    module = Small()
    found: list[Tensor] = []
    gradients: list[Tensor] = []
    weight = module.head.weight

    def after(optimizer: torch.optim.Optimizer, lr: float) -> None:
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
        found.append(momentum(optimizer, weight).clone())

    table = replace(TABLE, epochs=1, weight_decay=0.0)
    fit(module, course(tmp_path / "a", table), Hooks(after_step=after))
    assert torch.allclose(found[0], gradients[0])
    assert torch.allclose(found[1], 0.9 * gradients[0] + gradients[1])
    found.clear()
    gradients.clear()
    fit(module, course(tmp_path / "b", replace(table, optimizer="adamw")), Hooks(after_step=after))
    # m = 0.1 g, v = 0.001 g^2: after the first step 0.1 / sqrt(0.001) of the sign.
    assert torch.allclose(found[0], 0.1 * gradients[0] / (0.001**0.5 * gradients[0].abs() + 1e-8), rtol=1e-4)
    fresh = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    assert torch.equal(momentum(fresh, weight), torch.zeros_like(weight)) and not fresh.state


@dataclass
class Spoiler:
    """Breaks the network after some epochs, and remembers how many it has seen."""

    module: Small
    bad: set[int]
    seen: list[int] = field(default_factory=list)
    good: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def after_epoch(self, epoch: int, _: object) -> None:
        self.seen.append(epoch)
        if epoch in self.bad:
            with torch.no_grad():
                self.module.head.bias.copy_(torch.tensor([1e4, 0.0]))
        self.good[epoch] = weights(self.module)

    def state(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen = list(state["seen"])

    def hooks(self) -> Hooks:
        return Hooks(after_epoch=self.after_epoch, state=self.state, restore=self.restore)


@pytest.mark.parametrize("objective", ["natural", "fgsm"])
def test_the_best_epoch_is_put_back_with_what_the_hooks_had_then(tmp_path: Path, objective: str) -> None:
    module = Small()
    spoiler = Spoiler(module, {8, 9})
    table = replace(TABLE, epochs=10, keep="best", objective=objective, eps="1/255", augment="off")
    held = stripes(40, "val", 1)
    history = fit(module, course(tmp_path, table, validation=held), spoiler.hooks())
    best = history.best
    assert best is not None and best < 8
    assert history.validation[best] == max(history.validation) > 0.5 == history.validation[9]
    # Of equal ones the later.
    assert all(value < history.validation[best] for value in history.validation[best + 1 :])
    assert same(weights(module), spoiler.good[best]) and spoiler.seen == list(range(best + 1))
    correct, total = robust_accuracy(module, held, objective_of(table, None), seed=0)
    assert correct / total == history.validation[best]
    again = Small()
    assert fit(again, course(tmp_path, table, validation=held), Spoiler(again, {8, 9}).hooks()).best == best
    assert same(weights(again), weights(module))


def test_the_last_epoch_stays_by_default_and_nothing_is_validated(tmp_path: Path) -> None:
    module = Small()
    spoiler = Spoiler(module, {2})
    history = fit(module, course(tmp_path, validation=stripes(8, "val", 1)), spoiler.hooks())
    assert history.best == 2 and history.validation == ()
    assert float(module.head.bias[0].detach()) == 1e4
    untouched = Small()
    assert fit(untouched, course(tmp_path / "b", replace(TABLE, epochs=0))).best is None
    assert same(weights(untouched), weights(Small()))


def test_validation_looks_at_a_thousand_images_under_attack_and_at_all_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "VALIDATED", 10)
    held = stripes(30, "val", 1)
    for objective, count in (("natural", 30), ("fgsm", 10)):
        table = replace(TABLE, epochs=1, keep="best", objective=objective)
        history = fit(Small(), course(tmp_path / objective, table, validation=held))
        assert (history.validation[0] * count) % 1 == pytest.approx(0, abs=1e-9)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_place(tmp_path: Path) -> None:
    module = Answers(lambda x: x.mean((2, 3))[:, :2] @ torch.full((2, 2), math.nan))
    with pytest.raises(ModelError, match="loss is nan in epoch 1, step 1 of 4") as caught:
        fit(module, course(tmp_path), Hooks(penalty=module.weight.sum))
    assert "tune.lr=0.005" in caught.value.hint
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    module = Small()
    before = {name: value.clone() for name, value in module.named_parameters()}

    def steep() -> Tensor:
        return (module.head.bias.sum() * 0).sqrt()

    with pytest.raises(ModelError, match="norm of the gradient is nan in epoch 1, step 1 of 4"):
        fit(module, course(tmp_path), Hooks(penalty=steep))
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_a_loss_without_a_gradient_is_refused(tmp_path: Path) -> None:
    module = Answers(lambda x: x.mean((2, 3))[:, :2])
    with pytest.raises(ModelError, match=r"batch \(16, 3, 8, 8\) has no gradient that can be computed"):
        fit(module, course(tmp_path))


def test_a_learning_rate_far_too_high_ends_as_a_clear_error_or_finite(tmp_path: Path) -> None:
    try:
        history = fit(Small(), course(tmp_path, replace(TABLE, lr=100.0)))
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

    assert len(fit(Viewing(), course(tmp_path / "a")).losses) == 3
    table = replace(TABLE, distill=0.5)
    assert len(fit(Small(), course(tmp_path / "b", table, teacher=Viewing())).losses) == 3


def test_what_is_too_little_or_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training needs at least 2"):
        fit(Small(), course(tmp_path, split=stripes(1)))
    frozen = Small().requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter that can be trained"):
        fit(frozen, course(tmp_path))
    assert len(fit(Small(), course(tmp_path, split=stripes(3))).losses) == 3
    for change, found in (
        ({"keep": "best"}, "validation images, and there are none"),
        ({"keep": "first"}, "'first' is not one of last, best"),
        ({"optimizer": "adma"}, "'adma' is not one of sgd, adamw"),
        ({"mixed": "fp8"}, "'fp8' is not one of auto, fp32, bf16"),
    ):
        with pytest.raises(UsageError, match=found):
            fit(Small(), course(tmp_path, replace(TABLE, **change)))


def test_augmentation_is_off_when_the_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(x: Tensor, *_: object, **__: object) -> Tensor:
        raise AssertionError("augmented")

    monkeypatch.setattr("edgeprune.train.loop.augment", never)
    fit(Small(), course(tmp_path, replace(TABLE, epochs=1, augment="off")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_hooks_see_the_network_there_and_it_comes_back(tmp_path: Path) -> None:
    module, seen = Small(), set()

    def look() -> None:
        seen.update(parameter.device.type for parameter in module.parameters())

    table = replace(TABLE, objective="pgd", attack_steps=2)
    fit(module, course(tmp_path, table), Hooks(before_step=look))
    assert seen == {"cuda"}
    assert {value.device.type for value in module.state_dict().values()} == {"cpu"}
