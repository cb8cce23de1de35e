"""What layers get: patches that give their outputs, second moments of them, and which rows are looked at."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import Tensor, nn

from edgeprune.repair import input_moments
from edgeprune.repair.input_moments import (
    affordable,
    features,
    input_hooks,
    moments_of_inputs,
    output_rows,
    patches,
    positions,
)

LAYERS = {
    "plain": nn.Conv2d(3, 4, 3),
    "padding": nn.Conv2d(3, 4, 3, padding=1),
    "stride": nn.Conv2d(3, 4, 3, padding=1, stride=2),
    "uneven": nn.Conv2d(3, 4, (2, 3), padding=(0, 2), stride=(3, 1), dilation=(2, 1)),
    "dilation": nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "same": nn.Conv2d(3, 4, 3, padding="same"),
    "same, even kernel": nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 3)),
    "valid": nn.Conv2d(3, 4, 3, padding="valid"),
    "reflect": nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
    "circular": nn.Conv2d(3, 4, (3, 2), padding=(1, 2), padding_mode="circular"),
    "replicate": nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"),
    "1x1": nn.Conv2d(3, 4, 1),
    "1x1, stride and padding": nn.Conv2d(3, 4, 1, stride=(2, 3), padding=(1, 2)),
    "no bias": nn.Conv2d(3, 4, 3, bias=False),
}


def weights(layer: nn.Module) -> Tensor:
    """(F + 1, O): the layer's weights and its bias, as `patches` has its inputs."""
    weight = layer.get_parameter("weight").detach().flatten(1)
    bias = dict(layer.named_parameters()).get("bias", torch.zeros(len(weight)))
    return torch.cat([weight, bias.detach()[:, None]], 1).T


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("kind", LAYERS)
def test_patches_times_weights_are_the_outputs_of_a_convolution(kind: str) -> None:
    layer, x = LAYERS[kind], torch.rand(5, 3, 9, 8) - 0.3
    with torch.no_grad():
        expected = layer(x)
    rows = patches(layer, x)
    assert rows.shape == (expected[:, 0].numel(), input_moments.width(layer) + 1)
    torch.testing.assert_close(rows @ weights(layer), output_rows(layer, expected))
    assert output_rows(layer, expected)[-1].tolist() == expected[-1, :, -1, -1].tolist()


@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 7), (2, 3, 5, 7)])
def test_patches_times_weights_are_the_outputs_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(7, 4), torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(patches(layer, x) @ weights(layer), output_rows(layer, expected))
    assert len(patches(layer, x)) == x.numel() // 7


