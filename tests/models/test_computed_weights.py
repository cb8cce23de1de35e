"""Parametrized weights are computed once: same outputs, plain layers, and the user's own network is not touched."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from edgeprune.models import bundle
from edgeprune.models.from_export import remodulify
from edgeprune.safe_loading import pt2_archive

LAYERS = {"0": "Conv2d", "2": "Conv2d", "5": "Linear"}


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


class Standardized(nn.Conv2d):
    """Weight standardization by hand: the parameter has the name of the weight that is computed of it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def doubly(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return parametrize.register_parametrization(parametrizations.weight_norm(layer), "weight", Centred())


def beside_a_plain_one(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return parametrizations.spectral_norm(layer)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "old weight_norm": old_weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "mask": pruned,
    "two": doubly,
    "identity": beside_a_plain_one,
}


def network(wrap: Callable[[nn.Module], nn.Module], conv: type = nn.Conv2d) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        wrap(conv(3, 8, 3)),
        nn.ReLU(),
        wrap(conv(8, 6, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        wrap(nn.Linear(6, 4)),
    )
    net(torch.rand(2, 3, 12, 12))  # a step in training: hooks leave a weight behind that deepcopy refuses
    return net.eval()


def layers(net: nn.Module) -> dict[str, str]:
    return {
        name: type(part).__name__
        for name, part in net.named_modules()
        if list(part.parameters(recurse=False))
    }


@pytest.mark.parametrize("name", WRAPS)
def test_a_network_in_memory_gets_plain_weights_and_stays_as_it_is_itself(name: str) -> None:
    net, x = network(WRAPS[name]), torch.rand(2, 3, 12, 12)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loaded = bundle.from_module(net, x)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), net(x))
    assert layers(loaded.module) == LAYERS
    assert sorted(loaded.module.state_dict()) == sorted(
        f"{key}.{t}" for key in LAYERS for t in ("weight", "bias")
    )
    assert all(isinstance(loaded.module[int(key)].weight, nn.Parameter) for key in LAYERS)
    assert "0.weight" in loaded.notes[0]
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.train()(x).sum().backward()


def test_a_tied_original_is_not_changed() -> None:
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)), nn.Conv2d(3, 3, 3), nn.Flatten()
    ).eval()
    net[1].weight = net[0].parametrizations.weight.original
    loaded = bundle.from_module(net, torch.rand(2, 3, 8, 8)).module
    assert torch.equal(loaded[1].weight, net[1].weight) and torch.equal(loaded[0].weight, net[0].weight)


@pytest.mark.parametrize("name", [*WRAPS, "standardized"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_that_computes_its_weights_gets_its_layers_again(name: str, decomposed: bool) -> None:
    net = network(WRAPS[name]) if name in WRAPS else network(lambda layer: layer, Standardized)
    x = torch.rand(2, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
        program = program.run_decompositions() if decomposed else program
        file = io.BytesIO()
        torch.export.save(program, file)
    again = remodulify(pt2_archive.load_pt2(file.getvalue(), "net.pt2"))
    assert layers(again) == LAYERS
    assert sorted(again.state_dict()) == sorted(f"{key}.{t}" for key in LAYERS for t in ("weight", "bias"))
    assert "0.weight" in again.computed  # type: ignore[operator]
    with torch.no_grad():
        assert torch.allclose(again(x), net(x), atol=1e-6)  # torch decomposes norms in another order of sums


def test_a_computed_weight_whose_parts_are_used_elsewhere_stays_computed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Standardized(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + self.conv.weight.sum()).mean((2, 3))

    net, x = Tied().eval(), torch.rand(2, 3, 12, 12)
    again = remodulify(torch.export.export(net, (x,)))
    assert again.computed == () and torch.equal(again(x), net(x))  # type: ignore[comparison-overlap]
