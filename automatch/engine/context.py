"""Context: how well what surrounds a pair's items (modules, templates, neighbours, lists) is matched by the soft assignment."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import scipy.sparse as sp

from automatch.engine.sides import Side
from automatch.engine.sparse import DENSE, Soft, at, product
from automatch.keys import template_of


class Groups:
    """One family of groupings of a side's items (modules, templates, suffixes), as incidence and padded lists."""

    def __init__(self, memberships: Sequence[Sequence[Hashable]], n: int) -> None:
        ids: dict[Hashable, int] = {}
        lists = [[ids.setdefault(group, len(ids)) for group in dict.fromkeys(groups)] for groups in memberships]
        rows = [i for i, groups in enumerate(lists) for _ in groups]
        cols = [group for groups in lists for group in groups]
        self.count = max(1, len(ids))
        self.incidence = sp.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=(n, self.count))
        self.size = np.asarray(self.incidence.sum(0)).ravel()
        width = max((len(groups) for groups in lists), default=1) or 1
        self.padded = np.full((n, width), self.count)
        for i, groups in enumerate(lists):
            self.padded[i, : len(groups)] = groups
        self.dense = self.incidence.toarray() if n * self.count <= SMALL else None
        self.weight = np.append(np.log(1 + n / np.maximum(self.size, 1)), 0.0)


def module_groups(side: Side) -> Groups:
    """Every module on the way to an item."""
    return Groups([path[1:] for path in side.paths], side.n)


def template_groups(side: Side) -> Groups:
    """Every prefix of an item's key, numbers taken out."""
    return Groups([["/".join(map(template_of, segs[:d])) for d in range(1, len(segs) + 1)] for segs in side.segments], side.n)


def suffix_groups(side: Side) -> Groups:
    """The last two to four segments of an item's key, numbers kept."""
    return Groups([["/".join(segs[-d:]) for d in range(2, min(4, len(segs)) + 1)] or ["/".join(segs)] for segs in side.segments], side.n)


SMALL = 1 << 18  # up to this many entries dense matrices are faster than sparse ones


def matrix_of(soft: np.ndarray, t: np.ndarray, s: np.ndarray, n_t: int, n_s: int) -> Soft:
    """The soft assignment as a matrix, dense where it is small."""
    if n_t * n_s > SMALL:
        return sp.csr_matrix((soft, (t, s)), shape=(n_t, n_s))
    matrix = np.zeros((n_t, n_s))
    matrix[t, s] = soft
    return matrix


def context(target: Groups, source: Groups, matrix: Soft, t: np.ndarray, s: np.ndarray, *, compete: bool) -> np.ndarray:
    """How well the groups of a pair's items are matched with one another, in [0, 1].

    The similarity of two groups is the Jaccard index under the soft assignment; each group of an item
    takes its best partner among the groups of the other item, and small groups count more than large ones.
    """
    dense = target.dense is not None and source.dense is not None and isinstance(matrix, np.ndarray)
    both = target.dense.T @ matrix @ source.dense if dense else product(target.incidence, matrix, source.incidence)  # type: ignore[union-attr]
    jaccard = _jaccard(both, target.size, source.size, compete=compete)
    of_t, of_s = target.padded[t], source.padded[s]
    values = at(jaccard, *np.broadcast_arrays(of_t[:, :, None], of_s[:, None, :]))
    weight_t, weight_s = target.weight[of_t], source.weight[of_s]
    from_t = (values.max(2) * weight_t).sum(1) / np.maximum(weight_t.sum(1), 1e-9)
    from_s = (values.max(1) * weight_s).sum(1) / np.maximum(weight_s.sum(1), 1e-9)
    return 0.5 * (from_t + from_s)


def _jaccard(both: Soft, size_t: np.ndarray, size_s: np.ndarray, *, compete: bool = False) -> Soft:
    """Jaccard index of two sides' groups from the soft count they share, with a group of nothing at the end of either side.

    With ``compete`` each is measured by the best that one of the two groups has.
    """
    if isinstance(both, np.ndarray):
        jaccard = both / np.maximum(size_t[:, None] + size_s[None, :] - both, 1e-9)
        if compete:
            jaccard = jaccard * jaccard / np.maximum(np.maximum(jaccard.max(1, keepdims=True), jaccard.max(0, keepdims=True)), 1e-9)
        return np.pad(jaccard, ((0, 1), (0, 1)))
    held = both.tocoo()
    data = held.data / np.maximum(size_t[held.row] + size_s[held.col] - held.data, 1e-9)
    if compete:
        best_t, best_s = np.zeros(len(size_t)), np.zeros(len(size_s))
        np.maximum.at(best_t, held.row, data)
        np.maximum.at(best_s, held.col, data)
        data = data * data / np.maximum(np.maximum(best_t[held.row], best_s[held.col]), 1e-9)
    return sp.csr_matrix((data, (held.row, held.col)), shape=(len(size_t) + 1, len(size_s) + 1))


