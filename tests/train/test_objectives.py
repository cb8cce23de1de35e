"""Losses worked by hand, adversarial training as its equations say, and what counts as a network's answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import Answers, Small, same, weights
from nets import build, example
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.models.inference import logits
from edgeprune.recipe.schema import TuneTable
from edgeprune.train import adversarial, objectives
from edgeprune.train.adversarial import Ball
from edgeprune.train.objectives import Objective, objective_of

TABLE = TuneTable(objective="pgd", attack_steps=2, beta=0.5, distill=0.5)
KINDS = ("natural", "fgsm", "pgd", "trades")
Y = torch.tensor([0, 1, 1, 0, 1])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=seeded(5))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class Watched(nn.Module):
    """Two classes by a small network with batch-norm and without dropout; remembers what it was called with."""

    def __init__(self, seed: int = 0, normed: bool = True) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.bn = nn.BatchNorm2d(4) if normed else nn.Identity()
        self.calls: list[tuple[bool, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, x.detach().clone()))
        return self.head(torch.relu(self.bn(self.a(x))).mean((2, 3)))

    def trained_on(self) -> list[Tensor]:
        return [x for training, x in self.calls if training]


def test_auxiliary_outputs_of_the_training_mode_are_left_aside() -> None:
    class Auxiliary(Small):
        """Two heads while training, as torchvision's inception_v3 and googlenet have."""

        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            answer = Small.forward(self, x)
            return (answer, answer * math.nan) if self.training else answer

    found = []
    for module in (Small().train(), Auxiliary().train()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = objective_of(TABLE, None)(module, images(), Y, seeded())
        found.append((loss, gradients(module, loss)))
    assert torch.equal(found[0][0], found[1][0]) and same(found[0][1], found[1][1])


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
        (torch.rand(3), "tensor (3,)"),
        (torch.rand(4, 5), "tensor (4, 5)"),
        ((), "tuple"),
    ):
        with pytest.raises(ModelError) as caught:
            logits(Answers(lambda _, answer=answer: answer), x)
        assert found in caught.value.message


def test_a_network_that_fails_is_an_error_with_the_batch_and_the_mode() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("shape mismatch inside")

    for kind, batch, mode in (("natural", 5, "training"), ("pgd", 5, "evaluation")):
        objective = objective_of(replace(TABLE, objective=kind), None)
        with pytest.raises(
            ModelError, match=rf"batch \({batch}, 3, 8, 8\) in {mode} mode: shape mismatch inside"
        ):
            objective(Answers(fail).train(), images(), Y, seeded())
    with pytest.raises(ModelError, match=r"batch \(10, 3, 8, 8\) in training mode"):
        objective_of(TABLE, None)(
            Answers(lambda x: fail(x) if len(x) == 10 else x.mean((2, 3))), images(), Y, seeded()
        )


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


# The hybrid of clean and adversarial cross-entropy


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_beta_1_is_plain_training_and_calls_no_attack(kind: str) -> None:
    objective, module, chance = (
        objective_of(replace(TABLE, objective=kind, beta=1.0), None),
        Watched(),
        seeded(),
    )
    before = chance.get_state()
    loss = objective(module, images(), Y, chance)
    plain = nn.functional.cross_entropy(Watched()(images()), Y)
    assert torch.equal(loss, plain) and torch.equal(chance.get_state(), before)
    assert len(module.calls) == 1 and torch.equal(module.calls[0][1], images())
    assert objective.attack(module, images(), Y, chance) is not None and len(module.calls) == 1


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_beta_0_is_pure_adversarial_training(kind: str) -> None:
    objective, module = objective_of(replace(TABLE, objective=kind, beta=0.0), None), Watched()
    adversarial = objective.attack(Watched(), images(), Y, seeded())
    loss = objective(module, images(), Y, seeded())
    assert torch.equal(loss, nn.functional.cross_entropy(Watched()(adversarial), Y))
    (seen,) = module.trained_on()
    assert torch.equal(seen, adversarial) and not torch.equal(seen, images())
    assert len(module.calls) == 1 + objective.steps


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "trades"])
def test_clean_and_adversarial_images_go_through_the_network_in_one_batch(kind: str) -> None:
    objective, module = objective_of(replace(TABLE, objective=kind), None), Watched()
    adversarial = objective.attack(Watched(), images(), Y, seeded())
    objective(module, images(), Y, seeded())
    (seen,) = module.trained_on()
    assert torch.equal(seen, torch.cat([images(), adversarial]))
    assert float((adversarial - images()).abs().max()) == pytest.approx(8 / 255, abs=1e-6)
    # The statistics are those of this one batch: the attack left them alone.
    alone = Watched()
    alone(torch.cat([images(), adversarial]))
    assert same(weights(module), weights(alone))


