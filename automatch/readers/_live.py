"""Checkpoints that are in memory already: loaded dicts, nested or bare, and specs without tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._base import Checkpoint, OpenCheckpoint, Region
from automatch.readers._unwrap import Node, pick_state
from automatch.specs import StateSpec, dtype_name, is_tensor, shape_of, spec_of_state_dict


@dataclass(frozen=True, slots=True)
class LiveEntry:
    """A tensor in memory."""

    value: Any

    @property
    def dtype(self) -> str:
        return dtype_name(self.value.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.value, "a tensor")

    def read(self) -> Any:
        return self.value

    def region(self) -> Region | None:
        return None


@dataclass(frozen=True, slots=True)
class ForeignEntry:
    """A tensor of an open checkpoint of somebody else's making."""

    checkpoint: Checkpoint
    key: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Any:
        return self.checkpoint.tensor(self.key)

    def region(self) -> Region | None:
        return None


@dataclass(frozen=True, slots=True)
class NoEntry:
    """A tensor of which only the spec is known."""

    key: str
    origin: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Any:
        raise CheckpointError(f"{self.origin or 'the checkpoint'} is a spec without tensors; pass the checkpoint to read {self.key!r}")

    def region(self) -> Region | None:
        return None


class LiveNode(Node):
    """How `pick_state` looks into loaded dicts."""

    @staticmethod
    def tensor(value: Any, key: str, origin: str) -> Any:
        try:
            if not is_tensor(value) or _is_numpy_scalar(value):
                return None
        except RuntimeError as error:  # what an uninitialised (lazy) parameter raises when asked for its shape
            raise CheckpointError(f"{key!a} of {origin} is an uninitialised (lazy) parameter; save it after one batch has run") from error
        shape_of(value, key)
        return value

    @staticmethod
    def shape(tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.shape)

    @staticmethod
    def mapping(value: Any) -> Mapping[Any, Any] | None:
        return cast("Mapping[Any, Any]", value) if isinstance(value, Mapping) else None


def _is_numpy_scalar(value: Any) -> bool:
    import numpy as np

    return isinstance(value, np.generic)


def open_dict(ckpt: Any, like: StateSpec | None, wrapper: Sequence[str] | None, origin: str = "state_dict") -> OpenCheckpoint:
    """Open a loaded checkpoint.

    Raises:
        CheckpointError: it holds no mapping of text to tensors.
    """
    state = pick_state(ckpt, LiveNode, origin=origin, like=like, wrapper=wrapper)
    spec = replace(spec_of_state_dict(state.tensors, origin=origin), wrapper=state.path, notes=state.notes)
    return OpenCheckpoint(spec, {key: LiveEntry(value) for key, value in state.tensors.items()}, tree=ckpt, live=True)


def open_foreign(checkpoint: Checkpoint) -> OpenCheckpoint:
    """Give an open checkpoint of somebody else's making the face of one of ours."""
    entries = {t.key: ForeignEntry(checkpoint, t.key, t.dtype, t.shape) for t in checkpoint.spec}
    return OpenCheckpoint(checkpoint.spec, entries)


def open_spec(spec: StateSpec) -> OpenCheckpoint:
    """Open a spec: there are no tensors behind it."""
    return OpenCheckpoint(spec, {t.key: NoEntry(t.key, spec.origin, t.dtype, t.shape) for t in spec})