def neighbours(source: Side, target: Side, soft: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """How far the items before and after a pair's items are matched with one another."""
    rank_t, rank_s = np.argsort(np.argsort(target.position, kind="stable")), np.argsort(np.argsort(source.position, kind="stable"))
    if target.n * source.n > DENSE:
        held = sp.csr_matrix((soft, (rank_t[t] + 1, rank_s[s] + 1)), shape=(target.n + 2, source.n + 2))
        return at(held, rank_t[t] + 2, rank_s[s] + 2) + at(held, rank_t[t], rank_s[s])
    grid = np.zeros((target.n + 2, source.n + 2))
    grid[rank_t[t] + 1, rank_s[s] + 1] = soft
    return grid[rank_t[t] + 2, rank_s[s] + 2] + grid[rank_t[t], rank_s[s]]


def owners(source: Side, target: Side, soft: np.ndarray, matrix: Soft, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The share of the other entries of a pair's modules that are matched with one another; 0 where a module has no others."""
    of_t, _, owners_t = target.owner_runs()
    of_s, _, owners_s = source.owner_runs()
    size_t, size_s = np.asarray(owners_t.sum(0)).ravel(), np.asarray(owners_s.sum(0)).ravel()
    others = np.maximum(size_t[of_t[t]], size_s[of_s[s]]) - 1
    shared = at(product(owners_t, matrix, owners_s), of_t[t], of_s[s])
    return np.clip((shared - soft) / np.maximum(others, 1), 0, 1)


def module_neighbours(source: Side, target: Side, matrix: Soft, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """How far the modules before and after a pair's modules are matched with one another."""
    of_t, order_t, owners_t = target.owner_runs()
    of_s, order_s, owners_s = source.owner_runs()
    size_t, size_s = np.asarray(owners_t.sum(0)).ravel(), np.asarray(owners_s.sum(0)).ravel()
    jaccard = _jaccard(product(owners_t, matrix, owners_s), size_t, size_s)
    a, b = of_t[t], of_s[s]
    return at(jaccard, order_t[a, 0], order_s[b, 0]) + at(jaccard, order_t[a, 1], order_s[b, 1])


class Lists:
    """The numbered siblings of a side: for every item the kinds of the innermost ones around it, its rank there, and their number."""

    def __init__(self, side: Side) -> None:
        self.group = np.full((side.n, 2), -1)
        self.rank = np.zeros((side.n, 2), dtype=np.intp)
        self.size: list[int] = []
        ids: dict[tuple[str, int], int] = {}
        for i, path in enumerate(side.paths):
            numbered = [k for k in range(len(path) - 1, 0, -1) if path[k] in side.loop_nodes]
            for column, k in enumerate(numbered[:2]):
                rank, size = side.sibling_rank[path[k]]
                group = ids.setdefault((template_of(".".join(side.segments[i][: k - 1])), size), len(ids))
                if group == len(self.size):
                    self.size.append(size)
                self.group[i, column], self.rank[i, column] = group, rank


def directions(source: Lists, target: Lists, soft: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """For pairs in numbered siblings of equal count: whether the siblings run forwards or backwards, and the pair agrees."""
    result = np.zeros(len(t))
    if not source.size or not target.size:
        return result
    size_t, size_s = np.array([*target.size, -1]), np.array([*source.size, -2])
    for a in range(2):
        for b in range(2):
            of_t, of_s = target.group[t, a], source.group[s, b]
            rank_t, rank_s = target.rank[t, a], source.rank[s, b]
            n = size_t[of_t]
            same = (of_t >= 0) & (of_s >= 0) & (n == size_s[of_s]) & (n > 1)
            lists = of_t * (len(source.size) + 1) + of_s
            lists = np.where(same, lists, 0)
            ahead, back = same & (rank_t == rank_s), same & (rank_t == n - 1 - rank_s)
            count = int(lists.max()) + 1
            forward, backward = np.bincount(lists, soft * (ahead & ~back), count), np.bincount(lists, soft * (back & ~ahead), count)
            lean = (forward - backward) / np.maximum(forward + backward, 1.0)
            result += np.where(ahead & ~back, lean[lists], 0.0) - np.where(back & ~ahead, lean[lists], 0.0)
    return np.clip(result, -2, 2)


def kind_ids(side: Side) -> np.ndarray:
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(side.loop_template(i), len(ids)) for i in range(side.n)])


def consensus(kinds: tuple[np.ndarray, np.ndarray], soft: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The share of a target kind's soft pairs (the same key in three or more repeated modules) that go to the pair's source kind."""
    of_t, of_s = kinds[0][t], kinds[1][s]
    _, place = np.unique(of_t * (int(of_s.max()) + 1) + of_s, return_inverse=True)
    both = np.bincount(place, soft)
    total = np.maximum(np.bincount(of_t, soft), 1e-9)
    many = np.bincount(kinds[0])[of_t] > 2
    return np.where(many, both[place] / np.maximum(total[of_t], 0.5), 0.0)
