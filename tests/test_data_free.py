"""The data-free method as a whole: its modes keep their budgets, repeat themselves and say what is wrong."""

from __future__ import annotations

from dataclasses import replace

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune import plugins
from edgeprune.errors import UsageError
from edgeprune.methods import PruneTask
from edgeprune.methods.data_free import MODES
from edgeprune.nn import costs, graph, progressive, surgery
from edgeprune.nn.allocate import Rules
from edgeprune.records import InputSpec

SPEC = InputSpec(nets.SHAPE, 5)


def call(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def task_for(network: nn.Module, share: float = 0.6, unlabelled: Tensor | None = None) -> PruneTask:
    found = graph.provable_groups(network, graph.find_groups(network, nets.example()), nets.example(), 0)
    model = costs.cost_model(network, found.groups, nets.example())
    limits = {"macs": share * model.cost({})["macs"]}
    return PruneTask(found.groups, model, Rules(limits), call, seed=3, spec=SPEC, unlabelled=unlabelled)


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_mode_meets_the_budget_and_gives_the_same_masks_for_the_same_seed(name: str, mode: str) -> None:
    images = nets.example(24) if mode == "reconstruction" else None
    chosen = []
    for _ in range(2):
        network = nets.build(name)
        task = task_for(network, unlabelled=images)
        masks = plugins.build("methods", "data-free", {"mode": mode})(network, task)
        assert surgery.proof_failure(network, task.groups, masks.channels, nets.example()) is None
        chosen.append(masks.channels)
        surgery.cut(network, surgery.removed_positions(task.groups, masks.channels))
        assert costs.total_macs(network, nets.example()) <= task.rules.limits["macs"]
    assert all(torch.equal(chosen[0][g], chosen[1][g]) for g in chosen[0])


def test_duplicated_units_are_merged_without_a_trace() -> None:
    network = nets.build("plain")
    with torch.no_grad():
        for tensor in (network.a[0].weight, *(getattr(network.a[1], n) for n in ("weight", "bias"))):
            tensor[4:] = tensor[:4]
        for name in ("running_mean", "running_var"):
            getattr(network.a[1], name)[4:] = getattr(network.a[1], name)[:4]
    expected = network(nets.example(6, 2)).detach()
    task = task_for(network)
    group = next(g for g in task.groups if g.name == "a.0")
    model = costs.cost_model(network, (group,), nets.example())
    limit = {"macs": model.cost({"a.0": 4})["macs"]}
    task = replace(task, groups=(group,), costs=model, rules=Rules(limit))
    for mode in ("baseline", "greedy", "stochastic"):
        copy = nets.build("plain")
        copy.load_state_dict(network.state_dict())
        masks = plugins.build("methods", "data-free", {"mode": mode, "step": 0.5})(copy, task)
        surgery.cut(copy, surgery.removed_positions(task.groups, masks.channels))
        assert copy.a[0].out_channels == 4
        assert torch.allclose(copy(nets.example(6, 2)), expected, atol=1e-5), mode


def test_auto_is_reconstruction_with_images_and_stochastic_without() -> None:
    network = nets.build("plain")
    with_images = plugins.build("methods", "data-free", {})
    same = plugins.build("methods", "data-free", {"mode": "reconstruction"})
    task = task_for(network, unlabelled=nets.example(16))
    assert torch.equal(with_images(network, task).channels["a.0"], same(network, task).channels["a.0"])
    stochastic = plugins.build("methods", "data-free", {"mode": "stochastic"})
    first, second = nets.build("plain"), nets.build("plain")
    alone = replace(task, unlabelled=None)
    assert torch.equal(with_images(first, alone).channels["a.0"], stochastic(second, alone).channels["a.0"])
    assert any("Mode stochastic" in note for note in task.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "gready"}, r"mode = 'gready' is not one of auto, reconstruction, baseline"),
        ({"score": "impact"}, r"score = 'impact' is not one of paper, margin"),
        ({"alpha": 1.5}, r"alpha = 1.5 must be in \[0, 1\]"),
        ({"step": 0.0}, r"step = 0.0 in \(0, 1\]"),
        ({"pool": 0}, r"pool = 0 at least 1"),
        ({"mode": "reconstruction"}, r"needs images, and there are none"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    network = nets.build("plain")
    with pytest.raises(UsageError, match=said):
        plugins.build("methods", "data-free", options)(network, task_for(network))


class Strange(nn.Module):
    """Its activation sorts: no bound is known for it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(self.a(x), 3)
        return self.fc(torch.relu(self.b(x)).mean((2, 3)))


def test_what_can_not_be_bounded_is_said_and_thinned_by_saliency() -> None:
    torch.manual_seed(0)
    network = Strange().eval()
    task = task_for(network, 0.5)
    plugins.build("methods", "data-free", {"mode": "stochastic", "step": 0.2, "pool": 2})(network, task)
    said = " ".join(task.notes)
    assert "could not be bounded" in said and "cumsum" in said


def test_units_go_in_steps_of_the_told_share_and_none_twice() -> None:
    network = nets.build("plain")
    task = task_for(network)
    thinning = progressive.Thinning(
        network, _program(network), task.groups, _box(), progressive.Rules(mode="stochastic", step=0.25)
    )
    quotas: list[int] = []
    original = progressive.merge

    def merge(net: nn.Module, group: object, pairs: list[progressive.Pair]) -> None:
        quotas.append(len(pairs))
        original(net, group, pairs)  # type: ignore[arg-type]

    progressive.merge, keep = merge, {"a.0": 3, "b.0": 12}  # type: ignore[assignment]
    try:
        thinning.run(keep, 0)
    finally:
        progressive.merge = original
    assert quotas == [2, 2, 1]  # ceil(0.25 * 8) a step, and what is left
    assert int(thinning.alive["a.0"].sum()) == 3 and bool(thinning.alive["b.0"].all())


def _program(network: nn.Module) -> object:
    from edgeprune.nn.tracing import trace

    return trace(network, nets.example())


def _box() -> object:
    from edgeprune.nn.certify import input_box

    return input_box(SPEC)
