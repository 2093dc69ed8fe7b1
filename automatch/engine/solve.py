"""Joint matching of two sides: unary evidence, then context propagated by graduated assignment.

The soft assignment is Sinkhorn's with a slack on both sides (Gold & Rangarajan, "A graduated assignment
algorithm for graph matching", 1996), sharpened round by round. Between rounds every candidate pair is
scored again by how well the groups that hold its two items (modules, templates, suffixes, blocks)
have been matched as wholes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from automatch.engine.context import Context
from automatch.engine.evidence import flat_words, unary_evidence
from automatch.engine.items import canonical
from automatch.engine.names import Lexicon
from automatch.engine.sides import Side
from automatch.engine.sparse import CROWDED, DENSE, crowded_pairs


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each kind of evidence counts, in units of log odds."""

    name: float = 6.0
    contrast: float = 3.0
    ending: float = 2.0
    concept: float = 3.0
    region: float = 2.0
    role: float = 6.0
    rank: float = 2.0
    sibling: float = 1.0
    block: float = 1.5
    position: float = 1.0
    layout: float = 1.0
    sequence: float = 1.5
    node: float = 6.0
    template: float = 4.0
    suffix: float = 4.0
    direction: float = 3.0
    consensus: float = 2.0
    neighbour: float = 1.0
    beside: float = 1.5
    owner: float = 3.0
    turned: float = 3.0
    none: float = 3.0
    betas: tuple[float, ...] = (0.5, 0.7, 0.9, 1.1, 1.4, 1.7, 2.0, 2.5)


def candidates(source: Side, target: Side) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of items whose shapes differ by 1s and the order of axes only, by target and source position.

    All of them, but for shapes that too many items have (`automatch.engine.sparse`).
    """
    blocks: dict[tuple[int, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i, shape in enumerate(source.shapes):
        blocks[canonical(shape)][0].append(i)
    for j, shape in enumerate(target.shapes):
        blocks[canonical(shape)][1].append(j)
    words: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] | None = None
    t: list[np.ndarray] = []
    s: list[np.ndarray] = []
    for a, b in blocks.values():
        if len(a) * len(b) > CROWDED:
            words = words or (flat_words(target), flat_words(source))
            rows, cols = crowded_pairs(*words, b, a)
        else:
            rows, cols = np.repeat(np.array(b, np.intp), len(a)), np.tile(np.array(a, np.intp), len(b))
        t.append(rows)
        s.append(cols)
    if not t:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    t_all, s_all = np.concatenate(t), np.concatenate(s)
    order = np.lexsort((s_all, t_all))
    return t_all[order], s_all[order]


def soft_assignment(score: np.ndarray, t: np.ndarray, s: np.ndarray, n_t: int, n_s: int, none: float, beta: float) -> np.ndarray:
    """Sinkhorn's soft one-to-one assignment in which every item may also stay alone at the score ``none``."""
    x = np.exp(np.clip(beta * (score - none), -60, 60))
    of_t, of_s = np.ones(n_t), np.ones(n_s)
    for _ in range(4):
        of_t = 1.0 / (1.0 + np.bincount(t, x * of_s[s], n_t))
        of_s = 1.0 / (1.0 + np.bincount(s, x * of_t[t], n_s))
    return np.minimum(x * of_t[t] * of_s[s], 1.0)


