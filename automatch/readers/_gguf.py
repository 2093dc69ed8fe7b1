"""GGUF files: the header by positioned reads, quantised blocks through the gguf package.

The package's own reader maps the file and keeps every token of the vocabulary as an array; walking the
header instead bounds time and memory on any file. Its tables and its dequantisation are used as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from automatch.errors import CheckpointError, MissingExtraError
from automatch.readers._base import OpenCheckpoint, Region, SourceFile
from automatch.readers._entries import Wrapper, open_flat
from automatch.readers._limits import MAX_KEY_LENGTH, check_count, check_shape

_BLOCK = 1 << 16
_MAX_FIELDS, _MAX_STRINGS = 100_000, 10_000_000
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantisedEntry:
    """A tensor in ggml's blocks; reading it gives float32."""

    file: SourceFile
    offset: int
    nbytes: int
    kind: Any
    shape: tuple[int, ...]
    dtype: str = "float32"

    def read(self) -> Any:
        import numpy as np
        import torch
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        data = self.file.read(self.offset, self.nbytes).reshape(quant_shape_to_byte_shape(self.shape, self.kind))
        try:
            with np.errstate(all="ignore"):  # a scale may be infinite, as any float may
                return torch.from_numpy(dequantize(data, self.kind)).reshape(self.shape)
        except NotImplementedError as error:
            raise CheckpointError(f"the gguf package cannot decode {self.kind.name}; convert {self.file.path} to F16") from error

    def region(self) -> Region | None:
        return None


def open_gguf(file: SourceFile, wrapper: Wrapper) -> OpenCheckpoint:
    """Open a GGUF file; shapes are given in torch's order.

    Raises:
        CheckpointError: the header is damaged, or a tensor lies outside the file.
        MissingExtraError: the gguf package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtraError(f'{file.path} is a GGUF file; to read it, run: pip install "automatch[gguf]"') from error

    header = _Header(file)
    infos, base = header.tensors()
    entries: dict[str, Any] = {}
    kinds: Counter[str] = Counter()
    for key, shape, code, offset in infos:
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise CheckpointError(f"{key!a} of {file.path} has type {code}, which the gguf package does not know; update it") from error
        block, width = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * width
        if key in entries or (shape[-1:] or (1,))[0] % block or offset % header.alignment or base + offset + nbytes > file.size:
            raise CheckpointError(f"{key!a} of {file.path} stands twice or lies outside the file; the file is truncated or damaged")
        kinds[kind.name] += 1
        entries[key] = _entry(file, base + offset, nbytes, kind, shape)
    packed = {name: count for name, count in kinds.items() if name not in _PLAIN}
    notes = [_note(packed)] if packed else []
    return open_flat(entries, str(file.path), [file], notes=notes, wrapper=wrapper)


def _note(packed: dict[str, int]) -> str:
    listed = ", ".join(f"{count} {name}" for name, count in sorted(packed.items()))
    return f"{sum(packed.values())} tensors are quantised ({listed}); they become float32 when they are read, near to what was quantised"


def _entry(file: SourceFile, offset: int, nbytes: int, kind: Any, shape: tuple[int, ...]) -> Any:
    from automatch.readers._entries import FileEntry

    if kind.name in _PLAIN:
        return FileEntry(file, offset, nbytes, _PLAIN[kind.name], shape)
    return QuantisedEntry(file, offset, nbytes, kind, shape)


class _Header:
    def __init__(self, file: SourceFile) -> None:
        self.file, self.at, self.alignment, self.strings = file, 4, 32, 0
        self._block, self._start = b"", 0
        version = self.number(4)
        if version not in (2, 3):
            raise CheckpointError(f"{file.path} has GGUF version {version}; versions 2 and 3 in little-endian are read")
        self.count = self.number(8)
        fields = self.number(8)
        check_count(self.count, str(file.path))
        if fields > _MAX_FIELDS:
            raise CheckpointError(f"{file.path} declares {fields} metadata fields; at most {_MAX_FIELDS} are read")
        for _ in range(fields):
            self.field()

    def take(self, count: int) -> bytes:
        begin = self.at - self._start
        if begin < 0 or begin + count > len(self._block):
            self._start, begin = self.at, 0
            self._block = self.file.read(self.at, max(count, min(_BLOCK, self.file.size - self.at))).tobytes()
        self.at += count
        return self._block[begin : begin + count]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self) -> str:
        length = self.number(8)
        if length > 16 * MAX_KEY_LENGTH:
            raise CheckpointError(f"a name in {self.file.path} has {length} bytes; the file is damaged")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"a name in {self.file.path} is not UTF-8; the file is damaged") from error

    def field(self) -> None:
        name, code = self.text(), self.number(4)
        if name == "general.alignment" and code == 4:
            self.alignment = self.number(4)
            if self.alignment == 0 or self.alignment > 1 << 20:
                raise CheckpointError(f"{self.file.path} declares an alignment of {self.alignment}; the file is damaged")
            return
        self.skip(code)

    def skip(self, code: int) -> None:
        if code == _STRING:
            self.step(self.number(8))
        elif code == _ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner in _WIDTHS:
                self.step(count * _WIDTHS[inner])
                return
            self.strings += count
            if inner != _STRING or self.strings > _MAX_STRINGS:
                raise CheckpointError(f"{self.file.path} declares an array of {count} values of type {inner}; it is not read")
            for _ in range(count):
                self.step(self.number(8))
        elif code in _WIDTHS:
            self.step(_WIDTHS[code])
        else:
            raise CheckpointError(f"{self.file.path} has a metadata field of unknown type {code}; the file is damaged")

    def step(self, count: int) -> None:
        self.at += count
        if self.at > self.file.size:
            raise CheckpointError(f"the header of {self.file.path} ends beyond byte {self.file.size}; the file is truncated or damaged")

    def tensors(self) -> tuple[list[tuple[str, tuple[int, ...], int, int]], int]:
        """Name, shape in torch's order, type and offset of every tensor, and where the data begins."""
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(self.count):
            key, dimensions = self.text(), self.number(4)
            if dimensions > 8:
                raise CheckpointError(f"{key!a} of {self.file.path} declares {dimensions} dimensions; the file is damaged")
            shape = check_shape(tuple(reversed([self.number(8) for _ in range(dimensions)])), key, str(self.file.path))
            found.append((key, shape, self.number(4), self.number(8)))
        return found, self.at + -self.at % self.alignment
