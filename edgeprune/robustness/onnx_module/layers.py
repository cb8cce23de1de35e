"""ONNX operators in torch that have kernels or statistics: convolutions, products, pools, normalizations, resizing."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.robustness.onnx_module.fake_quantize import (
    Inputs,
    Node,
    Operator,
    at,
    ints,
    need,
    read,
    refuse,
)
from edgeprune.safe_loading import LARGEST_STRIDE

Pool = Callable[..., Tensor]
CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


def _window(node: Node, kernel: list[int]) -> tuple[list[int], list[int]]:
    ones = [1] * len(kernel)
    strides = list(node.get("strides", ones))
    if max(strides, default=1) > LARGEST_STRIDE:
        raise refuse(node, f"strides {strides}, accepted are at most {LARGEST_STRIDE}")
    return strides, list(node.get("dilations", ones))


def _pads(node: Node, x: Tensor, kernel: list[int]) -> tuple[list[int], list[int]]:
    rank, how = len(kernel), node.get("auto_pad", b"NOTSET").decode()
    if how in ("NOTSET", "VALID"):
        pads = [0] * (2 * rank) if how == "VALID" else list(node.get("pads", [0] * (2 * rank)))
        return pads[:rank], pads[rank:]
    strides, dilations = _window(node, kernel)
    begin, end = [], []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        wanted = -(-size // stride)
        total = max(0, (wanted - 1) * stride + (k - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        begin.append(small if how == "SAME_UPPER" else large)
        end.append(large if how == "SAME_UPPER" else small)
    return begin, end


def _padded(x: Tensor, pads: tuple[list[int], list[int]], value: float = 0.0) -> Tensor:
    flat = [size for side in reversed(list(zip(*pads, strict=True))) for size in side]
    return functional.pad(x, flat, value=value) if any(flat) else x


def _conv(node: Node, x: Inputs) -> Tensor:
    image, weight = need(x, 0), need(x, 1)
    kernel = list(weight.shape[2:])
    (strides, dilations), (begin, end) = _window(node, kernel), _pads(node, image, kernel)
    if begin != end:
        image, begin = _padded(image, (begin, end)), [0] * len(kernel)
    convolve = _by_rank(node, kernel, CONVOLUTIONS)
    return convolve(image, weight, at(x, 2), strides, begin, dilations, node.get("group", 1))


def _conv_transpose(node: Node, x: Inputs) -> Tensor:
    image, weight = need(x, 0), need(x, 1)
    kernel = list(weight.shape[2:])
    strides, dilations = _window(node, kernel)
    extra = list(node.get("output_padding", [0] * len(kernel)))
    # torch wants less than a stride of it, so it is added by hand.
    whole = _by_rank(node, kernel, TRANSPOSED)(
        image, weight, at(x, 2), strides, groups=node.get("group", 1), dilation=dilations
    )
    if any(extra):
        whole = _grown(whole, extra, at(x, 2))
    sizes = list(whole.shape[2:])
    how, shape = node.get("auto_pad", b"NOTSET").decode(), node.get("output_shape", None)
    if shape is None and how.startswith("SAME"):
        shape = [size * stride for size, stride in zip(image.shape[2:], strides, strict=True)]
    if shape is None:
        begin, end = _pads(node, image, kernel)
    else:
        total = [have - want for have, want in zip(sizes, list(shape)[-len(kernel) :], strict=True)]
        begin = [t // 2 if how == "SAME_UPPER" else t - t // 2 for t in total]
        end = [t - b for t, b in zip(total, begin, strict=True)]
    for place, (b, e) in enumerate(zip(begin, end, strict=True)):
        whole = whole.narrow(2 + place, b, sizes[place] - b - e)
    return whole


def _grown(whole: Tensor, extra: list[int], bias: Tensor | None) -> Tensor:
    pads = ([0] * len(extra), extra)
    if bias is None:
        return _padded(whole, pads)
    shift = bias.view(-1, *[1] * len(extra))
    return _padded(whole - shift, pads) + shift


def _gemm(node: Node, x: Inputs) -> Tensor:
    a, b, c = need(x, 0), need(x, 1), at(x, 2)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.T if node.get("transA", 0) else a
    # Outputs by inputs, as a linear layer has it.
    b = b if node.get("transB", 0) else b.T
    if alpha == beta == 1.0 and (c is None or (c.ndim == 1 and len(c) == len(b))):
        return functional.linear(a, b, c)
    product = alpha * (a @ b.T)
    return product if c is None else product + beta * c


def _batch_norm(node: Node, x: Inputs) -> Tensor:
    if node.get("training_mode", 0):
        raise refuse(node, "training_mode")
    scale, shift, mean, var = (need(x, place) for place in range(1, 5))
    return functional.batch_norm(
        need(x, 0), mean, var, scale, shift, training=False, eps=node.get("epsilon", 1e-5)
    )


def _instance_norm(node: Node, x: Inputs) -> Tensor:
    eps = node.get("epsilon", 1e-5)
    return functional.instance_norm(need(x, 0), weight=need(x, 1), bias=need(x, 2), eps=eps)


def _group_norm(node: Node, x: Inputs) -> Tensor:
    image, groups = need(x, 0), node.options["num_groups"]
    # Up to opset 20 there is a scale for each group, then one for each channel.
    scale, shift = (t.repeat_interleave(image.shape[1] // len(t)) for t in (need(x, 1), need(x, 2)))
    return functional.group_norm(image, groups, scale, shift, node.get("epsilon", 1e-5))


def _layer_norm(node: Node, x: Inputs) -> Tensor:
    whole, shift = need(x, 0), at(x, 2)
    if node.outputs > 1:
        raise refuse(node, "outputs for mean and deviation")
    axis = node.get("axis", -1) % whole.ndim
    found = functional.layer_norm(whole, whole.shape[axis:], eps=node.get("epsilon", 1e-5)) * need(x, 1)
    return found if shift is None else found + shift


def _response_norm(node: Node, x: Inputs) -> Tensor:
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return functional.local_response_norm(need(x, 0), node.options["size"], alpha, beta, bias)


def _global(function: Callable[..., Tensor]) -> Operator:
    def operator(node: Node, x: Inputs) -> Tensor:
        image = need(x, 0)
        return function(image, tuple(range(2, image.ndim)), keepdim=True)

    return operator


def _max_pool(node: Node, x: Inputs) -> Tensor:
    if node.outputs > 1:
        raise refuse(node, "indices")
    image, kernel = need(x, 0), list(node.options["kernel_shape"])
    pool = _by_rank(node, kernel, (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d))
    (strides, dilations), (begin, end) = _window(node, kernel), _pads(node, image, kernel)
    if begin != end or any(2 * b > k for b, k in zip(begin, kernel, strict=True)):
        image, begin = _padded(image, (begin, end), -torch.inf), [0] * len(kernel)
    return pool(image, kernel, strides, begin, dilations, bool(node.get("ceil_mode", 0)))


def _average_pool(node: Node, x: Inputs) -> Tensor:
    image, kernel = need(x, 0), list(node.options["kernel_shape"])
    pool = _by_rank(node, kernel, (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d))
    (strides, dilations), (begin, end) = _window(node, kernel), _pads(node, image, kernel)
    whole, ceil = bool(node.get("count_include_pad", 0)), bool(node.get("ceil_mode", 0))
    if any(d != 1 for d in dilations):
        raise refuse(node, f"dilations {dilations}")
    if begin == end and all(2 * b <= k for b, k in zip(begin, kernel, strict=True)):
        return pool(image, kernel, strides, begin, ceil, whole)
    if ceil:
        raise refuse(node, f"ceil_mode with pads {begin + end}")
    found = pool(_padded(image, (begin, end)), kernel, strides)
    if whole:
        return found
    # The share of each window that lies in the image.
    return found / pool(_padded(torch.ones_like(image[:1, :1]), (begin, end)), kernel, strides)


def _by_rank(node: Node, kernel: list[int], pools: tuple[Pool, Pool, Pool]) -> Pool:
    if len(kernel) > 3:
        raise refuse(node, f"kernel {kernel}")
    return pools[len(kernel) - 1]


def _resize(node: Node, x: Inputs) -> Tensor:
    image, scales = need(x, 0), read(node, x, 1 if node.opset < 11 else 2)
    sizes, mode = ints(node, x, 3, "sizes"), node.get("mode", b"nearest").decode()
    given = [float(s) for s in scales or []]
    if node.get("axes", None) is not None or not (sizes or given):
        raise refuse(node, "axes, or neither scales nor sizes")
    have = image.shape[2:]
    if sizes:
        want = sizes[2:]
        given = [w / h for w, h in zip(want, have, strict=True)]
    else:
        given = given[2:]
        want = [int(h * s) for h, s in zip(have, given, strict=True)]
    how = node.get(
        "coordinate_transformation_mode", b"half_pixel" if node.opset > 10 else b"asymmetric"
    ).decode()
    if mode == "nearest":
        for axis, (size, scale) in enumerate(zip(want, given, strict=True), 2):
            image = image.index_select(
                axis, _nearest(node, how, (image.shape[axis], size, scale)).to(image.device)
            )
        return image
    return _smooth(node, image, (mode, how, want, given))


def _nearest(node: Node, how: str, sizes: tuple[int, int, float]) -> Tensor:
    """Which place of an axis each new one takes. sizes: the old one, the new one, the scale."""
    old, new, scale = sizes
    place = torch.arange(new, dtype=torch.float64)
    if how == "asymmetric":
        source = place / scale
    elif how == "align_corners":
        source = place * (old - 1) / max(1, new - 1)
    elif how in ("half_pixel", "pytorch_half_pixel"):
        source = torch.zeros(1).double() if how[0] == "p" and new == 1 else (place + 0.5) / scale - 0.5
    else:
        raise refuse(node, how)
    rounding = node.get("nearest_mode", b"round_prefer_floor" if node.opset > 10 else b"floor").decode()
    rounded = {
        "floor": torch.floor,
        "ceil": torch.ceil,
        "round_prefer_floor": lambda t: torch.ceil(t - 0.5),
        "round_prefer_ceil": lambda t: torch.floor(t + 0.5),
    }[rounding](source)
    return rounded.long().clamp(0, old - 1)


def _smooth(node: Node, image: Tensor, how: tuple[str, str, list[int], list[float]]) -> Tensor:
    mode, coordinates, want, scales = how
    names: dict[tuple[str, int], Any] = {
        ("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic",
    }  # fmt: skip
    whole = all(abs(h * s - w) < 1e-6 * w for h, s, w in zip(image.shape[2:], scales, want, strict=True))
    known = coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
    cubic = mode != "cubic" or node.get("cubic_coeff_a", -0.75) == -0.75
    plain = not node.get("antialias", 0) and not node.get("exclude_outside", 0)
    if (mode, len(want)) not in names or not (whole and known and plain and cubic):
        raise refuse(node, f"mode {mode}, {coordinates}, scales {scales}")
    corners = coordinates == "align_corners"
    return functional.interpolate(image, want, mode=names[mode, len(want)], align_corners=corners)


LAYERS: Mapping[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _response_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda node, x: torch.matmul(need(x, 0), need(x, 1)),
    "MaxPool": _max_pool,
    "Resize": _resize,
}