@settings(max_examples=30, deadline=None)
@given(
    beta=st.floats(0, 1),
    seed=st.integers(0, 1000),
    normed=st.booleans(),
    kind=st.sampled_from(["fgsm", "pgd"]),
)
def test_the_hybrid_loss_is_affine_in_beta(beta: float, seed: int, normed: bool, kind: str) -> None:
    # At 0 and at 1 only one half passes batch-norm in training mode, so there its ends are taken within.
    low, high = (0.1, 0.9) if normed else (0.0, 1.0)
    beta = low + (high - low) * beta

    def loss(share: float) -> tuple[float, dict[str, Tensor]]:
        objective = objective_of(replace(TABLE, objective=kind, beta=share), None)
        module = Watched(seed, normed)
        value = objective(module, images(), Y, seeded(seed))
        return float(value.detach()), gradients(module, value)

    weight = (beta - low) / (high - low)
    (at_low, from_low), (at_high, from_high), (value, found) = loss(low), loss(high), loss(beta)
    assert value == pytest.approx((1 - weight) * at_low + weight * at_high, abs=1e-5)
    for name, gradient in found.items():
        assert torch.allclose(gradient, (1 - weight) * from_low[name] + weight * from_high[name], atol=1e-5)


def test_each_half_of_the_hybrid_is_the_mean_over_its_own_images() -> None:
    module = Watched(normed=False).eval()
    moved = objective_of(TABLE, None).attack(module, images(), Y, seeded())
    clean = nn.functional.cross_entropy(module(images()), Y)
    adversarial = nn.functional.cross_entropy(module(moved), Y)
    for beta in (0.0, 0.25, 0.5, 1.0):
        loss = objective_of(replace(TABLE, beta=beta), None)(module, images(), Y, seeded())
        assert torch.allclose(loss, beta * clean + (1 - beta) * adversarial)


# TRADES


