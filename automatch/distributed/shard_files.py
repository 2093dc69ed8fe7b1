"""The files of a conversion: written under another name, recorded when they are on the disk, and named at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from automatch.convert.content import Content
from automatch.convert.output import Output as FileOutput
from automatch.convert.plan import Planned
from automatch.convert.safetensors_file import write_safetensors
from automatch.distributed.shards import Format, Output, Plan
from automatch.distributed.storage import INDEX
from automatch.errors import CheckpointError
from automatch.files import write_atomically
from automatch.mapping import Match
from automatch.specs import dtype_name

_RECORDS, _PLAN = ".automatch", "plan.json"


class ShardFiles:
    """The output directory of a conversion, under its working name until it is complete.

    Args:
        out: the directory.
        to: its format.
    """

    def __init__(self, out: Path, to: Format) -> None:
        self.out = out
        self.format: Format = to
        self.work = out.with_name(out.name + ".incomplete")
        self._records = self.work / _RECORDS

    def refuse_existing(self) -> None:
        """Make sure that nothing is overwritten.

        Raises:
            CheckpointError: the output exists.
        """
        if self.out.exists() and not (self.out / _RECORDS / _PLAN).is_file():
            raise CheckpointError(f"{str(self.out)!r} exists; name a new directory")
        if not self.out.parent.is_dir():
            raise CheckpointError(f"{str(self.out.parent)!r} is not a directory; create it first")

    def begin(self, plan: Plan) -> frozenset[int]:
        """Prepare the working directory; which shards an earlier run of the same conversion has completed.

        Raises:
            CheckpointError: it holds another conversion.
        """
        if self.out.exists():
            self._reopen(plan)
        note = self._records / _PLAN
        if self.work.exists() and not self._is_blank():
            self._refuse_other(_read_json(note) or {}, plan)
        else:
            self._records.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps(_note(plan)).encode())
        done = frozenset(shard for shard in range(len(plan.shards)) if self._is_done(shard, plan))
        kept = {self._name(shard, plan) for shard in done}
        for file in self.work.iterdir():
            if file.is_file() and file.name not in kept:
                file.unlink()
        return done

    def _is_blank(self) -> bool:
        """Whether a run ended before it had noted what it was to write."""
        return not (self._records / _PLAN).is_file() and list(self.work.iterdir()) == [self._records]

    def _reopen(self, plan: Plan) -> None:
        """Take up a run that ended between naming the directory and clearing its records."""
        if self.work.exists() or _read_json(self.out / _RECORDS / _PLAN) != _note(plan):
            raise CheckpointError(f"{str(self.out)!r} exists; name a new directory")
        self.out.rename(self.work)

    def _refuse_other(self, known: dict[str, Any], plan: Plan) -> None:
        what = "something that is not recorded" if "plan" not in known else None
        if what is None and known.get("checkpoint") != plan.checkpoint:
            what = "another checkpoint, or of this one before it was written again"
        elif what is None and known["plan"] != plan.digest:
            what = "this checkpoint with another mapping, format or size of shards"
        if what is not None:
            raise CheckpointError(f"{str(self.work)!r} holds an unfinished conversion of {what}; finish that one or remove the directory")

    def write(self, plan: Plan, shard: int, values: Iterator[tuple[str, Any]]) -> None:
        """Write one shard, bring it to the disk, and record it.

        Args:
            plan: the whole conversion.
            shard: number of the shard.
            values: keys and values of all that it holds, in the order of `portions`.
        """
        path = self.work / self._name(shard, plan)
        temporary = path.with_name(f".{path.name}.tmp")
        infos: list[tuple[str, int, int]] = []
        if self.format == "safetensors":
            write_safetensors(temporary, [_planned(output) for output in plan.shards[shard]], {}, _Streamed(values))
        else:
            infos = _write_dcp(temporary, values)
        temporary.replace(path)
        _sync(self.work)
        record = {"file": path.name, "size": path.stat().st_size, "infos": infos}
        write_atomically(self._records / f"{shard}.json", json.dumps(record).encode())

    def finish(self, plan: Plan) -> None:
        """Write what joins the shards, and give the directory its name."""
        if self.format == "safetensors":
            self._write_index(plan)
        else:
            self._write_metadata(plan)
        _sync(self.work)
        self.work.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(self.out / _RECORDS)

    # ---- safetensors --------------------------------------------------------------------------------------

    def _name(self, shard: int, plan: Plan) -> str:
        if self.format == "dcp":
            return f"__{shard}_0.distcp"
        count = len(plan.shards)
        return "model.safetensors" if count == 1 else f"model-{shard + 1:05}-of-{count:05}.safetensors"

    def _write_index(self, plan: Plan) -> None:
        if len(plan.shards) == 1:
            return
        names = {output.key: self._name(i, plan) for i, shard in enumerate(plan.shards) for output in shard}
        total = sum(plan.nbytes(shard) for shard in range(len(plan.shards)))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2)
        write_atomically(self.work / INDEX, text.encode())

    # ---- torch.distributed.checkpoint -----------------------------------------------------------------------

    def _writer(self) -> FileSystemWriter:
        return FileSystemWriter(self.work, single_file_per_rank=True, sync_files=True, thread_count=1)

    def _write_metadata(self, plan: Plan) -> None:
        results: list[WriteResult] = []
        described: dict[str, Any] = {}
        for shard, outputs in enumerate(plan.shards):
            record = _read_json(self._records / f"{shard}.json")
            assert record is not None
            places = {key: _StorageInfo(record["file"], offset, length) for key, offset, length in record["infos"]}
            for output in outputs:
                index = MetadataIndex(output.key)
                described[output.key] = BytesStorageMetadata()
                if output.shape is not None and output.dtype is not None:
                    size, zeros = torch.Size(output.shape), torch.Size([0] * len(output.shape))
                    index = MetadataIndex(output.key, zeros, 0)
                    described[output.key] = TensorStorageMetadata(TensorProperties(output.dtype), size, [ChunkStorageMetadata(zeros, size)])
                place = places[output.key]
                results.append(WriteResult(index=index, size_in_bytes=place.length, storage_data=place))
        paths = {output.key: output.path for outputs in plan.shards for output in outputs}
        writer = self._writer()
        writer.set_up_storage_writer(is_coordinator=True)
        writer.finish(Metadata(described, planner_data=paths), [results])

    # ---- records ------------------------------------------------------------------------------------------

    def _is_done(self, shard: int, plan: Plan) -> bool:
        record = _read_json(self._records / f"{shard}.json")
        path = self.work / self._name(shard, plan)
        return record is not None and record.get("file") == path.name and path.is_file() and path.stat().st_size == record.get("size")


class _Streamed(Content):
    """The values of a shard's tensors as they come, where a conversion of one process would read them itself."""

    def __init__(self, values: Iterator[tuple[str, Any]]) -> None:
        self._values = values

    def write(self, item: Planned, output: FileOutput, *, checksum: bool = False) -> int:
        """Append the next tensor to ``output``."""
        key, tensor = next(self._values)
        assert (key, dtype_name(tensor.dtype), tuple(tensor.shape)) == (item.key, item.dtype, item.shape)
        output.write(tensor.reshape(-1).view(torch.uint8).numpy())
        return 0


def _note(plan: Plan) -> dict[str, str]:
    """By what an unfinished conversion is known again."""
    return {"plan": plan.digest, "checkpoint": plan.checkpoint}


def _planned(output: Output) -> Planned:
    assert output.shape is not None
    assert output.dtype is not None
    return Planned(Match(output.key, (output.key,)), dtype_name(output.dtype), output.shape, None)


def _write_dcp(path: Path, values: Iterator[tuple[str, Any]]) -> list[tuple[str, int, int]]:
    """Write one file as torch's own writer does, which would hold all of it in memory; keys with their offsets and lengths."""
    infos: list[tuple[str, int, int]] = []
    with path.open("xb") as file:
        for key, value in values:
            offset = file.tell()
            torch.save(value, file)
            infos.append((key, offset, file.tell() - offset))
            del value  # before the next portion is read
        file.flush()
        os.fsync(file.fileno())
    return infos


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
