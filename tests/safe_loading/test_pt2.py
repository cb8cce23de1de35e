"""`.pt2` archives: genuine ones pass, and none that would run code gets as far as torch.export.load."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgeprune.errors import ModelError, UnsafeModel, UnsupportedModel
from edgeprune.safe_loading import pt2_archive
from edgeprune.safe_loading.pt2_graph import check_expression

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
PROGRAM = "models/model.json"


class Zoo(nn.Module):
    """A bit of everything that ends up in an archive: tied weights, buffers of each kind, a constant, branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.same = nn.Conv2d(3, 4, 3, padding=1)
        self.same.weight = self.conv.weight
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("kept", torch.rand(4, 1, 1))
        self.register_buffer("volatile", torch.rand(1), persistent=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x) + self.same(x)) * self.kept + self.volatile + torch.tensor(0.5))
        return self.fc(x.reshape(x.shape[0], 4, -1).mean(2))


def archive(net: nn.Module, dynamic_shapes: Any = None, *, extra: bool = False) -> bytes:
    program = torch.export.export(net.eval(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=dynamic_shapes)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"note.txt": "hello"} if extra else None)
    return file.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    return {name: reader.get_record(name) for name in reader.get_all_records()}


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(out)
    writer.set_min_version(6)
    for name, content in files.items():
        if not name.startswith(".data/") and name != "byteorder":
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return out.getvalue()


@pytest.fixture(scope="module")
def genuine() -> bytes:
    return archive(Zoo(), ({0: Dim("batch", min=1)},))


@pytest.mark.parametrize(
    "shapes", [None, ({0: Dim("batch", min=1)},), ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)]
)
@pytest.mark.parametrize("extra", [False, True])
def test_genuine_archives_pass_and_load(shapes: Any, extra: bool) -> None:
    torch.manual_seed(0)
    net = Zoo()
    data = archive(net, shapes, extra=extra)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(pt2_archive.load_pt2(data, "model.pt2").module()(x), net(x))


def test_an_archive_put_together_by_the_test_passes_when_it_is_genuine(genuine: bytes) -> None:
    # Otherwise the attacks below could be refused for how they are packed.
    assert (
        pt2_archive.load_pt2(packed(records(genuine)), "same.pt2").state_dict.keys()
        == Zoo().state_dict().keys()
    )


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def edited(data: bytes, name: str, change: Callable[[Any, dict[str, bytes]], None]) -> bytes:
    files = records(data)
    table = json.loads(files[name])
    change(table, files)
    files[name] = json.dumps(table).encode()
    return packed(files)


def everywhere(value: Any, change: Callable[[dict[str, Any]], None]) -> None:
    if isinstance(value, dict):
        for inner in list(value.values()):
            everywhere(inner, change)
        change(value)
    elif isinstance(value, list):
        for inner in value:
            everywhere(inner, change)


def in_samples(data: bytes, marker: Path) -> bytes:
    return packed({**records(data), "data/sample_inputs/model.pt": saved((Evil(marker),))})


def in_a_weight(data: bytes, marker: Path) -> bytes:
    def change(table: Any, files: dict[str, bytes]) -> None:
        payload = table["config"]["fc.bias"]
        payload["use_pickle"] = True
        files["data/weights/" + payload["path_name"]] = saved(Evil(marker))

    return edited(data, WEIGHTS, change)


def in_a_constant(data: bytes, marker: Path) -> bytes:
    def change(table: Any, files: dict[str, bytes]) -> None:
        table["config"]["x"] = {
            "path_name": "tensor_9",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }
        files["data/constants/tensor_9"] = saved(Evil(marker))

    return edited(data, CONSTANTS, change)


def in_an_opaque_object(data: bytes, marker: Path) -> bytes:
    def change(table: Any, files: dict[str, bytes]) -> None:
        table["config"]["x"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }
        files["data/constants/opaque_obj_0"] = pickle.dumps(Evil(marker))

    return edited(data, CONSTANTS, change)


def in_an_expression(data: bytes, marker: Path) -> bytes:
    code = f"__import__('os').system('touch {marker}')"

    def change(table: Any, _: dict[str, bytes]) -> None:
        everywhere(table, lambda d: d.update(expr_str=code) if "expr_str" in d else None)

    return edited(data, PROGRAM, change)


def in_a_nested_expression(data: bytes, marker: Path) -> bytes:
    code = f"""Max("__import__('os').system('touch {marker}')", 1)"""

    def change(table: Any, _: dict[str, bytes]) -> None:
        everywhere(table, lambda d: d.update(expr_str=code) if "expr_str" in d else None)

    return edited(data, PROGRAM, change)


def in_a_guard(data: bytes, marker: Path) -> bytes:
    def change(table: Any, _: dict[str, bytes]) -> None:
        table["guards_code"] = [f"__import__('os').system('touch {marker}') or True"]

    return edited(data, PROGRAM, change)


