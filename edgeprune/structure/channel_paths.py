"""The path of a group's units through a traced program, from the layer that makes them to the layers that read them.

Two units are interchangeable when every operator on that path treats each channel separately and all alike, except for
a batch-norm right after the layer. Only operators that are known to do so are allowed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeprune.models import Call, Program, Ref
from edgeprune.records import Group

CONVOLUTIONS = frozenset(f"conv{d}d" for d in (1, 2, 3))
TRANSPOSED = frozenset(f"conv_transpose{d}d" for d in (1, 2, 3))
LAYERS = CONVOLUTIONS | TRANSPOSED | {"linear"}

# f(c x) = c f(x) for c > 0, entry by entry.
_SCALING = frozenset((
    "relu", "leaky_relu", "rrelu", "prelu", "abs", "neg", "dropout", "alpha_dropout", "feature_dropout", "clone",
    "contiguous", "detach", "alias",
))  # fmt: skip
_BENDING = frozenset((
    "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh", "gelu", "silu", "hardswish",
    "hardsigmoid", "elu", "celu", "selu", "softplus", "mish", "log_sigmoid", "hardshrink", "softshrink", "threshold",
    "exp", "square", "pow", "rsub",
))  # fmt: skip
_POOLS = re.compile(
    r"(adaptive_)?(max|avg)_pool([123])d(_with_indices)?|upsample_\w*?([123])d|_upsample_\w*?([123])d\w*"
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})


@dataclass(frozen=True)
class Path:
    """producer: the call that makes the units. batch_norm: the layer right after it, or None.

    homogeneous: c > 0 times the output of those two gives c times the input of the readers.
    """

    producer: Call
    batch_norm: str | None
    homogeneous: bool


@dataclass(frozen=True)
class _Place:
    """axis: the dimension of a value that holds the channels. homogeneous: so far."""

    axis: int
    homogeneous: bool


class _Mixed(Exception):
    """Why the units are not interchangeable."""


def follow(program: Program, group: Group) -> Path | str:
    """The path of the units of a group with one producer, or why its units can't be merged."""
    weight = next((m.tensor for m in group.members if m.role == "producer"), "")
    makers = program.readers(weight)
    if len(makers) != 1 or makers[0].op not in LAYERS:
        return f"{_layer_of(weight)} is used {len(makers)} times in the traced network, or not as a layer"
    consumers = {m.tensor for m in group.members if m.role == "consumer"}
    try:
        start, batch_norm = _start(program, makers[0])
        places = _spread(program, start, consumers)
    except _Mixed as reason:
        return str(reason)
    return Path(makers[0], batch_norm, all(p.homogeneous for p in places.values()))


def following_batch_norm(program: Program, layer: str) -> str | None:
    """The path of the batch-norm that alone reads a layer's output and reads nothing else; or None."""
    calls = program.readers(f"{layer}.weight".lstrip("."))
    followers = [program.users(call.name) for call in calls]
    if not calls or any(len(f) != 1 or f[0].op != "batch_norm" for f in followers):
        return None
    norms = [f[0] for f in followers]
    means = {n.args[3] for n in norms}
    if len(means) != 1 or None in means or any(n.arg("training") for n in norms):
        return None
    mean = means.pop().name
    return _layer_of(mean) if len(program.readers(mean)) == len(norms) else None


def _start(program: Program, maker: Call) -> tuple[dict[str, _Place], str | None]:
    axis = len(maker.shape) - 1 if maker.op == "linear" else 1
    users = program.users(maker.name)
    if len(users) != 1 or users[0].op != "batch_norm" or axis != 1:
        return {maker.name: _Place(axis, True)}, None
    norm = users[0]
    if norm.arg("training"):
        raise _Mixed(f"{_where(norm)} normalizes with the statistics of the batch")
    return {norm.name: _Place(axis, True)}, _layer_of(norm.args[3].name)


def _spread(program: Program, start: dict[str, _Place], consumers: set[str]) -> dict[str, _Place]:
    places, reached = dict(start), set[str]()
    for call in program.calls:
        if call.name in start or not any(name in places for name in call.reads):
            continue
        if call.op in LAYERS:
            reached.add(_read_by_layer(call, places, consumers))
        else:
            places[call.name] = _step(program, call, places)
    if program.output in places:
        raise _Mixed("its channels are outputs of the network")
    if consumers - reached:
        raise _Mixed(f"the way from it to {_layer_of(sorted(consumers - reached)[0])} could not be followed")
    return places


def _read_by_layer(call: Call, places: Mapping[str, _Place], consumers: set[str]) -> str:
    if call.op != "linear" and call.arg("groups") != 1:
        raise _Mixed(f"{_where(call)} has other filters for other channels")
    source = call.args[0]
    weight = call.weights[0] if call.weights else ""
    if not isinstance(source, Ref) or source.name not in places or weight not in consumers:
        raise _Mixed(f"{_where(call)} reads its channels without being a consumer of the group")
    axis = len(call.shape) - 1 if call.op == "linear" else 1
    if places[source.name].axis != axis:
        raise _Mixed(f"{_where(call)} runs along another dimension than its channels")
    return weight


