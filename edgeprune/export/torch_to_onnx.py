"""A network as ONNX at exactly the requested opset, by torch's exporters and onnx's version converter."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import onnx
import torch
from onnx import ModelProto, version_converter
from torch import nn
from torch.export import ExportedProgram

from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.models import FORWARD_ERRORS, PREFIX, capture, example, quiet, reason, title
from edgeprune.onnx_graph import ONNX_ERRORS, name_after_layers, opset_of
from edgeprune.records import InputSpec
from edgeprune.serialization import scratch_folder

INPUT, OUTPUT, BATCH = "input", "logits", "batch"
# Protobuf stops at 2 GiB, and one file is what a device gets.
MAX_BYTES = 1_900_000_000
OLDEST_OPSET = 9
# The dynamo exporter makes this when an older one is requested, and reports it in its log only.
OLDEST_DYNAMO_OPSET = 18
DEFAULT_DYNAMO_OPSET = 20


@dataclass(frozen=True)
class Exported:
    """An ONNX model at the right opset, named after its layers. note: how it was exported, "" for as usual."""

    model: ModelProto
    note: str = ""


def check_size(module: nn.Module) -> None:
    """Refuse a network that does not fit in one ONNX file."""
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    check_bytes(size, "the network has {:.1f} GB of weights")


def check_bytes(size: int, message: str) -> None:
    """Refuse what has more bytes than one ONNX file holds; `message` has a place for the GB."""
    if size > MAX_BYTES:
        limit = f"{MAX_BYTES / 1e9:.1f} GB"
        raise UnsupportedModel(
            f"{message.format(size / 1e9)}; one ONNX file holds at most {limit}",
            f"ask for a smaller network: --budget 'size={limit}'",
        )


def candidates(
    module: nn.Module, spec: InputSpec, opset: int, *, dynamic_batch: bool
) -> Iterator[Callable[[], Exported]]:
    """Functions that export to an ONNX model at `opset` or raise UnsupportedModel, best first.

    Args:
        dynamic_batch: leave N open, named "batch"; else it is 1.

    Raises:
        UsageError: no exporter makes that opset.
        UnsupportedModel: the network can't be traced.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UsageError(
            f"export.opset = {opset} must be between {OLDEST_OPSET} and {newest}",
            "leave it away to get the one that suits the target",
        )
    modules = {path: _is_layer(part) for path, part in module.named_modules()}
    # The TorchScript exporter would silently follow one branch of an `if`; what torch.export took has none.
    program = capture(module, spec, dynamic_batch=dynamic_batch)

    def named(model: ModelProto) -> ModelProto:
        # Before any conversion, which drops the metadata that the names come from.
        name_after_layers(model, modules, PREFIX)
        _set_shapes(model, spec, dynamic_batch)
        return model

    def dynamo(made_at: int) -> Exported:
        return _at_opset(named(_dynamo(program, made_at)), opset)

    def torchscript() -> Exported:
        note = f"exported by torch's TorchScript exporter: the current one makes no opset {opset}"
        return Exported(named(_torchscript(module, spec, opset, dynamic_batch)), note)

    yield partial(dynamo, max(opset, OLDEST_DYNAMO_OPSET))
    if opset > DEFAULT_DYNAMO_OPSET:
        yield partial(dynamo, DEFAULT_DYNAMO_OPSET)
    if opset < OLDEST_DYNAMO_OPSET:
        yield torchscript


def _is_layer(part: nn.Module) -> bool:
    return any(p.ndim > 1 for p in part.parameters(recurse=False)) or isinstance(
        part, (nn.Linear, nn.modules.conv._ConvNd)
    )


def _dynamo(program: ExportedProgram, opset: int) -> ModelProto:
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                (),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
            assert exported is not None
            return exported.model_proto
    except FORWARD_ERRORS as error:
        raise _untranslatable(program, error) from error


def _at_opset(model: ModelProto, opset: int) -> Exported:
    got = opset_of(model)
    if got == opset:
        return Exported(model)
    try:
        converted = version_converter.convert_version(model, opset)
        onnx.checker.check_model(converted, full_check=True)
    except ONNX_ERRORS as error:
        # "/project/onnx/.../BaseConverter.h:66: adapter_lookup: Assertion `false` failed: No Adapter From ..."
        why = re.sub(r"^.*Assertion `.*` failed: ", "", reason(error))
        raise UnsupportedModel(
            f"torch's exporter made opset {got}, not {opset}, and onnx can't convert it: {why}",
            f"take a target or an export.opset of {got} or more",
        ) from error
    return Exported(converted, f"exported at opset {got} and converted to {opset}")


def _torchscript(module: nn.Module, spec: InputSpec, opset: int, dynamic_batch: bool) -> ModelProto:
    try:
        with scratch_folder() as folder, quiet(), torch.no_grad():
            file = folder / "model.onnx"
            torch.onnx.export(
                module,
                (example(spec),),
                file,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}} if dynamic_batch else None,
                dynamo=False,
                verbose=False,
                # Otherwise it merges batch-norms and transposes weights, which lose their names; onnxslim does it too.
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )
            return onnx.load(file)
    except (*FORWARD_ERRORS, *ONNX_ERRORS) as error:
        raise UnsupportedModel(
            f"torch's TorchScript exporter fails at opset {opset}: {reason(error)}"
        ) from error


def _set_shapes(model: ModelProto, spec: InputSpec, dynamic_batch: bool) -> None:
    # One exporter names the open dimension "s77", the other omits the shapes of some graphs.
    batch = BATCH if dynamic_batch else 1
    for value, shape in ((model.graph.input[0], spec.shape), (model.graph.output[0], (spec.classes,))):
        stated = onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, (batch, *shape))
        value.CopyFrom(stated)


def _untranslatable(program: ExportedProgram, error: BaseException) -> UnsupportedModel:
    match = re.search(
        r"Error when translating node %(\w+)[^\n]*?target=(?:torch\.ops\.)?([\w.]+)", str(error)
    )
    if not match:
        return UnsupportedModel(f"torch's ONNX exporter failed: {reason(error)}")
    name, operator = match.groups()
    layer = _layer_of(program, name)
    return UnsupportedModel(
        f"{layer} uses {operator.removesuffix('.default')}, "
        f"which torch's ONNX exporter can't translate: {reason(error)}",
        "replace that operation by others",
    )


def _layer_of(program: ExportedProgram, node_name: str) -> str:
    try:
        with quiet():
            graph = program.run_decompositions().graph
    except FORWARD_ERRORS:
        graph = program.graph
    for node in graph.nodes:
        if node.name == node_name and node.meta.get("nn_module_stack"):
            path, cls = list(node.meta["nn_module_stack"].values())[-1]
            kind = cls if isinstance(cls, str) else cls.__name__
            return title(path, kind.rpartition(".")[2])
    return title("", "")
