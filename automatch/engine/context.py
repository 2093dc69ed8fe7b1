"""Context: how well what surrounds a pair's items (modules, templates, neighbours, lists) is matched by the soft assignment."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import scipy.sparse as sp

from automatch.engine.sides import Side
from automatch.engine.sparse import DENSE, Soft, at, product
from automatch.keys import template_of

SMALL = 1 << 18  # up to this many entries dense matrices are faster than sparse ones


class Context:
    """The evidence of what surrounds the candidate pairs; what does not change from round to round is worked out once.

    Args:
        source, target: the sides.
        t, s: the candidate pairs, by target and source position.
    """

    def __init__(self, source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> None:
        self._t, self._s, self._shape = t, s, (target.n, source.n)
        self._families = {
            "node": _Family(_module_groups(target), _module_groups(source), t, s, compete=True),
            "template": _Family(_template_groups(target), _template_groups(source), t, s, compete=False),
            "suffix": _Family(_suffix_groups(target), _suffix_groups(source), t, s, compete=False),
        }
        self._directions = _Directions(_Lists(source), _Lists(target), t, s)
        self._consensus = _Consensus(_kind_ids(target), _kind_ids(source), t, s)
        self._neighbours = _Neighbours(source, target, t, s)
        self._owners = _Owners(source, target, t, s)

    def __call__(self, soft: np.ndarray) -> dict[str, np.ndarray]:
        """Each signal's values per candidate pair under a soft assignment of them."""
        if self._shape[0] * self._shape[1] > SMALL:
            matrix = sp.csr_matrix((soft, (self._t, self._s)), shape=self._shape)
        else:
            matrix = np.zeros(self._shape)
            matrix[self._t, self._s] = soft
        owner, beside = self._owners(matrix, soft)
        return {
            **{name: family(matrix) for name, family in self._families.items()},
            "direction": self._directions(soft),
            "consensus": self._consensus(soft),
            "owner": owner,
            "neighbour": self._neighbours(soft),
            "beside": beside,
        }


# ---- groups --------------------------------------------------------------------------------------------------


class _Groups:
    """One family of groupings of a side's items: the groups each item is in, the same for all items of a kind."""

    def __init__(self, memberships: Sequence[Sequence[Hashable]]) -> None:
        n = len(memberships)
        ids: dict[Hashable, int] = {}
        kinds: dict[tuple[int, ...], int] = {}
        lists = [tuple(dict.fromkeys(ids.setdefault(group, len(ids)) for group in groups)) for groups in memberships]
        self.kind = np.array([kinds.setdefault(groups, len(kinds)) for groups in lists], dtype=np.intp)
        self.count = max(1, len(ids))
        rows = [i for i, groups in enumerate(lists) for _ in groups]
        cols = [group for groups in lists for group in groups]
        self.incidence = sp.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=(n, self.count))
        self.dense = self.incidence.toarray() if n * self.count <= SMALL else None
        self.size = np.bincount(np.array(cols, dtype=np.intp), minlength=self.count).astype(np.float64)
        self.weight = np.append(np.log(1 + n / np.maximum(self.size, 1)), 0.0)
        # By kind, padded with a group of nothing.
        self.padded = np.full((len(kinds), max(1, *map(len, kinds)) if kinds else 1), self.count)
        for groups, kind in kinds.items():
            self.padded[kind, : len(groups)] = groups


def _module_groups(side: Side) -> _Groups:
    """Every module on the way to an item."""
    return _Groups([path[1:] for path in side.paths])


def _template_groups(side: Side) -> _Groups:
    """Every prefix of an item's key, numbers taken out."""
    return _Groups([["/".join(map(template_of, segs[:d])) for d in range(1, len(segs) + 1)] for segs in side.segments])


def _suffix_groups(side: Side) -> _Groups:
    """The last two to four segments of an item's key, numbers kept."""
    return _Groups([["/".join(segs[-d:]) for d in range(2, min(4, len(segs)) + 1)] or ["/".join(segs)] for segs in side.segments])


