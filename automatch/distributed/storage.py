"""The checkpoints that ranks read together: torch.distributed.checkpoint directories and safetensors folders.

Both go through torch's own storage readers; what is added is that metadata is read without executing anything,
that it can be handed from rank to rank, and that a shard's bytes are read without those around them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from enum import EnumMeta
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from automatch.collector import no_collection
from automatch.distributed._slices import StoredTensor, read_slice, stored_tensor
from automatch.errors import CheckpointError, UnsafeCheckpointError
from automatch.readers._base import SourceFile
from automatch.readers._entries import FileEntry
from automatch.readers._safetensors import read_header

INDEX = "model.safetensors.index.json"
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


def _member(of: object, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 wrote ``getattr`` for: a member of an enumeration."""
    if not (isinstance(of, EnumMeta) and name in of.__members__):
        raise UnsafeCheckpointError(f"it takes {name!r} of {of!r}, which may be code; pass trust=True if you know who wrote it")
    return of.__members__[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what a DCP writer puts into ``.metadata``, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise UnsafeCheckpointError(f"it refers to {module}.{name}, which is code; pass trust=True if you know who wrote it")


def _in_batches(plan: LoadPlan, planner: LoadPlanner) -> Iterator[LoadPlan]:
    """The plan in the portions in which the planner wants it; one portion for torch's own planners."""
    batches = getattr(planner, "batches", None)
    for items in [plan.items] if batches is None else batches(plan.items):
        yield LoadPlan(items, plan.storage_data, plan.planner_data)


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


class DirectoryReader(FileSystemReader):
    """Reads a torch.distributed.checkpoint directory, of each stored chunk only the bytes that are asked for.

    Args:
        path: the directory.
        metadata: what `read_metadata` gave on another rank; None reads the file.
        trust: allow the metadata to execute code while it is unpickled.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata | None = None, *, trust: bool = False) -> None:
        super().__init__(path)
        self._metadata, self._trust = metadata, trust
        self.bytes_read = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, unpickled with nothing but torch's own metadata classes."""
        if self._metadata is None:
            self._metadata = _read_directory_metadata(Path(self.path), self._trust)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, file by file, in the portions that the planner wants."""
        for part in _in_batches(plan, planner):
            files: dict[str, list[ReadItem]] = {}
            for item in part.items:
                files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
            for name, items in files.items():
                self._read_file(name, items, planner)
        return _done()

    def _read_file(self, name: str, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        ordered = sorted(items, key=lambda item: self.storage_data[item.storage_index].offset)
        found: tuple[Any, StoredTensor | None] = (None, None)
        with self._open(name) as file:
            for item in ordered:
                info = self.storage_data[item.storage_index]
                if item.type == LoadItemType.BYTE_IO or info.transform_descriptors:
                    self._read_whole(file, info, item, planner)
                    continue
                if found[0] is not info:
                    found = (info, stored_tensor(file.fileno(), info.offset, info.length, f"{item.storage_index.fqn!r} in {name}"))
                if found[1] is None:
                    self._read_whole(file, info, item, planner)
                else:
                    target = planner.resolve_tensor(item).detach()
                    self.bytes_read += read_slice(file.fileno(), found[1], item.storage_offsets, item.lengths, target)
                    planner.commit_tensor(item, target)

    def _read_whole(self, file: IO[bytes], info: Any, item: ReadItem, planner: LoadPlanner) -> None:
        """What cannot be sliced: objects, and chunks that a stream transform (compression) has changed."""
        stream = self.transforms.transform_load_stream(item, info.transform_descriptors or (), self._slice_file(file, info))
        data = io.BytesIO(stream.read(-1))
        self.bytes_read += info.length
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, data)
            return
        tensor = cast(torch.Tensor, torch.load(data, map_location="cpu", weights_only=True))
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    def _open(self, name: str) -> IO[bytes]:
        root = Path(self.path)
        path = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{root}: the metadata points outside the checkpoint, at {name!r}; it is damaged or hostile")
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}; the checkpoint is incomplete") from error


class FolderReader(HuggingFaceStorageReader):
    """Reads a folder of safetensors files (or one such file); with an index, only the files that it names.

    Args:
        path: the folder or file.
        metadata: what `read_metadata` gave on another rank; None reads the files' headers.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata | None = None) -> None:
        super().__init__(str(path))
        self._metadata = metadata
        self._headers: dict[str, dict[str, FileEntry]] = {}
        self.bytes_read = 0

    def read_metadata(self) -> Metadata:
        """The metadata, from the headers of the files."""
        if self._metadata is None:
            for_listing = self.fs
            self.fs = cast(Any, _Listing(folder_files(Path(self.path))))
            try:
                self._metadata = super().read_metadata()
            except (SafetensorError, KeyError, ValueError) as error:
                raise CheckpointError(f"a safetensors file of {str(self.path)!r} is damaged: {error}") from error
            finally:
                self.fs = for_listing
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, file by file, in the portions that the planner wants."""
        for part in _in_batches(plan, planner):
            files: dict[str, list[ReadItem]] = {}
            for item in part.items:
                files.setdefault(Path(self.storage_data[item.storage_index].relative_path).name, []).append(item)
            for name, items in files.items():
                self._read_file(name, items, planner)
        return _done()

    def _read_file(self, name: str, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        root = Path(self.path)
        file = SourceFile(root if root.is_file() else root / name)
        try:
            if name not in self._headers:
                self._headers[name] = read_header(file)[0]
            entries = self._headers[name]
            for item in sorted(items, key=lambda item: entries[item.storage_index.fqn].offset):
                entry = entries[item.storage_index.fqn]
                label = f"{item.storage_index.fqn!r} in {name}"
                stored = StoredTensor(entry.offset, entry.shape, self.storage_data[item.storage_index].dtype, label)
                target = planner.resolve_tensor(item).detach()
                self.bytes_read += read_slice(file.fd, stored, item.storage_offsets, item.lengths, target)
                planner.commit_tensor(item, target)
        finally:
            file.close()


class _Listing:
    """A file system that lists the given files only."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def ls(self, _: Any) -> list[str]:
        return [str(file) for file in self._files]


Reader = DirectoryReader | FolderReader


def open_reader(path: str | os.PathLike[str], metadata: Metadata | None = None, *, trust: bool = False) -> Reader:
    """The storage reader for a path.

    Args:
        path: a DCP directory, a folder of safetensors files, or one safetensors file.
        metadata: what `read_metadata` gave on another rank.
        trust: allow DCP metadata to execute code while it is unpickled.

    Raises:
        CheckpointError: it is neither.
    """
    root = Path(path)
    if (root / ".metadata").is_file():
        return DirectoryReader(root, metadata, trust=trust)
    if folder_files(root):
        return FolderReader(root, metadata)
    raise CheckpointError(
        f"{str(root)!r} is neither a torch.distributed.checkpoint directory (no .metadata in it) nor a folder of safetensors files; "
        "open other formats with automatch.load on one process, or convert them first"
    )


def folder_files(root: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names; those of its index if it has one.

    Raises:
        CheckpointError: the index is damaged, or names a file that is not there.
    """
    if root.suffix == ".safetensors" and root.is_file():
        return [root]
    index = root / INDEX
    if not index.is_file():
        return sorted(file for file in root.glob("*.safetensors") if file.is_file())
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(index)!r} is not an index of safetensors files: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (root / name).is_file():
            raise CheckpointError(f"{str(index)!r} names {name!r}, which is not a file of that folder; the checkpoint is incomplete")
    return [root / name for name in names]


def identity(path: str | os.PathLike[str], *, times: bool = False) -> str:
    """A digest by which ranks see that they look at the same checkpoint: its index or metadata, and its files' sizes.

    Args:
        path: the checkpoint.
        times: also by when its files were written, so that one which was saved again is another one.
    """
    root = Path(path)
    digest = hashlib.sha256()
    for name in (".metadata", INDEX):
        if (root / name).is_file():
            digest.update((root / name).read_bytes())
    files = [root] if root.is_file() else sorted(f for f in root.iterdir() if f.suffix in (".safetensors", ".distcp"))
    for file in files:
        info = file.stat()
        written = info.st_mtime_ns if times else ""
        digest.update(f"{file.name}\0{info.st_size}\0{written}\n".encode("utf-8", "surrogateescape"))
    return "sha256:" + digest.hexdigest()


def _read_directory_metadata(root: Path, trust: bool) -> Metadata:
    path = root / ".metadata"
    try:
        with path.open("rb") as file, no_collection():
            metadata: Any = pickle.load(file) if trust else _MetadataUnpickler(file).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{str(path)!r} was not read: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(
            f"{str(path)!r} holds {type(metadata).__name__}, not the metadata of a torch.distributed.checkpoint directory"
        )
    return metadata
