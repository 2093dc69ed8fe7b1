"""What a conversion says of itself when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Progress = Callable[[int, int], None]


class Conversion(NamedTuple):
    """What a conversion wrote.

    Args:
        path: the file or folder.
        n_keys: number of tensors.
        n_bytes: bytes of all tensors.
        n_moved: how many tensors were moved as bytes, without being decoded.
        verified: whether every tensor was read again and compared.
        notes: what a person should know, e.g. what the output format could not keep.
    """

    path: Path
    n_keys: int
    n_bytes: int
    n_moved: int
    verified: bool
    notes: tuple[str, ...] = ()
