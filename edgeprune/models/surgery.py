"""Remove channels from a network, and the proof that it was done right.

Cutting a group must give the same outputs as masking it: zeroing everything its removed channels own, scales,
shifts and the consumers' input slices included. The proof compares the two in float64.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models.inference import main_output
from edgeprune.models.torch_export import FORWARD_ERRORS, temporary_hooks
from edgeprune.records import Group, Plan

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, under each of its names where it is shared; not copied."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def removed_positions(
    groups: Sequence[Group], masks: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, tuple[int, ...]], ...]]:
    """What the masks take away, per tensor: {state-dict name: ((axis, removed positions), ...)}."""
    gone: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        keep = masks.get(group.name)
        if keep is None or bool(keep.all()):
            continue
        units = [i for i, kept in enumerate(keep.tolist()) if not kept]
        for member in group.members:
            axis = gone.setdefault(member.tensor, {}).setdefault(member.axis, set())
            for unit in units:
                axis.update(member.positions[unit])
    return {t: tuple((a, tuple(sorted(p))) for a, p in sorted(axes.items())) for t, axes in gone.items()}


def mask(network: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
    """Zero, in place, every entry that the removed channels own (statistics stay: a zero scale hides them)."""
    state = tensors(network)
    with torch.no_grad():
        for name, axes in removed_positions(groups, masks).items():
            if name.rsplit(".", 1)[-1] in _STATISTICS:
                continue
            for axis, positions in axes:
                state[name].index_fill_(axis, torch.tensor(positions, device=state[name].device), 0)


def cut(
    network: nn.Module, removed: Mapping[str, Sequence[tuple[int, Sequence[int]]]]
) -> dict[str, dict[str, int]]:
    """Remove positions from tensors, in place, and set the layers' sizes to match."""
    state = tensors(network)
    replaced: dict[int, nn.Parameter | Tensor] = {}
    touched: dict[str, nn.Module] = {}
    depthwise = {name for name, m in network.named_modules() if _is_depthwise(m)}
    for name, axes in removed.items():
        if name not in state:
            raise ModelError(
                f"the plan cuts {name!r}, which this network does not have", "use the network it was made for"
            )
        module_name, _, attribute = name.rpartition(".")
        module = network.get_submodule(module_name)
        old = state[name]
        if id(old) not in replaced:
            replaced[id(old)] = _without(name, old, axes)
        _set_tensor(module, attribute, replaced[id(old)])
        touched[module_name] = module
    return {name: _resize(module, name in depthwise) for name, module in touched.items()}


def replay(network: nn.Module, plan: Plan) -> None:
    """Cut a freshly built network, in place, as a plan says; needs no tracing."""
    cut(network, plan.tensors)
    for name, attributes in plan.attributes.items():
        module = network.get_submodule(name)
        for attribute, value in attributes.items():
            if getattr(module, attribute) != value:
                raise ModelError(
                    f"{name}.{attribute} is {getattr(module, attribute)} after the plan, which says {value}"
                )


def proof_failure(
    network: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], example: Tensor
) -> str | None:
    """Compare the masked with the cut network on copies; None when they agree, else what differs."""
    for dtype in (torch.float64, torch.float32):
        masked, small = deepcopy(network).to(dtype).eval(), deepcopy(network).to(dtype).eval()
        mask(masked, groups, masks)
        try:
            expected = checked_logits(masked, example.to(dtype))
        except FORWARD_ERRORS as error:
            if dtype == torch.float64 and "type" in str(error).lower():
                continue  # a buffer or a cast inside insists on float32
            return f"the masked network fails: {_first_line(error)}"
        try:
            cut(small, removed_positions(groups, masks))
            found = checked_logits(small, example.to(dtype))
        except (*FORWARD_ERRORS, ModelError) as error:
            return f"the network does not run without these channels: {_first_line(error)}"
        return _difference(expected, found, TOLERANCE[dtype])
    return "the network runs in neither float64 nor float32"


def checked_logits(network: nn.Module, x: Tensor) -> Tensor:
    """The network's main output without gradients."""
    with torch.no_grad():
        return main_output(network(x))


