"""A pickle as data: what it would build, with every class and call left as a description.

Nothing is imported, looked up or called. The machine runs over `pickletools.genops`, which decodes all
protocols; a global becomes a `Global`, a call a `Call`, a persistent id a `Persistent`.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import IO, Any, cast

from automatch.errors import CheckpointError
from automatch.readers._limits import MAX_PICKLE_BYTES, MAX_PICKLE_OPCODES
from automatch.readers._pickle_nodes import Attributed, Call, Global, Persistent

# Python 3.11.0 to 3.11.3 wrote a member of an enumeration as ``getattr(Class, "member")``.
_GETATTR = frozenset(("builtins.getattr", "__builtin__.getattr"))
_SCALARS = (str, bytes, int, float, bool, type(None))


class LimitedReader:
    """What `genops` reads from: a file whose reads and lines are bounded."""

    def __init__(self, file: IO[bytes], budget: int = MAX_PICKLE_BYTES) -> None:
        self._file, self._budget = file, budget

    def read(self, count: int) -> bytes:
        if count < 0 or count > self._budget:
            raise CheckpointError(f"the pickle is longer than {MAX_PICKLE_BYTES} bytes; it is damaged")
        data = self._file.read(count)
        self._budget -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(1 << 16)
        self._budget -= len(data)
        return data


def read_pickle(file: IO[bytes], origin: str) -> tuple[Any, frozenset[str]]:
    """Read one pickle from ``file``, leaving it after the end.

    Returns:
        The tree, and the full name of every global it refers to, without a ``getattr`` that only names members of classes.

    Raises:
        CheckpointError: the pickle is damaged, too long, or needs what no checkpoint needs.
    """
    return _read(cast("IO[bytes]", LimitedReader(file)), origin)


def read_pickle_bytes(data: bytes, origin: str) -> tuple[Any, frozenset[str]]:
    """Read one pickle from memory, whose length is its bound; see `read_pickle`."""
    return _read(io.BytesIO(data), origin)


def _read(file: IO[bytes], origin: str) -> tuple[Any, frozenset[str]]:
    machine = _Machine()
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if count > MAX_PICKLE_OPCODES:
                raise CheckpointError(f"the pickle of {origin} has more than {MAX_PICKLE_OPCODES} operations; it is not read")
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise ValueError(f"operation {opcode.name} is not used by checkpoints")
            action(machine, arg)
        if len(machine.stack) != 1 or machine.marks:
            raise ValueError(f"{len(machine.stack)} values are left on the stack")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, UnicodeError) as error:
        raise CheckpointError(f"the pickle of {origin} is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    return machine.stack[0], frozenset(machine.globals) - (frozenset() if machine.loose else _GETATTR)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}
        self.loose = 0  # times that a getattr was pushed for more than to name a member of a class

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push(self, value: Any) -> None:
        self.loose += _is_getattr(value)
        self.stack.append(value)

    def find(self, module: str, name: str) -> Global:
        path = f"{module}.{name}"
        self.loose += path in _GETATTR
        return self.globals.setdefault(path, Global(module, name))

    def call(self, function: Any, args: Any, kwargs: Any = None, *, new: bool = False) -> None:
        if _is_getattr(function) and isinstance(args, tuple):
            of, *rest = cast("tuple[Any, ...]", args)
            self.loose -= isinstance(of, Global) and len(rest) == 1 and isinstance(rest[0], str) and rest[0].isidentifier()
        self.loose += isinstance(function, Call) and _is_getattr(function.function)  # what it took is run
        self.stack.append(Call(function, args, kwargs, new))

    def pop(self, count: int) -> list[Any]:
        if self.marks and len(self.stack) - count < self.marks[-1]:
            raise ValueError("a mark is missing")
        values = self.stack[len(self.stack) - count :]
        if len(values) != count:
            raise ValueError("a value is missing")
        del self.stack[len(self.stack) - count :]
        return values


def _is_getattr(value: Any) -> bool:
    return isinstance(value, Global) and value.path in _GETATTR


def _put(target: Any, key: Any, value: Any) -> None:
    pairs: Any = target.pairs if isinstance(target, Call) else target
    if not isinstance(pairs, dict):
        raise TypeError(f"items are set on a {type(target).__name__}")
    _check_hashable(key)
    table = cast("dict[Any, Any]", pairs)
    if key in table:
        raise CheckpointError(f"key {ascii(key)[:200]} stands twice in one dict of the pickle; keys must be unique")
    table[key] = value


def _check_hashable(key: Any) -> None:
    # Hashing a nested tuple recurses in C without a limit, so only flat ones are hashed at all.
    flat = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (*_SCALARS, Global, Call, Persistent)) for part in flat):
        raise TypeError(f"a {type(key).__name__} is used as a key")


def _extend(target: Any, values: list[Any]) -> None:
    items: Any = target.items if isinstance(target, Call) else target
    if not isinstance(items, list):
        raise TypeError(f"items are appended to a {type(target).__name__}")
    cast("list[Any]", items).extend(values)


def _set_of(values: list[Any], kind: type) -> Any:
    for value in values:
        _check_hashable(value)
    return kind(values)


def _reduce(machine: _Machine, _: Any) -> None:
    function, args = machine.pop(2)
    if isinstance(function, Global) and function.path == "collections.OrderedDict" and args in ((), ([],)):
        machine.stack.append(Attributed())
    else:
        machine.call(function, args)


def _build(machine: _Machine, _: Any) -> None:
    (state,) = machine.pop(1)
    target = machine.stack[-1]
    if isinstance(target, Attributed):
        target.attributes = state
    elif isinstance(target, Call):
        target.state.append(state)
    else:
        raise TypeError(f"state is set on a {type(target).__name__}")


def _set_items(machine: _Machine, values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        _put(machine.stack[-1], key, value)


def _dict(machine: _Machine, _: Any) -> None:
    values = machine.since_mark()
    machine.stack.append({})
    _set_items(machine, values)


def _add_items(machine: _Machine, _: Any) -> None:
    values = machine.since_mark()
    target = machine.stack[-1]
    if not isinstance(target, set):
        raise TypeError(f"items are added to a {type(target).__name__}")
    cast("set[Any]", target).update(_set_of(values, list))


def _new(machine: _Machine, _: Any) -> None:
    function, args = machine.pop(2)
    machine.call(function, args, new=True)


def _new_ex(machine: _Machine, _: Any) -> None:
    function, args, kwargs = machine.pop(3)
    machine.call(function, args, kwargs, new=True)


def _pop(machine: _Machine, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop(1)


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.since_mark()


def _global(machine: _Machine, arg: str) -> None:
    module, _, name = arg.partition(" ")
    machine.stack.append(machine.find(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    module, name = machine.pop(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a global is named by something else than text")
    machine.stack.append(machine.find(module, name))


def _inst(machine: _Machine, arg: str) -> None:
    args = tuple(machine.since_mark())
    module, _, name = arg.partition(" ")
    machine.call(machine.find(module, name), args)


def _obj(machine: _Machine, _: Any) -> None:
    function, *args = machine.since_mark()
    machine.call(function, tuple(args))


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _push_memo(machine: _Machine, index: int) -> None:
    machine.push(machine.memo[index])


_PUSH = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
        "BYTEARRAY8",
    )
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_PUSH, lambda m, arg: m.stack.append(arg)),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "FROZENSET": lambda m, _: m.stack.append(_set_of(m.since_mark(), frozenset)),
    "DICT": _dict,
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda m, _: (lambda value: _extend(m.stack[-1], value))(m.pop(1)),
    "APPENDS": lambda m, _: (lambda values: _extend(m.stack[-1], values))(m.since_mark()),
    "SETITEM": lambda m, _: _set_items(m, m.pop(2)),
    "SETITEMS": lambda m, _: _set_items(m, m.since_mark()),
    "ADDITEMS": _add_items,
    "GET": _push_memo,
    "BINGET": _push_memo,
    "LONG_BINGET": _push_memo,
    "PUT": lambda m, index: m.remember(index),
    "BINPUT": lambda m, index: m.remember(index),
    "LONG_BINPUT": lambda m, index: m.remember(index),
    "MEMOIZE": lambda m, _: m.remember(None),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _inst,
    "OBJ": _obj,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "NEWOBJ_EX": _new_ex,
    "BUILD": _build,
    "PERSID": lambda m, name: m.stack.append(Persistent(name)),
    "BINPERSID": lambda m, _: m.stack.append(Persistent(m.pop(1)[0])),
}
