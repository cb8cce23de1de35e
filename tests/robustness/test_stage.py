"""Accuracy under attack: the worst case of every image, on the artifact itself, resumable, and honest about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgeprune.attacks._base import Attack, Inputs
from edgeprune.data.collection import Split, in_memory
from edgeprune.errors import UsageError
from edgeprune.plugins import build
from edgeprune.recipe.schema import AttackTable
from edgeprune.robustness import (
    attack_plan,
    gradient_masking,
    job,
    models_under_attack,
    readings,
    stage,
    surrogate_check,
)
from edgeprune.robustness.attack_plan import batch_size
from edgeprune.robustness.job import ModelUnderAttack, Verdicts, attack_job
from edgeprune.robustness.readings import describe_broken
from edgeprune.train.adversarial import Ball

CLASSES, PIXELS = 4, 3 * 8 * 8
EPS = 2 / 255


class Linear(nn.Module):
    """Logits W (x - 1/2): how far each image is from another class is known in closed form."""

    def __init__(self, scale: float = 1.0, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(CLASSES, PIXELS, generator=generator))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * ((x - 0.5).flatten(1) @ self.weight.T)


class Wrapped(nn.Module):
    """A linear network behind something that disturbs attacks."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.change = Linear(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x))


def images(count: int = 60) -> Split:
    """Images far from 0 and 1, with the linear network's classes; the first three are labelled wrong."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(77, 178, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = Linear()(pixels / 255).argmax(1)
    labels[:3] = (labels[:3] + 1) % CLASSES
    return in_memory("test", pixels, labels)


def robust(split: Split, eps: float) -> list[bool]:
    """Which images no change of eps makes wrong: w_y x - w_j x > eps |w_y - w_j|_1 for all other classes j."""
    network = Linear()
    with torch.no_grad():
        logits, w = network(split.take(torch.arange(len(split)))), network.weight
        rows = split.labels.tolist()
        margin = [(logits[i, y] - logits[i]) - eps * (w[y] - w).abs().sum(1) for i, y in enumerate(rows)]
        return [bool((torch.cat([m[:y], m[y + 1 :]]) > 0).all()) for m, y in zip(margin, rows, strict=True)]


def quick(table: AttackTable | None = None, seed: int = 0, queries: int = 60) -> job.Job:
    """The standard evaluation with fewer steps."""
    job = attack_job(table or AttackTable(name="standard", eps="2/255"), seed=seed, data="some")
    few = {
        "apgd-ce": build("attacks", "apgd-ce", {"steps": 12}),
        "apgd-t": build("attacks", "apgd-t", {"steps": 12, "classes": 3}),
        "fab-t": build("attacks", "fab-t", {"steps": 5, "classes": 3}),
        "square": build("attacks", "square", {"queries": queries}),
    }
    return replace(job, attacks={name: few.get(name, member) for name, member in job.attacks.items()})


def run(victim: ModelUnderAttack, job: job.Job, scratch: Path, split: Split | None = None) -> Verdicts:
    return stage.run(victim, images() if split is None else split, job, scratch=scratch, log=lambda _: None)


def test_the_verdicts_on_a_linear_network_are_those_of_the_closed_form(tmp_path: Path) -> None:
    verdicts = run(models_under_attack.of_network("net", Linear(), "w"), quick(), tmp_path)
    assert list(verdicts.survived) == robust(images(), EPS)
    assert [i for i, by in enumerate(verdicts.by) if by == job.CLEAN] == [0, 1, 2]
    assert 0 < sum(verdicts.survived) < 57
    assert verdicts.how == "white box"


def test_an_image_that_is_broken_is_not_attacked_again(tmp_path: Path) -> None:
    verdicts = run(models_under_attack.of_network("net", Linear(), "w"), quick(), tmp_path)
    left = 60
    for name, tried in verdicts.tried.items():
        assert tried == left
        left -= verdicts.by.count(name)
    assert left == sum(verdicts.survived)
    assert verdicts.queries["square"] == 60 * verdicts.tried["square"]


def batched() -> job.Job:
    """Eight batches without an attack, then PGD and Square on what is left."""
    job = attack_job(AttackTable(name="standard", eps="1/255", batch=8), seed=3, data="some")
    members = {
        "pgd": build("attacks", "pgd", {"steps": 3}),
        "square": build("attacks", "square", {"queries": 9}),
    }
    return replace(job, attacks=members)


@pytest.mark.parametrize("stop", [1, 5, 8, 9, 12, 17])
def test_an_evaluation_that_was_killed_goes_on_at_its_last_batch_with_the_same_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    victim, write, count = models_under_attack.of_network("net", Linear(), "w"), stage.write_state, 0

    def writing(limit: int) -> Callable[..., None]:
        def counted(*arguments: object) -> None:
            nonlocal count
            count += 1
            if count == limit:
                raise KeyboardInterrupt
            write(*arguments)  # type: ignore[arg-type]

        return counted

    monkeypatch.setattr(stage, "write_state", writing(0))
    undisturbed, batches, count = run(victim, batched(), tmp_path / "a"), count, 0
    assert batches >= 17
    monkeypatch.setattr(stage, "write_state", writing(stop))
    with pytest.raises(KeyboardInterrupt):
        run(victim, batched(), tmp_path / "b")
    count = 0
    monkeypatch.setattr(stage, "write_state", writing(0))
    resumed = run(victim, batched(), tmp_path / "b")
    assert (resumed.by, resumed.tried, resumed.queries) == (
        undisturbed.by, undisturbed.tried, undisturbed.queries,
    )  # fmt: skip
    assert count == batches - (stop - 1), "only the batch that was interrupted was done twice"


def test_another_job_or_a_broken_state_is_not_gone_on_with(tmp_path: Path) -> None:
    victim = models_under_attack.of_network("net", Linear(), "w")
    first = run(victim, batched(), tmp_path)
    assert run(victim, batched(), tmp_path) == first, "a finished one is read"
    for other in (
        replace(batched(), seed=4),
        replace(batched(), data="others"),
        replace(batched(), attacks={"fgsm": build("attacks", "fgsm", {})}),
    ):
        assert other.key(victim) != batched().key(victim)
        assert run(victim, other, tmp_path) != first
    assert batched().key(models_under_attack.of_network("net", Linear(), "v")) != batched().key(victim)
    (tmp_path / stage.STATE).write_text("{")
    assert run(victim, batched(), tmp_path).by == first.by


@dataclass(frozen=True)
class Corner(Attack):
    """Goes as far as it can, out of the ball and out of [0, 1]."""

    gradients: ClassVar[bool] = False

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        noise = torch.rand(given.x.shape, generator=given.generator) - 0.5
        return given.x + 1000 * noise, torch.ones_like(given.y)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.02), ("Linf", 0.5), ("L2", 0.3), ("L2", 9.0)])
def test_whatever_an_attack_does_the_artifact_is_only_asked_about_images_in_the_ball(
    tmp_path: Path, norm: str, eps: float
) -> None:
    split, asked = images(20), list[Tensor]()

    def answers(x: Tensor) -> Tensor:
        asked.append(x)
        with torch.no_grad():
            return Linear()(x)

    job = replace(quick(), ball=Ball(norm, eps), attacks={"corner": Corner()})
    run(ModelUnderAttack("file", "s", answers), job, tmp_path, split)
    centres = split.take(torch.arange(20))
    for x in asked:
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        change = (x[:, None] - centres[None]).flatten(2)
        far = change.abs().amax(2) if norm == "Linf" else change.norm(dim=2)
        assert float(far.amin(1).max()) <= eps + 1e-5


def test_what_gradients_of_the_twin_find_counts_only_where_the_artifact_errs(tmp_path: Path) -> None:
    """The artifact is another network: examples for the twin are replayed on it."""
    artifact = Linear(seed=2)
    with torch.no_grad():
        labels = artifact(images().take(torch.arange(60))).argmax(1)
    split = replace(images(), labels=labels)
    job = replace(quick(), attacks={"pgd": build("attacks", "pgd", {})})
    twin = Linear()
    victim = ModelUnderAttack("file", "s", lambda x: artifact(x).detach(), twin)
    verdicts = run(victim, job, tmp_path / "a", split)
    itself = run(models_under_attack.of_network("net", artifact, "s"), job, tmp_path / "b", split)
    assert verdicts.how == "white box on the torch network, replayed on the file"
    assert verdicts.broken["pgd"] < itself.broken["pgd"]
    assert list(verdicts.tried) == ["clean", "pgd", "apgd-ce-to-the-end"]


def test_images_made_against_the_dense_network_are_tried_too(tmp_path: Path) -> None:
    job = replace(quick(), attacks={n: m for n, m in quick().attacks.items() if n != "square"})
    hidden = Wrapped(lambda logits: logits.detach())
    alone = models_under_attack.of_network("net", hidden, "s")
    with pytest.raises(UsageError, match="needs gradients") as caught:
        run(ModelUnderAttack("x.onnx", "s", alone.answers), job, tmp_path / "a")
    assert "standard" in caught.value.hint
    helped = models_under_attack.of_network("net", hidden, "s", others={"dense": Linear()})
    verdicts = run(helped, quick(), tmp_path / "b")
    assert list(verdicts.tried) == ["clean", "apgd-ce-from-dense", "square"]
    assert verdicts.broken["apgd-ce-from-dense"] > 20
    assert "no gradient reaches" in verdicts.how


def test_modes_places_and_gradients_of_the_networks_are_as_they_were(tmp_path: Path) -> None:
    network = Wrapped(nn.Dropout(0.5)).train()
    run(models_under_attack.of_network("net", network, "s"), quick(queries=5), tmp_path)
    assert network.training and all(layer.training for layer in network.modules())
    assert network.linear.weight.requires_grad and network.linear.weight.grad is None


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda logits: 1e4 * logits,
    "rounded": lambda logits: 4 * (logits / 4).round(),
    "argmax": lambda logits: nn.functional.one_hot(logits.argmax(1), CLASSES).float(),
}


@pytest.mark.parametrize("name", MASKED)
def test_of_a_masked_network_pgd_says_that_it_is_robust_and_is_flagged_and_standard_breaks_it(
    tmp_path: Path, name: str
) -> None:
    split, network = images(), Wrapped(MASKED[name])
    with torch.no_grad():
        split.labels[3:] = network(split.take(torch.arange(60))).argmax(1)[3:]
    victim = models_under_attack.of_network("net", network, "s")
    job = quick(AttackTable(name="pgd", eps="2/255"))
    verdicts = run(victim, job, tmp_path / "pgd", split)
    assert sum(verdicts.survived) >= 50, "of 57; the true number is 15"
    flags = " ".join(gradient_masking.flags(victim, split, job, verdicts))
    assert "Take --attack standard" in flags or "No gradient reaches" in flags
    assert name == "argmax" or "is zero or not finite on" in flags
    job = quick(queries=200)
    worst = run(victim, job, tmp_path / "standard", split)
    flags = " ".join(gradient_masking.flags(victim, split, job, worst))
    assert "gradient" in flags and sum(worst.survived) < sum(verdicts.survived)
    if name == "scaled":
        assert worst.survived[3:] == tuple(robust(images(), EPS))[3:]
        return
    assert "square, which only asks, broke" in flags or "No gradient reaches" in flags
    # On steps and plateaus a search without gradients is lost, too; the dense network's own images are not.
    helped = models_under_attack.of_network("net", network, "s", others={"dense": Linear()})
    assert sum(run(helped, job, tmp_path / "helped", split).survived) <= 25


def file_of(path: Path, *, scale: float = 1.0, tail: str = "", step: float = 0.0) -> Path:
    """The linear network as an ONNX file. tail: what masks its logits; step: of the scale that quantizes its pixels."""
    nodes = [helper.make_node("Sub", ["input", "half"], ["centred"], "centre")]
    if step:
        nodes = [
            helper.make_node("QuantizeLinear", ["input", "step", "zero"], ["q"], "quantize"),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["pixels"], "dequantize"),
            helper.make_node("Sub", ["pixels", "half"], ["centred"], "centre"),
        ]
    nodes += [
        helper.make_node("Flatten", ["centred"], ["flat"], "flat"),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"], "fc"),
        helper.make_node("Mul", ["scores", "scale"], ["scaled" if tail else "logits"], "scale"),
    ]
    if tail == "argmax":
        nodes += [
            helper.make_node("ArgMax", ["scaled"], ["best"], "best", axis=1, keepdims=0),
            helper.make_node("OneHot", ["best", "classes", "values"], ["logits"], "hot"),
        ]
    elif tail:
        nodes.append(helper.make_node(tail, ["scaled"], ["logits"], "tail"))
    tensors: dict[str, Any] = {
        "half": np.float32(0.5), "weight": Linear().weight.detach().T.contiguous().numpy(),
        "scale": np.float32(scale), "classes": np.int64(CLASSES), "values": np.array([0, 1], np.float32),
        "step": np.float32(step), "zero": np.uint8(0),
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items() if k in used],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    made.ir_version = 9
    onnx.save(made, path)
    return path


@pytest.mark.parametrize("name", ["scaled", "argmax"])
def test_a_masked_file_is_called_robust_by_pgd_and_flagged_and_broken_by_standard(
    tmp_path: Path, name: str
) -> None:
    """Logits times 1e4 have no gradient of the cross-entropy left; an argmax has none at all."""
    path = file_of(
        tmp_path / "net.onnx", scale=1e4 if name == "scaled" else 1, tail="argmax" if name == "argmax" else ""
    )
    split, said = images(), list[str]()
    victim = surrogate_check.proven(
        models_under_attack.of_file("net.onnx", path, tmp_path, "here"), split, log=said.append
    )
    assert victim.own and "agrees with the file on 100.0 %" in said[0]
    job = quick(AttackTable(name="pgd", eps="2/255"))
    pgd = run(victim, job, tmp_path / "pgd", split)
    assert sum(pgd.survived) >= 50, "of 57; the true number is 15"
    flags = " ".join(gradient_masking.flags(victim, split, job, pgd))
    assert ("is zero or not finite on" if name == "scaled" else "No gradient reaches") in flags
    job = quick(queries=300)
    worst = run(victim, job, tmp_path / "standard", split)
    assert sum(worst.survived) < sum(pgd.survived)
    assert "gradient" in " ".join(gradient_masking.flags(victim, split, job, worst))
    if name == "scaled":
        assert list(worst.survived) == robust(split, EPS)


def test_of_a_quantized_file_the_attacks_that_see_the_quantization_come_after_the_transferred_ones(
    tmp_path: Path,
) -> None:
    """The float network that is given is another one, so that transferred images find little."""
    path = file_of(tmp_path / "net.onnx", step=1 / 255)
    split = images()
    victim = models_under_attack.of_file(
        "net.onnx", path, tmp_path, "here", twin=Linear(seed=2), others={"dense": Linear(seed=3)}
    )
    assert not victim.own and victim.straight is not None
    victim = surrogate_check.proven(victim, split, log=lambda _: None)
    verdicts = run(victim, quick(), tmp_path / "a", split)
    assert list(verdicts.steps) == [
        "apgd-ce", "apgd-ce-to-the-end", "apgd-ce-from-dense", "apgd-t", "fab-t",
        *(f"{n}{attack_plan.STRAIGHT}" for n in ("apgd-ce", "apgd-ce-to-the-end", "apgd-t", "fab-t")), "square",
    ]  # fmt: skip
    assert verdicts.how == (
        "white box on the torch network and on its straight-through surrogate, replayed on the file"
    )
    # An eps of two whole steps of the scale: rounding changes nothing that an attack can reach.
    assert list(verdicts.survived) == robust(split, EPS)
    _, worst, *_ = readings.readings_of(victim, quick(), verdicts, part="test")
    told = worst.conditions["transfer_only"]
    seen = sum(count for name, count in verdicts.broken.items() if name.endswith(attack_plan.STRAIGHT))
    assert seen > 10 and told["right"] == sum(verdicts.survived) + seen + verdicts.broken["square"]
    assert told["value"] == told["right"] / 60 and told["spread"][0] < told["value"] < told["spread"][1]
    assert worst.value is not None and told["lowered"] == seen / 60
    assert f"see the quantization lower it by {100 * seen / 60:.1f} points" in worst.conditions["notes"][-1]
    for name in ("pgd", "fgsm"):
        job = quick(AttackTable(name=name, eps="2/255"))
        found = run(victim, job, tmp_path / name, split)
        both = [name, "pgd-to-the-end"] if name == "pgd" else [name]
        moved = ["pgd-from-dense"] if name == "pgd" else []
        assert list(found.steps) == [*both, *moved, *(f"{n}{attack_plan.STRAIGHT}" for n in both)]
        used = readings.readings_of(victim, job, found, part="test")[1].conditions["also from"]
        assert used == (["dense"] if moved else []), "only what was tried is claimed"
        assert found.broken[f"{name}{attack_plan.STRAIGHT}"] > 10
        assert "transfer_only" in readings.readings_of(victim, job, found, part="test")[1].conditions


def test_a_bare_quantized_file_is_its_own_float_network_without_the_rounding(tmp_path: Path) -> None:
    split = images()
    victim = models_under_attack.of_file(
        "net.onnx", file_of(tmp_path / "net.onnx", step=4 / 255), tmp_path, "here"
    )
    assert victim.own and victim.twin is not None and victim.straight is not None
    x = split.take(torch.arange(5))
    with torch.no_grad():
        torch.testing.assert_close(victim.twin(x), Linear()(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(victim.straight(x), victim.answers(x), rtol=1e-4, atol=1e-4)
        assert float((victim.straight(x) - victim.twin(x)).abs().max()) > 0.01
    verdicts = run(victim, quick(AttackTable(name="fgsm", eps="2/255")), tmp_path / "a", split)
    assert verdicts.how.startswith(
        "white box on the file's own graph in torch and on its straight-through surrogate"
    )


def test_what_was_read_from_a_file_is_only_used_when_it_answers_as_the_file_does(tmp_path: Path) -> None:
    split, network, other = images(), Linear(), Linear(seed=2)

    def answers(x: Tensor) -> Tensor:
        return network(x).detach()

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such kernel")

    said: list[str] = []
    for twin, says in (
        (other, "names the same class on"),
        (Fails(), "no such kernel"),
        (nn.Flatten(), "(60, 192)"),
    ):
        found = surrogate_check.proven(
            ModelUnderAttack("f.onnx", "s", answers, twin, own=True), split, log=said.append
        )
        assert found.twin is None and not found.own
        assert says in found.notes[0] and "was only asked, which overstates" in found.notes[0]
    victim = ModelUnderAttack("f.onnx", "s", answers, network, straight=other)
    found = surrogate_check.proven(victim, split, log=said.append)
    assert found.twin is network and found.straight is None
    assert "see the quantization were not tried" in found.notes[0]
    assert len(said) == 4
    right = ModelUnderAttack("f.onnx", "s", answers, network, own=True)
    assert surrogate_check.proven(right, split, log=said.append) is right
    given = ModelUnderAttack("f.onnx", "s", answers, other)
    assert surrogate_check.proven(given, split, log=said.append) is given, (
        "a network that was given is not looked at"
    )
    keys = {quick().key(v) for v in (right, given, victim, found)}
    assert len(keys) == 3, "what is attacked with is part of the key; given and found are attacked alike"


def test_a_file_with_an_operator_that_torch_is_not_taught_is_only_asked(tmp_path: Path) -> None:
    path = file_of(tmp_path / "net.onnx", tail="ThresholdedRelu")
    victim = models_under_attack.of_file("net.onnx", path, tmp_path, "here")
    assert victim.twin is None and "ThresholdedRelu 'tail'" in victim.notes[0]
    with pytest.raises(UsageError, match=r"net.onnx has none"):
        run(victim, quick(AttackTable(name="pgd", eps="2/255")), tmp_path / "a")
    assert list(run(victim, quick(queries=5), tmp_path / "b").steps) == ["square"]
    quantized = file_of(tmp_path / "q.onnx", tail="ThresholdedRelu", step=1 / 255)
    victim = models_under_attack.of_file("q.onnx", quantized, tmp_path, "here", twin=Linear())
    assert victim.straight is None and "see the quantization were not tried" in victim.notes[0]


def test_an_honest_network_is_not_flagged(tmp_path: Path) -> None:
    victim = models_under_attack.of_network("net", Linear(0.1), "s")
    for name in ("pgd", "standard"):
        job = quick(AttackTable(name=name, eps="2/255"))
        verdicts = run(victim, job, tmp_path / name)
        assert gradient_masking.flags(victim, images(), job, verdicts) == ()


class Noisy(nn.Module):
    """Draws chance at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand_like(x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Noisy(), "differently each time"),
        (nn.Softmax(1), "are probabilities"),
        (lambda logits: logits.roll(1, 1), "no better than guessing"),
    ],
)
def test_what_makes_an_accuracy_doubtful_is_said(
    tmp_path: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    victim = models_under_attack.of_network("net", Wrapped(change), "s")
    job = quick(AttackTable(name="fgsm", eps="1/255"))
    flags = gradient_masking.flags(victim, images(), job, run(victim, job, tmp_path))
    assert any(says in flag for flag in flags)


def test_more_steps_and_a_larger_eps_that_help_the_model_are_said(tmp_path: Path) -> None:
    """A network whose answer far from its images is the right one again: PGD that goes far leaves it right."""
    split = images()
    centres = split.take(torch.arange(60))

    class Shelter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear()

        def forward(self, x: Tensor) -> Tensor:
            far = (x[:, None] - centres[None]).abs().flatten(2).amax(2).amin(1) > 1.5 * EPS
            return self.linear(x) + 1e3 * far[:, None] * nn.functional.one_hot(
                split.labels[: len(x)], CLASSES
            )

    victim = models_under_attack.of_network("net", Shelter(), "s")
    split = replace(split, labels=split.labels.clone())
    job = quick(AttackTable(name="fgsm", eps="2/255"))
    verdicts = Verdicts(("",) * 60, {"clean": 60, "fgsm": 60}, {}, {}, "white box", 64)
    flags = " ".join(gradient_masking.flags(victim, split, job, verdicts))
    assert "twice the eps" in flags and "into any other image" in flags


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (
            replace(images(), labels=torch.full((60,), 4)),
            "labels of 'test' go from 4 to 4, net answers 4 classes",
        ),
        (replace(images(), labels=torch.full((60,), -1)), "go from -1"),
        (images(0), "has no images"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, split: Split, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(models_under_attack.of_network("net", Linear(), "s"), quick(), tmp_path, split)


def test_pixels_outside_0_and_1_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Split.take
    monkeypatch.setattr(Split, "take", lambda self, rows: 4 * take(self, rows) - 2)
    with pytest.raises(UsageError, match=r"go from -.* to .*need pixels in \[0, 1\]"):
        run(models_under_attack.of_network("net", Linear(), "s"), quick(), tmp_path, images())


def test_readings_say_what_broke_what_and_how_it_was_had(tmp_path: Path) -> None:
    victim, job = models_under_attack.of_network("net", Linear(), "w"), quick()
    verdicts = run(victim, job, tmp_path)
    clean, worst, *each = readings.readings_of(victim, job, verdicts, part="test", flags=("careful",))
    assert (clean.metric, clean.value, clean.n) == ("clean_accuracy", 57 / 60, 60)
    assert (worst.metric, worst.value) == ("robust_accuracy", sum(robust(images(), EPS)) / 60)
    assert worst.spread is not None and worst.spread[0] < worst.value < worst.spread[1]
    said = worst.conditions
    assert said["flags"] == ["careful"] and said["eps"] == "2/255" and said["norm"] == "Linf"
    assert sum(said["broken"].values()) + said["right"] == 60 and said["broken"]["clean"] == 3
    assert said["parameters"]["square"]["queries"] == 60
    assert [r.metric for r in each] == [f"broken_by_{name}" for name in job.attacks]
    assert each[0].n == 57 and each[0].value == said["broken"]["apgd-ce"] / 57


def test_a_run_is_attacked_after_every_stage_and_its_ends_are_compared_in_pairs(tmp_path: Path) -> None:
    victims = {
        "dense": models_under_attack.of_network("dense", Linear(), "a"),
        "pruned": models_under_attack.of_network("compressed", Linear(seed=2), "b"),
        "exported": models_under_attack.of_network("model.onnx", Linear(0.5), "c"),
    }
    job = replace(quick(), attacks={"pgd": build("attacks", "pgd", {"steps": 5})})
    said: list[str] = []
    found = stage.run_stages(victims, images(), job, scratch=tmp_path, log=said.append)
    stages = [(r.conditions["stage"], r.metric) for r in found.ledger]
    metrics = ("clean_accuracy", "robust_accuracy")
    assert stages == [(stage, metric) for stage in victims for metric in metrics]
    robust = [r.artifact for r in (*found.before, *found.after) if r.metric == "robust_accuracy"]
    assert robust == ["dense", "compressed"]
    pair = found.after[0].conditions["paired"]
    assert pair["gained"] == pair["lost"] == 0 and pair["p"] == 1
    assert found.before[0].value == found.after[0].value
    known = (replace(found.ledger[0], conditions={"stage": "pruned"}),)
    merged = readings.merged(known, found.ledger)
    assert [(r.conditions["stage"], r.metric) for r in merged] == [
        ("dense", metrics[0]), ("dense", metrics[1]), ("pruned", metrics[0]), ("pruned", metrics[1]),
        ("exported", metrics[0]), ("exported", metrics[1]),
    ]  # fmt: skip
    # Of all images and of those that were attacked: both stand there, stage by stage.
    more = (replace(known[0], n=10_000), replace(known[0], n=10_000, conditions={"stage": "tuned"}))
    merged = readings.merged(more, found.ledger)
    assert [(r.conditions["stage"], r.metric, r.n) for r in merged][2:6] == [
        ("pruned", metrics[0], 10_000), ("pruned", metrics[0], found.ledger[0].n),
        ("pruned", metrics[1], found.ledger[0].n), ("tuned", metrics[0], 10_000),
    ]  # fmt: skip


def test_a_note_says_which_attack_broke_what() -> None:
    verdicts = Verdicts(
        ("", "pgd", "clean", "pgd", "square"), {"clean": 5, "pgd": 4, "square": 2}, {}, {}, "", 1
    )
    assert (
        describe_broken(verdicts)
        == "of 5 images 1 are wrong as they are; broken by pgd 2, square 1; 1 survive"
    )


def test_verdicts_are_compared_image_by_image() -> None:
    old = Verdicts(("", "", "", "clean", "pgd", ""), {}, {}, {}, "", 1)
    new = Verdicts(("", "pgd", "clean", "", "", "pgd"), {}, {}, {}, "", 1)
    found = readings.compare(old, new)
    assert (found["clean_accuracy"]["gained"], found["clean_accuracy"]["lost"]) == (1, 1)
    assert (found["robust_accuracy"]["gained"], found["robust_accuracy"]["lost"]) == (2, 3)
    assert found["robust_accuracy"]["change"] == pytest.approx(-1 / 6)
    with pytest.raises(ValueError, match="6 and on 1"):
        readings.compare(old, replace(new, by=("",)))


def test_batches_are_powers_of_two_that_fit() -> None:
    one = torch.zeros(1, 3, 8, 8)
    assert batch_size(None, one) == batch_size(Linear(), one) == 256

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.pool = nn.Upsample(scale_factor=800), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.up(x)).flatten(1)

    found = batch_size(Wide(), one)
    assert found < 16 and found & (found - 1) == 0


def test_no_attack_is_no_job() -> None:
    for name in ("none", "auto"):
        with pytest.raises(UsageError, match="is no attack"):
            attack_job(AttackTable(name=name), seed=0, data="")
    with pytest.raises(UsageError, match="too large") as caught:
        attack_job(AttackTable(name="pgd", eps="8"), seed=0, data="")
    assert "8/255" in caught.value.hint
