"""Fused queries, keys and values: one after the other, or interleaved head by head.

Megatron and what was written after it (GPT-NeoX, BLOOM) keep ``query_key_value`` as (heads, 3, head size), others
(``Wqkv``, ``c_attn``, ``in_proj_weight``, ``qkv``) as (3, heads, head size). Shapes agree all the same, and names are a habit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from automatch.engine.rotary import UNSURE
from automatch.mapping import Match, Option, Question
from automatch.specs import StateSpec
from automatch.transforms import Copy, Permute, PermuteElements, Slice, Transform, chain

USUAL = (64, 128, 96, 80, 256, 32, 16)  # head sizes, the most frequent first
_BY_HEAD = re.compile(r"query_key_value")
_IN_TURN = re.compile(r"(?:^|[._/])(?:wqkv|c_attn|in_proj|qkv)(?:[._/]|$)|in_proj_(?:weight|bias)", re.IGNORECASE)
_PART = re.compile(r"(?:^|[._/])(?:q|k|v|query|key|value)(?:_proj|_lin)?(?:[._/]|$)")


def fused_question(source: StateSpec, matches: Sequence[Match], number: int) -> tuple[list[Match], Question | None, str | None]:
    """Where the habits of the two names differ: the matches with their rows reordered and unsure, the question, and a warning."""
    rows = {m.target: m for m in matches if _differs(source, m)}
    if not rows:
        return list(matches), None, None
    lengths = [source[m.sources[0]].shape[0] // 3 for m in rows.values()]
    sizes = [size for size in USUAL if all(length % size == 0 and length > size for length in lengths)][:3] or [min(lengths)]
    keys = tuple(rows)
    options = [
        Option(f"interleaved, head size {size}", tuple(_reordered(source, m, size) for m in rows.values()), 0.9 / len(sizes))
        for size in sizes
    ]
    options.append(Option("one after the other on both sides", tuple(map(_unsure, rows.values())), 0.1))
    first = {match.target: match for match in options[0].matches}
    changed = [first.get(m.target, m) for m in matches]
    example = rows[keys[0]]
    text = (
        f"By their names {example.sources[0]!r} and {example.target!r} order the rows of queries, keys and values differently: "
        f"interleaved by head, and of which size? {len(keys)} keys hang on it."
    )
    warning = (
        f"fused rows: {len(keys)} tensors like {keys[0]!r} probably need their rows reordered; "
        "copied as they are the model computes nonsense"
    )
    return changed, Question(f"q{number}", text, tuple(options), keys), warning


def _differs(source: StateSpec, match: Match) -> bool:
    if len(match.sources) != 1:
        return False
    key = match.sources[0]
    shape = source[key].shape
    if not shape or shape[0] % 3:
        return False
    if isinstance(match.transform, Slice):
        third = match.transform.dim == 0 and match.transform.length == shape[0] // 3
        return third and bool(_BY_HEAD.search(key) and _PART.search(match.target))
    one, two = bool(_BY_HEAD.search(key)), bool(_BY_HEAD.search(match.target))
    return one != two and isinstance(match.transform, Copy | Permute) and bool(_IN_TURN.search(match.target if one else key))


def _reordered(source: StateSpec, match: Match, size: int) -> Match:
    heads = source[match.sources[0]].shape[0] // (3 * size)
    by_head = _BY_HEAD.search(match.sources[0]) is not None
    rows = PermuteElements(0, (heads, 3, size) if by_head else (3, heads, size), (1, 0, 2))
    transform: Transform = rows if isinstance(match.transform, Copy) else chain(rows, match.transform)
    return _unsure(replace(match, transform=transform, alternatives=()))


def _unsure(match: Match) -> Match:
    return replace(match, confidence=min(match.confidence, UNSURE))
