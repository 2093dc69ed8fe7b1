"""Opening checkpoints: specs from headers first, tensors one at a time, nothing executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from automatch.specs import StateSpec, spec_of_state_dict


class Checkpoint(Protocol):
    """An open checkpoint: its spec at once, each tensor when asked for; a context manager."""

    @property
    def spec(self) -> StateSpec: ...

    def tensor(self, key: str) -> Any: ...

    def close(self) -> None: ...

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class _DictCheckpoint:
    def __init__(self, state_dict: Mapping[str, Any], spec: StateSpec) -> None:
        self._state_dict, self.spec = state_dict, spec

    def tensor(self, key: str) -> Any:
        return self._state_dict[key]

    def close(self) -> None:
        pass

    def __enter__(self) -> _DictCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    ckpt: Any, *, like: StateSpec | None = None, wrapper: Sequence[str] | None = None, trust: bool = False
) -> Checkpoint:
    """Open a checkpoint: a path, a loaded dict (nested or bare), a `StateSpec`, or an open checkpoint.

    Args:
        ckpt: what to open.
        like: the model's spec; of several nested state dicts the one that fits it best is taken.
        wrapper: the path of dict keys to the state dict, when it is known already.
        trust: allow unpickling arbitrary code.
    """
    if isinstance(ckpt, StateSpec):
        return _DictCheckpoint({}, ckpt)
    if isinstance(ckpt, str | Path):
        import torch

        ckpt = torch.load(ckpt, map_location="cpu", weights_only=True)
    if "state_dict" in ckpt:
        ckpt = ckpt["state_dict"]
    return _DictCheckpoint(ckpt, spec_of_state_dict(ckpt))
