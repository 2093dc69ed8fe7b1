"""The values of planned tensors: written to an output, and compared with what was written."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from automatch.apply import convert
from automatch.conversion import Progress
from automatch.convert.output import CHUNK, Output, chunks_of
from automatch.convert.plan import Planned
from automatch.errors import CheckpointError
from automatch.mapping import KeyMapping
from automatch.readers import OpenCheckpoint
from automatch.readers._base import Region


class Content:
    """Gives planned tensors their values, and says how far the work has come."""

    def __init__(self, mapping: KeyMapping, source: OpenCheckpoint, total: int, progress: Progress | None) -> None:
        self._target, self._source, self._total, self._progress = mapping.target.spec, source, total, progress
        self._done = 0

    def tick(self, count: int) -> None:
        """Note that ``count`` more bytes are done."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def write(self, item: Planned, output: Output, *, checksum: bool = False) -> int:
        """Append a tensor to ``output``; its CRC-32 where it is asked for, else 0."""
        if item.regions is None:
            return self._write_decoded(item, output, checksum)
        crc = 0
        for region in item.regions:
            crc = output.move(region, self.tick, checksum=checksum) if len(item.regions) == 1 else self._append(region, output, crc)
        return crc

    def _write_decoded(self, item: Planned, output: Output, checksum: bool) -> int:
        crc = 0
        for block in self._blocks(item):
            output.write(block)
            crc = zlib.crc32(block, crc) if checksum else 0
            self.tick(len(block))
        return crc

    def _append(self, region: Region, output: Output, crc: int) -> int:
        for chunk in chunks_of([region]):
            crc = zlib.crc32(chunk.data, crc)
            output.write(chunk.data)
            self.tick(len(chunk))
        return crc

    def compare(self, item: Planned, written: Region | None, output: OpenCheckpoint) -> None:
        """Read a tensor from the output again and compare it with its source.

        Raises:
            CheckpointError: they differ.
        """
        if written is None:
            if not np.array_equal(np.concatenate([*self._blocks(item)]), _bytes_of(output.tensor(item.key))):
                raise CheckpointError(f"{item.key!r} reads back other than it was written; the disk or its memory is failing")
            self.tick(item.nbytes)
            return
        expected = chunks_of(item.regions) if item.regions is not None else self._blocks(item)
        offset = written.offset
        for chunk in expected:
            for start in range(0, len(chunk), 1 << 24):
                part = chunk[start : start + (1 << 24)]
                if not np.array_equal(part, written.file.read(offset, len(part))):
                    raise CheckpointError(f"{item.key!r} reads back other than it was written; the disk or its memory is failing")
                offset += len(part)
                self.tick(len(part))
        if offset != written.offset + written.nbytes:
            raise CheckpointError(f"{item.key!r} reads back with {written.nbytes} bytes, not {offset - written.offset}")

    def _blocks(self, item: Planned) -> Iterator[Any]:
        """The bytes of a tensor that has to be decoded; one that is not contiguous is laid out block by block, to save memory."""
        ((_, tensor),) = convert([item.match], self._source, self._target)
        if str(tensor.dtype) != f"torch.{item.dtype}" or tensor.is_meta:
            raise CheckpointError(f"{item.key!r} is {tensor.dtype} on {tensor.device}, its header says {item.dtype}; it cannot be written")
        rows = max(1, CHUNK * len(tensor) // max(item.nbytes, 1)) if tensor.ndim and not tensor.is_contiguous() else 0
        for block in tensor.split(rows) if rows else (tensor,):
            yield _bytes_of(block)


def _bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
