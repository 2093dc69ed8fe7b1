"""What single reads fill while a checkpoint is loaded: slices of a target, or whole sources of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from automatch.distributed.boxes import Piece, relative, sizes
from automatch.distributed.chunks import narrow
from automatch.distributed.entries import Entry
from automatch.distributed.reshapes import Box


@dataclass(slots=True)
class Part:
    """A read of a slice: its piece, the local tensor that it fills, and the buffer in between if one is needed."""

    piece: Piece
    local: torch.Tensor
    origin: Box
    buffer: torch.Tensor | None = None

    @property
    def target(self) -> torch.Tensor:
        """The part of the local tensor that is filled."""
        box = relative(self.piece.target, self.origin)
        return narrow(self.local.detach(), [start for start, _ in box], sizes(box))


@dataclass(slots=True)
class Whole:
    """A target that needs all of its sources: they are read, joined and cut."""

    entry: Entry
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    local: torch.Tensor | None
    box: Box | None
    waiting: int = 0
    buffers: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    objects: list[Any] = field(default_factory=list[Any])


@dataclass(frozen=True, slots=True)
class WholeRead:
    """A target whose sources are read whole on this rank, and why.

    Args:
        key: the target's key.
        nbytes: memory for the sources, in bytes, besides the target; held for one such target at a time.
        reason: why no slice of them will do.
    """

    key: str
    nbytes: int
    reason: str
