"""torch.distributed.checkpoint folders: shapes from `.metadata`, tensors joined from their chunks.

torch unpickles `.metadata` with everything in it; here it is read as data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._base import OpenCheckpoint, Region, SourceFile
from automatch.readers._dtypes import ITEM_BYTES
from automatch.readers._entries import Wrapper, nest, open_nested
from automatch.readers._folders import MAX_FILES, inside
from automatch.readers._hostile import refuse_hostile
from automatch.readers._limits import MAX_PICKLE_BYTES, check_shape
from automatch.readers._pickle import read_pickle
from automatch.readers._pickle_nodes import Call, Global
from automatch.readers._torch import tensor_entry
from automatch.readers._torch_tree import sizes
from automatch.specs import StateSpec

MAX_CHUNKS = 1_000_000
MAX_CELLS = 10**9


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: SourceFile
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor in chunks; each is what `torch.save` writes of one tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self) -> Any:
        import torch

        if len(self.chunks) == 1:
            return self._part(self.chunks[0])
        whole = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        for chunk in self.chunks:
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.shape, strict=True))
            whole[box] = self._part(chunk)
        return whole

    def region(self) -> Region | None:
        return None

    def _part(self, chunk: Chunk) -> Any:
        entry = tensor_entry(chunk.file.window(chunk.start, chunk.length))
        if entry.shape != chunk.shape or entry.dtype != self.dtype:
            raise CheckpointError(
                f"a chunk of {self.key!a} in {chunk.file.path} is {entry.dtype} {list(entry.shape)}, "
                f"but .metadata says {self.dtype} {list(chunk.shape)}; the folder is damaged"
            )
        return entry.read()


def open_dcp(folder: Path, like: StateSpec | None, wrapper: Wrapper) -> OpenCheckpoint:
    """Open a folder that `torch.distributed.checkpoint.save` wrote.

    Raises:
        CheckpointError: `.metadata` is damaged, or a tensor's chunks do not cover it.
    """
    origin = str(folder)
    files: dict[str, SourceFile] = {}
    try:
        root = _attributes(_read_metadata(folder))
        places = _places(root.get("storage_data"), origin)
        paths = root.get("planner_data")
        tree: dict[str, Any] = {}
        for key, value in _table(root.get("state_dict_metadata"), origin).items():
            tensor = _tensor(key, value, places, folder, files)
            if tensor is not None:
                nest(tree, _path(key, paths), tensor, origin)
        return open_nested(tree, origin, list(files.values()), like, wrapper)
    except BaseException:
        for file in files.values():
            file.close()
        raise


def _read_metadata(folder: Path) -> Any:
    file = SourceFile(folder / ".metadata")
    try:
        if file.size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{file.path} has {file.size} bytes; at most {MAX_PICKLE_BYTES} are read")
        tree, names = read_pickle(file.stream(), str(file.path))
    finally:
        file.close()
    refuse_hostile(names, str(file.path))
    if not isinstance(tree, Call) or not tree.path.endswith("metadata.Metadata"):
        raise CheckpointError(f"{file.path} does not hold the metadata of a distributed checkpoint; the folder is damaged")
    return tree


def _attributes(node: Any) -> dict[str, Any]:
    if isinstance(node, Call) and node.state and isinstance(node.state[-1], dict):
        return cast("dict[str, Any]", node.state[-1])
    return {}


def _table(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast("dict[Any, Any]", value)):
        raise CheckpointError(f"the .metadata of {origin} is malformed; the folder is damaged")
    return cast("dict[str, Any]", value)


def _places(value: Any, origin: str) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """(key, offsets) of every chunk → (file name, offset, length)."""
    found: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    for node, info in cast("Mapping[Any, Any]", value if isinstance(value, dict) else {}).items():
        index, place = _attributes(node), _attributes(info)
        match place:
            case {"relative_path": str(name), "offset": int(start), "length": int(length)} if start >= 0 and length >= 0:
                offset = index.get("offset")
                key = str(index.get("fqn"))
                found[(key, None if offset is None else sizes(offset, key, origin))] = (name, start, length)
            case _:
                raise CheckpointError(f"the .metadata of {origin} is malformed; the folder is damaged")
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{origin} was written through {place['transform_descriptors']!a}; save it without transforms")
    if len(found) > MAX_CHUNKS:
        raise CheckpointError(f"{origin} has more than {MAX_CHUNKS} chunks; it is not read")
    return found


def _path(key: str, paths: Any) -> tuple[str, ...]:
    path = cast("dict[str, Any]", paths).get(key) if isinstance(paths, dict) else None
    if isinstance(path, tuple) and path:
        return tuple(str(part) for part in cast("tuple[Any, ...]", path))
    return (key,)


def _tensor(
    key: str, value: Any, places: Mapping[Any, tuple[str, int, int]], folder: Path, files: dict[str, SourceFile]
) -> ChunkedTensor | None:
    if not isinstance(value, Call) or not value.path.endswith("TensorStorageMetadata"):
        return None
    data, origin = _attributes(value), str(folder)
    shape = sizes(data.get("size"), key, origin)
    dtype = _dtype(data.get("properties"), key, origin)
    chunks: list[Chunk] = []
    for node in cast("list[Any]", data.get("chunks") if isinstance(data.get("chunks"), list) else []):
        box = _attributes(node)
        offsets, extent = sizes(box.get("offsets"), key, origin), sizes(box.get("sizes"), key, origin)
        place = places.get((key, offsets)) or (places.get((key, None)) if not any(offsets) else None)
        if place is None or len(offsets) != len(shape) or len(extent) != len(shape):
            raise CheckpointError(f"a chunk of {key!a} is missing in {origin}; the folder is damaged")
        name, start, length = place
        if name not in files:
            if len(files) >= MAX_FILES:
                raise CheckpointError(f"{origin} has more than {MAX_FILES} files; it is not read")
            files[name] = SourceFile(inside(folder, name, origin))
        if start + length > files[name].size:
            raise CheckpointError(f"{files[name].path} is truncated: {key!a} ends at byte {start + length} of {files[name].size}")
        chunks.append(Chunk(offsets, extent, files[name], start, length))
    _check_cover(key, shape, chunks, origin)
    return ChunkedTensor(key, dtype, shape, tuple(chunks))


def _dtype(node: Any, key: str, origin: str) -> str:
    state = node.state[-1] if isinstance(node, Call) and node.state else None
    first = cast("tuple[Any, ...]", state)[0] if isinstance(state, tuple) and state else _attributes(node).get("dtype")
    if not isinstance(first, Global) or first.name not in ITEM_BYTES:
        raise CheckpointError(f"{key!a} of {origin} has a dtype that this automatch does not know")
    return first.name


def _check_cover(key: str, shape: tuple[int, ...], chunks: list[Chunk], origin: str) -> None:
    """Make sure that the chunks tile the tensor: disjoint, inside, and all of it."""
    if sum(_volume(chunk.shape) for chunk in chunks) != _volume(shape) or not _cover(shape, chunks):
        raise CheckpointError(f"the chunks of {key!a} in {origin} do not tile its shape {list(shape)}; the folder is damaged")


def _cover(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether every cell of the grid that the chunks' edges span lies in a chunk, and no chunk outside the shape."""
    import numpy as np

    if 0 in shape or not shape:
        return True
    edges = [sorted({edge for c in chunks for edge in (c.offsets[d], c.offsets[d] + c.shape[d])}) for d in range(len(shape))]
    cells = math.prod(len(along) - 1 for along in edges)
    if [(along[0], along[-1]) for along in edges] != [(0, size) for size in shape] or cells * len(chunks) > MAX_CELLS:
        return False
    places = [{edge: at for at, edge in enumerate(along)} for along in edges]
    grid = np.zeros([len(along) - 1 for along in edges], bool)
    for chunk in chunks:
        box = zip(places, chunk.offsets, chunk.shape, strict=True)
        grid[tuple(slice(place[start], place[start + size]) for place, start, size in box)] = True
    return bool(grid.all())


def _volume(shape: tuple[int, ...]) -> int:
    check_shape(shape, "a chunk", "the folder")
    count = 1
    for size in shape:
        count *= size
    return count
