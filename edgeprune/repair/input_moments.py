"""Second moments of the inputs of layers, over images and positions.

A convolution is a linear layer on patches. The patch has a 1 appended, so that a closed-form solution has a bias.
Least squares and backward elimination need only these moments of the data.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.models import logits, temporary_hooks
from edgeprune.progress import bar

# Most inputs of a layer: memory grows with the square, and time with the cube.
WIDEST = 6144
# Most positions for one layer's moments.
ROWS = 65536
# Entries of patches that are held at a time.
ENTRIES = 2**26
# Most multiply-accumulates of one pass over all images, and the least number of images.
LOOK = 2.5e11
FEWEST_IMAGES = 16


def reads_patches(layer: nn.Module) -> bool:
    """Whether the layer is a linear map of patches that is supported here."""
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


def width(layer: nn.Module) -> int:
    """Entries of one patch, without the 1 for the bias."""
    weight = layer.get_parameter("weight")
    return weight[0].numel()


def patches(layer: nn.Module, x: Tensor, most: int = ROWS, *, padded: bool = False) -> Tensor:
    """The rows that a layer multiplies with its weights, a 1 appended to each.

    Returns:
        (rows, F + 1); for a convolution F = C * kernel, channels first, as in `weight.flatten(1)`.
    """
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = x if padded else functional.pad(x, layer._reversed_padding_repeated_twice, mode)
        rows = _unfolded(layer, x, most)
    else:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[positions(len(rows), most)]
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def output_rows(layer: nn.Module, y: Tensor, most: int = ROWS) -> Tensor:
    """The outputs of a layer in the order of `patches`: (rows, outputs)."""
    rows = y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.permute(0, 2, 3, 1).flatten(0, 2)
    return rows[positions(len(rows), most)]


def affordable(images: Tensor, macs: float) -> Tensor:
    """An even subset of the images, small enough for a network of that cost."""
    return images[positions(len(images), max(FEWEST_IMAGES, int(LOOK / max(1.0, macs))))]


def positions(count: int, most: int) -> Tensor | slice:
    """An even subset of `count` rows, ascending: all, or one from each of `most` equal parts.

    The place in the part follows the golden ratio: a fixed stride as wide as an image, or as the number of classes,
    would select the left border or one class alone.
    """
    if count <= most:
        return slice(None)
    edges = torch.arange(most + 1) * count // most
    place = (torch.arange(most, dtype=torch.float64) * ((5**0.5 - 1) / 2)).frac()
    return edges[:-1] + (place * edges.diff()).long()


def moments_of_inputs(
    network: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, batch: int
) -> dict[str, Tensor]:
    """Mean of patch patch^T of each layer, on images.

    Returns:
        path -> float64 (F + 1, F + 1); without layers wider than WIDEST and those that are not reached.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    narrow = {n: layer for n, layer in layers.items() if width(layer) <= WIDEST}
    with torch.no_grad(), bar(len(images), "measure inputs of layers") as advance:
        for chunk in images.split(batch):
            most = max(1, ROWS * len(chunk) // len(images))

            def add(name: str, layer: nn.Module, x: Tensor, most: int = most) -> None:
                patch = patches(layer, x, most)
                moment = (patch.T @ patch).double()
                sums[name] = sums[name] + moment if name in sums else moment
                rows[name] = rows.get(name, 0) + len(patch)

            with input_hooks(narrow, add):
                logits(network, chunk)
            advance(len(chunk))
    return {name: moment / rows[name] for name, moment in sums.items()}


@contextmanager
def input_hooks(
    layers: Mapping[str, nn.Module], visit: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Call `visit(path, layer, input)` before each of the layers runs."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: visit(name, layer, inputs[0])

    with temporary_hooks(layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()):
        yield


def features(layer: nn.Module, channels: Sequence[int]) -> list[int]:
    """Which entries of a patch belong to input channels (of a linear layer: to inputs)."""
    taps = 1 if isinstance(layer, nn.Linear) else layer.get_parameter("weight")[0, 0].numel()
    return [channel * taps + tap for channel in channels for tap in range(taps)]


def _unfolded(layer: nn.Conv2d, x: Tensor, most: int) -> Tensor:
    """The chosen patches of a padded input, a few images at a time: all of them can be gigabytes."""
    span = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = [(n - s - 1) // step + 1 for n, s, step in zip(x.shape[2:], span, layer.stride, strict=True)]
    each = sizes[0] * sizes[1]
    chosen = torch.arange(len(x) * each)[positions(len(x) * each, most)]
    images = max(1, ENTRIES // (each * width(layer)))
    found: list[Tensor] = []
    for first in range(0, len(x), images):
        columns = _columns(layer, x[first : first + images])
        mine = chosen[(chosen // each >= first) & (chosen // each < first + images)] - first * each
        if len(mine) == columns.shape[0] * each:
            found.append(columns.transpose(1, 2).flatten(0, 1))
        else:
            found.append(columns.transpose(1, 2)[mine // each, mine % each])
    return torch.cat(found)


def _columns(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if layer.kernel_size == (1, 1):
        return x[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
    return functional.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
