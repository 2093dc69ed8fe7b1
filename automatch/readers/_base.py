"""What an open checkpoint is, and the file access that every reader shares."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

from automatch.errors import CheckpointError
from automatch.specs import StateSpec


class Checkpoint(Protocol):
    """An open checkpoint: its spec at once, each tensor when asked for; a context manager."""

    @property
    def spec(self) -> StateSpec: ...

    def tensor(self, key: str) -> Any: ...

    def close(self) -> None: ...

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Bytes:
    """A run of bytes that can be read at any position: a file, or a window of one."""

    path: Path
    size: int

    def read(self, offset: int, length: int) -> Any:
        """``length`` bytes from ``offset``, as a writable numpy array of bytes.

        Raises:
            CheckpointError: the range is not there, the disk fails, or the file has changed.
        """
        raise NotImplementedError

    def locate(self, offset: int) -> tuple[SourceFile, int]:
        """The file under these bytes, and where ``offset`` lies in it."""
        raise NotImplementedError

    def window(self, offset: int, length: int) -> Window:
        """Part of these bytes, under its own positions."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(f"{self.path.name} ends at byte {self.size}, but {offset + length} bytes are needed; it is truncated")
        file, start = self.locate(offset)
        return Window(file, start, length)

    def stream(self) -> io.BufferedReader:
        """These bytes as a file object for libraries that want one; nothing has to be closed."""
        return io.BufferedReader(_Stream(self))


class SourceFile(Bytes):
    """A file open for positioned reads.

    Reads copy instead of mapping: a mapped file that is cut short under the reader kills the process,
    and mapped pages count as its memory.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not a regular file.
    """

    fd = -1

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            advice = "; raise the limit with ulimit -n" if getattr(error, "errno", None) == errno.EMFILE else ""
            raise CheckpointError(f"cannot read checkpoint {str(path)!r}: {reason}{advice}") from error
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise CheckpointError(f"{str(path)!r} is not a regular file; pass a checkpoint file or folder")
        self.size = found.st_size
        self._written = found.st_mtime_ns

    def read(self, offset: int, length: int) -> Any:
        import numpy as np

        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(f"{self.path.name} ends at byte {self.size}, but {offset + length} bytes are needed; it is truncated")
        if self.fd < 0:
            raise CheckpointError(f"{str(self.path)!r} is closed; open the checkpoint again")
        array = np.empty(length, np.uint8)
        view, done = memoryview(cast(Any, array)), 0
        while done < length:
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"reading {str(self.path)!r} failed at byte {offset + done}: {error.strerror or error}") from error
            if count == 0:
                raise CheckpointError(f"{str(self.path)!r} was cut short while it was read; open it again")
            done += count
        return array

    def locate(self, offset: int) -> tuple[SourceFile, int]:
        return self, offset

    def check_unchanged(self) -> None:
        """Make sure that the file is still what was opened.

        Raises:
            CheckpointError: its size or time of change is another one.
        """
        found = os.fstat(self.fd)
        if (found.st_size, found.st_mtime_ns) != (self.size, self._written):
            raise CheckpointError(f"{str(self.path)!r} was changed while it was read; open it again")

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class Window(Bytes):
    """Part of a file, under its own positions."""

    def __init__(self, file: SourceFile, start: int, size: int) -> None:
        self.file, self.start, self.size, self.path = file, start, size, file.path

    def read(self, offset: int, length: int) -> Any:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(f"a part of {self.path.name} has {self.size} bytes, but {offset + length} are needed; it is truncated")
        return self.file.read(self.start + offset, length)

    def locate(self, offset: int) -> tuple[SourceFile, int]:
        return self.file, self.start + offset


class _Stream(io.RawIOBase):
    def __init__(self, source: Bytes) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, (0, self._at, self._source.size)[whence] + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        count = min(len(buffer), max(0, self._source.size - self._at))
        buffer[:count] = self._source.read(self._at, count).data
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class Region:
    """Where the bytes of one tensor lie: contiguous, in row-major order, little-endian."""

    file: SourceFile
    offset: int
    nbytes: int


class Entry(Protocol):
    """How one tensor is read: its dtype by torch's name, its shape, and its values when asked for."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Any:
        """The tensor, as a new torch tensor on the CPU."""
        ...

    def region(self) -> Region | None:
        """Where its bytes lie in a file as they are, or None."""
        ...


class OpenCheckpoint:
    """An open checkpoint: a spec, and one entry per key.

    Args:
        spec: what it holds.
        entries: how each tensor is read.
        files: what `close` closes.
        metadata: the text metadata of the file (safetensors), kept by a conversion.
        tree: the whole content around the weights, for formats that have one.
        live: whether the tensors are in memory already.
    """

    def __init__(
        self,
        spec: StateSpec,
        entries: Mapping[str, Entry],
        files: tuple[SourceFile, ...] = (),
        *,
        metadata: Mapping[str, str] | None = None,
        tree: Any = None,
        live: bool = False,
    ) -> None:
        self.spec, self.entries, self.files = spec, entries, files
        self.metadata = dict(metadata or {})
        self.tree, self.live = tree, live

    def tensor(self, key: str) -> Any:
        """The tensor of ``key``.

        Raises:
            CheckpointError: there is no such key, or its bytes cannot be read.
        """
        entry = self.entries.get(key)
        if entry is None:
            raise CheckpointError(f"{key!r} is not a key of {self.spec.origin or 'the checkpoint'}")
        return entry.read()

    def region(self, key: str) -> Region | None:
        """Where the bytes of ``key`` lie in a file as they are, or None."""
        return self.entries[key].region()

    def check_unchanged(self) -> None:
        """Make sure that no file has changed since it was opened.

        Raises:
            CheckpointError: one has.
        """
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; closing twice does no harm."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
