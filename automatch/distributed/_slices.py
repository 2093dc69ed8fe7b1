"""Reading a slice of a tensor from within a file, without the bytes around it and without a copy where possible."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from automatch.errors import CheckpointError

_BLOCK = 16 << 20
_SMALLEST_RUN = 4096  # below a page, the disk reads what lies between anyway


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the elements of a contiguous tensor stand in a file.

    Args:
        offset: of its first byte.
        shape: its shape.
        dtype: its dtype.
        label: what messages call it.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [room], self._start + self._position) if len(room) else 0
        self._position += count
        return count


def stored_tensor(file: int, offset: int, length: int, label: str) -> StoredTensor | None:
    """Find the elements of a tensor that ``torch.save`` wrote at ``offset`` of an open file; None if they are not stored plainly.

    Raises:
        CheckpointError: there is no such tensor.
    """
    view = io.BufferedReader(_Window(file, offset, length), 4096)
    try:
        with zipfile.ZipFile(view) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            data = members.get("data/0")
            if data is None or data.compress_type != zipfile.ZIP_STORED or "data/1" in members:
                return None
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                return None
            view.seek(data.header_offset)
            name_length, extra_length = struct.unpack("<HH", view.read(30)[26:30])
        view.seek(0)
        described = torch.load(view, map_location="meta", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, struct.error, OSError) as error:
        raise CheckpointError(f"{label} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(described, torch.Tensor) or not described.is_contiguous():
        return None
    skipped = int(described.storage_offset()) * described.element_size()
    start = data.header_offset + 30 + name_length + extra_length + skipped
    if skipped + described.nbytes > data.file_size or start + described.nbytes > length:
        raise CheckpointError(f"{label} is damaged: it declares {described.nbytes} bytes and holds {data.file_size}")
    return StoredTensor(offset + start, tuple(described.shape), described.dtype, label)


def read_slice(file: int, stored: StoredTensor, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor) -> int:
    """Copy a slice of a stored tensor into ``target``, which has the slice's shape; dtypes may differ.

    Returns:
        The number of bytes read.

    Raises:
        CheckpointError: the slice reaches beyond the tensor, or the file ends too early.
    """
    if any(a < 0 or a + n > size for a, n, size in zip(offsets, lengths, stored.shape, strict=True)):
        raise CheckpointError(f"{stored.label} has shape {stored.shape}; the metadata asks for {tuple(lengths)} from {tuple(offsets)}")
    if not math.prod(lengths):
        return 0
    outer = len(stored.shape)
    while outer and lengths[outer - 1] == stored.shape[outer - 1]:
        outer -= 1
    outer = max(outer - 1, 0)  # the dimensions before `outer` are walked one by one
    run = math.prod(lengths[outer:]) * stored.dtype.itemsize
    while outer and run < _SMALLEST_RUN:
        outer -= 1
        run = math.prod(stored.shape[outer + 1 :]) * lengths[outer] * stored.dtype.itemsize
    return sum(_read_rows(file, stored, index, outer, offsets, lengths, target) for index in np.ndindex(*lengths[:outer]))


def _read_rows(
    file: int,
    stored: StoredTensor,
    index: tuple[int, ...],
    outer: int,
    offsets: Sequence[int],
    lengths: Sequence[int],
    target: torch.Tensor,
) -> int:
    """One run of the file: whole rows of dimension ``outer``, from which the slice is cut."""
    inner = stored.shape[outer + 1 :]
    row = math.prod(inner) * stored.dtype.itemsize
    position = 0
    for at, start, size in zip(index, offsets, stored.shape, strict=False):
        position = position * size + at + start
    first, count, size = (offsets[outer], lengths[outer], stored.shape[outer]) if stored.shape else (0, 1, 1)
    begin = stored.offset + (position * size + first) * row
    part = target[index]
    if part.is_contiguous() and part.dtype == stored.dtype and part.device.type == "cpu" and tuple(lengths[outer + 1 :]) == inner:
        _read_into(file, begin, part, stored.label)
        return count * row
    step = max(1, _BLOCK // row)
    cut = tuple(slice(a, a + n) for a, n in zip(offsets[outer + 1 :], lengths[outer + 1 :], strict=True))
    for done in range(0, count, step):
        rows = min(step, count - done)
        block = torch.empty((rows, *inner), dtype=stored.dtype)
        _read_into(file, begin + done * row, block, stored.label)
        (part[done : done + rows] if stored.shape else part).copy_(block[(slice(None), *cut)] if stored.shape else block[0])
    return count * row


def _read_into(file: int, offset: int, tensor: torch.Tensor, label: str) -> None:
    """Fill a contiguous tensor with bytes of a file; ``pread``, so that a file cut short is an error and not a signal."""
    flat: Any = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    memory = memoryview(flat)
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], offset + done)
        if count <= 0:
            raise CheckpointError(f"{label} is cut short: the file ends {len(memory) - done} bytes too early")
        done += count
