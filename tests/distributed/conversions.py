"""Conversions in real processes: what ranks do, how they die, and what files are there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sharded_models import New, Old, mapping_of

import automatch.distributed.conversion
import automatch.distributed.shard_files
import automatch.distributed.shards
from automatch.distributed import convert

TIMEOUT = 4  # seconds without a sign of life after which the tests' ranks give a killed one up
LIMIT = 3000  # bytes: small files, so that there are many


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_where(where: str) -> None:
    """Let this rank kill itself: in its third file (when that has begun), or at a step of rank 0 when all files are there."""
    files = automatch.distributed.shard_files
    write, count = files.ShardFiles.write, 0

    def dying_write(*args: Any) -> None:
        nonlocal count
        count += 1
        write(*args[:-1], map(die, args[-1]) if count == 3 else args[-1])

    if where == "file":
        files.ShardFiles.write = dying_write  # type: ignore[method-assign]
    elif where == "index":
        files.ShardFiles._write_index = files.ShardFiles._write_metadata = die  # type: ignore[method-assign]
    elif where == "name":
        files.shutil = SimpleNamespace(rmtree=die)  # type: ignore[assignment]


def convert_some(rank: int, source: Path, out: Path, to: str, victim: int | None, where: str = "file") -> Any:
    """Convert; rank ``victim`` kills itself on the way."""
    if rank == victim:
        die_where(where)
    seen: list[tuple[int, int]] = []
    mapping = mapping_of(Old(), New())
    report = convert(
        source,
        out,
        mapping,
        to=to,
        max_shard_bytes=LIMIT,
        timeout=60 if victim is None else TIMEOUT,
        progress=lambda *done: seen.append(done),
    )
    return report, seen


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir() if file.is_file()}
