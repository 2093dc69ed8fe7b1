"""torch files: the zip form of today and the pickle form before it, read without executing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from automatch.errors import CheckpointError, UnsafeCheckpointError
from automatch.readers._base import Bytes, Entry, OpenCheckpoint, SourceFile
from automatch.readers._dtypes import ITEM_BYTES
from automatch.readers._entries import FileEntry, Wrapper
from automatch.readers._hostile import is_known, refuse_hostile
from automatch.readers._limits import MAX_PICKLE_BYTES
from automatch.readers._pickle import read_pickle, read_pickle_bytes
from automatch.readers._pickle_nodes import Call, Persistent
from automatch.readers._torch_tree import Storage, TensorRef, TorchTree, TreeNode, storage_of, tensor_ref, walk
from automatch.readers._unwrap import pick_state
from automatch.readers._zip import Archive, ZipEntry
from automatch.specs import StateSpec, TensorSpec

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def open_torch_zip(file: SourceFile, archive: Archive, like: StateSpec | None, wrapper: Wrapper) -> OpenCheckpoint:
    """Open a file that `torch.save` wrote in the zip form."""
    origin = str(file.path)
    pickle_name = next(name for name in archive.members if name.endswith("data.pkl"))
    folder = pickle_name.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.members:
        raise CheckpointError(f"{origin} is a TorchScript archive; save the state_dict() of the loaded module instead")
    order = archive.read(f"{folder}byteorder", 16) if f"{folder}byteorder" in archive.members else b"little"
    if order != b"little":
        raise CheckpointError(f"{origin} holds big-endian tensors; load it with torch.load and save it again on this machine")
    tree, names = read_pickle_bytes(archive.read(pickle_name, MAX_PICKLE_BYTES), origin)
    return _open_tree(tree, names, file, lambda ref: _zip_entry(archive, folder, ref), like, wrapper)


def tensor_entry(part: Bytes) -> Entry:
    """The one tensor that `torch.save` wrote into a part of a file, as the distributed format does.

    Raises:
        CheckpointError: there is something else.
    """
    archive = Archive(part)
    name = next((name for name in archive.members if name.endswith("data.pkl")), "data.pkl")
    tree, _ = read_pickle_bytes(archive.read(name, MAX_PICKLE_BYTES), str(part.path))
    ref = tensor_ref(tree, "a part", str(part.path))
    if ref is None:
        raise CheckpointError(f"a part of {part.path} holds a {type(tree).__name__} instead of a tensor; the folder is damaged")
    return _zip_entry(archive, name.removesuffix("data.pkl"), ref)


def _zip_entry(archive: Archive, folder: str, ref: TensorRef) -> ZipEntry:
    member = archive.members.get(f"{folder}data/{ref.storage.key}")
    if member is None:
        raise CheckpointError(f"storage {ref.storage.key!r} is missing in {archive.file.path}; the archive is damaged")
    size = ITEM_BYTES[ref.dtype]
    if (ref.offset + ref.span) * size > member.file_size:
        raise CheckpointError(f"a tensor of {archive.file.path} reaches beyond its storage {ref.storage.key!r}; the file is damaged")
    return ZipEntry(archive, member, ref.offset * size, ref.span * size, ref.dtype, ref.shape, ref.stride)


def open_torch_legacy(file: SourceFile, like: StateSpec | None, wrapper: Wrapper) -> OpenCheckpoint:
    """Open a file that `torch.save` wrote before torch 1.6, or any plain pickle of tensors."""
    origin = str(file.path)
    stream = file.stream()
    tree, names = read_pickle(stream, origin)
    storages: dict[str, tuple[int, int]] = {}
    if type(tree) is int and tree == LEGACY_MAGIC:
        read_pickle(stream, origin)
        read_pickle(stream, origin)
        tree, names = read_pickle(stream, origin)
        keys, _ = read_pickle(stream, origin)
        storages = _legacy_storages(file, stream.tell(), keys, _storage_sizes(tree))

    def entry(ref: TensorRef) -> Entry:
        start, nbytes = storages.get(ref.storage.key, (0, -1))
        size = ITEM_BYTES[ref.dtype]
        if (ref.offset + ref.span) * size > nbytes:
            raise CheckpointError(f"a tensor of {origin} reaches beyond its storage {ref.storage.key!r}; the file is damaged")
        return FileEntry(file, start + ref.offset * size, ref.span * size, ref.dtype, ref.shape, ref.stride)

    return _open_tree(tree, names, file, entry, like, wrapper)


def _storage_sizes(tree: Any) -> dict[str, int]:
    """Bytes per element of every storage that the tree refers to."""
    sizes: dict[str, int] = {}
    for node in walk(tree):
        if isinstance(node, Persistent) and (storage := storage_of(node)) is not None:
            sizes[storage.key] = ITEM_BYTES[storage.dtype]
    return sizes


def _legacy_storages(file: SourceFile, at: int, keys: Any, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    if not isinstance(keys, list):
        raise CheckpointError(f"{file.path} does not list its storages; the file is damaged")
    found: dict[str, tuple[int, int]] = {}
    for key in map(str, cast("list[Any]", keys)):
        elements = int.from_bytes(file.read(at, 8).tobytes(), "little", signed=True)
        nbytes = elements * sizes.get(key, 1)
        if elements < 0 or at + 8 + nbytes > file.size:
            raise CheckpointError(f"{file.path} is truncated: storage {key!r} needs {nbytes} bytes from {at + 8}, the file has {file.size}")
        found[key] = (at + 8, nbytes)
        at += 8 + nbytes
    return found


def _open_tree(
    tree: Any,
    names: frozenset[str],
    file: SourceFile,
    entry: Callable[[TensorRef], Entry],
    like: StateSpec | None,
    wrapper: tuple[str, ...] | None,
) -> OpenCheckpoint:
    origin = str(file.path)
    refuse_hostile(names, origin)
    needs_code = sorted(name for name in names if not is_known(name))
    state = pick_state(tree, TreeNode, origin=origin, like=like, wrapper=wrapper, needs_code=tuple(needs_code))
    refs: dict[str, TensorRef] = state.tensors
    first: dict[Any, str] = {}
    tensors: list[TensorSpec] = []
    for key, ref in refs.items():
        alias = first.setdefault(ref.identity, key) if ref.span else key
        tensors.append(TensorSpec(key, ref.shape, ref.dtype, alias_of=None if alias == key else alias))
    for key, other in state.others.items():
        _refuse_tensor_subclass(key, other, origin)
    spec = StateSpec(tuple(tensors), origin, state.path, notes=state.notes)
    whole = TorchTree(tree, state.nodes, state.attributes, lambda storage: entry(_whole(storage)))
    return OpenCheckpoint(spec, {key: entry(ref) for key, ref in refs.items()}, (file,), tree=whole)


def _whole(storage: Storage) -> TensorRef:
    return TensorRef(storage, storage.dtype, 0, (storage.elements,), (1,))


def _refuse_tensor_subclass(key: str, value: Any, origin: str) -> None:
    if isinstance(value, Call) and any(storage_of(node) for node in walk(value)):
        raise UnsafeCheckpointError(
            f"entry {key!r} of {origin} is built by {value.path!a}, which would have to run; "
            "pass trust=True if you know who made the file, or save it as plain tensors"
        )


def open_trusted(path: Path) -> Any:
    """Load a file with everything that its pickle wants to run."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever the file's own code raises
        raise CheckpointError(f"cannot read {str(path)!r} even with trust=True: {type(error).__name__}: {error}") from error
