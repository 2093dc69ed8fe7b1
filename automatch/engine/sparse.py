"""What keeps large problems small: few candidates per item where a shape is held by too many, and look-ups in sparse matrices.

Nothing here is used for ordinary models: repeated modules are solved once (`automatch.engine.reduction`), and what is
left of a shape is a few hundred items at most. Thousands of items of one shape without repeated structure (random names,
lists whose members differ) get candidates by the words they share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

CROWDED = 1 << 18  # pairs of one shape beyond which not all of them are candidates
PARTNERS = 6  # word lists of the other side that a word list is compared with
DENSE = 1 << 22  # entries of a matrix beyond which it stays sparse
CHUNK = 512  # word lists at a time

Words = tuple[str, ...]
Soft = np.ndarray | sp.csr_matrix


def crowded_pairs(words_t: Sequence[Words], words_s: Sequence[Words], t: Sequence[int], s: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Candidate pairs between items of one shape: items of the same words, and of those that share most, rank by rank from both ends.

    Args:
        words_t, words_s: the words of every item of a side.
        t, s: the items of the shape, in order.
    """
    groups_t, groups_s = _grouped(words_t, t), _grouped(words_s, s)
    lists_t, lists_s = list(groups_t), list(groups_s)
    rows: list[np.ndarray] = []
    cols: list[np.ndarray] = []
    for one, two in _partners(lists_t, lists_s):
        members_t, members_s = np.array(groups_t[lists_t[one]]), np.array(groups_s[lists_s[two]])
        rank = np.arange(len(members_t))
        for other in (rank, len(members_s) - len(members_t) + rank, len(members_s) - 1 - rank):
            inside = (other >= 0) & (other < len(members_s))
            rows.append(members_t[inside])
            cols.append(members_s[other[inside]])
    if not rows:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    pairs = np.unique(np.stack([np.concatenate(rows), np.concatenate(cols)]), axis=1)
    return pairs[0], pairs[1]


def _grouped(words: Sequence[Words], items: Sequence[int]) -> dict[Words, list[int]]:
    groups: dict[Words, list[int]] = defaultdict(list)
    for i in items:
        groups[words[i]].append(i)
    return groups


def _partners(lists_t: Sequence[Words], lists_s: Sequence[Words]) -> list[tuple[int, int]]:
    """For every word list the few of the other side that share most with it, rare words counting more; none that share nothing."""
    incidence_t, incidence_s = incidences(lists_t, lists_s)
    found = []
    for start in range(0, len(lists_t), CHUNK):
        shared = (incidence_t[start : start + CHUNK] @ incidence_s.T).tocsr()
        for row in range(shape_of(shared)[0]):
            low, high = shared.indptr[row], shared.indptr[row + 1]
            order = np.lexsort((shared.indices[low:high], -shared.data[low:high]))[:PARTNERS]
            found.extend((start + row, int(col)) for col in shared.indices[low:high][order])
    return found


def incidences(lists_t: Sequence[Words], lists_s: Sequence[Words]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Which word lists hold which words, rare words weighing more, every row of length 1; words of more than half the lists left out."""
    ids: dict[str, int] = {}
    counts: dict[str, int] = defaultdict(int)
    for words in (*lists_t, *lists_s):
        for word in set(words):
            ids.setdefault(word, len(ids))
            counts[word] += 1
    n = len(lists_t) + len(lists_s)
    weight = {word: np.log(n / counts[word]) if 2 * counts[word] <= n else 0.0 for word in ids}

    def matrix(lists: Sequence[Words]) -> sp.csr_matrix:
        rows = [i for i, words in enumerate(lists) for word in set(words) if weight[word]]
        cols = [ids[word] for words in lists for word in set(words) if weight[word]]
        data = [weight[word] for words in lists for word in set(words) if weight[word]]
        found = sp.csr_matrix((data, (rows, cols)), shape=(len(lists), len(ids)))
        length = np.sqrt(np.asarray(found.multiply(found).sum(1)).ravel())
        return sp.csr_matrix(sp.diags(1 / np.maximum(length, 1e-9)) @ found)

    return matrix(lists_t), matrix(lists_s)


def shape_of(matrix: sp.csr_matrix) -> tuple[int, int]:
    """Rows and columns of a sparse matrix."""
    rows, columns = matrix.shape  # type: ignore[misc]  # the stubs allow none
    return int(rows), int(columns)


def product(left: sp.csr_matrix, middle: Soft, right: sp.csr_matrix) -> Soft:
    """``left.T @ middle @ right``, dense unless it is large."""
    result = left.T @ middle @ right
    if isinstance(result, np.ndarray):
        return result
    return result.toarray() if shape_of(left)[1] * shape_of(right)[1] <= DENSE else sp.csr_matrix(result)


def at(matrix: Soft, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The entries of a matrix at the given places, in the shape of ``rows``; 0 where a sparse one has none."""
    if isinstance(matrix, np.ndarray):
        return matrix[rows, cols]
    matrix.sum_duplicates()
    rows_of, width = shape_of(matrix)
    codes = np.repeat(np.arange(rows_of), np.diff(matrix.indptr)) * width + matrix.indices
    wanted = rows.astype(np.int64) * width + cols
    place = np.minimum(np.searchsorted(codes, wanted), max(0, len(codes) - 1))
    if not len(codes):
        return np.zeros(wanted.shape)
    return np.where(codes[place] == wanted, matrix.data[place], 0.0)
