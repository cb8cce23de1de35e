"""Layers that lose too much go back to float: the most sensitive first, and as few as needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx import ModelProto

from edgeprune.nn.progress import bar
from edgeprune.stages.quantize_floats import Floats
from edgeprune.stages.quantize_job import Judgement
from edgeprune.stages.quantize_judge import answers, sqnr_db

Skip = tuple[str, ...]
# Of the judged images, for the output error of each layer alone.
FEW = 64


def fall_back(
    floats: Floats, name: str, build: Callable[[Skip], ModelProto], tolerance: float
) -> tuple[dict[str, float], Judgement]:
    """Put layers of a candidate back to float until its loss is tolerated, or as good as it gets.

    Args:
        name: the candidate's. build: makes it with these layers in float. tolerance: the largest loss that is accepted.

    Returns:
        Layer that went back -> its output error: the power of the logits' error over that of the logits when it
        alone is quantized. And how the file answers then.
    """
    pixels, wanted = floats.panel.pixels[:FEW], floats.panel.logits[:FEW]

    def alone(layer: str) -> float:
        model = build(tuple(other for other in floats.layers if other != layer))
        return 10.0 ** (-sqnr_db(wanted, answers(model, pixels, free=floats.panel.free)) / 10.0)

    def attempt(skip: Skip) -> Judgement:
        return floats.judge(name, skip, lambda: build(skip))

    errors: dict[str, float] = {}
    with bar(len(floats.layers), "quantize: output error of each layer alone") as advance:
        for layer in floats.layers:
            errors[layer] = floats.kept.number(f"alone {name} {layer}", lambda layer=layer: alone(layer))
            advance()
    back, judgement = fewest(errors, attempt, tolerance)
    return {layer: errors[layer] for layer in back}, judgement


def fewest(
    errors: Mapping[str, float], attempt: Callable[[Skip], Judgement], tolerance: float
) -> tuple[Skip, Judgement]:
    """The layers that go back to float, and how the file answers then.

    The most sensitive layers go back, twice as many at each step until the loss is tolerated; then as many fewer as
    halving finds; then each of them, the least sensitive first, is quantized again where that is tolerated too. One
    layer at least stays quantized.

    Args:
        errors: layer -> its output error when it alone is quantized. attempt: judges a file with these layers in float.
        tolerance: the largest loss that is accepted.

    Returns:
        The layers and the judgement; where nothing is tolerated, those of the smallest loss.
    """
    order = sorted(errors, key=lambda layer: -errors[layer])
    tried: dict[int, Judgement] = {}

    def first(count: int) -> Judgement:
        if count not in tried:
            tried[count] = attempt(tuple(order[:count]))
        return tried[count]

    failed, count = 0, 1
    while first(count).loss > tolerance:
        if count >= len(order) - 1:
            least = min(tried, key=lambda n: (tried[n].loss, n))
            return tuple(order[:least]), tried[least]
        failed, count = count, min(2 * count, len(order) - 1)
    while count - failed > 1:
        middle = (failed + count) // 2
        failed, count = (failed, middle) if first(middle).loss <= tolerance else (middle, count)
    return _thinned(tuple(order[:count]), first(count), attempt, tolerance)


def _thinned(
    layers: Skip, judgement: Judgement, attempt: Callable[[Skip], Judgement], tolerance: float
) -> tuple[Skip, Judgement]:
    for layer in reversed(layers[:-1]):
        fewer = tuple(name for name in layers if name != layer)
        found = attempt(fewer)
        if found.loss <= tolerance:
            layers, judgement = fewer, found
    return layers, judgement
