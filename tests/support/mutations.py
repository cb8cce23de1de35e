"""Changes that make a sound file a broken or a hostile one; each follows from a `random.Random` alone."""

from __future__ import annotations

import io
import json
import os
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from hostile_runs import CANARY

_SHELL = f"touch {CANARY}"
_PYTHON = f"open('{CANARY}', 'w'); __import__('sys').{CANARY} = 1; __import__('os').environ['{CANARY}'] = '1'"
# What runs code in somebody who unpickles without care.
PAYLOADS = (
    b"cos\nsystem\n(S'%s'\ntR" % _SHELL.encode(),
    b"cposix\nsystem\n(S'%s'\ntR" % _SHELL.encode(),
    b"cbuiltins\nexec\n(S\"%s\"\ntR" % _PYTHON.encode(),
    b"cbuiltins\neval\n(S\"%s\"\ntR" % f"__import__('os').system('{_SHELL}')".encode(),
    b"cbuiltins\ngetattr\n(cos\nenviron\nS'__setitem__'\ntR(S'%s'\nS'1'\ntR" % CANARY.encode(),
    b"ctorch\nfrom_file\n(S'%s'\nI01\nI64\ntR" % CANARY.encode(),
    b"ctorch.hub\nload\n(S'.'\nS'%s'\ntR" % CANARY.encode(),
    b"(S'%s'\nios\nsystem\n" % _SHELL.encode(),
    b"ctorch.nn.modules.linear\nIdentity\n)\x81}S'forward'\ncos\nsystem\nsb",
    b"ctorch.fx.graph_module\nreduce_graph_module\n(}S'_code'\nS\"%s\"\nsS''\ntR" % _PYTHON.encode(),
)  # fmt: skip
NAMES = (
    "\x1b]0;owned\x07\x1b[31m", "a\nb\r\tc", "../" * 4 + CANARY, f"/tmp/{CANARY}", "nul\0nul", "n" * 300, "n" * 70_000,
    "", ".", "..", "con", "\u202egnp.exe", "\ud800", "\u0661\u0662", "a'); import os; os.system('" + _SHELL + "') #",
    "$(" + _SHELL + ")", "`" + _SHELL + "`", "'; " + _SHELL + "; '", "{0.__class__}", "%s%n",
    "<script>alert(1)</script>",
    "__import__('os').system('" + _SHELL + "')", "forward", "__class__", "a.b.c", "None", "class", "a]b[/c]",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5,
    -0.0, 1e-320, 1e308, 1e999, -1e999, float("nan"),
)  # fmt: skip
_WORDS = (
    "", " ", "1", "\u0661\u0662 ms", "50 %", "-1 pp", "1e999", "nan", "inf", "-0", "0x10", "1_000", "50 \uff05",
    "9" * 5000, "null", "local", "8/0", "1/3", "3x8x8", "999999999x1x1",
)  # fmt: skip


def any_value(random: Random) -> Any:
    """A value of JSON of any type, odd ones preferred."""
    return random.choice(
        [
            lambda: random.choice(NUMBERS),
            lambda: random.choice(NUMBERS),
            lambda: random.choice(NAMES),
            lambda: random.choice(_WORDS),
            lambda: random.choice([None, True, False, [], {}, [[]], [None], {"": None}]),
            lambda: [any_value(random) for _ in range(random.randrange(4))],
            lambda: {random.choice(NAMES): any_value(random)},
            lambda: _deep(random.choice([50, 900, 20_000])),
        ]
    )()


class Raw(str):
    """Text that stands in JSON as it is."""


def _deep(levels: int) -> Raw:
    return Raw("[" * levels + "]" * levels)


def value(tree: Any, random: Random) -> Any:
    """A copy of a tree of JSON with one to three places changed: replaced, removed, repeated, renamed or swapped."""
    tree = json.loads(json.dumps(tree)) if not isinstance(tree, Raw) else tree
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return any_value(random)
        holder, key = random.choice(places)
        _change_at(holder, key, random, places)
    return tree


