"""NumPy archives: the header of each array, and its values when asked for; object arrays never."""

from __future__ import annotations

import io
import tokenize
import warnings
from dataclasses import dataclass
from typing import Any

from automatch.errors import CheckpointError, UnsafeCheckpointError
from automatch.readers._base import Entry, OpenCheckpoint, Region, SourceFile
from automatch.readers._dtypes import ITEM_BYTES
from automatch.readers._entries import Wrapper, open_flat
from automatch.readers._limits import check_count, check_shape
from automatch.readers._zip import Archive, ZipEntry

_HEADER_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class SwappedEntry:
    """An array of the other byte order."""

    inner: ZipEntry

    @property
    def dtype(self) -> str:
        return self.inner.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def read(self) -> Any:
        import torch

        array = self.inner.read().contiguous().numpy()
        return torch.from_numpy(array.byteswap())

    def region(self) -> Region | None:
        return None


def open_npz(file: SourceFile, archive: Archive, wrapper: Wrapper) -> OpenCheckpoint:
    """Open a file that `numpy.savez` wrote.

    Raises:
        CheckpointError: a header is damaged, or an array has a dtype that torch has not.
        UnsafeCheckpointError: an array holds pickled objects.
    """
    check_count(len(archive.members), str(file.path))
    entries = {name.removesuffix(".npy"): _entry(archive, name) for name in archive.members if name.endswith(".npy")}
    return open_flat(entries, str(file.path), [file], wrapper=wrapper)


def _entry(archive: Archive, name: str) -> Entry:
    import numpy as np
    from numpy.lib import format as npy

    origin = f"{name!a} in {archive.file.path}"
    info = archive.members[name]
    head = io.BytesIO(archive.read_part(info, 0, min(info.file_size, _HEADER_BYTES)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header that Python 2 wrote is as good as another
            major, _ = npy.read_magic(head)
            shape, fortran, dtype = (npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0)(head)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError, tokenize.TokenError) as error:
        raise CheckpointError(f"the header of {origin} is damaged ({str(error)[:200]})") from error
    if dtype.hasobject:
        raise UnsafeCheckpointError(f"{origin} holds pickled objects, which would have to run; save it as plain numbers")
    sizes = check_shape(tuple(shape), name, str(archive.file.path))
    kind = dtype.newbyteorder("=").name
    if kind not in ITEM_BYTES or ITEM_BYTES[kind] != dtype.itemsize:
        raise CheckpointError(f"{origin} has dtype {str(dtype)!r}, which torch has not; save it as another one")
    nbytes = int(np.prod(sizes, dtype=object)) * dtype.itemsize if sizes else dtype.itemsize
    if head.tell() + nbytes != info.file_size:
        raise CheckpointError(f"{origin} needs {nbytes} bytes, but has {info.file_size - head.tell()}; the file is truncated or damaged")
    stride = _strides(sizes, fortran)
    entry = ZipEntry(archive, info, head.tell(), nbytes, kind, sizes, stride)
    return entry if dtype.isnative or dtype.itemsize == 1 else SwappedEntry(entry)


def _strides(shape: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in shape if fortran else reversed(shape):
        strides.append(step)
        step *= size
    return tuple(strides if fortran else reversed(strides))
