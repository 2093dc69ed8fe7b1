"""Reading the tensors of a load without a second copy: the file's own pages, mapped, as far as its format allows."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from types import TracebackType
from typing import Any, Self, cast

from automatch.errors import CheckpointError
from automatch.readers import OpenCheckpoint
from automatch.readers._base import SourceFile
from automatch.specs import StateSpec

# Linux >= 5.14: bring pages in now, and report a failing disk as an error instead of a signal.
_POPULATE_READ = 22
_SMALLEST = 1 << 16


def _in_memory(pages: mmap.mmap, start: int, length: int) -> bool:
    """Whether the kernel holds all these pages of the file, so that no disk will be read (mincore(2); Linux)."""
    import torch

    address = torch.frombuffer(cast(Any, pages), dtype=torch.uint8, count=1, offset=start).data_ptr()
    held = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    found: int = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), held)
    return found == 0 and 0 not in bytes(held)


class MappedCheckpoint:
    """An open checkpoint whose large tensors are private mappings of its file: written to, they do not change it.

    Args:
        inner: the checkpoint, which stays open and is read for all that cannot be mapped.
    """

    def __init__(self, inner: OpenCheckpoint) -> None:
        self.inner = inner
        self._maps: dict[int, mmap.mmap] = {}
        self._used: list[tuple[mmap.mmap, int, int]] = []
        self._told = sys.platform == "linux"  # whether the kernel tells what it holds; of other users' files it says all

    @property
    def spec(self) -> StateSpec:
        return self.inner.spec

    def tensor(self, key: str) -> Any:
        """The tensor of ``key``, mapped where its bytes lie in the file as they are."""
        import torch

        spec = self.spec[key]
        dtype = getattr(torch, spec.dtype, None)
        if sys.byteorder != "little" or not isinstance(dtype, torch.dtype):
            return self.inner.tensor(key)
        nbytes = spec.numel * dtype.itemsize
        region = self.inner.region(key) if nbytes >= _SMALLEST else None  # finding a small one costs more than reading it
        if region is None or region.offset % dtype.itemsize or region.nbytes != nbytes:
            return self.inner.tensor(key)
        pages = self._map(region.file)
        self._used.append((pages, region.offset, region.nbytes))
        return torch.frombuffer(cast(Any, pages), dtype=dtype, count=spec.numel, offset=region.offset).reshape(spec.shape)

    def _map(self, file: SourceFile) -> mmap.mmap:
        pages = self._maps.get(id(file))
        if pages is None:
            self._told = self._told and os.geteuid() in (0, os.fstat(file.fd).st_uid)
            pages = self._maps[id(file)] = mmap.mmap(file.fd, file.size, access=mmap.ACCESS_COPY)
        return pages

    def bring_in(self) -> None:
        """Read the pages of every tensor given out, so that a failing disk is found before anything depends on it.

        Raises:
            CheckpointError: a page cannot be read, or the file has changed since it was opened.
        """
        for pages, offset, length in self._used:
            start = offset - offset % mmap.PAGESIZE
            if self._told and _in_memory(pages, start, offset + length - start):
                continue  # bringing pages in that are there takes a tenth of the time of the load
            try:
                pages.madvise(_POPULATE_READ, start, offset + length - start)
            except (AttributeError, ValueError):
                break
            except OSError as error:
                if error.errno == errno.EINVAL:
                    break  # an older kernel
                raise CheckpointError(f"{self.spec.origin} cannot be read: {error.strerror}") from error
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Make sure that the file is what was opened.

        Raises:
            CheckpointError: it has changed.
        """
        self.inner.check_unchanged()

    def close(self) -> None:
        """Let go of the mappings. Tensors hold on to theirs, so they are not unmapped here but with the last of them."""
        self._maps.clear()
        self._used.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