def _step(program: Program, call: Call, places: Mapping[str, _Place]) -> _Place:
    read = [places[name] for name in call.reads if name in places]
    place = _Place(read[0].axis, all(p.homogeneous for p in read))
    if call.op == "cat":
        return _cat(call, place, places)
    if call.op in ("add", "sub", "mul", "div", "maximum", "minimum"):
        return _arithmetic(program, call, places)
    if call.op == "batch_norm":
        raise _Mixed(f"{_where(call)} scales each of its channels otherwise, and not right behind the layer")
    rule = _RULES.get(call.op, _pool if _POOLS.fullmatch(call.op) else None)
    weights = () if call.op == "prelu" else call.weights
    if rule is None or weights or call.args[0] != Ref(call.reads[0]) or len(call.reads) != 1:
        raise _Mixed(f"{_where(call)} is not known to treat each of its channels by itself")
    shape = program.shape_of(call.reads[0])
    return rule(call, place, shape)


def _elementwise(call: Call, place: _Place, _: tuple[int, ...]) -> _Place:
    return place if call.op in _SCALING else _Place(place.axis, False)


def _pool(call: Call, place: _Place, shape: tuple[int, ...]) -> _Place:
    found = re.search(r"([123])d", call.op)
    if found is None or place.axis >= len(shape) - int(found[1]):
        raise _Mixed(f"{_where(call)} runs over its channels")
    return place


def _item(call: Call, place: _Place, _: tuple[int, ...]) -> _Place:
    """The values of a pooling with indices; other operators with several outputs are refused."""
    if call.args[1] != 0:
        raise _Mixed(f"{_where(call)} uses the places of its maxima")
    return place


def _pad(call: Call, place: _Place, shape: tuple[int, ...]) -> _Place:
    amounts = call.args[1]
    from_end = len(shape) - 1 - place.axis
    if any(amounts[2 * from_end : 2 * from_end + 2]):
        raise _Mixed(f"{_where(call)} adds channels to it")
    constant = call.op == "constant_pad_nd" or call.args[2] == "constant"
    return _Place(place.axis, place.homogeneous and not (constant and bool(call.args[-1])))


def _reduce(call: Call, place: _Place, shape: tuple[int, ...]) -> _Place:
    given = call.arg("dim") if "dim" in call.names else None
    dims = {d % len(shape) for d in ((given,) if isinstance(given, int) else given or range(len(shape)))}
    if place.axis in dims:
        raise _Mixed(f"{_where(call)} adds up its channels")
    gone = 0 if call.arg("keepdim") else sum(d < place.axis for d in dims)
    return _Place(place.axis - gone, place.homogeneous)


def _reshape(call: Call, place: _Place, shape: tuple[int, ...]) -> _Place:
    ahead, channels = math.prod(shape[: place.axis]), shape[place.axis]
    for axis, size in enumerate(call.shape):
        if math.prod(call.shape[:axis]) == ahead and size % channels == 0 and size >= channels:
            return _Place(axis, place.homogeneous)
    raise _Mixed(f"{_where(call)} takes its channels apart")


def _permute(call: Call, place: _Place, shape: tuple[int, ...]) -> _Place:
    order = list(range(len(shape)))
    if call.op == "permute":
        order = [d % len(shape) for d in call.args[1]]
    else:
        first, second = (d % len(shape) for d in call.args[1:3])
        order[first], order[second] = second, first
    return _Place(order.index(place.axis), place.homogeneous)


def _cat(call: Call, place: _Place, places: Mapping[str, _Place]) -> _Place:
    """Concatenation with other channels is harmless; along another dimension each part must hold the same units."""
    mine = [places.get(name) for name in call.reads]
    axes = {p.axis for p in mine if p}
    if len(axes) != 1 or (call.args[1] % len(call.shape) != place.axis and None in mine):
        raise _Mixed(f"{_where(call)} puts channels of other layers in the place of its own")
    return place


def _arithmetic(program: Program, call: Call, places: Mapping[str, _Place]) -> _Place:
    others = [a for a in call.args[:2] if not (isinstance(a, Ref) and a.name in places)]
    if any(not isinstance(a, (int, float)) for a in others):
        raise _Mixed(f"{_where(call)} joins its channels with values of another layer")
    # Shapes are matched from the end when they have not the same length.
    ends = {places[name].axis - len(program.shape_of(name)) for name in call.reads}
    if len(ends) != 1:
        raise _Mixed(f"{_where(call)} joins its channels with themselves along another dimension")
    scaling = call.op not in ("mul", "div")
    if others:
        scaling = call.op == "mul" or (call.op == "div" and isinstance(call.args[0], Ref))
    return _Place(ends.pop() + len(call.shape), scaling and all(places[n].homogeneous for n in call.reads))


def _layer_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _where(call: Call) -> str:
    return f"{call.op} in {call.layer}" if call.layer else call.op


_RULES: Mapping[str, Callable[[Call, _Place, tuple[int, ...]], _Place]] = {
    **dict.fromkeys(_SCALING | _BENDING, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "getitem": _item,
}
