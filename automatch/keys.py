"""Keys taken apart: segments, words, numbers; templates and natural order. Knows nothing of tensors."""

from __future__ import annotations

import re
from functools import lru_cache

_PIECES = re.compile(r"\d+|[A-Z]+(?![a-z])|[A-Z][a-z]*|[a-z]+|[^\W\d_]+")
_NUMBER = re.compile(r"\d+")

Piece = str | int


@lru_cache(maxsize=1 << 16)
def pieces_of(segment: str) -> tuple[Piece, ...]:
    """Words (lower case) and numbers of one segment: ``"LayerNorm_1"`` gives ``("layer", "norm", 1)``."""
    return tuple(int(piece) if piece.isdigit() and piece.isascii() else piece.lower() for piece in _PIECES.findall(segment))


def segments_of(key: str) -> list[str]:
    """The segments of a key, split at dots and slashes."""
    return key.replace("/", ".").split(".")


def template_of(key: str) -> str:
    """The key with every number replaced by ``#``."""
    return _NUMBER.sub("#", key) if not key.isalpha() else key


def numbers_of(key: str) -> tuple[int, ...]:
    """Every number in the key, in order."""
    return tuple(int(number) for number in _NUMBER.findall(key))


def natural_order(key: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key) if part)
