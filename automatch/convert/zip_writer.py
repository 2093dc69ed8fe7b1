"""A zip archive of stored members, as `torch.save` lays one out: contents aligned, written once, front to back.

`zipfile` passes every byte through Python twice; here a member's bytes can be moved by the kernel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from automatch.convert.output import Output

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_VERSION = 45
_LOCAL = 30
_CRC_AT = 14


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    offset: int
    size: int
    crc: int


class ZipWriter:
    """Writes members to an output; `finish` writes the directory."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._members: list[_Member] = []

    def add(self, name: str, size: int, write: Callable[[Output], int]) -> None:
        """Add a member of ``size`` bytes, which ``write`` appends; it returns their CRC-32."""
        offset, encoded = self._output.position, name.encode()
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LIMIT else b""
        used = offset + _LOCAL + len(encoded) + len(large) + 4
        padding = -used % _ALIGNMENT
        extra = large + struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        shown = min(size, _LIMIT)
        header = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", _VERSION, 0x800, 0, 0, 0x21, 0, shown, shown, len(encoded), len(extra))
        self._output.write(header + encoded + extra)
        crc = write(self._output)
        self._output.rewrite(offset + _CRC_AT, struct.pack("<I", crc))
        self._members.append(_Member(encoded, offset, size, crc))

    def add_bytes(self, name: str, data: bytes) -> None:
        """Add a small member."""

        def write(output: Output) -> int:
            output.write(data)
            return zlib.crc32(data)

        self.add(name, len(data), write)

    def finish(self) -> None:
        """Write the directory."""
        start = self._output.position
        for member in self._members:
            self._output.write(_directory_entry(member))
        size, count = self._output.position - start, len(self._members)
        end64 = self._output.position
        self._output.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, size, start))
        self._output.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end64, 1))
        shown = min(count, 0xFFFF)
        self._output.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, shown, shown, min(size, _LIMIT), min(start, _LIMIT), 0))


def _directory_entry(member: _Member) -> bytes:
    wide = [value for value in (member.size, member.size, member.offset) if value >= _LIMIT]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, offset = min(member.size, _LIMIT), min(member.offset, _LIMIT)
    fixed = (b"PK\x01\x02", _VERSION, _VERSION, 0x800, 0, 0, 0x21, member.crc, size, size, len(member.name), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<4sHHHHHHIIIHHHHHII", *fixed) + member.name + extra
