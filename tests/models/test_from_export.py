"""An exported program made into modules again is the eager network: names, parameters, outputs, groups, training."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from edgeprune.errors import EdgepruneError, UnsupportedModel
from edgeprune.models import architectures
from edgeprune.models.from_export import ExportedNetwork, remodulify
from edgeprune.safe_loading import pt2_archive
from edgeprune.structure import groups

DYNAMIC = ({0: Dim("batch", min=1)},)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(x + self.layer1(x))
        return self.fc(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


class Depthwise(nn.Module):
    """Depthwise, squeeze-and-excite, hard-swish; 'same' padding; one weight per channel by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dw = nn.Conv2d(8, 8, 5, padding="same", groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.dw(self.stem(x))))
        x = x * F.hardsigmoid(self.se(x)) * self.gamma
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(9, 6, 3, padding=1, groups=3)
        self.c = nn.ConvTranspose2d(15, 8, 2, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.PReLU(8)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(x)], 1)
        x = self.act(self.norm(self.c(torch.cat([x, self.b(x)], 1))))
        left, right = x.chunk(2, 1)
        return self.fc((left * torch.sigmoid(right)).mean((2, 3)))


class Shared(nn.Module):
    """One layer called twice, two names for one weight, a weight that nothing uses, buffers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.tied = nn.Conv2d(6, 6, 3, padding=1)
        self.tied.weight, self.tied.bias = self.twice.weight, self.twice.bias
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor([0.5]))
        self.register_buffer("shift", torch.tensor([0.25]), persistent=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(self.stem(x)))))
        x = F.relu(self.tied(x)) * self.scale + self.shift + torch.tensor(0.125)
        return self.head(F.dropout(x.mean((2, 3)), 0.5, self.training))


class Attention(nn.Module):
    """A transformer block with a class token, literal reshapes and layer norms, as vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.cls_token = nn.Parameter(torch.rand(1, 1, 12))
        self.pos = nn.Parameter(torch.rand(1, 17, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        batch, _, width = x.shape
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], 1) + self.pos
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, 17, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 17, width)
        x = x + self.proj(attended)
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class Rows(nn.Module):
    """One-dimensional layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8, momentum=None)
        self.norm = nn.InstanceNorm1d(8, affine=True)
        self.flat = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.bn(self.conv(x.flatten(2)))))
        return self.fc(self.flat(x.mean(2)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    net.__name__.lower(): net for net in (Residual, Depthwise, Concat, Shared, Attention, Rows)
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data.uniform_(0.5, 1.5)
    return net.eval()


def exported(
    net: nn.Module, batch: int = 2, *, dynamic: bool = False, decomposed: bool = False
) -> torch.export.ExportedProgram:
    """Exported, written to a file and read back, as a user's file is."""
    program = torch.export.export(
        net, (torch.rand(batch, 3, 16, 16),), dynamic_shapes=DYNAMIC if dynamic else None
    )
    if decomposed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own pytrees
            program = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    return pt2_archive.load_pt2(file.getvalue(), "test.pt2")


