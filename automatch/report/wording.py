"""Rounding and phrasing that every renderer shares, and making hostile keys safe to look at."""

from __future__ import annotations

import math
import re
import unicodedata

from automatch.transforms import Adapt, Chain, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, Transform

MAX_KEY = 240
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MAYBE_HOSTILE = re.compile(r"[^\x20-\x7e]")


def visible(text: str) -> str:
    """``text`` with every control, bidirectional and invisible character written as an escape."""
    if not _MAYBE_HOSTILE.search(text):
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _INVISIBLE else c for c in text)


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def short(text: str, limit: int = MAX_KEY) -> str:
    """``visible(text)``, its middle left out beyond ``limit`` characters; quoted where it is blank."""
    shown = visible(text) if text.strip() else f'"{visible(text)}"'
    if len(shown) <= limit:
        return shown
    tail = limit // 2
    return f"{shown[: limit - tail - 1]}…{shown[-tail:]}"


def percent(confidence: float) -> str:
    """A probability in [0, 1] as a percentage, never rounded up to a certainty it has not got."""
    if 0 < confidence < 0.01:
        return "<1%"
    return f"{math.floor(confidence * 100 + 1e-9)}%"


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A shape as people write it: ``64×3×7×7``; ``scalar`` for ``()``; ``?`` where nobody knows it."""
    if shape is None:
        return "?"
    return "×".join(map(str, shape)) or "scalar"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``1 key``, ``12,000 keys``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def transform_text(transform: Transform) -> str:
    """What a transform does in a few words; empty for a plain copy."""
    match transform:
        case Copy():
            return ""
        case Reshape(shape):
            return f"reshape to {shape_text(shape)}"
        case Permute((1, 0)):
            return "transpose"
        case Permute(dims):
            return f"permute axes to {','.join(map(str, dims))}"
        case Slice(dim, start, length):
            return f"entries {start}…{start + length - 1} of axis {dim}"
        case Concat(dim):
            return f"join along axis {dim}"
        case Stack(dim):
            return f"stack on a new axis {dim}"
        case PermuteElements(dim, split, order):
            return f"reorder axis {dim} ({shape_text(split)} read as {','.join(map(str, order))})"
        case Adapt(method, shape):
            return f"adapt to {shape_text(shape)} ({visible(method)}; only when asked for)"
        case Chain(steps):
            return ", then ".join(transform_text(step) for step in steps)


def invents_values(transform: Transform) -> bool:
    """Whether a transform invents or drops values (an `Adapt` step)."""
    return any(isinstance(step, Adapt) for step in (transform.steps if isinstance(transform, Chain) else (transform,)))
