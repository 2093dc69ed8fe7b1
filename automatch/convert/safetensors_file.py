"""safetensors output: one file, or shards with an index as Hugging Face libraries read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from automatch.convert.content import Content
from automatch.convert.output import writing
from automatch.convert.plan import Planned
from automatch.errors import CheckpointError
from automatch.readers._dtypes import ITEM_BYTES, TO_SAFETENSORS


def write_safetensors(path: Path, plan: Sequence[Planned], metadata: Mapping[str, str], content: Content) -> None:
    """Write one file.

    Raises:
        CheckpointError: a dtype does not exist in safetensors.
    """
    ordered = _ordered(plan)
    with writing(path) as output:
        output.write(_header(ordered, metadata))
        for item in ordered:
            content.write(item, output)


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


def _ordered(plan: Iterable[Planned]) -> list[Planned]:
    # Wide elements first, as the format's own writer does, so that every tensor is aligned to its element.
    return sorted(plan, key=lambda item: -ITEM_BYTES[item.dtype])


def _header(plan: Iterable[Planned], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for item in plan:
        if item.dtype not in TO_SAFETENSORS:
            raise CheckpointError(f"{item.key!r} is {item.dtype}, which safetensors has not; write a .pt file instead")
        shape = list(item.shape)
        if item.dtype == "float4_e2m1fn_x2" and shape:
            shape[-1] *= 2
        header[item.key] = {"dtype": TO_SAFETENSORS[item.dtype], "shape": shape, "data_offsets": [at, at + item.nbytes]}
        at += item.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