def disturbed(network: nn.Module, example: Tensor, seed: int) -> nn.Module:
    """A copy in which every branch and channel changes the output, so that a wrong cut shows in it.

    A scale of zero at the end of a residual branch, or a channel that never passes its ReLU, would hide a wrong cut.
    So norms get fresh scales and upward shifts and the statistics of `example`, and other constant parameters noise.
    """
    copy = deepcopy(network).eval()
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(
            (low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)).to(
                tensor
            )
        )

    with torch.no_grad():
        for module in copy.modules():
            if isinstance(module, NORMS) and module.weight is not None:
                uniform(module.weight, 0.5, 1.5)
                if module.bias is not None:
                    uniform(module.bias, 0.0, 0.5)
            elif isinstance(module, BATCH_NORMS):
                continue
            else:
                for parameter in module.parameters(recurse=False):
                    if parameter.numel() > 1 and bool(parameter.max() == parameter.min()):
                        uniform(parameter, 0.25, 0.75)
    _fit_statistics(copy, example)
    return copy


def _fit_statistics(network: nn.Module, example: Tensor) -> None:
    def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics = tensors(module)
        if "running_mean" not in statistics:
            return
        x = inputs[0].detach()
        axes = [i for i in range(x.ndim) if i != 1]
        spread = x.var(axes, unbiased=False) + 1e-3 if x.numel() > x.shape[1] else torch.ones(x.shape[1])
        statistics["running_mean"].copy_(x.mean(axes))
        statistics["running_var"].copy_(spread)

    layers = [m for m in network.modules() if isinstance(m, BATCH_NORMS)]
    with temporary_hooks(m.register_forward_pre_hook(fit) for m in layers):
        checked_logits(network, example)


def _difference(expected: Tensor, found: Tensor, tolerance: float) -> str | None:
    if expected.shape != found.shape:
        return f"the output has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    worst = float((expected - found).abs().max())
    if worst <= tolerance * max(scale, 1e-12):
        return None
    return f"cut and masked outputs differ by {worst:.3g} on outputs up to {scale:.3g}"


def _without(name: str, tensor: Tensor, axes: Sequence[tuple[int, Sequence[int]]]) -> nn.Parameter | Tensor:
    out = tensor.detach()
    for axis, positions in axes:
        if axis >= out.ndim or (positions and max(positions) >= out.shape[axis]):
            raise ModelError(
                f"{name} has shape {tuple(tensor.shape)}, which the plan does not fit "
                f"(axis {axis}, position {max(positions)})"
            )
        gone = set(positions)
        keep = [i for i in range(out.shape[axis]) if i not in gone]
        if not keep:
            raise ModelError(f"{name} would lose all of its {out.shape[axis]} entries along axis {axis}")
        out = out.index_select(axis, torch.tensor(keep, device=out.device))
    out = out.contiguous().clone()
    return nn.Parameter(out, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else out


def _set_tensor(module: nn.Module, attribute: str, value: nn.Parameter | Tensor) -> None:
    if attribute in module._parameters:
        module._parameters[attribute] = value  # type: ignore[assignment]
    else:
        module._buffers[attribute] = value


def _is_depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1 and getattr(module, "groups", 0) == getattr(
        module, "in_channels", -1
    )


def _resize(module: nn.Module, depthwise: bool) -> dict[str, int]:
    """Set the size attributes of a layer from its tensors; says which it set."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(module).items()}
    weight = shapes.get("weight", shapes.get("running_mean", ()))
    sizes: dict[str, int] = {}
    if not weight:
        return sizes
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        groups = weight[0] if depthwise else module.groups
        sizes = {"out_channels": weight[0], "in_channels": weight[1] * groups, "groups": groups}
    elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        sizes = {"in_channels": weight[0], "out_channels": weight[1] * module.groups}
    elif isinstance(module, nn.Linear):
        sizes = {"out_features": weight[0], "in_features": weight[1]}
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        sizes = {"num_features": weight[0]}
    elif isinstance(module, nn.GroupNorm):
        share = module.num_channels // module.num_groups
        sizes = {"num_channels": weight[0], "num_groups": weight[0] // share}
    elif isinstance(module, nn.PReLU):
        sizes = {"num_parameters": weight[0]}
    for attribute, value in sizes.items():
        setattr(module, attribute, value)
    return sizes


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"
