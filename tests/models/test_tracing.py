"""Traced programs: the same answers as the network, call by call, with names, defaults and pure operators."""

from __future__ import annotations

import nets
import pytest
import torch
from programs import run
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import UnsupportedModel
from edgeprune.models.from_export import remodulify
from edgeprune.models.tracing import Call, Program, Ref, Weight, trace


class InPlace(nn.Module):
    """In-place operators of every kind, on views too, a branch that goes nowhere, constants, two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 36, 5)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.norm(self.conv(x)), inplace=True)
        unused = x.sigmoid()
        x[:, 1].mul_(2)
        x += self.scale.view(1, -1, 1, 1)
        x[:, 0, 2:4] = torch.tensor(0.5)
        left, right = x.chunk(2, 1)
        return self.fc(
            functional.dropout(torch.cat([right, left], 1), training=self.training).flatten(1)
        ), unused


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def plain() -> Program:
    return trace(nets.build("plain"), nets.example())


@pytest.mark.parametrize("name", nets.NETS)
def test_a_program_gives_what_the_network_gives(name: str) -> None:
    network = nets.build(name)
    program = trace(network, nets.example())
    x = nets.example(3)
    found = run(program, network.state_dict(), x)
    with torch.no_grad():
        assert torch.allclose(found[program.output], network(x), atol=1e-5)
    assert {call.name: found[call.name].shape[1:] for call in program.calls if call.shape} == {
        call.name: call.shape[1:] for call in program.calls if call.shape
    }
    modules = dict(network.named_modules())
    assert all(call.layer in modules for call in program.calls)


def test_arguments_are_in_the_order_of_the_schema_with_defaults_filled_in(plain: Program) -> None:
    first = plain.calls[0]
    assert (first.name, first.op, first.layer, first.shape) == ("conv2d", "conv2d", "a.0", (1, 8, 8, 8))
    assert first.args == (Ref("x"), Weight("a.0.weight"), None, (1, 1), (1, 1), (1, 1), 1)
    assert first.names == ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    assert (first.arg("stride"), first.arg("groups"), first.arg("weight")) == (
        (1, 1),
        1,
        Weight("a.0.weight"),
    )
    assert (first.reads, first.weights) == (("x",), ("a.0.weight",))
    with pytest.raises(KeyError, match="conv2d has no argument 'kernel'"):
        first.arg("kernel")


def test_batch_norm_is_one_call_with_one_output_and_the_names_of_its_tensors(plain: Program) -> None:
    norm = plain.users(plain.calls[0].name)[0]
    assert (norm.op, norm.shape, norm.layer) == ("batch_norm", (1, 8, 8, 8), "a.1")
    assert norm.weights == ("a.1.weight", "a.1.bias", "a.1.running_mean", "a.1.running_var")
    assert (norm.arg("training"), norm.arg("eps")) == (False, 1e-5)
    assert [c.op for c in plain.users(norm.name)] == ["relu"]


def test_a_program_knows_who_reads_what(plain: Program) -> None:
    assert plain.input_shape == plain.shape_of("x") == (1, 3, 8, 8)
    assert plain.users("x") == (plain.calls[0],)
    assert plain.users(plain.output) == ()
    assert plain.call("conv2d_1").layer == "b.0" and plain.shape_of("conv2d_1") == (1, 12, 8, 8)
    assert [c.op for c in plain.readers("fc.weight")] == ["linear"]
    pooled = next(c for c in plain.calls if c.op == "max_pool2d")
    assert [c.op for c in plain.after(frozenset([pooled.name]))] == ["view", "linear"]


def test_no_operator_works_in_place_and_what_the_answer_does_not_need_is_left_out() -> None:
    torch.manual_seed(0)
    network = InPlace().eval()
    program = trace(network, torch.zeros(1, 3, 8, 8))
    assert not any(
        call.target._schema.is_mutable for call in program.calls if hasattr(call.target, "_schema")
    )
    assert "sigmoid" not in [call.op for call in program.calls]
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network(x)[0]
    assert torch.allclose(run(program, network.state_dict(), x)[program.output], wanted, atol=1e-6)


def test_what_no_state_dict_holds_is_among_the_constants_of_the_program() -> None:
    network = InPlace().eval()
    program = trace(network, torch.zeros(1, 3, 8, 8))
    assert torch.equal(program.constants["scale"], network.scale)
    named = {name for call in program.calls for name in call.weights}
    assert named <= set(network.state_dict()) | set(program.constants)
    assert not set(program.constants) & set(network.state_dict())


def test_tied_weights_have_a_name_that_the_state_dict_knows() -> None:
    network = Tied()
    program = trace(network, torch.zeros(1, 4))
    names = [c.arg("weight").name for c in program.calls if c.op == "linear"]
    assert all(torch.equal(network.state_dict()[n], network.one.weight) for n in names)


def test_lists_become_tuples_and_tuples_of_outputs_are_taken_apart_by_getitem() -> None:
    program = trace(nets.build("split"), nets.example())
    split = next(c for c in program.calls if c.op in ("split", "chunk"))
    assert split.shape == () and {c.op for c in program.users(split.name)} == {"getitem"}
    assert [c.arg("index") for c in program.users(split.name)] == [0, 1]
    cat = next(c for c in program.calls if c.op == "cat")
    assert isinstance(cat.args[0], tuple) and all(isinstance(a, Ref) for a in cat.args[0])


def test_the_network_is_left_as_it_was() -> None:
    network = nets.build("residual").double().train()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    trace(network, nets.example())
    assert network.training and next(network.parameters()).dtype == torch.float64
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_a_network_that_came_from_a_file_can_be_traced() -> None:
    network = nets.build("concat")
    exported = torch.export.export(network, (nets.example(2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    again = remodulify(exported).eval()
    program = trace(again, nets.example())
    x = nets.example(2)
    with torch.no_grad():
        assert torch.allclose(run(program, again.state_dict(), x)[program.output], network(x), atol=1e-6)
    assert {c.layer for c in program.calls} >= {"a.0", "fc"}


def test_a_module_that_is_called_twice_has_one_path() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x) - 1)

    assert [c.layer for c in trace(Twice(), torch.zeros(1, 2)).calls] == ["act", "", "act"]


def test_batch_norm_without_running_statistics_says_that_it_trains() -> None:
    program = trace(nn.BatchNorm2d(3, track_running_stats=False), torch.zeros(1, 3, 4, 4))
    assert [(c.op, c.arg("training"), c.arg("running_mean")) for c in program.calls] == [
        ("batch_norm", True, None)
    ]


def test_a_network_that_can_not_be_traced_names_its_layer() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModel, match=r"1 \(Branches\) can't be traced"):
        trace(nn.Sequential(nn.Conv2d(3, 3, 1), Branches()), nets.example())


def test_an_answer_that_does_not_depend_on_the_input_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = nn.Parameter(torch.zeros(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.answer

    with pytest.raises(UnsupportedModel, match="does not depend on its input"):
        trace(Stubborn(), nets.example())


def test_calls_are_equal_when_they_say_the_same() -> None:
    assert Call("a", "relu", (Ref("x"),), (1, 2), "") == Call(
        "a", "relu", (Ref("x"),), (1, 2), "", target=torch.relu
    )
