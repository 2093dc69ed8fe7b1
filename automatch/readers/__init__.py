"""Opening checkpoints: specs from headers first, tensors one at a time, nothing executed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from automatch.errors import CheckpointError
from automatch.readers._base import Checkpoint, OpenCheckpoint
from automatch.readers._files import open_path
from automatch.readers._live import open_dict, open_foreign, open_spec
from automatch.readers._quantised import quantised_note
from automatch.specs import StateSpec

__all__ = ["Checkpoint", "OpenCheckpoint", "as_open_checkpoint", "open_checkpoint"]


class _Borrowed:
    """A checkpoint that somebody else opened and will close."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner

    @property
    def spec(self) -> StateSpec:
        return self.inner.spec

    def tensor(self, key: str) -> Any:
        return self.inner.tensor(key)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def open_checkpoint(ckpt: Any, *, like: StateSpec | None = None, wrapper: Sequence[str] | None = None, trust: bool = False) -> Checkpoint:
    """Open a checkpoint: a path, a loaded dict (nested or bare), a `StateSpec`, or an open checkpoint.

    Only headers are read and nothing is executed; tensors are read one at a time, when asked for.

    Args:
        ckpt: what to open.
        like: the model's spec; of several nested state dicts the one that fits it best is taken.
        wrapper: the path of dict keys to the state dict, when it is known already.
        trust: allow a pickle to run the code it wants to run.

    Raises:
        CheckpointError: it cannot be read, or holds no mapping of text to tensors.
        UnsafeCheckpointError: reading it would execute code.
        MissingExtraError: its format needs a package that is not installed.
    """
    if isinstance(ckpt, StateSpec):
        return open_spec(ckpt)
    if isinstance(ckpt, str | os.PathLike):
        path = Path(cast("str | os.PathLike[str]", ckpt))
        return _noted(open_path(path, like=like, wrapper=None if wrapper is None else tuple(wrapper), trust=trust))
    if isinstance(ckpt, Mapping | list | tuple):
        return _noted(open_dict(cast(Any, ckpt), like, wrapper))
    if hasattr(ckpt, "spec") and hasattr(ckpt, "tensor"):
        return _Borrowed(cast(Checkpoint, ckpt))
    raise CheckpointError(f"a {type(ckpt).__name__} is not a checkpoint; pass a path, a dict of tensors or an open checkpoint")


def as_open_checkpoint(checkpoint: Checkpoint) -> OpenCheckpoint:
    """An open checkpoint with what conversions need of it: entries, files, and the content around the weights."""
    inner = checkpoint.inner if isinstance(checkpoint, _Borrowed) else checkpoint
    return inner if isinstance(inner, OpenCheckpoint) else open_foreign(inner)


def _noted(checkpoint: OpenCheckpoint) -> OpenCheckpoint:
    note = quantised_note(checkpoint.spec)
    if note is not None:
        checkpoint.spec = replace(checkpoint.spec, notes=(*checkpoint.spec.notes, note))
    return checkpoint