@pytest.mark.parametrize("kind", ["padding", "uneven", "reflect", "1x1, stride and padding"])
def test_the_rows_that_are_chosen_are_the_same_of_inputs_and_of_outputs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few are chosen, and however few images are unfolded at a time to have them."""
    layer, x = LAYERS[kind], torch.rand(5, 3, 9, 8)
    with torch.no_grad():
        y = layer(x)
    everything = patches(layer, x)
    monkeypatch.setattr(input_moments, "ENTRIES", 1)
    torch.testing.assert_close(patches(layer, x), everything, rtol=0, atol=0)
    for most in (1, 7, 40):
        few = patches(layer, x, most)
        assert len(few) == most
        torch.testing.assert_close(few, everything[positions(len(everything), most)], rtol=0, atol=0)
        torch.testing.assert_close(few @ weights(layer), output_rows(layer, y, most))


def test_an_input_that_is_padded_already_is_not_padded_again() -> None:
    layer, x = LAYERS["reflect"], torch.rand(2, 3, 9, 8)
    padded = nn.functional.pad(x, (2, 2, 2, 2), "reflect")
    assert torch.equal(patches(layer, padded, padded=True), patches(layer, x))


@pytest.mark.parametrize(("count", "most"), [(10, 3), (64, 16), (1000, 999), (4096, 64), (10**9, 5)])
def test_rows_are_chosen_one_from_each_of_equal_parts(count: int, most: int) -> None:
    chosen = positions(count, most)
    assert isinstance(chosen, Tensor) and chosen.dtype == torch.int64
    edges = torch.arange(most + 1) * count // most
    assert bool(((chosen >= edges[:-1]) & (chosen < edges[1:])).all()) and edges[-1] == count


def test_all_rows_are_taken_when_they_are_few() -> None:
    assert torch.arange(8)[positions(8, 8)].tolist() == list(range(8))


def test_rows_are_chosen_from_every_column_and_every_class() -> None:
    """A stride of 16 in images 16 wide would only see what lies at their left border."""
    columns = torch.bincount(positions(64 * 16 * 16, 1024) % 16, minlength=16)
    assert columns.min() >= 48 and columns.max() <= 80, "64 on average"
    classes = torch.bincount(positions(256, 128) % 10, minlength=10)
    assert classes.min() >= 8, "12.8 on average"


def hand_made(network: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with input_hooks({"layer": layer}, lambda _, m, x: seen.append(patches(m, x).double())), torch.no_grad():
        network(images)
    rows = torch.cat(seen)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("name", ["plain", "residual", "concat"])
def test_moments_are_the_mean_products_of_patches_in_batches_of_any_size(name: str) -> None:
    network, images = nets.build(name), nets.example(7)
    layers = {n: m for n, m in network.named_modules() if input_moments.reads_patches(m)}
    found = {batch: moments_of_inputs(network, layers, images, batch) for batch in (1, 3, 7, 64)}
    for path, layer in layers.items():
        expected = hand_made(network, layer, images)
        for batch in found.values():
            assert batch[path].dtype == torch.float64
            # Products are added up in float32.
            torch.testing.assert_close(batch[path], expected, rtol=1e-5, atol=1e-6)
        assert float(expected[-1, -1]) == 1


def test_every_image_counts_alike_also_in_a_smaller_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(1, 1, 1)
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 2))
    images = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    monkeypatch.setattr(input_moments, "ROWS", 48)
    found = moments_of_inputs(network, {"0": layer}, images, 2)["0"]
    assert found.tolist() == [[(1 + 4 + 16) / 3, 7 / 3], [7 / 3, 1]]


def test_a_layer_that_runs_twice_has_the_moments_of_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(3 * self.a(x))

    network, x = Twice(), torch.tensor([[1.0, 0.0]])
    network.a.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = moments_of_inputs(network, {"a": network.a}, x, 1)["a"]
    # The rows are (1, 0, 1) and (0, 3, 1).
    assert (2 * found).tolist() == [[1, 0, 1], [0, 9, 3], [1, 3, 2]]


def test_very_wide_layers_and_those_that_do_not_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nets.build("plain")
    layers = {"a.0": network.a[0], "fc": network.fc, "nowhere": nn.Linear(3, 3)}
    assert set(moments_of_inputs(network, layers, nets.example(2), 2)) == {"a.0", "fc"}
    monkeypatch.setattr(input_moments, "WIDEST", 191)
    assert set(moments_of_inputs(network, layers, nets.example(2), 2)) == {"a.0"}


def test_looking_changes_nothing_and_stops_when_the_network_fails() -> None:
    network = nets.build("plain")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    moments_of_inputs(network, {"a.0": network.a[0]}, nets.example(3), 2)
    with pytest.raises(ZeroDivisionError), input_hooks({"fc": network.fc}, lambda *_: 1 / 0):  # type: ignore[arg-type, return-value]
        network(nets.example(1))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_features_are_the_taps_of_a_channel() -> None:
    assert features(nn.Conv2d(4, 2, (1, 3)), (0, 2)) == [0, 1, 2, 6, 7, 8]
    assert features(nn.Linear(9, 2), (3, 8)) == [3, 8]
    layer, x = nn.Conv2d(4, 2, 3), torch.zeros(1, 4, 5, 5)
    x[:, 2] = 1
    assert sorted(set(patches(layer, x)[:, :-1].nonzero()[:, 1].tolist())) == features(layer, (2,))


def test_only_maps_of_patches_are_read() -> None:
    assert input_moments.reads_patches(nn.Conv2d(4, 4, 3)) and input_moments.reads_patches(nn.Linear(2, 2))
    others = (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv1d(4, 4, 3),
        nn.BatchNorm2d(4),
    )
    assert not any(input_moments.reads_patches(m) for m in others)


def test_a_dear_network_is_looked_at_on_fewer_images() -> None:
    images = torch.arange(256.0).view(256, 1, 1, 1)
    assert len(affordable(images, 1e6)) == 256 == len(affordable(images, 0))
    assert len(affordable(images, input_moments.LOOK / 100)) == 100
    assert len(affordable(images, 1e15)) == input_moments.FEWEST_IMAGES
    assert len(affordable(images[:5], 1e15)) == 5
