"""Checkpoints whose tensors are known one by one: flat or nested tables of entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._base import Bytes, Entry, OpenCheckpoint, Region, SourceFile
from automatch.readers._dtypes import row_major, tensor_from_bytes
from automatch.readers._limits import check_count, check_keys
from automatch.readers._unwrap import Node, pick_state
from automatch.specs import StateSpec, TensorSpec

Wrapper = tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A tensor whose bytes lie in a file as they are."""

    file: Bytes
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    def read(self) -> Any:
        return tensor_from_bytes(self.file.read(self.offset, self.nbytes), self.dtype, self.shape, self.stride)

    def region(self) -> Region | None:
        if self.stride is not None and not row_major(self.shape, self.stride):
            return None
        return Region(*self.file.locate(self.offset), self.nbytes)


class EntryNode(Node):
    """How `pick_state` looks into nested tables of entries."""

    @staticmethod
    def tensor(value: Any, key: str, origin: str) -> Any:
        return value if hasattr(value, "region") else None

    @staticmethod
    def shape(tensor: Any) -> tuple[int, ...]:
        return tensor.shape

    @staticmethod
    def mapping(value: Any) -> Mapping[Any, Any] | None:
        return cast("Mapping[Any, Any]", value) if isinstance(value, dict) else None


def open_flat(
    entries: Mapping[str, Entry],
    origin: str,
    files: Sequence[SourceFile],
    *,
    metadata: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    wrapper: Wrapper = None,
) -> OpenCheckpoint:
    """Open a flat table of entries.

    Raises:
        CheckpointError: a wrapper is asked for, or keys are unfit.
    """
    if wrapper:
        raise CheckpointError(f"{origin} is flat: it holds no tensors at {'.'.join(wrapper)!a}; leave wrapper out")
    check_count(len(entries), origin)
    check_keys(entries, origin)
    return OpenCheckpoint(StateSpec(specs_of(entries), origin, notes=tuple(notes)), entries, tuple(files), metadata=metadata)


def open_nested(
    tree: Mapping[str, Any], origin: str, files: Sequence[SourceFile], like: StateSpec | None, wrapper: Wrapper, notes: Sequence[str] = ()
) -> OpenCheckpoint:
    """Open a nested table of entries: the part of it that fits ``like`` best."""
    state = pick_state(tree, EntryNode, origin=origin, like=like, wrapper=wrapper)
    spec = StateSpec(specs_of(state.tensors), origin, state.path, notes=(*notes, *state.notes))
    return OpenCheckpoint(spec, state.tensors, tuple(files))


def specs_of(entries: Mapping[str, Entry]) -> tuple[TensorSpec, ...]:
    """The specs of entries, in order."""
    return tuple(TensorSpec(key, entry.shape, entry.dtype) for key, entry in entries.items())


def nest(tree: dict[str, Any], path: Sequence[str], entry: Entry, origin: str) -> None:
    """Put an entry into a nested table.

    Raises:
        CheckpointError: the place is taken.
    """
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(cast(Any, tree), dict):
            raise CheckpointError(f"{'.'.join(path)!a} of {origin} lies below another tensor; the file is damaged")
    if path[-1] in tree:
        raise CheckpointError(f"{'.'.join(path)!a} stands twice in {origin}; keys must be unique")
    tree[path[-1]] = entry