class _Family:
    """How well the groups of a pair's items are matched with one another, in [0, 1].

    The similarity of two groups is the Jaccard index under the soft assignment; each group of an item
    takes its best partner among the groups of the other item, and small groups count more than large ones.
    """

    def __init__(self, target: _Groups, source: _Groups, t: np.ndarray, s: np.ndarray, *, compete: bool) -> None:
        self._target, self._source, self._compete = target, source, compete
        kinds, self._pair = np.unique(target.kind[t] * len(source.padded) + source.kind[s], return_inverse=True)
        of_t, of_s = target.padded[kinds // len(source.padded)].T, source.padded[kinds % len(source.padded)].T
        self._places = np.broadcast_arrays(of_t[:, None, :], of_s[None, :, :])
        self._flat = of_t[:, None, :] * (source.count + 1) + of_s[None, :, :]
        weight_t, weight_s = target.weight[of_t], source.weight[of_s]
        self._weight_t, self._weight_s = (0.5 * w / np.maximum(w.sum(0), 1e-9) for w in (weight_t, weight_s))

    def __call__(self, matrix: Soft) -> np.ndarray:
        target, source = self._target, self._source
        if target.dense is not None and source.dense is not None and isinstance(matrix, np.ndarray):
            both = target.dense.T @ matrix @ source.dense
        else:
            both = product(target.incidence, matrix, source.incidence)
        jaccard = _jaccard(both, target.size, source.size, compete=self._compete)
        values = jaccard.ravel().take(self._flat) if isinstance(jaccard, np.ndarray) else at(jaccard, *self._places)
        return ((values.max(1) * self._weight_t).sum(0) + (values.max(0) * self._weight_s).sum(0))[self._pair]


def _jaccard(both: Soft, size_t: np.ndarray, size_s: np.ndarray, *, compete: bool = False) -> Soft:
    """Jaccard index of two sides' groups from the soft count they share, with a group of nothing at the end of either side.

    With ``compete`` each is measured by the best that one of the two groups has.
    """
    if isinstance(both, np.ndarray):
        result = np.zeros((len(size_t) + 1, len(size_s) + 1))
        jaccard = both / np.maximum(size_t[:, None] + size_s[None, :] - both, 1e-9)
        if compete:
            jaccard *= jaccard / np.maximum(np.maximum(jaccard.max(1, keepdims=True), jaccard.max(0, keepdims=True)), 1e-9)
        result[:-1, :-1] = jaccard
        return result
    held = both.tocoo()
    data = held.data / np.maximum(size_t[held.row] + size_s[held.col] - held.data, 1e-9)
    if compete:
        best_t, best_s = np.zeros(len(size_t)), np.zeros(len(size_s))
        np.maximum.at(best_t, held.row, data)
        np.maximum.at(best_s, held.col, data)
        data = data * data / np.maximum(np.maximum(best_t[held.row], best_s[held.col]), 1e-9)
    return sp.csr_matrix((data, (held.row, held.col)), shape=(len(size_t) + 1, len(size_s) + 1))


# ---- what stands beside --------------------------------------------------------------------------------------


class _Neighbours:
    """How far the items before and after a pair's items are matched with one another."""

    def __init__(self, source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> None:
        rank_t, rank_s = (np.argsort(np.argsort(side.position, kind="stable")) + 1 for side in (target, source))
        self._shape = target.n + 2, source.n + 2
        self._own, self._after, self._before = ((rank_t[t] + by, rank_s[s] + by) for by in (0, 1, -1))

    def __call__(self, soft: np.ndarray) -> np.ndarray:
        if self._shape[0] * self._shape[1] > DENSE:
            held: Soft = sp.csr_matrix((soft, self._own), shape=self._shape)
        else:
            held = np.zeros(self._shape)
            held[self._own] = soft
        return at(held, *self._after) + at(held, *self._before)


class _Owners:
    """The share of the other entries of a pair's modules that are matched with one another (0 where a module has no others),
    and how far the modules before and after them are."""

    def __init__(self, source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> None:
        of_t, beside_t, self._owners_t = target.owner_runs()
        of_s, beside_s, self._owners_s = source.owner_runs()
        self._size_t, self._size_s = np.bincount(of_t).astype(np.float64), np.bincount(of_s).astype(np.float64)
        self._pair = a, b = of_t[t], of_s[s]
        self._others = np.maximum(np.maximum(self._size_t[a], self._size_s[b]) - 1, 1)
        self._before, self._after = ((beside_t[a, side], beside_s[b, side]) for side in (0, 1))
        small = target.n * len(self._size_t) <= SMALL and source.n * len(self._size_s) <= SMALL
        self._dense = (self._owners_t.toarray(), self._owners_s.toarray()) if small else None

    def __call__(self, matrix: Soft, soft: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._dense is not None and isinstance(matrix, np.ndarray):
            shared: Soft = self._dense[0].T @ matrix @ self._dense[1]
        else:
            shared = product(self._owners_t, matrix, self._owners_s)
        jaccard = _jaccard(shared, self._size_t, self._size_s)
        beside = at(jaccard, *self._before) + at(jaccard, *self._after)
        return np.clip((at(shared, *self._pair) - soft) / self._others, 0, 1), beside


# ---- lists -----------------------------------------------------------------------------------------------------


class _Lists:
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


class _Directions:
    """For pairs in numbered siblings of equal count: whether the siblings run forwards or backwards, and the pair agrees."""

    def __init__(self, source: _Lists, target: _Lists, t: np.ndarray, s: np.ndarray) -> None:
        self._n = len(t)
        self._ways: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]] = []
        if not source.size or not target.size:
            return
        size_t, size_s = np.array([*target.size, -1]), np.array([*source.size, -2])
        for a in range(2):
            for b in range(2):
                of_t, of_s = target.group[t, a], source.group[s, b]
                rank_t, rank_s = target.rank[t, a], source.rank[s, b]
                n = size_t[of_t]
                same = (of_t >= 0) & (of_s >= 0) & (n == size_s[of_s]) & (n > 1)
                ahead, back = same & (rank_t == rank_s), same & (rank_t == n - 1 - rank_s)
                lists = of_t * (len(source.size) + 1) + of_s
                one, two = np.flatnonzero(ahead & ~back), np.flatnonzero(back & ~ahead)
                if len(one) or len(two):
                    self._ways.append((one, two, lists[one], lists[two], int(lists.max()) + 1))

    def __call__(self, soft: np.ndarray) -> np.ndarray:
        result = np.zeros(self._n)
        for ahead, back, of_ahead, of_back, count in self._ways:
            forward, backward = np.bincount(of_ahead, soft[ahead], count), np.bincount(of_back, soft[back], count)
            lean = (forward - backward) / np.maximum(forward + backward, 1.0)
            result[ahead] += lean[of_ahead]
            result[back] -= lean[of_back]
        return np.clip(result, -2, 2)


def _kind_ids(side: Side) -> np.ndarray:
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(side.loop_template(i), len(ids)) for i in range(side.n)])


class _Consensus:
    """The share of a target kind's soft pairs (the same key in three or more repeated modules) that go to the pair's source kind."""

    def __init__(self, kinds_t: np.ndarray, kinds_s: np.ndarray, t: np.ndarray, s: np.ndarray) -> None:
        self._of_t = kinds_t[t]
        _, self._place = np.unique(self._of_t * (int(kinds_s.max()) + 1) + kinds_s[s], return_inverse=True)
        self._many = np.bincount(kinds_t)[self._of_t] > 2

    def __call__(self, soft: np.ndarray) -> np.ndarray:
        both, total = np.bincount(self._place, soft), np.bincount(self._of_t, soft)
        return np.where(self._many, both[self._place] / np.maximum(total[self._of_t], 0.5), 0.0)
