"""Reading a pickle without running it: which globals it names, and which of its operations could run code.

A pickle is a program for a small stack machine. `faults` runs that program on stand-ins: a global is only its name, a
construction only a note of what would be made. So each call, each construction and each state is judged with its
arguments, as they are when the pickle ends, before anything is imported or made.
"""

import io
import itertools
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What pickletools may raise on bytes that are no pickle.
BROKEN = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OverflowError,
    UnicodeDecodeError,
)


@dataclass(frozen=True)
class Global:
    """A name that the pickle would look up, such as torch.nn.modules.linear.Linear."""

    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """An object that the pickle would make of the class or by the function of that name, and the items put in it."""

    of: str
    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Pairs:
    """A dict: its items in order. Not a dict, because hashing hostile keys could be made to hang."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Permit:
    """What a pickle may do with one global: None forbids; otherwise a judge of the arguments or of the state.

    A judge returns "" or what is wrong.
    """

    call: Callable[[tuple[Any, ...]], str] | None = None
    new: Callable[[tuple[Any, ...]], str] | None = None
    build: Callable[[Any], str] | None = None


def globals_of(data: bytes, *, count: int | None = None) -> list[str]:
    """Every global that the first `count` pickles in `data` name, sorted, as far as the bytes can be read.

    Executes nothing.
    """
    found: set[str] = set()
    stream = io.BytesIO(data)
    for _ in itertools.count() if count is None else range(count):
        recent: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for operation, argument, _position in pickletools.genops(stream):
                _note_global(operation.name, argument, recent, memo, found)
        except BROKEN:
            break
    return sorted(found)


def faults(data: bytes, permits: Mapping[str, Permit], *, count: int = 1) -> list[str]:
    """What the pickles in `data` would do without a permit; empty when they are harmless.

    Args:
        permits: global name -> what may be done with it. Any other global is a fault.
    """
    stream = io.BytesIO(data)
    found: list[str] = []
    try:
        for _ in range(count):
            machine = _Machine(permits, found)
            for operation, argument, _ in pickletools.genops(stream):
                if not machine.step(operation.name, argument):
                    break
            machine.judge_all()
            if found:
                break
    except BROKEN as error:
        raise ValueError("its pickle breaks off or is damaged") from error
    return list(dict.fromkeys(found))


def python3_name(module: str, name: str) -> str:
    """The dotted name, with Python 2's spelling of the standard library translated as every unpickler does."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[(module, name)]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _note_global(
    operation: str, argument: Any, recent: list[Any], memo: dict[int, Any], found: set[str]
) -> None:
    if operation in ("GLOBAL", "INST"):
        module, _, name = str(argument).partition(" ")
        found.add(python3_name(module, name))
    elif operation == "STACK_GLOBAL":
        texts = [v for v in recent if isinstance(v, str)][-2:]
        found.add(python3_name(*texts) if len(texts) == 2 else "a name made while loading")
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if operation == "MEMOIZE" else int(argument)] = recent[-1] if recent else None
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
        recent.append(memo.get(int(argument)))
    elif operation not in ("PROTO", "FRAME"):
        recent.append(argument)


class _Machine:
    """The stack machine of one pickle, over stand-ins. The operations are those that torch.save writes; no others."""

    def __init__(self, permits: Mapping[str, Permit], found: list[str]) -> None:
        self.permits = permits
        self.found = found
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.acts: list[tuple[str, Any, Callable[[Any], str] | None, Any]] = []

    def step(self, operation: str, argument: Any) -> bool:
        """Do one operation. False: a fault after which nothing can be judged."""
        if operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation](argument))
        elif operation in _HANDLERS:
            _HANDLERS[operation](self, argument)
        elif operation not in ("PROTO", "STOP"):
            self.found.append(f"the operation {operation}, which files of torch.save don't have")
            return False
        return True

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def judge(self, verb: str, of: Any, judge: Callable[[Any], str] | None, value: Any) -> None:
        """Note an act; it is judged when the pickle ends, because what it was given can be filled afterwards."""
        self.acts.append((verb, of, judge, value))

    def judge_all(self) -> None:
        for verb, of, judge, value in self.acts:
            reason = judge(value) if judge else ""
            if judge is None or reason:
                self.found.append(f"{verb} {_describe(of)}" + (f" with {reason}" if reason else ""))

    def permit(self, value: Any) -> Permit:
        name = value.name if isinstance(value, Global) else value.of if isinstance(value, Made) else ""
        return self.permits.get(name, Permit())


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = str(argument).partition(" ")
    full = python3_name(module, name)
    if full not in machine.permits:
        machine.found.append(f"the global {full}")
    machine.stack.append(Global(full))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    call = machine.permit(function).call if isinstance(function, Global) else None
    machine.judge("a call of", function, call if isinstance(arguments, tuple) else None, arguments)
    machine.stack.append(Made(function.name if isinstance(function, Global) else "?"))


def _newobj(machine: _Machine, _: Any) -> None:
    arguments, cls = machine.stack.pop(), machine.stack.pop()
    new = machine.permit(cls).new if isinstance(cls, Global) else None
    machine.judge("a construction of", cls, new if isinstance(arguments, tuple) else None, arguments)
    machine.stack.append(Made(cls.name if isinstance(cls, Global) else "?"))


def _build(machine: _Machine, _: Any) -> None:
    state, made = machine.stack.pop(), machine.stack[-1]
    build = machine.permit(made).build if isinstance(made, Made) else None
    machine.judge("a state for", made, build, state)


def _persistent(machine: _Machine, _: Any) -> None:
    value = machine.stack.pop()
    if isinstance(value, tuple) and value[:1] == ("module",):
        machine.found.append(
            "a class with its source code, as whole networks have it in torch's format without a zip archive: "
            "save it again with plain torch.save(network, file)"
        )
    elif not isinstance(value, tuple) or value[:1] != ("storage",):
        machine.found.append("a persistent id that is not a tensor's storage")
    elif len(value) < 5 or not isinstance(value[1], Global) or not value[1].name.endswith("Storage"):
        machine.found.append("a tensor's storage of no known kind")
    machine.stack.append(Made("storage"))


def _into_list(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        machine.found.append(f"an append to {_describe(target)}")
        return
    target.extend(items)


def _into_dict(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    known = isinstance(target, Pairs) or (
        isinstance(target, Made) and target.of in ("collections.OrderedDict", "collections.Counter")
    )
    if not known:
        machine.found.append(f"items for {_describe(target)}")
        return
    target.items.extend(zip(items[::2], items[1::2], strict=True))


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def pack(machine: _Machine, _: Any) -> None:
        items = [machine.stack.pop() for _ in range(count)][::-1] if count else machine.pop_mark()
        machine.stack.append(tuple(items))

    return pack


def _get(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[int(argument)])


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[int(argument)] = machine.stack[-1]


def _describe(value: Any) -> str:
    if isinstance(value, Global):
        return value.name
    return f"an object of {value.of}" if isinstance(value, Made) else f"a {type(value).__name__}"


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: Pairs(),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
        lambda value: value,
    ),
}
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _global,
    "REDUCE": _reduce,
    "NEWOBJ": _newobj,
    "BUILD": _build,
    "BINPERSID": _persistent,
    "APPEND": lambda machine, _: _into_list(machine, [machine.stack.pop()]),
    "APPENDS": lambda machine, _: _into_list(machine, machine.pop_mark()),
    "SETITEM": lambda machine, _: _into_dict(machine, [machine.stack.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda machine, _: _into_dict(machine, machine.pop_mark()),
    "MARK": _mark,
    "TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "BINGET": _get,
    "LONG_BINGET": _get,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
}
