"""Name similarity: tokens of both sides compared through learnt conventions, then keys by soft alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rapidfuzz.distance import JaroWinkler
from rapidfuzz.process import cdist

Lexicon = Mapping[str, Mapping[str, float]]
_UPWARD = ("up", "dec", "fusion", "refine", "fpn", "neck", "lateral", "top_down")


def token_similarity(left: Sequence[str], right: Sequence[str], lexicon: Lexicon) -> np.ndarray:
    """Similarity in [0, 1] of every token of ``left`` with every token of ``right``."""
    result = cdist(left, right, scorer=JaroWinkler.normalized_similarity, dtype=np.float32).astype(np.float64)
    result = np.clip((result - 0.8) / 0.2, 0, 1) * 0.7
    digit_l = np.array([any(c.isdigit() for c in a) for a in left])
    digit_r = np.array([any(c.isdigit() for c in b) for b in right])
    result[digit_l[:, None] | digit_r[None, :]] = 0
    where = {b: j for j, b in enumerate(right)}
    for i, a in enumerate(left):
        bare = a.lstrip("~")
        for j, b in enumerate(right):
            if _abbreviates(bare, b.lstrip("~")):
                result[i, j] = max(result[i, j], 0.8)
        for b, value in lexicon.get(a, {}).items():
            j = where.get(b)
            if j is not None:
                result[i, j] = max(result[i, j], value)
        j = where.get(a)
        if j is not None:
            result[i, j] = 1.0
    return result


def _abbreviates(a: str, b: str) -> bool:
    """Whether one word is a shortening of the other: a prefix of 3 letters or more, or its consonants in order."""
    short, long = (a, b) if len(a) < len(b) else (b, a)
    if len(short) < 3 or short == long or short[-1].isdigit() or long[-1].isdigit() or short[0] != long[0]:
        return False
    if long.startswith(short):
        return True
    rest = iter(long)
    return len(short) >= 4 and all(letter in rest for letter in short)


def key_similarity(left: Sequence[tuple[str, ...]], right: Sequence[tuple[str, ...]], lexicon: Lexicon) -> np.ndarray:
    """Similarity in [0, 1] of every word list of ``left`` with every one of ``right``.

    Each word finds its best partner on the other side; words that say little (they stand in most
    lists of their side) weigh little.
    """
    tokens_l, weights_l, rows_l, cols_l = _vocabulary(left)
    tokens_r, weights_r, rows_r, cols_r = _vocabulary(right)
    if not tokens_l or not tokens_r:
        return np.ones((len(left), len(right))) * 0.5
    similar = token_similarity(tokens_l, tokens_r, lexicon)
    return 0.5 * (
        _aligned(similar, weights_l, rows_l, cols_l, rows_r, cols_r, len(left), len(right))
        + _aligned(similar.T, weights_r, rows_r, cols_r, rows_l, cols_l, len(right), len(left)).T
    )


def _vocabulary(lists: Sequence[tuple[str, ...]]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    index: dict[str, int] = {}
    rows: list[int] = []
    cols: list[int] = []
    for i, words in enumerate(lists):
        for word in words:
            rows.append(i)
            cols.append(index.setdefault(word, len(index)))
    n = max(1, len(lists))
    frequency = np.zeros(len(index))
    pairs = set(zip(rows, cols, strict=True))
    for _, col in pairs:
        frequency[col] += 1
    weights = 1.05 - (frequency / n) ** 2
    return list(index), weights, np.array(rows, dtype=np.intp), np.array(cols, dtype=np.intp)


def _aligned(similar, weights, rows, cols, rows_o, cols_o, n, n_other) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Weighted mean over a list's words of the best similarity within each other list."""
    best = np.zeros((similar.shape[0], n_other))
    order = np.argsort(rows_o, kind="stable")
    rows_o, cols_o = rows_o[order], cols_o[order]
    present, starts = np.unique(rows_o, return_index=True)
    best[:, present] = np.maximum.reduceat(similar[:, cols_o], starts, axis=1)
    total = np.zeros((n, n_other))
    np.add.at(total, rows, best[cols] * weights[cols][:, None])
    norm = np.zeros(n)
    np.add.at(norm, rows, weights[cols])
    return total / np.maximum(norm, 1e-9)[:, None]


def runs_upward(key: str) -> bool:
    """Whether a key lies where some libraries count from the deepest level and others from the shallowest."""
    return any(word.startswith(_UPWARD) for segment in key.lower().replace("/", ".").split(".") for word in segment.split("_"))
