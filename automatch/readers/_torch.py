"""torch files: the zip form of today and the pickle form before it, read without executing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from automatch.errors import CheckpointError, UnsafeCheckpointError
from automatch.readers._base import Bytes, Entry, OpenCheckpoint, SourceFile
from automatch.readers._dtypes import ITEM_BYTES, TORCH_STORAGES
from automatch.readers._entries import FileEntry, Wrapper
from automatch.readers._limits import FREE_EXPANSION_ELEMENTS, MAX_PICKLE_BYTES, check_shape
from automatch.readers._pickle import Call, Global, Persistent, read_pickle, read_pickle_bytes
from automatch.readers._unwrap import Node, pick_state
from automatch.readers._zip import Archive, ZipEntry
from automatch.specs import StateSpec, TensorSpec

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_KNOWN_MODULES = frozenset(
    ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter", "collections", "builtins", "__builtin__", "_codecs")
)
# A pickle that names one of these was made to run something: no checkpoint needs them, so not even the
# weights of such a file are read. Other unknown names are left as descriptions and never called.
_HOSTILE_MODULES = frozenset(
    (
        "os", "posix", "nt", "posixpath", "ntpath", "sys", "subprocess", "pty", "shutil", "socket", "ssl", "http", "urllib",
        "requests", "ftplib", "smtplib", "webbrowser", "runpy", "importlib", "pkgutil", "codeop", "pdb", "bdb", "timeit",
        "ctypes", "cffi", "_ctypes", "multiprocessing", "signal", "asyncio", "threading", "_thread", "marshal", "pickle", "_pickle",
        "cloudpickle", "dill", "shelve", "zipimport", "ensurepip", "fileinput", "types", "pydoc", "linecache", "operator", "_operator",
    )
)  # fmt: skip
_HOSTILE_BUILTINS = frozenset(
    (
        "eval", "exec", "execfile", "compile", "__import__", "open", "file", "input", "raw_input", "getattr", "setattr",
        "delattr", "globals", "locals", "vars", "dir", "apply", "breakpoint", "exit", "quit", "help", "memoryview",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a pickle refers to."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class TorchTree:
    """The whole content of a torch file, so that it can be written again around other weights.

    Args:
        root: what the pickle describes.
        nodes: the nodes of the weights, by key.
        attributes: what hangs on the weights' own mapping, such as ``_metadata``.
        storage: how a storage is read.
    """

    root: Any
    nodes: Mapping[str, Any]
    attributes: Any
    storage: Callable[[Storage], Entry]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that a pickle describes: a strided view of a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two keys of one tensor share."""
        return (self.storage.key, self.dtype, self.offset, self.shape, self.stride)

    @property
    def span(self) -> int:
        """Number of elements from the first to the last one used."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


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
    ref = tensor_ref(tree)
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


def walk(tree: Any) -> Iterator[Any]:
    """Every node of a pickle's tree, once each, without recursion."""
    stack, seen = [tree], {id(tree)}
    while stack:
        node = stack.pop()
        yield node
        for child in _children(node):
            if not isinstance(child, str | int | float | bool | bytes | None) and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        table = cast("dict[Any, Any]", node)
        return [*table.values(), *table, getattr(table, "attributes", None)]
    if isinstance(node, list | tuple | set | frozenset):
        return list(cast("list[Any]", node))
    if isinstance(node, Call):
        return [node.function, node.args, node.kwargs, *node.state, *node.items, *node.pairs, *node.pairs.values()]
    return [node.id] if isinstance(node, Persistent) else []


def storage_of(node: Any) -> Storage | None:
    """What a persistent id says of a storage, or None if it is not one of torch's."""
    match node:
        case Persistent(id=("storage", Global(name=name), key, _, int(elements), *_)) if elements >= 0 and name in TORCH_STORAGES:
            return Storage(str(key), TORCH_STORAGES[name], elements)
        case _:
            return None


