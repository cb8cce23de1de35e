"""The graph in a `.pt2` archive, checked record by record before torch makes anything of it.

The checks know what torch.export writes: operators on tensors, names that are identifiers, sizes that are arithmetic,
containers that are tuples, lists and dicts.
"""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _dict_to_dataclass
from torch._export.serde.union import _Union

from edgeprune.errors import ModelError, UnsafeModel, UnsupportedModel
from edgeprune.safe_loading.names import check_name, short

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SYMBOL = re.compile(r"z?[a-z]{1,2}\d+")
_ATEN = re.compile(r"torch\.ops\.(aten|prims)\.([A-Za-z_]\w*)\.\w+")
_SCALAR_OPERATOR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem|lshift|rshift)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum)|torch\._sym_sqrt|math\.(ceil|floor|trunc|sqrt)"
)
_TOUCHES_THE_MACHINE = (
    "from_file", "save", "_print", "warn", "manual_seed", "seed", "set_grad_enabled", "to_here", "wait",
)  # fmt: skip
_SYMPY = frozenset([
    "Max", "Min", "Mod", "FloorDiv", "CeilDiv", "CleanDiv", "PythonMod", "ModularIndexing", "Where", "Eq",
    "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Abs", "Pow", "PowByNatural", "Add", "Mul", "Rational",
    "Float", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictLessThan", "StrictGreaterThan",
    "FloatPow", "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "TruncToFloat", "RoundToInt", "CeilToInt",
    "FloorToInt", "ToFloat", "Identity", "LShift", "RShift", "Integer", "Symbol",
    "IsNonOverlappingAndDenseIndicator",
])  # fmt: skip
_WORDS = frozenset(["oo", "int_oo", "true", "false"])
_ASSUMPTIONS = frozenset(
    ["positive", "integer", "negative", "nonnegative", "nonzero", "real", "extended_real"]
)
_VARIABLE_BITS = 64
_MOST_BITS = 512
# More, because these sizes are followed through the whole graph, where each layer may multiply and divide again.
_MOST_SCALAR_BITS = 4096
_MOST_TERMS = 4096
_MOST_TERMS_IN_ALL = 1_000_000
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_SUMS = ("Add", "Sub", "Max", "Min", "And", "Or", "USub")
_EXPRESSION_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.Name, ast.Constant, ast.keyword,
    ast.Load, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_GUARD_NODES = (*_EXPRESSION_NODES, ast.Subscript, ast.Attribute)
_GUARD_ATTRIBUTES = ("size", "stride", "storage_offset", "shape", "ndim")
_GUARD_WORDS = ("L", "Mod", "FloorDiv", "PythonMod", "Eq", "Ne", "Max", "Min")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def check_program(table: Any, where: str) -> None:
    """Check the parsed `models/model.json` of an archive."""
    program: Any = _dict_to_dataclass(schema.ExportedProgram, table)
    if program.schema_version.major != schema.SCHEMA_VERSION[0]:
        raise ModelError(
            f"{where} has schema version {program.schema_version.major}, "
            f"torch {torch.__version__} reads {schema.SCHEMA_VERSION[0]}",
            "export it again with this torch",
        )
    parts = list(parts_of(program.graph_module))
    texts = {part.expr_str for part in parts if isinstance(part, schema.SymExpr)}
    if (
        sum(check_expression(text, where) for text in {*texts, *program.range_constraints})
        > _MOST_TERMS_IN_ALL
    ):
        raise UnsafeModel(f"{where} was not loaded: its {len(texts)} symbolic sizes take too long to read")
    for code in program.guards_code:
        _check_guard(code, where)
    for part in parts:
        checks = _CHECKS.get(type(part))
        if checks is not None:
            checks(part, where)
    _check_scalars(program.graph_module.graph.nodes, where)