@dataclass
class Solution:
    """Scores, soft assignment and evidence per candidate pair."""

    t: np.ndarray
    s: np.ndarray
    score: np.ndarray
    soft: np.ndarray
    evidence: dict[str, np.ndarray]

    @cached_property
    def index(self) -> dict[tuple[int, int], int]:
        """Where each candidate pair (target, source) stands."""
        return {pair: k for k, pair in enumerate(zip(self.t.tolist(), self.s.tolist(), strict=True))}

    def exchange(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let the second of each two candidate pairs stand where the first stood, and the other way round."""
        if pairs:
            one, two = np.array(pairs).T
            for values in (self.score, self.soft, *self.evidence.values()):
                values[one], values[two] = values[two], values[one].copy()


def _avoidable(these: np.ndarray, t: np.ndarray, s: np.ndarray, n_t: int, n_s: int) -> np.ndarray:
    """Pairs other than ``these`` both of whose items have a candidate among ``these``."""
    of_t, of_s = np.bincount(t, these, n_t) > 0, np.bincount(s, these, n_s) > 0
    return ~these & of_t[t] & of_s[s]


class _Turned:
    """Less than 0 for pairs whose axes are permuted and need not be, as far as most oblong pairs keep theirs; and the reverse."""

    def __init__(self, source: Side, target: Side, plain: np.ndarray, t: np.ndarray, s: np.ndarray) -> None:
        self._oblong = np.array([len(set(canonical(shape))) > 1 for shape in target.shapes])[t]
        self._plain = plain
        self._turned = _avoidable(plain, t, s, target.n, source.n)
        self._kept = _avoidable(self._oblong & ~plain, t, s, target.n, source.n) & self._oblong

    def __call__(self, soft: np.ndarray) -> np.ndarray:
        kept = float(soft[self._oblong & self._plain].sum() / max(soft[self._oblong].sum(), 1e-9))
        return -max(0.0, 2 * kept - 1) * self._turned - max(0.0, 1 - 2 * kept) * self._kept


def solve(source: Side, target: Side, lexicon: Lexicon, weights: Weights | None = None) -> Solution:
    """Score all candidate pairs of two sides jointly."""
    w = weights or Weights()
    t, s = candidates(source, target)
    if not len(t):
        return Solution(t, s, np.zeros(0), np.zeros(0), {})
    evidence = unary_evidence(source, target, t, s, lexicon)
    unary = sum(getattr(w, name) * values for name, values in evidence.items())
    context = Context(source, target, t, s)
    turned = _Turned(source, target, evidence["layout"] > 0, t, s)
    trust = source.order_trust[s] * target.order_trust[t]
    score = np.asarray(unary)
    for beta in w.betas:
        soft = soft_assignment(score, t, s, target.n, source.n, w.none, beta)
        found = context(soft) | {"turned": turned(soft)}
        for name in ("neighbour", "beside"):
            found[name] *= trust
        score = np.array(unary)
        for name, values in found.items():
            score += getattr(w, name) * values
        evidence.update(found)
    soft = soft_assignment(score, t, s, target.n, source.n, w.none, w.betas[-1])
    return Solution(t, s, score, soft, evidence)


def assign(solution: Solution, n_t: int, n_s: int, none: float) -> dict[int, int]:
    """The best one-to-one assignment in which every item may stay alone (Hungarian, per connected block)."""
    t, s = solution.t, solution.s
    if not len(t):
        return {}
    graph = sp.coo_matrix((np.ones(len(t)), (t, s + n_t)), shape=(n_t + n_s, n_t + n_s))
    _, label = sp.csgraph.connected_components(graph, directed=False)
    order = np.argsort(label[t], kind="stable")
    result: dict[int, int] = {}
    for pairs in np.split(order, np.flatnonzero(np.diff(label[t][order])) + 1):
        rows, row = np.unique(t[pairs], return_inverse=True)
        cols, col = np.unique(s[pairs], return_inverse=True)
        if len(rows) * (len(cols) + len(rows)) > DENSE:
            result.update(_assign_sparse(rows, cols, row, col, solution.score[pairs] - none))
            continue
        gain = np.zeros((len(rows), len(cols) + len(rows)))
        gain[:, : len(cols)] = -1e6
        gain[row, col] = solution.score[pairs] - none
        for a, b in zip(*linear_sum_assignment(-gain), strict=True):
            if b < len(cols) and gain[a, b] > 0:
                result[int(rows[a])] = int(cols[b])
    return result


def _assign_sparse(rows: np.ndarray, cols: np.ndarray, row: np.ndarray, col: np.ndarray, gain: np.ndarray) -> dict[int, int]:
    """The same for a block with many items of few candidates each: a full matching in which staying alone is a column of one's own."""
    useful = gain > 0
    own = np.arange(len(rows))
    cost = np.concatenate([gain.max(initial=0.0) + 1.0 - gain[useful], np.full(len(rows), gain.max(initial=0.0) + 1.0)])
    places = np.concatenate([row[useful], own]), np.concatenate([col[useful], len(cols) + own])
    graph = sp.csr_matrix((cost, places), shape=(len(rows), len(cols) + len(rows)))
    chosen = zip(*sp.csgraph.min_weight_full_bipartite_matching(graph), strict=True)
    return {int(rows[a]): int(cols[b]) for a, b in chosen if b < len(cols)}