def tensor_ref(node: Any) -> TensorRef | None:
    """What a call says of a tensor, or None if it is not one of torch's ways to build a plain tensor."""
    if not isinstance(node, Call) or not isinstance(node.args, tuple):
        return None
    args = cast("tuple[Any, ...]", node.args)
    match node.path:
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" if args:
            return tensor_ref(args[0])
        case "torch._tensor._rebuild_from_type_v2" if len(args) >= 3 and _is_parameter(args[1]) and isinstance(args[2], tuple):
            return tensor_ref(Call(args[0], args[2]))
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" if len(args) >= 4:
            storage = storage_of(args[0])
            return storage and _strided(storage, storage.dtype, args[1:4])
        case "torch._utils._rebuild_tensor_v3" if len(args) >= 7 and isinstance(args[6], Global):
            storage, dtype = storage_of(args[0]), args[6].name
            return _strided(storage, dtype, args[1:4]) if storage and dtype in ITEM_BYTES else None
        case _:
            return None


def _is_parameter(node: Any) -> bool:
    return isinstance(node, Global) and node.path in ("torch.nn.parameter.Parameter", "torch.Tensor", "torch.nn.parameter.Buffer")


def _strided(storage: Storage, dtype: str, layout: tuple[Any, ...]) -> TensorRef:
    offset, size, stride = layout
    shape, steps = sizes(size), sizes(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(steps):
        raise CheckpointError("a tensor of the file has an impossible offset or stride; the file is damaged")
    ref = TensorRef(storage, dtype, offset, shape, steps)
    held = storage.elements * ITEM_BYTES[storage.dtype] // ITEM_BYTES[dtype]
    count = 1
    for extent in shape:
        count *= extent
    if offset + ref.span > held:
        raise CheckpointError(f"a tensor of shape {list(shape)} reaches beyond its storage of {held} elements; the file is damaged")
    if count > max(held, FREE_EXPANSION_ELEMENTS):
        raise CheckpointError(f"a tensor of shape {list(shape)} repeats a storage of only {held} elements; it is not read")
    return ref


def sizes(value: Any) -> tuple[int, ...]:
    """A shape as a pickle holds it: a tuple, a list, or torch's own."""
    if isinstance(value, Call) and value.path == "torch.Size" and isinstance(value.args, tuple) and value.args:
        value = cast("tuple[Any, ...]", value.args)[0]
    return check_shape(value, "a tensor", "the file")


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
    needs_code = sorted(name for name in names if not _known(name))
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


class TreeNode(Node):
    """How `pick_state` looks into the tree of a pickle."""

    @staticmethod
    def tensor(value: Any) -> TensorRef | None:
        return tensor_ref(value)

    @staticmethod
    def shape(tensor: TensorRef) -> tuple[int, ...]:
        return tensor.shape

    @staticmethod
    def mapping(value: Any) -> Mapping[Any, Any] | None:
        if isinstance(value, dict):
            return cast("dict[Any, Any]", value)
        if isinstance(value, Call) and value.pairs:
            return value.pairs
        return None


def _known(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return module in _KNOWN_MODULES or (module == "numpy.core.multiarray" and attribute.startswith("_reconstruct"))


def refuse_hostile(names: frozenset[str], origin: str) -> None:
    """Refuse a pickle that was made to run something.

    Raises:
        UnsafeCheckpointError: it names a function that no checkpoint needs.
    """
    found = sorted(name for name in names if _is_hostile(name))
    if found:
        raise UnsafeCheckpointError(
            f"{origin} is not read: its pickle would run {', '.join(map(ascii, found[:5]))}; "
            "trust=True runs it, so pass that only if you know who made the file"
        )


def _is_hostile(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return attribute in _HOSTILE_BUILTINS
    if name in ("operator.itemgetter", "types.SimpleNamespace", "operator.attrgetter"):
        return False
    return module.split(".")[0] in _HOSTILE_MODULES or module == "code"


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
