"""Keras files: HDF5 weights, alone or in a `.keras` archive, through h5py and without TensorFlow."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

from automatch.errors import CheckpointError, MissingExtraError
from automatch.readers._base import Bytes, OpenCheckpoint, Region, SourceFile
from automatch.readers._dtypes import ITEM_BYTES
from automatch.readers._entries import Wrapper, nest, open_nested
from automatch.readers._limits import FREE_INFLATION_BYTES, MAX_DEPTH, MAX_INFLATION, MAX_TENSORS, check_shape
from automatch.readers._zip import Archive
from automatch.specs import StateSpec

WEIGHTS = "model.weights.h5"
_MAX_MEMBER = 2**31


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """A dataset of an HDF5 file."""

    dataset: Any
    dtype: str
    shape: tuple[int, ...]
    raw: Region | None

    def read(self) -> Any:
        import numpy as np
        import torch

        try:
            return torch.from_numpy(np.asarray(self.dataset[()], np.dtype(self.dtype)))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"dataset {self.dataset.name!a} cannot be read ({error}); the file is damaged") from error

    def region(self) -> Region | None:
        return self.raw


def open_keras_archive(file: SourceFile, archive: Archive, like: StateSpec | None, wrapper: Wrapper) -> OpenCheckpoint:
    """Open a `.keras` archive: the weights in it."""
    info = archive.members[WEIGHTS]
    if info.compress_type == zipfile.ZIP_STORED:
        return open_hdf5(file, file.window(archive.offset_of(info), info.file_size), like, wrapper)
    return open_hdf5(file, io.BytesIO(archive.read(WEIGHTS, _MAX_MEMBER)), like, wrapper)


def open_hdf5(file: SourceFile, content: Bytes | io.BytesIO, like: StateSpec | None, wrapper: Wrapper) -> OpenCheckpoint:
    """Open an HDF5 file of weights.

    Raises:
        CheckpointError: it is damaged, or refers to other files.
        MissingExtraError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError(f'{file.path} is a Keras file; to read it, run: pip install "automatch[keras]"') from error
    origin = str(file.path)
    try:
        handle = h5py.File(content.stream() if isinstance(content, Bytes) else content, "r")
        tree: dict[str, Any] = {}
        _walk(handle, h5py, tree, origin, content if isinstance(content, Bytes) else None)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, UnicodeError) as error:
        raise CheckpointError(f"{origin} is a damaged HDF5 file ({str(error)[:200]}); fetch it again") from error
    return open_nested(tree, origin, [file], like, wrapper)


def _walk(handle: Any, h5py: Any, tree: dict[str, Any], origin: str, content: Bytes | None) -> None:
    stack: list[tuple[Any, tuple[str, ...]]] = [(handle, ())]
    seen: set[int] = set()
    count = 0
    while stack:
        group, path = stack.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or len(path) > MAX_DEPTH:
            raise CheckpointError(f"group {'/'.join(path)!a} of {origin} is linked twice or lies too deep; it is not read")
        seen.add(address)
        below: list[tuple[Any, tuple[str, ...]]] = []
        for name in group:
            count += 1
            if count > MAX_TENSORS:
                raise CheckpointError(f"{origin} has more than {MAX_TENSORS} entries; it is not read")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CheckpointError(f"{name!a} of {origin} is a link to elsewhere; it is not read")
            child = group[name]
            if isinstance(child, h5py.Group):
                below.append((child, (*path, name)))
            elif isinstance(child, h5py.Dataset) and child.dtype.kind in "fiubc":
                nest(tree, (*path, name), _entry(child, origin, content), origin)
        stack.extend(reversed(below))


def _entry(dataset: Any, origin: str, content: Bytes | None) -> DatasetEntry:
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"dataset {dataset.name!a} of {origin} lies in another file; it is not read")
    dtype = dataset.dtype.newbyteorder("=").name
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"dataset {dataset.name!a} of {origin} has dtype {dtype!r}, which torch has not")
    shape = check_shape(tuple(dataset.shape), dataset.name, origin)
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > FREE_INFLATION_BYTES + MAX_INFLATION * stored:
        raise CheckpointError(f"dataset {dataset.name!a} of {origin} declares {dataset.nbytes} bytes, but stores {stored}")
    offset = dataset.id.get_offset()
    raw = None
    if content is not None and offset is not None and dataset.chunks is None and dataset.dtype.isnative and stored == dataset.nbytes:
        raw = Region(*content.locate(int(offset)), stored)
    return DatasetEntry(dataset, dtype, shape, raw)