@pytest.mark.parametrize("distill", [0.0, 0.3])
def test_trades_equals_its_formula_written_out(distill: float) -> None:
    module, teacher = Watched().double(), Watched(7).double().eval()
    x = images().double()
    table = replace(TABLE, objective="trades", trades=6.0, distill=distill, temperature=3.0)
    objective = objective_of(table, teacher)
    loss = objective(module, x, Y, seeded())

    other = Watched().double()
    moved = objective.attack(other, x, Y, seeded())
    answer = other(torch.cat([x, moved]))
    p, q = torch.softmax(answer[:5], 1), torch.softmax(answer[5:], 1)
    wanted = 0.0
    for i in range(5):
        wanted = wanted - torch.log(p[i, Y[i]]) / 5
        wanted = wanted + 6.0 * sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(2)) / 5
    t = torch.softmax(teacher(x).detach() / 3, 1)
    soft = torch.softmax(answer[5:] / 3, 1)
    wanted = (1 - distill) * wanted + distill * 9 * (t * (t / soft).log()).sum() / 5
    assert torch.allclose(loss, wanted)
    found, expected = gradients(module, loss), gradients(other, wanted)
    assert all(torch.allclose(found[name], expected[name]) for name in expected)
    objective(module, x, Y, seeded()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_trades_needs_no_labels_for_its_images() -> None:
    objective = objective_of(replace(TABLE, objective="trades"), None)
    found = [objective.attack(build("plain"), example(5), y, seeded()) for y in (Y, 1 - Y)]
    assert torch.equal(found[0], found[1])


# The teacher


def test_natural_is_cross_entropy_or_distillation_to_the_bit_and_draws_no_chance() -> None:
    chance, teacher = seeded(), Watched(3).eval()
    before = chance.get_state()
    for distill, wanted in ((0.0, None), (0.9, teacher(images()).detach())):
        table = TuneTable(distill=distill, temperature=4.0)
        module, other = Watched(), Watched()
        loss, answer = objective_of(table, teacher)(module, images(), Y, chance), other(images())
        plain = (
            nn.functional.cross_entropy(answer, Y)
            if wanted is None
            else objectives.distillation(answer, wanted, Y, 0.9, 4.0)
        )
        assert torch.equal(loss, plain)
        assert same(gradients(module, loss), gradients(other, plain))
    assert torch.equal(chance.get_state(), before)
    assert objective_of(TABLE, None).attack(Watched(), images(), Y, chance) is not images()


def test_natural_gives_back_the_images_themselves_as_its_attack() -> None:
    x = images()
    assert objective_of(TuneTable(), None).attack(Watched(), x, Y, seeded()) is x


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_teacher_answers_the_clean_image_and_each_part_of_the_hybrid_is_taught(beta: float) -> None:
    teacher, module, other = Watched(7).train(), Watched(), Watched()
    objective = objective_of(replace(TABLE, beta=beta, distill=0.7, temperature=2.0), teacher)
    loss = objective(module, images(), Y, seeded())
    ((training, seen),) = teacher.calls
    assert not training and torch.equal(seen, images()) and teacher.training
    assert same(weights(teacher), weights(Watched(7)))

    moved = objective.attack(other, images(), Y, seeded())
    wanted = Watched(7).eval()(images()).detach()
    parts = []
    if beta in (0.0, 1.0):
        parts = [(1.0, other(images() if beta else moved))]
    else:
        both = other(torch.cat([images(), moved]))
        parts = [(beta, both[:5]), (1 - beta, both[5:])]
    expected = sum(
        share
        * (0.3 * nn.functional.cross_entropy(a, Y) + 0.7 * objectives.distillation(a, wanted, Y, 1.0, 2.0))
        for share, a in parts
    )
    assert torch.allclose(loss, expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_teacher_without_weight_is_not_called() -> None:
    teacher = Watched(7)
    for kind in KINDS:
        objective_of(replace(TABLE, objective=kind, distill=0.0), teacher)(Watched(), images(), Y, seeded())
    assert not teacher.calls


# Chance, precision, options


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_loss_and_no_other_chance_is_drawn(kind: str) -> None:
    objective = objective_of(replace(TABLE, objective=kind), None)
    before = torch.get_rng_state()
    found = [float(objective(Watched(), images(), Y, seeded(seed)).detach()) for seed in (0, 0, 1)]
    assert found[0] == found[1] and (found[0] == found[2]) == (kind == "natural")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_in_mixed_precision_the_loss_is_float32_and_every_weight_learns(kind: str) -> None:
    module, teacher = Watched(), Watched(7)
    exact = objective_of(replace(TABLE, objective=kind), teacher)(Watched(), images(), Y, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective_of(replace(TABLE, objective=kind), teacher)(module, images(), Y, seeded())
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(
        float(exact.detach()), rel=0.03
    )
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_options_that_are_left_out_fit_the_attack_and_the_norm() -> None:
    fgsm = objective_of(TuneTable(objective="fgsm"), None)
    assert (fgsm.ball, fgsm.steps) == (Ball("Linf", 8 / 255), 1) and fgsm.step == pytest.approx(10 / 255)
    pgd = objective_of(TuneTable(objective="pgd", norm="L2", attack_steps=10), None)
    assert (pgd.ball, pgd.steps) == (Ball("L2", 128 / 255), 10) and pgd.step == pytest.approx(32 / 255)
    trades = objective_of(TuneTable(objective="trades", eps="4/255", attack_step=0.01, trades=3.0), None)
    assert (trades.ball.eps, trades.steps, trades.step, trades.trades) == (4 / 255, 7, 0.01, 3.0)


def test_the_attack_of_each_objective_is_the_one_that_its_name_says() -> None:
    module, x, y, ball = build("residual"), example(4), torch.tensor([0, 1, 2, 3]), Ball("Linf", 8 / 255)
    wanted = {
        "fgsm": adversarial.pgd(module, x, y, ball, steps=1, step=1.25 * ball.eps, generator=seeded()),
        "pgd": adversarial.pgd(module, x, y, ball, steps=2, generator=seeded()),
        "trades": adversarial.trades(module, x, ball, steps=2, step=1.25 * ball.eps, generator=seeded()),
    }
    for kind, expected in wanted.items():
        found = objective_of(replace(TABLE, objective=kind), None).attack(module, x, y, seeded())
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"objective": "pdg"}, "tune.objective = 'pdg' is not one of natural, fgsm, pgd, trades"),
        ({"eps": "8"}, "too large"),
        ({"eps": "0"}, "more than 0"),
        ({"eps": "8 px"}, "not a quantity"),
        ({"norm": "L1"}, "not one of Linf, L2"),
        ({"attack_steps": 0}, "tune.attack_steps = 0 must be at least 1"),
        ({"attack_step": -0.1}, "tune.attack_step = -0.1 must be finite and more than 0"),
        ({"beta": 1.5}, r"tune.beta = 1.5 must be in \[0, 1\]"),
        ({"trades": math.inf}, "tune.trades = inf must be finite and not negative"),
        ({"distill": math.nan}, r"tune.distill = nan must be in \[0, 1\]"),
        ({"temperature": 0.0}, "tune.temperature = 0.0 must be finite and more than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, object], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        objective_of(replace(TABLE, **change), None)  # type: ignore[arg-type]


def test_a_misspelt_objective_is_answered_with_the_closest() -> None:
    with pytest.raises(UsageError) as caught:
        Objective("trade", Ball("Linf", 0.1), 7, 0.01)
    assert caught.value.hint == "did you mean 'trades'?"


# What it is for


def test_training_against_an_attack_gives_up_the_features_that_the_attack_can_turn() -> None:
    """One feature is right for 9 of 10 images and strong; 48 are right together, but weak (Tsipras et al. 2019).

    Plain training uses the weak ones too and loses everything under attack; the strong one alone loses nothing.
    """
    chance, count = seeded(), 200
    y = torch.arange(count) % 2
    side = (2 * y - 1).view(-1, 1).float()
    strong = side * torch.where(torch.rand(count, 1, generator=chance) < 0.9, 1.0, -1.0) * 0.35
    weak = side * 0.05 + 0.05 * torch.randn(count, 48, generator=chance)
    x = (0.5 + torch.cat([strong, weak], 1)).clamp(0, 1).view(count, 1, 7, 7)
    table = TuneTable(objective="pgd", eps="0.1", attack_steps=3)
    attack = objective_of(replace(table, attack_steps=10), None)

    def accuracies(kind: str) -> tuple[float, float]:
        module, objective = (
            nn.Sequential(nn.Flatten(), nn.Linear(49, 2)),
            objective_of(replace(table, objective=kind), None),
        )
        nn.init.zeros_(module[1].weight)
        nn.init.zeros_(module[1].bias)
        optimizer = torch.optim.SGD(module.train().parameters(), lr=0.3, momentum=0.9)
        for step in range(200):
            optimizer.zero_grad()
            objective(module, x, y, seeded(step)).backward()
            optimizer.step()
        seen = (x, attack.attack(module, x, y, seeded(999)))
        clean, robust = (float((logits(module, images).argmax(1) == y).float().mean()) for images in seen)
        return clean, robust

    clean, robust = accuracies("natural")
    assert clean > 0.95 and robust < 0.1
    for kind in ("fgsm", "pgd", "trades"):
        clean, robust = accuracies(kind)
        assert clean > 0.88 and robust > 0.88
