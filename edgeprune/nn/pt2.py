"""`.pt2` archives of torch.export: looked into before they are loaded, because loading one can run code.

torch 2.13 runs code out of an archive by pickles (sample inputs, weights, constants), by Python expressions (symbolic
sizes, guards), by names that end up in generated source, by operators given as dotted paths, and by modules that a
tree of containers asks to import. `vet` knows what genuine archives hold and refuses everything else.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import SerializeError, _dict_to_dataclass
from torch._export.verifier import SpecViolationError

from edgeprune.errors import ModelError, UnsafeModel, UnsupportedModel
from edgeprune.nn.pickle_rules import DATA
from edgeprune.nn.pickle_scan import faults
from edgeprune.nn.zoo import FOREIGN_ERRORS

_LOAD_ERRORS = (*FOREIGN_ERRORS, SerializeError, SpecViolationError)
_MAIN = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {"data/weights/model_weights_config.json": "weight", "data/constants/model_constants_config.json": "tensor"}
_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/[\w.\-]+"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STATE_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_SYMBOL = re.compile(r"z?[a-z]{1,2}\d+")
_ATEN = re.compile(r"torch\.ops\.(aten|prims)\.([A-Za-z_]\w*)\.\w+")
_SCALAR_OPERATOR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem|lshift|rshift)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum)|torch\._sym_sqrt|math\.(ceil|floor|trunc|sqrt)"
)
_TOUCHES_THE_MACHINE = ("from_file", "save", "_print", "warn", "manual_seed", "seed", "set_grad_enabled", "to_here", "wait")
_SYMPY = frozenset(
    "Max Min Mod FloorDiv CeilDiv CleanDiv PythonMod ModularIndexing Where Eq Ne Lt Le Gt Ge And Or Not Abs Pow PowByNatural "
    "Add Mul Rational Float Equality Unequality GreaterThan LessThan StrictLessThan StrictGreaterThan "
    "FloatPow IntTrueDiv FloatTrueDiv TruncToInt TruncToFloat RoundToInt CeilToInt FloorToInt ToFloat Identity LShift RShift "
    "Integer Symbol IsNonOverlappingAndDenseIndicator".split()
)
_WORDS = frozenset(["oo", "int_oo", "true", "false"])
_ASSUMPTIONS = frozenset(["positive", "integer", "negative", "nonnegative", "nonzero", "real", "extended_real"])
_EXPRESSION_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load,
    ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_GUARD_NODES = (*_EXPRESSION_NODES, ast.Subscript, ast.Attribute)
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def vet(path: Path) -> None:
    """Refuse an archive whose loading could run code, or that is not as torch.export.save writes it.

    Raises:
        UnsafeModel: it could run code; says where in the archive and how.
        UnsupportedModel: it holds operators that are none of torch's own on tensors; names the first.
        ModelError: not a complete `.pt2` archive, or of another version.
    """
    _vet(path.read_bytes(), str(path))


def load(data: bytes, where: str) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Vet the bytes of an archive, then load its program and its extra files (name -> text).

    Raises:
        UnsafeModel, UnsupportedModel, ModelError: as `vet`, or torch can't load it.
    """
    _vet(data, where)
    extra = {name.partition("/")[2]: "" for name in _records(data, where)[1] if name.startswith("extra/")}
    try:
        with _quiet():
            return torch.export.load(io.BytesIO(data), extra_files=extra), extra
    except _LOAD_ERRORS as error:
        raise ModelError(f"{where} can't be loaded by torch {torch.__version__}: {_last_line(error)}", "export it again") from error


def _vet(data: bytes, where: str) -> None:
    reader, names = _records(data, where)
    strange = [n for n in names if not _FILES.fullmatch(n)]
    if strange or len(set(names)) != len(names):
        what = f"holds {strange[0]!r}" if strange else "holds a file twice"
        raise UnsafeModel(f"{where} was not loaded: it {what}, which torch.export.save doesn't write", "export it again")
    needed = ("archive_format", "archive_version", _MAIN, _SAMPLES, *_CONFIGS)
    absent = [n for n in needed if n not in names]
    if absent:
        raise ModelError(f"{where} is not a complete .pt2 archive: {absent[0]} is missing", "export it again")
    try:
        _check_program(_json(reader, _MAIN), where)
        for name, kind in _CONFIGS.items():
            _check_payloads(_json(reader, name), kind, f"{where}: {name}")
        _check_samples(reader.get_record(_SAMPLES), where)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        raise ModelError(f"{where} is a corrupt .pt2 archive: {_last_line(error)}", "export it again") from error


