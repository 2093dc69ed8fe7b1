"""safetensors output: one file, or shards with an index as Hugging Face libraries read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from automatch.convert.content import Content
from automatch.convert.output import writing
from automatch.convert.plan import Planned
from automatch.errors import CheckpointError
from automatch.readers._base import Region
from automatch.readers._dtypes import ITEM_BYTES, TO_SAFETENSORS

_PAGE = 4096


def write_safetensors(path: Path, plan: Sequence[Planned], metadata: Mapping[str, str], content: Content) -> None:
    """Write one file.

    Raises:
        CheckpointError: a dtype does not exist in safetensors.
    """
    laid_out = _laid_out(plan)
    with writing(path) as output:
        output.write(_header(plan, laid_out, metadata))
        for part in _runs(laid_out):
            if isinstance(part, Region):
                output.move(part, content.tick)
            else:
                content.write(part, output)


def write_folder(path: Path, plan: Sequence[Planned], metadata: Mapping[str, str], content: Content, limit: int) -> None:
    """Write shards of at most ``limit`` bytes and their index, or one file if one is enough."""
    shards = _split(plan, limit)
    if len(shards) == 1:
        write_safetensors(path / "model.safetensors", plan, metadata, content)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path / name, shard, metadata, content)
        weight_map |= {item.key: name for item in shard}
    index = {"metadata": {"total_size": sum(item.nbytes for item in plan)}, "weight_map": weight_map}
    with writing(path / "model.safetensors.index.json") as output:
        output.write(json.dumps(index, indent=2).encode() + b"\n")


def _split(plan: Iterable[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for item in plan:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _laid_out(plan: Iterable[Planned]) -> list[Planned]:
    """The order of the tensors' bytes: wide elements first, as the format's own writer has it, so that every tensor is
    aligned to its element; among those as they lie in the source, so that neighbours move together.
    """

    def place(item: Planned) -> tuple[int, bool, str, int]:
        first = item.regions[0] if item.regions else None
        return -ITEM_BYTES[item.dtype], first is None, str(first.file.path) if first else "", first.offset if first else 0

    return sorted(plan, key=place)


def _runs(plan: Iterable[Planned]) -> Iterator[Region | Planned]:
    """What is written one after the other: runs of bytes that are moved, and tensors that are decoded."""
    run: Region | None = None
    for item in plan:
        for region in item.regions or ():
            if run is not None and run.file is region.file and run.offset + run.nbytes == region.offset:
                run = Region(run.file, run.offset, run.nbytes + region.nbytes)
            else:
                if run is not None:
                    yield run
                run = region
        if item.regions is None:
            if run is not None:
                yield run
            run = None
            yield item
    if run is not None:
        yield run


def _header(plan: Iterable[Planned], laid_out: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    offsets: dict[str, int] = {}
    at = 0
    for item in laid_out:
        offsets[item.key] = at
        at += item.nbytes
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for item in plan:
        if item.dtype not in TO_SAFETENSORS:
            raise CheckpointError(f"{item.key!r} is {item.dtype}, which safetensors has not; write a .pt file instead")
        shape = list(item.shape)
        if item.dtype == "float4_e2m1fn_x2" and shape:
            shape[-1] *= 2
        start = offsets[item.key]
        header[item.key] = {"dtype": TO_SAFETENSORS[item.dtype], "shape": shape, "data_offsets": [start, start + item.nbytes]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * _padding(8 + len(text), laid_out)
    return len(text).to_bytes(8, "little") + text


def _padding(length: int, laid_out: Sequence[Planned]) -> int:
    """Spaces that bring the data to where it lies within a page in the source: the kernel then moves whole pages."""
    first = laid_out[0].regions if laid_out else None
    return (first[0].offset - length) % _PAGE if first and first[0].offset % 8 == 0 else -length % 8