def in_a_container(data: bytes, marker: Path) -> bytes:
    """A dict whose keys are an enum: its module is imported by name. The key is spelled so that no search finds it."""
    (marker.parent / "imported_by_a_model.py").write_text(f"import os; os.system('touch {marker}')")
    context = '[{"\\u005f_enum__": true, "fqn": "imported_by_a_model:Kind", "name": "A"}]'

    def change(table: Any, _: dict[str, bytes]) -> None:
        for entry in table["graph_module"]["module_call_graph"]:
            if entry.get("signature"):
                spec = json.loads(entry["signature"]["in_spec"])
                spec[1]["children_spec"][1]["context"] = context
                entry["signature"]["in_spec"] = json.dumps(spec)

    return edited(data, PROGRAM, change)


def first_node(data: bytes, target: str, arguments: dict[str, Any]) -> bytes:
    def change(table: Any, _: dict[str, bytes]) -> None:
        node = table["graph_module"]["graph"]["nodes"][0]
        node["target"] = target
        node["inputs"] = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]

    return edited(data, PROGRAM, change)


def in_a_file_operator(data: bytes, marker: Path) -> bytes:
    arguments = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
    return first_node(data, "torch.ops.aten.from_file.default", arguments)


def in_a_dotted_path(data: bytes, marker: Path) -> bytes:
    return first_node(data, "torch.serialization.os.system", {"command": {"as_string": f"touch {marker}"}})


def in_a_name(data: bytes, marker: Path) -> bytes:
    code = f"relu = None\nimport os; os.system('touch {marker}')\nrelu"

    def change(table: Any, _: dict[str, bytes]) -> None:
        table["graph_module"] = json.loads(
            json.dumps(table["graph_module"]).replace('"relu"', json.dumps(code))
        )

    return edited(data, PROGRAM, change)


def in_a_state_name(data: bytes, marker: Path) -> bytes:
    code = f'"+__import__("os").system("touch {marker}")+"'

    def change(table: Any, _: dict[str, bytes]) -> None:
        table["graph_module"] = json.loads(
            json.dumps(table["graph_module"]).replace('"kept"', json.dumps(code))
        )

    return edited(data, PROGRAM, change)


def in_compiled_code(data: bytes, marker: Path) -> bytes:
    return packed({**records(data), "data/aotinductor/model/model.so": str(marker).encode()})


def in_a_second_program(data: bytes, _: Path) -> bytes:
    files = records(data)
    return packed({**files, "models/other.json": files[PROGRAM]})


ATTACKS = [
    in_samples, in_a_weight, in_a_constant, in_an_opaque_object, in_an_expression, in_a_nested_expression, in_a_guard,
    in_a_container, in_a_file_operator, in_a_dotted_path, in_a_name, in_a_state_name, in_compiled_code,
    in_a_second_program,
]  # fmt: skip
RUN_ON_LOAD = [
    in_samples,
    in_a_weight,
    in_a_constant,
    in_an_opaque_object,
    in_an_expression,
    in_a_nested_expression,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda f: f.__name__)