def parts_of(value: Any) -> Iterator[Any]:
    """The records inside a record of the format, itself first. Of a union only the field that is set."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, _Union):
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
    raise UnsafeModel(
        f"{where} was not loaded: it calls {node.target!r}, which is not an operator on tensors"
    )


def _check_argument(argument: schema.Argument, where: str) -> None:
    if argument.type in ("as_custom_obj", "as_operator", "as_string_to_argument"):
        raise UnsafeModel(f"{where} was not loaded: it hands over an argument of kind {str(argument.type)!r}")
    if argument.type == "as_graph":
        raise UnsupportedModel(
            f"{where} has a graph inside its graph (control flow)", "export the network without control flow"
        )


def _check_named(record: Any, where: str) -> None:
    _check_name(record.name, where)


def _check_symbolic(record: Any, where: str) -> None:
    if record.type == "as_name":
        _check_name(record.value, where)


def _check_name(name: Any, where: str) -> None:
    # Names become variables of generated source code.
    if not isinstance(name, str) or (name and not _IDENTIFIER.fullmatch(name)):
        raise UnsafeModel(
            f"{where} was not loaded: it names a value {short(name)}, which is not an identifier"
        )


def _check_target(record: Any, where: str) -> None:
    for item in fields(record):
        if item.name.endswith("_name"):
            check_name(getattr(record, item.name), where)


def _check_signature(signature: schema.ModuleCallSignature, where: str) -> None:
    for name in signature.forward_arg_names or []:
        _check_name(name, where)
    for text in (signature.in_spec, signature.out_spec):
        version, tree = json.loads(text)
        if version != schema.TREESPEC_VERSION:
            raise ModelError(
                f"{where} has containers of version {version!r}, expected {schema.TREESPEC_VERSION}"
            )
        pending = [tree]
        while pending:
            node = pending.pop()
            if node["type"] not in (None, *_CONTAINERS) or not _plain_context(node["context"]):
                what = f"{short(node['type'])} of {short(node['context'])}"
                raise UnsafeModel(f"{where} was not loaded: its inputs or outputs are in {what}")
            pending.extend(node["children_spec"])


def _plain_context(context: Any) -> bool:
    """Whether a container's own data are just the keys of a dict: an object in them would be imported by name."""
    value = json.loads(context) if isinstance(context, str) else context
    return value is None or (isinstance(value, list) and all(isinstance(key, (str, int)) for key in value))


