"""Flax msgpack files: walked value by value, so that no array is read to list them."""

from __future__ import annotations

import struct
from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._base import Bytes, OpenCheckpoint, Region, SourceFile
from automatch.readers._dtypes import ITEM_BYTES
from automatch.readers._entries import FileEntry, Wrapper, open_nested
from automatch.readers._limits import MAX_DEPTH, MAX_KEY_LENGTH, MAX_TENSORS, check_shape
from automatch.specs import StateSpec

_BLOCK = 4096
_NDARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_TABLES = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


class ChunkedEntry:
    """An array that flax wrote in several pieces, because it is larger than one may be."""

    def __init__(self, chunks: tuple[FileEntry, ...], shape: tuple[int, ...]) -> None:
        self.chunks, self.shape, self.dtype = chunks, shape, chunks[0].dtype

    def read(self) -> Any:
        import torch

        return torch.cat([chunk.read().reshape(-1) for chunk in self.chunks]).reshape(self.shape)

    def region(self) -> Region | None:
        return None


def open_flax(file: SourceFile, like: StateSpec | None, wrapper: Wrapper) -> OpenCheckpoint:
    """Open what `flax.serialization.to_bytes` wrote.

    Raises:
        CheckpointError: it is not msgpack, damaged, or holds no arrays.
    """
    walker = _Walker(file)
    tree = walker.value(0)
    if walker.at != file.size or not isinstance(tree, dict):
        raise CheckpointError(f"{file.path} is not a flax checkpoint, or damaged: a table ends at byte {walker.at} of {file.size}")
    return open_nested(cast("dict[str, Any]", tree), str(file.path), [file], like, wrapper)


class _Walker:
    def __init__(self, file: Bytes) -> None:
        self.file, self.at, self.values = file, 0, 0
        self._block, self._start = b"", 0

    def take(self, count: int) -> bytes:
        begin = self.at - self._start
        if begin < 0 or begin + count > len(self._block):
            self._start, begin = self.at, 0
            self._block = self.file.read(self.at, min(max(count, _BLOCK), max(self.file.size - self.at, count))).tobytes()
        self.at += count
        return self._block[begin : begin + count]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def value(self, depth: int) -> Any:
        self.values += 1
        if depth > MAX_DEPTH or self.values > 8 * MAX_TENSORS:
            raise CheckpointError(f"{self.file.path} is nested too deeply or has too many values; it is not read")
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code < 0x90 or code in (0xDE, 0xDF):
            return self.table(code & 15 if code < 0x90 else self.number(_TABLES[code]), depth)
        if code < 0xA0 or code in (0xDC, 0xDD):
            return [self.value(depth + 1) for _ in range(code & 15 if code < 0xA0 else self.number(_TABLES[code]))]
        return self.scalar(code)

    def scalar(self, code: int) -> Any:
        if code in _INTEGERS:
            return struct.unpack(_INTEGERS[code], self.take(_FIXED[code]))[0]
        if code in _FIXED:
            self.at += _FIXED[code]
            return None
        if code in (0xC0, 0xC2, 0xC3):
            return None if code == 0xC0 else code == 0xC3
        if code in _EXTENSIONS or 0xD4 <= code <= 0xD8:
            return self.extension(self.number(_EXTENSIONS[code]) if code in _EXTENSIONS else 1 << (code - 0xD4))
        if 0xA0 <= code < 0xC0 or code in _SIZED:
            length = code & 31 if code < 0xC0 else self.number(_SIZED[code])
            return self.text(length) if code not in (0xC4, 0xC5, 0xC6) else self.skip(length)
        raise CheckpointError(f"{self.file.path} is not msgpack: byte {code:#x} at {self.at - 1}")

    def skip(self, length: int) -> tuple[int, int]:
        """Step over bytes, and say where they lie."""
        start, self.at = self.at, self.at + length
        if self.at > self.file.size:
            raise CheckpointError(f"{self.file.path} is truncated: {length} bytes are needed at {start} of {self.file.size}")
        return start, length

    def text(self, length: int) -> str:
        if length > MAX_KEY_LENGTH:
            self.skip(length)
            return ""
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"a key of {self.file.path} is not UTF-8; the file is damaged") from error

    def table(self, count: int, depth: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int):
                raise CheckpointError(f"a key of {self.file.path} is a {type(key).__name__}, not text; the file is damaged")
            if key in found:
                raise CheckpointError(f"key {key!a} stands twice in {self.file.path}; keys must be unique")
            found[key] = self.value(depth + 1)
        return self.chunked(found) if _CHUNKED in found else found

    def chunked(self, found: dict[Any, Any]) -> ChunkedEntry:
        sizes, chunks = found.get("shape"), found.get("chunks")
        if not isinstance(sizes, dict) or not isinstance(chunks, dict):
            raise CheckpointError(f"a large array of {self.file.path} is malformed; the file is damaged")
        shape = check_shape(list(cast("dict[str, Any]", sizes).values()), "a large array", str(self.file.path))
        parts = tuple(cast("dict[str, Any]", chunks).values())
        if not parts or not all(isinstance(part, FileEntry) for part in parts) or len({part.dtype for part in parts}) != 1:
            raise CheckpointError(f"a large array of {self.file.path} is malformed; the file is damaged")
        if sum(part.nbytes for part in parts) != _nbytes(shape, parts[0].dtype):
            raise CheckpointError(f"a large array of {self.file.path} has not the bytes that its shape {list(shape)} needs; it is damaged")
        return ChunkedEntry(parts, shape)

    def extension(self, length: int) -> FileEntry | None:
        kind = self.take(1)[0]
        end = self.at + length
        if end > self.file.size:
            raise CheckpointError(f"{self.file.path} is truncated: an array ends at byte {end} of {self.file.size}; fetch it again")
        if kind not in (_NDARRAY, _SCALAR):
            self.at = end
            return None
        parts = self.value(MAX_DEPTH - 2)
        match parts:
            case [list(sizes), str(dtype), (int(start), int(nbytes))] if self.at == end:
                shape = check_shape(sizes, "an array", str(self.file.path))
            case _:
                raise CheckpointError(f"an array of {self.file.path} is malformed; the file is damaged")
        if dtype not in ITEM_BYTES or nbytes != _nbytes(shape, dtype):
            raise CheckpointError(f"an array of {self.file.path} is {dtype[:40]!a} {list(shape)} in {nbytes} bytes, which do not fit")
        return FileEntry(self.file, start, nbytes, dtype, shape) if kind == _NDARRAY else None


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return count
