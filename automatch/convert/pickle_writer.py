"""Writes the tree of a pickle again: what `readers` described, it describes, and nothing is looked up.

Python's own pickler would import every class that a checkpoint names, to make sure that it exists.
Protocol 2, as `torch.save` writes, so that `torch.load(weights_only=True)` reads the result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._pickle_nodes import Attributed, Call, Global, Persistent

_BATCH = 1000


def write_pickle(tree: Any, persistent: Callable[[Persistent], Any]) -> bytes:
    """The pickle of a tree.

    Args:
        tree: plain values, containers, and the descriptions that a reader made.
        persistent: gives the id under which a storage is written.

    Raises:
        CheckpointError: the tree is nested too deeply, or holds a value of another kind.
    """
    writer = _Writer(persistent)
    writer.out += b"\x80\x02"
    try:
        writer.save(tree)
    except RecursionError as error:
        raise CheckpointError("the checkpoint is nested too deeply to be written again") from error
    return bytes(writer.out) + b"."


class _Writer:
    def __init__(self, persistent: Callable[[Persistent], Any]) -> None:
        self.out = bytearray()
        self._persistent = persistent
        self._memo: dict[int, int] = {}
        self._names: dict[str, Global] = {}
        self._alive: list[Any] = []

    def save(self, value: Any) -> None:
        if id(value) in self._memo:
            self._get(self._memo[id(value)])
        elif value is None or isinstance(value, bool):
            self.out += b"N" if value is None else b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(text)) + text
            self._put(value)
        elif isinstance(value, bytes | bytearray | set | frozenset):
            self._as_call(cast("bytes | bytearray | set[Any]", value))
        else:
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, tuple):
            self._tuple(cast("tuple[Any, ...]", value))
        elif isinstance(value, list):
            self.out += b"]"
            self._put(value)
            self._extend(cast("list[Any]", value))
        elif isinstance(value, dict):
            self._dict(cast("dict[Any, Any]", value))
        elif isinstance(value, Global):
            self.out += b"c" + f"{value.module}\n{value.name}\n".encode()
            self._put(value)
        elif isinstance(value, Persistent):
            self.save(self._persistent(value))
            self.out += b"Q"
        elif isinstance(value, Call):
            self._call(value)
        else:
            raise CheckpointError(f"a {type(value).__name__} of the checkpoint cannot be written again")

    def _integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += (b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out += b")"
            return
        if len(value) > 3:
            self.out += b"("
        for item in value:
            self.save(item)
        if id(value) in self._memo:  # the tuple holds, somewhere below, itself
            self.out += b"0" * len(value) if len(value) <= 3 else b"1"
            self._get(self._memo[id(value)])
            return
        self.out += b"\x85\x86\x87"[len(value) - 1 : len(value)] if len(value) <= 3 else b"t"
        self._put(value)

    def _dict(self, value: dict[Any, Any]) -> None:
        if isinstance(value, Attributed):
            self.save(self._name("collections", "OrderedDict"))
            self.out += b")R"
        else:
            self.out += b"}"
        self._put(value)
        self._set_items(value)
        if isinstance(value, Attributed) and value.attributes is not None:
            self.save(value.attributes)
            self.out += b"b"

    def _call(self, value: Call) -> None:
        if value.kwargs is None:
            self.save(value.function)
            self.save(value.args)
            self.out += b"\x81" if value.new else b"R"
        else:
            self.save(self._name("copyreg", "__newobj_ex__"))
            self.save((value.function, value.args, value.kwargs))
            self.out += b"R"
        self._put(value)
        self._extend(value.items)
        self._set_items(value.pairs)
        for state in value.state:
            self.save(state)
            self.out += b"b"

    def _as_call(self, value: bytes | bytearray | set[Any]) -> None:
        # Protocol 2 has no bytes and no sets of its own.
        if isinstance(value, bytes):
            function, args = self._name("_codecs", "encode"), (value.decode("latin-1"), "latin1")
        elif isinstance(value, bytearray):
            function, args = self._name("__builtin__", "bytearray"), (bytes(value),)
        else:
            function, args = self._name("__builtin__", type(value).__name__), (list(value),)
        self.save(function)
        self._keep(args)
        self.save(args)
        self.out += b"R"
        self._put(value)

    def _extend(self, items: list[Any]) -> None:
        for start in range(0, len(items), _BATCH):
            self.out += b"("
            for item in items[start : start + _BATCH]:
                self.save(item)
            self.out += b"e"

    def _set_items(self, table: dict[Any, Any]) -> None:
        pairs = list(table.items())
        for start in range(0, len(pairs), _BATCH):
            self.out += b"("
            for key, value in pairs[start : start + _BATCH]:
                self.save(key)
                self.save(value)
            self.out += b"u"

    def _name(self, module: str, name: str) -> Global:
        return self._names.setdefault(f"{module}.{name}", Global(module, name))

    def _put(self, value: Any) -> None:
        index = len(self._memo)
        self._memo[id(value)] = index
        self._keep(value)
        self.out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)

    def _get(self, index: int) -> None:
        self.out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)

    def _keep(self, value: Any) -> None:
        # The memo goes by identity, so nothing in it may be freed and its place be taken by another value.
        self._alive.append(value)