def _records(data: bytes, where: str) -> tuple[Any, list[str]]:
    try:
        # torch's own reader: another one might see other files in a forged archive
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        return reader, list(reader.get_all_records())
    except RuntimeError as error:
        raise ModelError(f"{where} is a truncated or corrupt archive: {_last_line(error)}", "export it again") from error


def _json(reader: Any, name: str) -> Any:
    return json.loads(reader.get_record(name).decode("utf-8"))


def _check_program(table: Any, where: str) -> None:
    program = _dict_to_dataclass(schema.ExportedProgram, table)
    if program.schema_version.major != schema.SCHEMA_VERSION[0]:
        raise ModelError(
            f"{where} has schema version {program.schema_version.major}, torch {torch.__version__} reads {schema.SCHEMA_VERSION[0]}",
            "export it again with this torch",
        )
    for symbol in program.range_constraints:
        _check_expression(symbol, where)
    for code in program.guards_code:
        _check_guard(code, where)
    for part in _parts(program.graph_module):
        checks = _CHECKS.get(type(part))
        if checks is not None:
            checks(part, where)


def _parts(value: Any) -> Iterator[Any]:
    """The records inside a record, itself first. Only what is set: a union has one field that counts."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, schema._Union):
            yield item
            pending.append(item.value)
        elif is_dataclass(item):
            yield item
            pending.extend(getattr(item, f.name) for f in fields(item))
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)


def _check_node(node: schema.Node, where: str) -> None:
    _check_name(node.name or "_", where)
    for argument in node.inputs:
        _check_name(argument.name or "_", where)
    aten = _ATEN.fullmatch(node.target)
    if aten and aten.group(2) not in _TOUCHES_THE_MACHINE:
        return
    if not aten and _SCALAR_OPERATOR.fullmatch(node.target):
        return
    if node.target.startswith("torch.ops.") and not aten:
        raise UnsupportedModel(
            f"{where} uses {node.target}, which is not one of torch's own operators on tensors",
            "export the network without it, in eval mode and without torch.no_grad() inside forward",
        )
    raise UnsafeModel(f"{where} was not loaded: it calls {node.target!r}, which is not an operator on tensors")


def _check_argument(argument: schema.Argument, where: str) -> None:
    if argument.type in ("as_custom_obj", "as_operator", "as_string_to_argument"):
        raise UnsafeModel(f"{where} was not loaded: it hands over an argument of kind {str(argument.type)!r}")
    if argument.type == "as_graph":
        raise UnsupportedModel(f"{where} has a graph inside its graph (control flow)", "export the network without control flow")


def _check_named(record: Any, where: str) -> None:
    _check_name(record.name, where)


def _check_symbolic(record: Any, where: str) -> None:
    if record.type == "as_name":
        _check_name(record.value, where)


def _check_name(name: Any, where: str) -> None:
    # Names become variables of generated source code.
    if not isinstance(name, str) or (name and not _IDENTIFIER.fullmatch(name)):
        raise UnsafeModel(f"{where} was not loaded: it names a value {_short(name)}, which is not an identifier")


def _check_state_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not _STATE_NAME.fullmatch(name):
        raise UnsafeModel(f"{where} was not loaded: it names a tensor {_short(name)}, which is no name of a parameter or buffer")


def _check_target(record: Any, where: str) -> None:
    for item in fields(record):
        if item.name.endswith("_name"):
            _check_state_name(getattr(record, item.name), where)


def _check_signature(signature: schema.ModuleCallSignature, where: str) -> None:
    for name in signature.forward_arg_names or []:
        _check_name(name, where)
    for text in (signature.in_spec, signature.out_spec):
        version, tree = json.loads(text)
        if version != schema.TREESPEC_VERSION:
            raise ModelError(f"{where} has containers of version {version!r}, expected {schema.TREESPEC_VERSION}")
        pending = [tree]
        while pending:
            node = pending.pop()
            plain = node["context"] is None or not isinstance(node["context"], str) or "__enum__" not in node["context"]
            if node["type"] not in (None, *_CONTAINERS) or not plain:
                raise UnsafeModel(f"{where} was not loaded: its inputs or outputs are in a {_short(node['type'])}")
            pending.extend(node["children_spec"])


def _check_expression(text: Any, where: str) -> None:
    """Symbolic sizes are read by sympy, which evaluates them as Python."""
    problem = "" if isinstance(text, str) and len(text) < 2000 else "too long"
    try:
        nodes = [] if problem else list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        nodes, problem = [], "not an expression"
    problem = problem or next((p for node in nodes if (p := _expression_problem(node))), "")
    if problem:
        raise UnsafeModel(f"{where} was not loaded: the size {_short(text)} is {problem}")


def _expression_problem(node: ast.AST) -> str:
    if not isinstance(node, _EXPRESSION_NODES):
        return f"no arithmetic ({type(node).__name__})"
    if isinstance(node, ast.Call):
        return "" if isinstance(node.func, ast.Name) and node.func.id in _SYMPY else "a call of something unknown"
    if isinstance(node, ast.keyword):
        return "" if node.arg in _ASSUMPTIONS and isinstance(node.value, ast.Constant) else "an assumption of no known kind"
    if isinstance(node, ast.Name):
        known = node.id in _SYMPY or node.id in _WORDS or _SYMBOL.fullmatch(node.id)
        return "" if known else f"of something unknown ({node.id})"
    if isinstance(node, ast.Constant):
        symbol = isinstance(node.value, str) and _SYMBOL.fullmatch(node.value)
        return "" if symbol or (isinstance(node.value, (int, float)) and abs(node.value) < 2**64) else "of a strange constant"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        small = isinstance(node.right, ast.Constant) and isinstance(node.right.value, int) and node.right.value <= 8
        return "" if small else "a power that could take forever"
    return ""


def _check_guard(code: Any, where: str) -> None:
    """Guards are Python source. They are never used here; still, only comparisons of sizes are let through."""
    try:
        nodes = list(ast.walk(ast.parse(code, mode="eval")))
    except (SyntaxError, TypeError, ValueError) as error:
        raise UnsafeModel(f"{where} was not loaded: the guard {_short(code)} is not an expression") from error
    for node in nodes:
        hidden = isinstance(node, ast.Attribute) and node.attr not in ("size", "stride", "storage_offset", "shape", "ndim")
        foreign = isinstance(node, ast.Name) and node.id not in ("L", "Mod", "FloorDiv", "PythonMod", "Eq", "Ne", "Max", "Min")
        called = isinstance(node, ast.Call) and not isinstance(node.func, (ast.Attribute, ast.Name))
        if hidden or foreign or called or not isinstance(node, _GUARD_NODES):
            raise UnsafeModel(f"{where} was not loaded: the guard {_short(code)} is more than a comparison of sizes")


def _check_payloads(table: Any, kind: str, where: str) -> None:
    for name, payload in _dict_to_dataclass(schema.PayloadConfig, table).config.items():
        _check_state_name(name, where)
        if payload.use_pickle is not False:
            raise UnsafeModel(f"{where} was not loaded: {name} is a pickle, which can run code")
        if not isinstance(payload.path_name, str) or not re.fullmatch(rf"{kind}_\d+", payload.path_name):
            raise UnsafeModel(f"{where} was not loaded: {name} lies in {_short(payload.path_name)}, expected {kind}_N")
        for part in _parts(payload.tensor_meta):
            if isinstance(part, schema.SymExpr):
                raise UnsafeModel(f"{where} was not loaded: {name} has a symbolic size")


def _check_samples(data: bytes, where: str) -> None:
    """torch falls back to its unrestricted unpickler when the restricted one refuses the sample inputs."""
    if not data:
        return
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    found = faults(reader.get_record("data.pkl"), DATA)
    if found:
        raise UnsafeModel(f"{where} was not loaded: its sample inputs hold {found[0]}")
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except _LOAD_ERRORS as error:
        raise UnsafeModel(f"{where} was not loaded: its sample inputs are not just tensors: {_last_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs a traceback before it raises; the error alone is enough."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _check_sym_expr(record: schema.SymExpr, where: str) -> None:
    _check_expression(record.expr_str, where)


_CHECKS: Mapping[type, Any] = {
    schema.Node: _check_node,
    schema.Argument: _check_argument,
    schema.SymExpr: _check_sym_expr,
    schema.TensorArgument: _check_named,
    schema.TokenArgument: _check_named,
    schema.GraphArgument: _check_named,
    schema.InputToConstantInputSpec: _check_named,
    schema.SymIntArgument: _check_symbolic,
    schema.SymFloatArgument: _check_symbolic,
    schema.SymBoolArgument: _check_symbolic,
    schema.InputToParameterSpec: _check_target,
    schema.InputToBufferSpec: _check_target,
    schema.InputToTensorConstantSpec: _check_target,
    schema.BufferMutationSpec: _check_target,
    schema.ParameterMutationSpec: _check_target,
    schema.UserInputMutationSpec: _check_target,
    schema.ModuleCallSignature: _check_signature,
}