def test_an_archive_that_could_run_code_is_refused_and_runs_none(
    attack: Callable[[bytes, Path], bytes], genuine: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    marker = tmp_path / "ran"
    path = tmp_path / "model.pt2"
    path.write_bytes(attack(genuine, marker))
    with pytest.raises(UnsafeModel, match=r"was not loaded"):
        pt2_archive.load_pt2(path.read_bytes(), "model.pt2")
    assert not marker.exists()


@pytest.mark.parametrize("attack", RUN_ON_LOAD, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_the_attacks_are_real(attack: Callable[[bytes, Path], bytes], genuine: bytes, tmp_path: Path) -> None:
    # If torch closes one of these routes, this tells that a check may be relaxed.
    marker = tmp_path / "ran"
    # The code runs before torch notices that something is wrong, so what it raises then is no matter.
    with contextlib.suppress(Exception):
        torch.export.load(io.BytesIO(attack(genuine, marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    "text",
    ["s0", "2*s77 + 1", "Symbol('s77', positive=True, integer=True)", "Mul(Integer(3), Symbol('s0', integer=True))",
     "Max(1, s0)", "((s0 + 6)//7)", "Eq(Mod(s0, 2), 0)", "u3 <= 8", "s0**2", "-int_oo", "oo",
     "Pow(Symbol('s0'), Integer(2))", "Mul(Integer(4), Pow(Add(FloorDiv(s0, Integer(2)), Integer(1)), Integer(-1)))",
     "FloorDiv(s0*s1*s2*64, s1*s2)", " + ".join(f"s{i}" for i in range(40)), "1 << 9"],
)  # fmt: skip
def test_the_arithmetic_that_torch_writes_for_sizes_is_let_through(text: str) -> None:
    check_expression(text, "model.pt2")


@pytest.mark.parametrize(
    "text",
    ["s0.__class__", "().__class__.__bases__", "open('x')", "lambda: 1", "[s0 for s0 in 1]", "f(s0)", "s0 if s0 else 1",
     "9**9**9", "2**100000",
     "'__import__'", "Symbol('os')", "Symbol(name='s0')", "s0[0]", "x", "import os", "1 << 9999", "",
     "Pow(9,Pow(9,Pow(9,9)))", "Pow(Pow(Pow(Pow(9,9),9),9),9)", "PowByNatural(s0,999999999)", "LShift(1,99999999999)",
     "Pow(2,Mul(9999,9999))", "Pow(s0, s1)", "FloatPow(2.5, 9999999)", "Float(2, 99999999)", "9"*20, "1e400",
     "*".join(["s0"]*9), "FloorDiv((s0+s1+s2+s3)**4*(s4+s5+s6+s7), (s0+s1+1)**3)", "-"*1999 + "1",
     "FloorDiv(" + "*".join(f"(s{i}+s{i+1}+1)" for i in range(7)) + ",s1)", "\0", "s0 + "*999],
)  # fmt: skip
def test_anything_else_as_a_size_is_refused(text: str) -> None:
    with pytest.raises(UnsafeModel):
        check_expression(text, "model.pt2")


@pytest.mark.parametrize(
    "power", ["Pow(9,Pow(9,Pow(9,9)))", "LShift(1,999999999999)", "PowByNatural(9,999999999)"]
)
def test_a_tower_of_powers_anywhere_in_an_archive_is_refused_at_once(power: str, genuine: bytes) -> None:
    def in_a_size(table: Any, _: dict[str, bytes]) -> None:
        everywhere(table, lambda d: d.update(expr_str=power) if "expr_str" in d else None)

    def in_a_range(table: Any, _: dict[str, bytes]) -> None:
        table["range_constraints"] = {power: {"min_val": 1, "max_val": 8}}

    for change in (in_a_size, in_a_range):
        with pytest.raises(UnsafeModel, match="take forever"):
            pt2_archive.load_pt2(edited(genuine, PROGRAM, change), "model.pt2")


def numbers(*steps: tuple[str, str | int, int | str]) -> Callable[[Any, dict[str, bytes]], None]:
    """Put nodes that work out n1 = OPERATOR(A, B), n2 = ... on whole numbers before the others."""

    def argument(value: str | int) -> dict[str, Any]:
        inner = {"as_int": value} if isinstance(value, int) else {"as_name": value}
        return {"name": "", "arg": {"as_sym_int": inner}, "kind": 1}

    def change(table: Any, _: dict[str, bytes]) -> None:
        nodes = table["graph_module"]["graph"]["nodes"]
        like = {**nodes[0], "is_hop_single_tensor_return": None}
        nodes[:0] = [
            {**like, "name": f"n{i}", "target": f"_operator.{name}", "inputs": [argument(a), argument(b)],
             "outputs": [{"as_sym_int": {"as_name": f"n{i}"}}]}
            for i, (name, a, b) in enumerate(steps, 1)
        ]  # fmt: skip

    return change


@pytest.mark.parametrize(
    "steps",
    [[("pow", 9, 999999999)], [("lshift", 1, 99999999999)], [("pow", 9, 20), ("pow", 2, "n1")],
     [("mul", 9**9, 9**9), *(("mul", f"n{i}", f"n{i}") for i in range(1, 40))]],
)  # fmt: skip
def test_whole_numbers_that_grow_without_bounds_are_refused(steps: Any, genuine: bytes) -> None:
    with pytest.raises(UnsafeModel, match="number without bounds"):
        pt2_archive.load_pt2(edited(genuine, PROGRAM, numbers(*steps)), "model.pt2")


def test_control_flow_and_foreign_operators_are_refused_by_name(genuine: bytes) -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.ops\.mine\.op\.default"):
        pt2_archive.load_pt2(first_node(genuine, "torch.ops.mine.op.default", {}), "model.pt2")


def test_another_schema_version_is_named(genuine: bytes) -> None:
    data = edited(genuine, PROGRAM, lambda table, _: table["schema_version"].update(major=99))
    with pytest.raises(ModelError, match="schema version 99"):
        pt2_archive.load_pt2(data, "model.pt2")


@pytest.mark.parametrize(
    "name", [PROGRAM, WEIGHTS, CONSTANTS, "data/sample_inputs/model.pt", "archive_version"]
)
def test_a_missing_part_is_named(name: str, genuine: bytes) -> None:
    files = records(genuine)
    del files[name]
    with pytest.raises(ModelError, match=f"{name} is missing"):
        pt2_archive.load_pt2(packed(files), "model.pt2")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_called_so(share: float, genuine: bytes) -> None:
    with pytest.raises(ModelError, match="truncated or corrupt"):
        pt2_archive.load_pt2(genuine[: int(len(genuine) * share)], "model.pt2")


def test_a_program_that_is_no_json_is_called_corrupt(genuine: bytes) -> None:
    for content in (b"{", b"[]", b"{}", b"null", b"\xff"):
        with pytest.raises(ModelError, match="corrupt"):
            pt2_archive.load_pt2(packed({**records(genuine), PROGRAM: content}), "model.pt2")