def check_expression(text: Any, where: str) -> int:
    """Symbolic sizes are read by sympy, which evaluates them as Python. Returns how many terms it can have at most."""
    problem, size = "" if isinstance(text, str) and len(text) < 2000 else "too long", _Size()
    try:
        tree = ast.parse("0" if problem else text, mode="eval")
        problem = problem or next((p for node in ast.walk(tree) if (p := _expression_problem(node))), "")
        size = size if problem else _size(tree.body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        problem = "not an expression"
    if not problem and (size.bits > _MOST_BITS or size.terms > _MOST_TERMS):
        problem = "an expression that could take forever"
    if problem:
        raise UnsafeModel(f"{where} was not loaded: the size {short(text)} is {problem}")
    return size.terms


@dataclass(frozen=True)
class _Size:
    """How large an expression's value, and how long its text, can get when it is worked out.

    bits: of the largest value that it can have. terms: of the sum that it becomes with its products multiplied out,
    which decides how long sympy divides.
    """

    bits: int = 1
    terms: int = 1


def _size(node: ast.AST) -> _Size:
    if isinstance(node, ast.Constant):
        return (
            _Size(int(abs(node.value)).bit_length() + 1) if isinstance(node.value, (int, float)) else _Size()
        )
    if isinstance(node, ast.Name):
        return _Size(_VARIABLE_BITS)
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    kind = called or type(getattr(node, "op", None)).__name__
    if kind == "Symbol":
        return _Size(_VARIABLE_BITS)
    children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    values = [child for child in children if isinstance(child, ast.expr)]
    parts = [_size(value) for value in values]
    if kind in _POWERS and len(parts) == 2:
        times = _exponent(values[1])
        return _Size(parts[0].bits * times, min(parts[0].terms, _MOST_TERMS) ** min(times, _MOST_BITS))
    if kind == "LShift" and len(parts) == 2:
        return _Size(parts[0].bits + _exponent(values[1]), parts[0].terms)
    if kind in _SUMS:
        return _Size(max((p.bits for p in parts), default=1) + len(parts), sum(p.terms for p in parts))
    return _Size(sum(p.bits for p in parts), math.prod(min(p.terms, _MOST_TERMS + 1) for p in parts))


def _exponent(node: ast.AST) -> int:
    """The largest that an exponent can be; more than any allowed one when it is not made of numbers alone."""
    numbers = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    if names - {"Integer", "Rational", "Float"} or any(
        isinstance(part, ast.BinOp) for part in ast.walk(node)
    ):
        return _MOST_BITS + 1
    return math.prod(max(1, math.ceil(abs(n))) for n in numbers if isinstance(n, (int, float)))


def _check_scalars(nodes: list[schema.Node], where: str) -> None:
    """Whole numbers of Python that operators of the graph work out: they have no largest value, so products grow."""
    bits: dict[str, int] = {}
    for node in nodes:
        operator = _SCALAR_OPERATOR.fullmatch(node.target)
        if operator is None:
            continue
        values = [_scalar_of(argument.arg) for argument in node.inputs]
        sizes = [bits.get(v, _VARIABLE_BITS) if isinstance(v, str) else v.bit_length() + 1 for v in values]
        size = max(sizes, default=1) + len(sizes)
        if operator.group(1) in ("pow", "lshift", "mul") and len(values) == 2:
            times = _MOST_SCALAR_BITS + 1 if isinstance(values[1], str) else abs(values[1])
            grown = {"pow": sizes[0] * max(times, 1), "lshift": sizes[0] + times, "mul": sum(sizes)}
            size = grown[operator.group(1)]
        if size > _MOST_SCALAR_BITS:
            raise UnsafeModel(
                f"{where} was not loaded: {short(node.name or node.target)} is a number without bounds"
            )
        bits.update(dict.fromkeys((str(_scalar_of(output)) for output in node.outputs), size))


def _scalar_of(argument: schema.Argument) -> int | str:
    value = argument.value
    value = value.value if isinstance(value, _Union) else value
    if isinstance(value, (int, float)):
        return math.ceil(min(abs(value), 1e308))
    return value if isinstance(value, str) else getattr(value, "name", "")


def _expression_problem(node: ast.AST) -> str:
    if not isinstance(node, _EXPRESSION_NODES):
        return f"no arithmetic ({type(node).__name__})"
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id in _SYMPY
        # The second argument of Float is how many digits to work with.
        precise = known and node.func.id == "Float" and len(node.args) > 1  # type: ignore[attr-defined]
        return "" if known and not precise else "a call of something unknown"
    if isinstance(node, ast.keyword):
        return (
            ""
            if node.arg in _ASSUMPTIONS and isinstance(node.value, ast.Constant)
            else "an assumption of no known kind"
        )
    if isinstance(node, ast.Name):
        known = node.id in _SYMPY or node.id in _WORDS or _SYMBOL.fullmatch(node.id)
        return "" if known else f"of something unknown ({node.id})"
    if isinstance(node, ast.Constant):
        symbol = isinstance(node.value, str) and _SYMBOL.fullmatch(node.value)
        return (
            ""
            if symbol or (isinstance(node.value, (int, float)) and abs(node.value) < 2**64)
            else "of a strange constant"
        )
    return ""


def _check_guard(code: Any, where: str) -> None:
    """Guards are Python source. They are never used here; still, only comparisons of sizes are let through."""
    try:
        nodes = list(ast.walk(ast.parse(code, mode="eval")))
    except (SyntaxError, TypeError, ValueError) as error:
        raise UnsafeModel(f"{where} was not loaded: the guard {short(code)} is not an expression") from error
    for node in nodes:
        hidden = isinstance(node, ast.Attribute) and node.attr not in _GUARD_ATTRIBUTES
        foreign = isinstance(node, ast.Name) and node.id not in _GUARD_WORDS
        called = isinstance(node, ast.Call) and not isinstance(node.func, (ast.Attribute, ast.Name))
        if hidden or foreign or called or not isinstance(node, _GUARD_NODES):
            raise UnsafeModel(
                f"{where} was not loaded: the guard {short(code)} is more than a comparison of sizes"
            )


_CHECKS: Mapping[type, Any] = {
    schema.Node: _check_node,
    schema.Argument: _check_argument,
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