def remade(
    net: nn.Module, batch: int = 2, *, dynamic: bool = False, decomposed: bool = False
) -> ExportedNetwork:
    module = remodulify(exported(net, batch, dynamic=dynamic, decomposed=decomposed))
    assert isinstance(module, ExportedNetwork)
    return module


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (2, False), (2, True)])
def test_the_remade_network_has_the_names_and_answers_of_the_eager_one(
    name: str, batch: int, dynamic: bool
) -> None:
    net = network(name)
    made = remade(net, batch, dynamic=dynamic)
    ours, theirs = made.state_dict(), net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sorted(k for k, _ in made.named_parameters()) == sorted(k for k, _ in net.named_parameters())
    assert made.fixed_batch is None and made.image_shape == (3, 16, 16)
    for images in (1, batch, 5):
        x = torch.rand(images, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(made(x), net(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_decomposed_program_gets_its_layers_back(name: str) -> None:
    net = network(name)
    made = remade(net, decomposed=True)
    kinds = (
        nn.Conv1d,
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.Linear,
        nn.modules.batchnorm._BatchNorm,
        nn.GroupNorm,
    )
    owned = {k for k, m in net.named_modules() if isinstance(m, kinds)} - {
        "unused",
        "qkv",
        "proj",
        "mlp.0",
        "mlp.3",
    }
    assert owned <= {k for k, m in made.named_modules() if isinstance(m, kinds)}
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        # A decomposed attention sums in another order than the fused one.
        assert torch.allclose(made(x), net(x), atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "depthwise", "shared", "concat"])
def test_a_program_exported_in_training_mode_evaluates_as_the_network(name: str) -> None:
    net = network(name)
    before = copy.deepcopy(net)
    made = remade(net.train())
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(made(x), before(x))


def test_the_functional_batch_norm_of_a_training_program_becomes_a_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    made = remade(copy.deepcopy(net).train(), decomposed=True)
    assert isinstance(made.get_submodule("1"), nn.BatchNorm2d)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(made(x), net.eval()(x), atol=1e-6)


def test_dropout_is_active_in_training_and_only_there() -> None:
    made = remade(network("residual"))
    x = torch.rand(8, 3, 16, 16)
    assert torch.equal(made(x), made(x))
    made.train()
    assert isinstance(made.get_submodule("drop"), nn.Dropout)
    made.get_submodule("bn1").eval()
    made.get_submodule("layer1.1").eval()
    assert not torch.equal(made(x), made(x))


def test_training_moves_batch_norm_statistics_as_in_the_eager_network() -> None:
    net = network("depthwise")
    made = remade(net)
    x = torch.rand(8, 3, 16, 16)
    net.train()(x).sum().backward()
    made.train()(x).sum().backward()
    for key, value in net.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key
    for (key, ours), (_, theirs) in zip(
        sorted(made.named_parameters()), sorted(net.named_parameters()), strict=True
    ):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), key


def test_a_cumulative_batch_norm_average_stays_one() -> None:
    made = remade(network("rows"))
    assert made.get_submodule("bn").momentum is None


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_independent_and_answers_alike(name: str) -> None:
    made = remade(network(name))
    twin = copy.deepcopy(made)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = made(x)
        assert torch.equal(twin(x), expected)
        assert twin.state_dict().keys() == made.state_dict().keys()
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(made(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_works_in_double_precision_and_can_be_exported_again(name: str) -> None:
    net = network(name)
    made = remade(net)
    again = remade(made, dynamic=True)
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
        assert torch.allclose(made.double()(x.double()).float(), net(x), atol=1e-5)
    assert again.state_dict().keys() == net.state_dict().keys()


def test_tied_weights_stay_one_tensor_and_shared_layers_one_layer() -> None:
    made = remade(network("shared"))
    assert made.get_submodule("tied").weight is made.get_submodule("twice").weight
    assert isinstance(made.get_submodule("twice"), nn.Conv2d)
    assert "shift" not in made.state_dict() and "shift" in dict(made.named_buffers())


def test_the_program_is_not_changed_by_changing_the_modules() -> None:
    net = network("residual")
    program = torch.export.export(net, (torch.rand(2, 3, 16, 16),))
    made = remodulify(program)
    for parameter in made.parameters():
        parameter.data.zero_()
    assert bool(net.fc.weight.detach().any())
    assert bool(program.state_dict["fc.weight"].detach().any())


@pytest.mark.parametrize("name", nets.NETS)
def test_the_channel_groups_are_those_of_the_eager_network(name: str) -> None:
    net, x = nets.build(name), nets.example(2)
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (x,)), file)
    eager = groups.find_groups(net, x)
    ours = groups.find_groups(remodulify(pt2_archive.load_pt2(file.getvalue(), "test.pt2")), x)
    assert {g.name: (g.channels, set(g.members)) for g in ours.groups} == {
        g.name: (g.channels, set(g.members)) for g in eager.groups
    }
    assert eager.groups


class SequenceFirst(nn.Module):
    """nn.MultiheadAttention puts the batch behind the positions, and merges it with them and with the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_is_merged_into_other_axes_is_freed(batch: int) -> None:
    net = SequenceFirst().eval()
    made = remade(net, batch)
    nn.init.ones_(net.head.weight)
    nn.init.ones_(made.get_submodule("head").weight)
    x = torch.rand(5, 3, 16, 16)
    assert made.fixed_batch is None
    with torch.no_grad():
        assert torch.allclose(made(x), net(x), atol=1e-6)


def test_a_batch_size_that_the_network_mixes_up_is_kept_and_told() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16 * 2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(1, -1)).expand(2, 4)

    net = Mixing().eval()
    made = remade(net)
    x = torch.rand(2, 3, 16, 16)
    assert made.fixed_batch == 2
    with torch.no_grad():
        assert torch.equal(made(x), net(x))


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).mean((2, 3))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.rand(16)).mean((2, 3))


@pytest.mark.parametrize(
    ("net", "inputs", "words"),
    [
        (Pair(), (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)), "2 inputs"),
        (nn.Linear(4, 2), (torch.rand(2, 4),), "2-dimensional"),
        (Noisy(), (torch.rand(2, 3, 16, 16),), "random numbers"),
    ],
)
def test_what_is_no_network_of_images_is_refused_by_name(
    net: nn.Module, inputs: tuple[Tensor, ...], words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        remodulify(torch.export.export(net, inputs))


@pytest.mark.parametrize(
    "spec", ["torchvision:mobilenet_v3_small?num_classes=5", "timm:efficientnet_lite0?num_classes=5"]
)
def test_networks_of_the_zoos_come_back_whole(spec: str) -> None:
    try:
        net = architectures.architecture(spec).eval()
    except EdgepruneError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    program = torch.export.export(net, (torch.rand(1, 3, 64, 64),))
    made = remodulify(program)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(made(x), net(x))
    assert made.state_dict().keys() == net.state_dict().keys()
