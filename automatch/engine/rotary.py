"""Rotary layouts: libraries keep the rows of query and key projections in one of two orders.

Meta's own checkpoints (``attention.wq``), GGUF files (``blk.#.attn_q``) and torchtune interleave the two
halves of every head, Hugging Face (``self_attn.q_proj``), flash-attn and litgpt keep them apart. Names and shapes
agree all the same, so a copy from one to the other loads without an error and computes nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from automatch.mapping import Match, Option, Question
from automatch.specs import StateSpec
from automatch.transforms import Copy, PermuteElements, Transform

INTERLEAVED = ("attention.wq.", "blk.0.attn_q.")
HALVES = ("self_attn.q_proj.", "mixer.Wqkv.")
UNSURE = 0.8  # rows reordered as the names suggest: right in 12 of the 14 cases of both corpora that propose it
_QUERY_KEY = re.compile(r"(?:^|[._/])(?:w[qk]|[qk]_proj|attn_[qk])(?:[._/]|$)")


def layout_of(spec: StateSpec) -> str | None:
    """Which of the two orders the names of a model are known for: "interleaved", "halves", or None."""
    keys = spec.keys
    tune = any(key.startswith("tok_embeddings") for key in keys) and any(".attn.q_proj." in key for key in keys)
    if tune or any(mark in key for key in keys for mark in INTERLEAVED):
        return "interleaved"
    rotary = not any("pos" in key and "emb" in key for key in keys)
    return "halves" if rotary and any(mark in key for key in keys for mark in HALVES) else None


def rotary_question(
    source: StateSpec, target: StateSpec, matches: Sequence[Match], number: int
) -> tuple[list[Match], Question | None, str | None]:
    """Where the layouts differ: the matches with query and key made unsure, the question that settles them, and a warning."""
    a, b = layout_of(source), layout_of(target)
    if a is None or b is None or a == b:
        return list(matches), None, None
    rows = [m for m in matches if _is_query_or_key(m, target)]
    if not rows:
        return list(matches), None, None
    sizes = head_sizes(source, [target[m.target].shape[0] for m in rows])
    doubtful = {m.target for m in rows}
    changed = [_unsure(_with(m, _reorder(target[m.target].shape[0], sizes[0], a))) if m.target in doubtful else m for m in matches]
    options = [
        Option(f"reorder, head size {size}", tuple(_with(m, _reorder(target[m.target].shape[0], size, a)) for m in rows), 0.9 / len(sizes))
        for size in sizes
    ]
    options.append(Option("as they are", tuple(_with(m, Copy()) for m in rows), 0.1))
    text = (
        f"The checkpoint keeps the rotary rows of queries and keys {_words(a)}, the model {_words(b)}: "
        f"reorder them, and for which head size? {len(rows)} keys hang on it."
    )
    keys = tuple(m.target for m in rows)
    warning = (
        f"rotary layout: {len(rows)} query and key tensors like {keys[0]!r} need their rows reordered ({a} to {b}); "
        "copied as they are the model computes nonsense"
    )
    return changed, Question(f"q{number}", text, tuple(options), keys), warning


def _words(layout: str) -> str:
    return "interleaved" if layout == "interleaved" else "in two halves"


def _is_query_or_key(match: Match, target: StateSpec) -> bool:
    return (
        len(match.sources) == 1
        and _QUERY_KEY.search(match.target) is not None
        and match.transform == Copy()
        and 1 <= len(target[match.target].shape) <= 2
        and "norm" not in match.target
    )


def _unsure(match: Match) -> Match:
    return replace(match, confidence=min(match.confidence, UNSURE))


def _with(match: Match, transform: Transform) -> Match:
    return replace(match, transform=transform, alternatives=())


def head_sizes(source: StateSpec, rows: Sequence[int]) -> list[int]:
    """The head sizes that fit all row counts: known from the rotary frequencies if the checkpoint keeps them, else the usual ones."""
    for tensor in source:
        if ("rope" in tensor.key or "inv_freq" in tensor.key) and len(tensor.shape) == 1 and tensor.shape[0] > 1:
            return [2 * tensor.shape[0]]
    usual = [size for size in (128, 64, 256, 96, 80, 32, 16) if all(count % size == 0 for count in rows)]
    return usual[:3] or [min(rows)]


def _reorder(rows: int, head: int, layout: str) -> Transform:
    heads = rows // head
    if layout == "interleaved":
        return PermuteElements(0, (heads, head // 2, 2), (0, 2, 1))
    return PermuteElements(0, (heads, 2, head // 2), (0, 2, 1))