def _change_at(holder: Any, key: Any, random: Random, places: list[tuple[Any, Any]]) -> None:
    how = random.choice(
        ["replace", "replace", "replace", "alike", "alike", "remove", "add", "swap", "rename"]
    )
    found = holder[key]
    if how == "remove":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[random.choice(NAMES)] = any_value(random)
    elif how == "rename" and isinstance(holder, dict):
        holder[random.choice(NAMES)] = holder.pop(key)
    elif how == "add":
        holder.insert(key, found)
    elif how == "swap":
        other, at = random.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            holder[key] = json.loads(json.dumps(other[at], default=str))
    elif how == "alike":
        holder[key] = _alike(found, random)
    else:
        holder[key] = any_value(random)


def _alike(found: Any, random: Random) -> Any:
    """Another value of the same type, so that what looks at types alone lets it through."""
    if isinstance(found, str):
        cut = random.randrange(len(found) + 1)
        return random.choice(
            [
                random.choice(NAMES),
                random.choice(_WORDS),
                found[:cut] + random.choice(NAMES)[:400] + found[cut:],
            ]
        )
    if isinstance(found, bool):
        return not found
    if isinstance(found, int):
        return random.choice([n for n in NUMBERS if isinstance(n, int)] + [found + 1, found - 1, -found])
    if isinstance(found, float):
        return random.choice([n for n in NUMBERS if isinstance(n, float)] + [found * 2, -found])
    if isinstance(found, list):
        return found * 2 if random.random() < 0.5 else found[: len(found) // 2]
    return {} if isinstance(found, dict) else any_value(random)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        found.extend((holder, key) for key in keys)
        waiting.extend(holder[key] for key in keys)
    return found


def json_text(tree: Any) -> bytes:
    """JSON of a tree, with what JSON does not have (NaN, halves of surrogates) and the text of `Raw` as it is."""
    marks: dict[str, str] = {}

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            marks[f"raw-{len(marks)}-"] = str(part)
            return f"raw-{len(marks) - 1}-"
        if isinstance(part, dict):
            return {str(k): marked(v) for k, v in part.items()}
        return [marked(v) for v in part] if isinstance(part, list) else part

    text = json.dumps(marked(tree))
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def json_bytes(data: bytes, random: Random) -> bytes:
    """JSON text with values changed, or bytes of it."""
    if random.random() < 0.15:
        return flat(data, random)
    return json_text(value(json.loads(data), random))


def flat(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut, repeated, inserted, removed or overwritten."""
    out = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        at = random.randrange(len(out) + 1)
        length = random.choice([1, 2, 8, 100, len(out) // 2 + 1])
        end = min(len(out), at + length)
        how = random.choice(["flip", "flip", "flip", "cut", "repeat", "insert", "remove", "fill", "text"])
        if how == "flip" and out:
            out[at % len(out)] ^= 1 << random.randrange(8)
        elif how == "cut":
            del out[at:]
        elif how == "repeat":
            out[at:at] = out[at:end]
        elif how == "insert":
            out[at:at] = random.randbytes(min(length, 1000))
        elif how == "remove":
            del out[at:end]
        elif how == "fill":
            out[at:end] = random.choice([b"\0", b"\xff"]) * (end - at)
        elif how == "text":
            out[at:end] = random.choice(NAMES).encode("utf-8", "surrogatepass")[:1000]
    return bytes(out)


def pickled(data: bytes, random: Random) -> bytes:
    """A pickle with a call put in between two opcodes, an operand or an opcode changed; or bytes of it."""
    if random.random() < 0.25:
        return flat(data, random)
    try:
        steps = [(op, arg, at) for op, arg, at in pickletools.genops(data) if at is not None]
    except Exception:  # not one pickle: torch's old format has several, with storages behind
        return data[:2] + random.choice(PAYLOADS) + data[2:] if data[:1] == b"\x80" else flat(data, random)
    i = random.randrange(1, len(steps))
    at = steps[i][2]
    end = steps[i + 1][2] if i + 1 < len(steps) else len(data)
    how = random.choice(["call", "call", "instead", "remove", "repeat", "operand", "class"])
    if how == "call":
        return data[:at] + random.choice(PAYLOADS) + b"0" + data[at:]
    if how == "instead":
        return data[:at] + random.choice(PAYLOADS) + data[end:]
    if how == "remove":
        return data[:at] + data[end:]
    if how == "repeat":
        return data[:at] + data[at:end] * 2 + data[end:]
    if how == "class":
        classes = [s for s in steps if s[0].name == "GLOBAL"]
        if classes:
            _, name, start = random.choice(classes)
            new = random.choice(
                [b"os\nsystem", b"torch.nn\nModule", b"torch.jit\nload", b"builtins\nexec", b"a\x1bb\nc"]
            )
            return data[:start] + b"c" + new + b"\n" + data[start + len(str(name)) + 2 :]
    return data[:at] + flat(data[at:end], random) + data[end:]


def _varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
        if shift > 63:
            raise ValueError("no varint")


def _fields(data: bytes) -> list[tuple[int, int, Any]]:
    """The fields of a protobuf message: (number, wire type, value)."""
    at, found = 0, []
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            held, at = _read_varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            held, at = data[at : at + size], at + size
        elif wire == 2:
            size, at = _read_varint(data, at)
            held, at = data[at : at + size], at + size
            if len(held) != size:
                raise ValueError("cut short")
        else:
            raise ValueError("no wire type")
        if not number:
            raise ValueError("no field number")
        found.append((number, wire, held))
    return found


def _message(fields: list[tuple[int, int, Any]]) -> bytes:
    out = bytearray()
    for number, wire, held in fields:
        out += _varint(number << 3 | wire)
        out += _varint(held) if wire == 0 else (_varint(len(held)) + held if wire == 2 else held)
    return bytes(out)


def protobuf(data: bytes, random: Random) -> bytes:
    """A protobuf message with a field somewhere in its tree changed, removed, repeated or renumbered; or bytes."""
    if random.random() < 0.15:
        return flat(data, random)
    for _ in range(random.choice([1, 1, 2, 4])):
        data = _message_changed(data, random)
    return data


def _message_changed(data: bytes, random: Random) -> bytes:
    try:
        fields = _fields(data)
    except (ValueError, IndexError):
        return _leaf(data, random)
    if not fields:
        return _leaf(data, random)
    i = random.randrange(len(fields))
    number, wire, held = fields[i]
    if wire == 2 and held and random.random() < 0.8:
        fields[i] = (number, wire, _message_changed(held, random))
        return _message(fields)
    how = random.choice(["value", "value", "value", "remove", "repeat", "swap", "number"])
    if how == "remove":
        del fields[i]
    elif how == "repeat":
        fields[i:i] = [fields[i]] * random.choice([1, 3, 1000])
    elif how == "swap":
        fields[i] = (number, *random.choice(fields)[1:])
    elif how == "number":
        fields[i] = (random.randrange(1, 40), wire, held)
    elif wire == 0:
        fields[i] = (number, 0, int(random.choice([n for n in NUMBERS if isinstance(n, int)])))
    elif wire == 2:
        fields[i] = (number, 2, _leaf(held, random))
    else:
        fields[i] = (number, wire, random.randbytes(len(held)))
    return _message(fields)


def _leaf(data: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return random.choice([*NAMES, "\udcff", *_WORDS]).encode("utf-8", "surrogatepass")
    return flat(data, random)


def zipped(data: bytes, random: Random, members: Callable[[str], Callable[[bytes, Random], bytes]]) -> bytes:
    """A zip archive with a member changed (its CRC fits), renamed, removed, doubled or added; or bytes of it.

    Args:
        members: how a member of that name is changed.
    """
    if random.random() < 0.25:
        return flat(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = [(info.filename, archive.read(info)) for info in archive.infolist()]
    # what is small says what the rest means: it is chosen as often as the weights together
    small = [i for i, (_, content) in enumerate(files) if members(files[i][0]) is not flat]
    i = random.choice(small) if small and random.random() < 0.7 else random.randrange(len(files))
    name, content = files[i]
    how = random.choice(["change"] * 6 + ["rename", "remove", "double", "add"])
    if how == "change":
        files[i] = (name, members(name)(content, random))
    elif how == "rename":
        files[i] = (name[: name.rfind("/") + 1] + _member_name(random), content)
    elif how == "remove":
        del files[i]
    elif how == "double":
        files.append((name, members(name)(content, random)))
    else:
        files.append((random.choice([_member_name(random), f"x/{CANARY}.py"]), random.randbytes(10)))
    return pack(files, random.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def _member_name(random: Random) -> str:
    return random.choice(NAMES).encode("utf-8", "replace").decode()[:60_000] or "-"


def pack(files: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of members in that order; names may come twice."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Duplicate name"
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, content in files:
                archive.writestr(zipfile.ZipInfo(name) if method == zipfile.ZIP_STORED else name, content)
    return out.getvalue()


def npy(data: bytes, random: Random) -> bytes:
    """An .npy file with its header changed: shape, type, order, length; or with pickled objects; or bytes of it."""
    how = random.choice(["header", "header", "header", "bytes", "objects", "bomb"])
    start = 10
    size = int.from_bytes(data[8:10], "little")
    header = data[start : start + size].decode("latin-1", "replace")
    if how == "bytes" or "descr" not in header:
        return flat(data, random)
    if how == "objects":
        text, body = (
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
            random.choice(PAYLOADS) + b".",
        )
    elif how == "bomb":
        count = random.choice([10**7, 10**12, 10**30])
        text, body = (
            f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 8, 8, 3), }}",
            bytes(5_000_000),
        )
    else:
        old = random.choice(["'|u1'", "'<i8'", "False", "(", ",", "}", "'shape'", "8", "descr"])
        new = random.choice(
            ["'|O'", "'<f8'", "True", "(-1, ", "", "}" * 3, "(" * 2000, "9" * 30, "'>c16'", "'|S0'", "[('a', '<i4')]",
             "'<M8[s]'", "None", f"__import__('os').system('{_SHELL}')", "1j", "'\x1b['", "é", "#", "\\"]
        )  # fmt: skip
        text, body = header.replace(old, new, 1).rstrip(), data[start + size :]
    raw = (text + "\n").encode("latin-1", "replace")[:65_000]
    return data[:6] + b"\x01\x00" + len(raw).to_bytes(2, "little") + raw + body


def toml(tables: Any, random: Random) -> bytes:
    """The TOML of tables with values changed; or bytes of it."""
    if random.random() < 0.2:
        return flat(toml_text(tables).encode(), random)
    changed = value(tables, random)
    if not isinstance(changed, dict):
        return repr(changed).encode("utf-8", "replace")
    return toml_text(changed).encode("utf-8", "surrogatepass")


def toml_text(tables: dict[str, Any]) -> str:
    """Any tree as TOML, as inline tables below the first level; what TOML does not have is left in as it is."""
    scalars = [f"{_toml_key(k)} = {_toml(v)}" for k, v in tables.items() if not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            scalars += [f"[{_toml_key(name)}]", *(f"{_toml_key(k)} = {_toml(v)}" for k, v in table.items())]
    return "\n".join(scalars) + "\n"


def _toml_key(name: Any) -> str:
    text = str(name)
    return text if text.replace("_", "a").isalnum() and text.isascii() else _toml(text)


def _toml(held: Any) -> str:
    if isinstance(held, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in held.items()) + "}"
    if isinstance(held, list):
        return "[" + ", ".join(map(_toml, held)) + "]"
    if isinstance(held, float):
        return repr(held)
    if isinstance(held, str) and not isinstance(held, Raw):
        return json.dumps(held, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(held) if isinstance(held, Raw) else json.dumps(held)


def name_on_disk(random: Random) -> str:
    """One of the names, as a file may be called on this system."""
    name = random.choice(NAMES).replace("/", "_").replace("\0", "0")[:200]
    name = name if name not in ("", ".", "..") else "-"
    return os.fsdecode(
        name.encode("utf-8", "surrogatepass")[:250] if random.random() < 0.9 else b"\xff\xfe\x80"
    )
