"""Writing a file or folder that appears under its name when it is complete and on the disk, or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from automatch.errors import CheckpointError
from automatch.readers._base import Region, SourceFile

CHUNK = 16 * 2**20
_SPARE = 2**20
_YOUNG_SECONDS = 60
_NOT_POSSIBLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)
Tick = Callable[[int], None]


def check_output(path: Path, files: Sequence[SourceFile], *, folder: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        CheckpointError: it is the checkpoint itself, a folder that has something in it, or its parent is missing.
    """
    if any(path.exists() and os.path.samestat(path.stat(), os.fstat(file.fd)) for file in files):
        raise CheckpointError(f"{str(path)!r} is the checkpoint itself; write to another name")
    if not path.parent.is_dir():
        raise CheckpointError(f"folder {str(path.parent)!r} does not exist; create it first")
    if folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{str(path)!r} exists and is not empty; name a new folder")
    if not folder and path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder; name a file")


def check_space(path: Path, needed: int) -> None:
    """Refuse to start what cannot fit.

    Raises:
        CheckpointError: the disk has fewer than ``needed`` bytes left.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed + _SPARE:
        raise CheckpointError(f"{str(path)!r} needs {needed} bytes, but its disk has {free} left; nothing was written")


class Output:
    """A file under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._in_kernel = hasattr(os, "copy_file_range")

    def write(self, data: Any) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            count = os.write(self._fd, view[: 1 << 30])
            view = view[count:]
            self.position += count

    def rewrite(self, offset: int, data: bytes) -> None:
        """Replace bytes that were written before."""
        os.pwrite(self._fd, data, offset)

    def move(self, region: Region, tick: Tick, *, checksum: bool = False) -> int:
        """Append a region of another file; its CRC-32 where it is asked for, else 0."""
        done, crc = 0, 0
        while done < region.nbytes:
            count = min(CHUNK, region.nbytes - done)
            if checksum or not self._copy_in_kernel(region.file, region.offset + done, count):
                data = region.file.read(region.offset + done, count).data
                crc = zlib.crc32(data, crc) if checksum else 0
                self.write(data)
            done += count
            tick(count)
        return crc

    def _copy_in_kernel(self, file: SourceFile, offset: int, count: int) -> bool:
        """Copy without passing the bytes through this process; False where the file systems cannot."""
        done = 0
        while self._in_kernel and done < count:
            try:
                copied = os.copy_file_range(file.fd, self._fd, count - done, offset + done)
            except OSError as error:
                if error.errno not in _NOT_POSSIBLE or done:
                    raise
                self._in_kernel = False
                return False
            if copied == 0:
                raise CheckpointError(f"{str(file.path)!r} was cut short while it was read; open it again")
            done += copied
            self.position += copied
        return done == count

    def sync(self) -> None:
        """Bring everything to the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def staged(path: Path, *, folder: bool) -> Generator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` if the block succeeds, and vanishes if it does not.

    Raises:
        CheckpointError: the disk is full or fails; nothing is left behind.
    """
    parent = path.parent
    lock = None
    try:
        _sweep(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=parent))
    except OSError as error:
        raise CheckpointError(f"cannot write in folder {str(parent)!r}: {error.strerror or error}") from error
    try:
        lock = _lock(temporary)
        inner = temporary / path.name
        if folder:
            inner.mkdir()
        yield inner
        if folder:
            _sync_folder(inner)
        inner.replace(path)
        _sync_folder(parent)
    except OSError as error:
        raise CheckpointError(f"writing {str(path)!r} failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Lock a folder as long as this process lives; None if another one holds it or locks do not exist here."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _sweep(path: Path) -> None:
    """Remove what killed conversions to ``path`` left behind: nobody holds its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        # A folder this young may be one that another process has made and not locked yet.
        if left.is_dir() and not left.is_symlink() and time.time() - left.stat().st_mtime > _YOUNG_SECONDS:
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


@contextmanager
def writing(path: Path) -> Generator[Output]:
    """A new file that is on the disk when the block succeeds."""
    output = Output(path)
    try:
        yield output
        output.sync()
    finally:
        output.close()


def forget_cached(files: Iterable[SourceFile]) -> None:
    """Let the next reads of files come from the disk, as far as the system allows it."""
    for file in files:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def chunks_of(regions: Sequence[Region]) -> Iterator[Any]:
    """The bytes of regions, one after the other, in pieces."""
    for region in regions:
        for start in range(0, region.nbytes, CHUNK):
            yield region.file.read(region.offset + start, min(CHUNK, region.nbytes - start))
