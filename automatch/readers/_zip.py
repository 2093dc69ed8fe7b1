"""Zip archives with bounds: the directory is checked before anything is read from it."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from automatch.errors import CheckpointError
from automatch.readers._base import Bytes, Region
from automatch.readers._dtypes import row_major, tensor_from_bytes
from automatch.readers._limits import FREE_INFLATION_BYTES, MAX_INFLATION, MAX_ZIP_DIRECTORY_BYTES

_LOCAL_HEADER = 30
_END_SIZE, _END64_SIZE, _LOCATOR_SIZE = 22, 56, 20


class Archive:
    """A zip archive over a file or a part of one.

    Raises:
        CheckpointError: the archive is damaged, or would inflate to more than it may.
    """

    def __init__(self, file: Bytes) -> None:
        self.file = file
        _check_directory_size(file)
        try:
            self._zip = zipfile.ZipFile(file.stream())
            infos = self._zip.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, UnicodeError) as error:
            raise CheckpointError(f"{file.path.name} is a damaged or truncated zip archive ({error}); fetch it again") from error
        self.members = {info.filename: info for info in infos}
        if len(self.members) != len(infos):
            raise CheckpointError(f"{file.path.name} holds two members of one name; the archive is damaged")
        _check_inflation(infos, file)

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small member.

        Raises:
            CheckpointError: it is missing, damaged, encrypted, or longer than ``limit`` bytes.
        """
        info = self.members.get(name)
        if info is None:
            raise CheckpointError(f"{self.file.path.name} has no member {name!r}; the archive is damaged")
        if info.file_size > limit:
            raise CheckpointError(f"member {name!r} of {self.file.path.name} has {info.file_size} bytes; at most {limit} are read")
        return self.read_part(info, 0, info.file_size)

    def read_part(self, info: zipfile.ZipInfo, start: int, length: int) -> bytes:
        """Part of a member, decompressed as far as needed.

        Raises:
            CheckpointError: the member is damaged or encrypted.
        """
        try:
            with self._zip.open(info) as member:
                member.seek(start)
                data = member.read(length)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, RuntimeError, EOFError, ValueError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
            raise CheckpointError(f"member {info.filename!r} of {self.file.path.name} is damaged ({error}); fetch it again") from error
        if len(data) != length:
            raise CheckpointError(f"member {info.filename!r} of {self.file.path.name} is shorter than it says; the archive is damaged")
        return data

    def offset_of(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a stored member begin in the file."""
        header = self.file.read(info.header_offset, _LOCAL_HEADER).tobytes()
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"member {info.filename!r} of {self.file.path.name} has no header; the archive is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return info.header_offset + _LOCAL_HEADER + name_length + extra_length


@dataclass(slots=True)
class ZipEntry:
    """A tensor in a member of an archive; `start` and `nbytes` are the part of the member that it spans."""

    archive: Archive
    member: zipfile.ZipInfo
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def _stored(self) -> bool:
        return self.member.compress_type == zipfile.ZIP_STORED and not self.member.flag_bits & 1

    def read(self) -> Any:
        import numpy as np

        if self._stored:
            data = self.archive.file.read(self.archive.offset_of(self.member) + self.start, self.nbytes)
        else:
            data = np.frombuffer(bytearray(self.archive.read_part(self.member, self.start, self.nbytes)), np.uint8)
        return tensor_from_bytes(data, self.dtype, self.shape, self.stride)

    def region(self) -> Region | None:
        if not self._stored or not row_major(self.shape, self.stride):
            return None
        return Region(*self.archive.file.locate(self.archive.offset_of(self.member) + self.start), self.nbytes)


def _check_directory_size(file: Bytes) -> None:
    # zipfile reads the whole directory at once, so its size is looked up before.
    span = min(file.size, 65535 + _END_SIZE + _LOCATOR_SIZE + _END64_SIZE)
    tail = file.read(file.size - span, span).tobytes()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END_SIZE:
        raise CheckpointError(f"{file.path.name} is a truncated zip archive: its directory is missing; fetch it again")
    size = struct.unpack("<I", tail[at + 12 : at + 16])[0]
    at64 = tail.rfind(b"PK\x06\x06", 0, at)
    if size == 0xFFFFFFFF and at64 >= 0 and len(tail) - at64 >= _END64_SIZE:
        size = struct.unpack("<Q", tail[at64 + 40 : at64 + 48])[0]
    if size > MAX_ZIP_DIRECTORY_BYTES:
        raise CheckpointError(f"the directory of {file.path.name} has {size} bytes; at most {MAX_ZIP_DIRECTORY_BYTES} are read")


def _check_inflation(infos: list[zipfile.ZipInfo], file: Bytes) -> None:
    packed = sum(info.compress_size for info in infos)
    unpacked = sum(info.file_size for info in infos if info.compress_type != zipfile.ZIP_STORED)
    if packed > file.size or any(i.compress_type == zipfile.ZIP_STORED and i.file_size != i.compress_size for i in infos):
        raise CheckpointError(f"the members of {file.path.name} declare more bytes than the file has; the archive is damaged")
    if unpacked > FREE_INFLATION_BYTES + MAX_INFLATION * file.size:
        raise CheckpointError(
            f"{file.path.name} would inflate from {file.size} to {unpacked} bytes, more than {MAX_INFLATION} times; it is not read"
        )
