"""Joint matching of two sides: unary evidence, then context propagated by graduated assignment.

The soft assignment is Sinkhorn's with a slack on both sides (Gold & Rangarajan, "A graduated assignment
algorithm for graph matching", 1996), sharpened round by round. Between rounds every candidate pair is
scored again by how well the groups that hold its two items (modules, templates, suffixes, blocks)
have been matched as wholes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from automatch.engine.conventions import concept_evidence, shipped_conventions
from automatch.engine.items import canonical, squeezed
from automatch.engine.names import Lexicon, key_similarity
from automatch.engine.sides import Side
from automatch.keys import natural_order, template_of

Soft = np.ndarray | sp.csr_matrix


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each kind of evidence counts, in units of log odds."""

    name: float = 6.0
    ending: float = 2.0
    concept: float = 3.0
    region: float = 2.0
    role: float = 6.0
    rank: float = 2.0
    sibling: float = 1.0
    block: float = 1.5
    position: float = 1.0
    layout: float = 1.0
    node: float = 6.0
    template: float = 4.0
    suffix: float = 4.0
    direction: float = 3.0
    consensus: float = 2.0
    neighbour: float = 1.0
    beside: float = 1.5
    none: float = 3.0
    betas: tuple[float, ...] = (0.5, 0.7, 0.9, 1.1, 1.4, 1.7, 2.0, 2.5)


ROLES = {
    **dict.fromkeys(("weight", "kernel", "gamma", "scale", "w", "weights", "embedding", "embeddings"), "weight"),
    **dict.fromkeys(("bias", "beta", "b", "biases", "offset"), "bias"),
    "mean": "mean",
    "var": "var",
    "variance": "var",
    "tracked": "tracked",
    "index": "index",
    "ids": "index",
}


def role_of(words: Sequence[str]) -> str:
    """What an entry is within its module, from the words of its last segment."""
    last = [word for word in words if not word[-1].isdigit()]
    return ROLES.get(last[-1], "other") if last else "other"


@dataclass(slots=True)
class Problem:
    """Two sides, their candidate pairs and the evidence of each pair."""

    source: Side
    target: Side
    t: np.ndarray
    s: np.ndarray
    unary: np.ndarray
    evidence: dict[str, np.ndarray] = field(default_factory=dict)


def candidates(source: Side, target: Side) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of items whose shapes differ by 1s and the order of axes only, by target and source position."""
    blocks: dict[tuple[int, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i, shape in enumerate(source.shapes):
        blocks[canonical(shape)][0].append(i)
    for j, shape in enumerate(target.shapes):
        blocks[canonical(shape)][1].append(j)
    t = [np.repeat(np.array(b), len(a)) for a, b in blocks.values() if a and b]
    s = [np.tile(np.array(a), len(b)) for a, b in blocks.values() if a and b]
    if not t:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    t_all, s_all = np.concatenate(t), np.concatenate(s)
    order = np.lexsort((s_all, t_all))
    return t_all[order], s_all[order]


# ---- unary evidence ------------------------------------------------------------------------------------------


def unary_evidence(source: Side, target: Side, t: np.ndarray, s: np.ndarray, lexicon: Lexicon) -> dict[str, np.ndarray]:
    """The evidence that a pair carries by itself, each signal's values per candidate pair."""
    roles_t, roles_s = [role_of(w[-1]) for w in target.words], [role_of(w[-1]) for w in source.words]
    registered = source.order == target.order == "registered"
    position = _positions(target)[t] - _positions(source)[s]
    meaning, region = concept_evidence(source, target, t, s, shipped_conventions())
    return {
        "concept": meaning,
        "region": region,
        "name": _name_pairs(source, target, t, s, lexicon),
        "ending": _endings(source, target, t, s),
        "role": _roles(roles_t, roles_s, t, s),
        "rank": _ranks(source, target, t, s),
        "sibling": _siblings(source, target, t, s),
        "block": _block_ranks(source, target, roles_t, roles_s, t, s) * (1.0 if registered else 0.3),
        "position": (1 - 3 * np.abs(position)) if registered else np.zeros(len(t)),
        "layout": _layouts(source, target, t, s),
    }


def flat_words(side: Side) -> list[tuple[str, ...]]:
    """One word list per item, the last segment's words marked with ``~``."""
    return [tuple(x for seg in words[:-1] for x in seg) + tuple("~" + x for x in words[-1]) for words in side.words]


def _name_pairs(source: Side, target: Side, t: np.ndarray, s: np.ndarray, lexicon: Lexicon) -> np.ndarray:
    lists_t, lists_s = flat_words(target), flat_words(source)
    unique_t = {words: i for i, words in enumerate(dict.fromkeys(lists_t))}
    unique_s = {words: i for i, words in enumerate(dict.fromkeys(lists_s))}
    similarity = key_similarity(list(unique_t), list(unique_s), lexicon)
    of_t = np.array([unique_t[words] for words in lists_t])
    of_s = np.array([unique_s[words] for words in lists_s])
    return similarity[of_t[t], of_s[s]]


def _endings(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Whether the last two segments of a pair are the same, and say more than a number."""
    ids: dict[str, int] = {}
    endings = []
    for side in (target, source):
        own = []
        for i, segments in enumerate(side.segments):
            ending = "/".join(segments[-2:])
            named = any(character.isalpha() for character in segments[-2]) if len(segments) > 1 else True
            own.append(ids.setdefault(ending if named else f"{id(side)}:{i}", len(ids)))
        endings.append(np.array(own))
    return (endings[0][t] == endings[1][s]).astype(np.float64)


def _roles(roles_t: Sequence[str], roles_s: Sequence[str], t: np.ndarray, s: np.ndarray) -> np.ndarray:
    ids = {role: i for i, role in enumerate(dict.fromkeys(("other", *roles_t, *roles_s)))}
    a, b = np.array([ids[r] for r in roles_t])[t], np.array([ids[r] for r in roles_s])[s]
    return np.where(a == b, 0.0, np.where((a == 0) | (b == 0), -0.25, -1.0))


def _grouped_rank(side: Side, group: Callable[[int], Hashable], order: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i in range(side.n):
        groups[group(i)].append(i)
    rank, size = np.zeros(side.n), np.zeros(side.n)
    for members in groups.values():
        members.sort(key=order)  # type: ignore[arg-type]
        for r, i in enumerate(members):
            rank[i], size[i] = r, len(members)
    return rank, size


def _ranks(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Agreement of the ranks of a pair among the items of its kind.

    What counts as one kind (which numbers are indices) is uncertain, so several readings are tried and the
    first in which both kinds have equally many members decides; failing that, the ranks of
    the numbered modules themselves, and then the relative rank.
    """
    readings = [
        [_kind_rank(side, kind) for kind in (side.strict_template, side.loop_template, side.bare_template)] for side in (target, source)
    ]
    best = np.full(len(t), np.nan)
    for i, j in ((0, 0), (1, 1), (0, 1), (1, 0), (2, 2), (0, 2), (2, 0), (1, 2), (2, 1)):
        (rank_t, size_t), (rank_s, size_s) = readings[0][i], readings[1][j]
        distance = np.abs(rank_t[t] - rank_s[s])
        value = np.where(distance == 0, 1.0, -0.3 * np.minimum(distance, 3))
        best = np.where(np.isnan(best) & (size_t[t] == size_s[s]), value, best)
    (rank_t, size_t), (rank_s, size_s) = readings[0][1], readings[1][1]
    fraction = np.abs(((rank_t + 0.5) / size_t)[t] - ((rank_s + 0.5) / size_s)[s])
    unequal = np.where(_same_loop_ranks(source, target, t, s), 0.8, 0.4 - 2 * fraction)
    return np.where(np.isnan(best), unequal, best)


def _kind_rank(side: Side, kind: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    return _grouped_rank(side, lambda i: (kind(i), canonical(side.shapes[i])), lambda i: natural_order(side.keys[i]))


def _same_loop_ranks(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Whether the ranks of the repeated modules around both items agree, as far as both have them."""
    ids: dict[tuple[int, ...], int] = {}
    ranks = [
        [ids.setdefault(tuple(rank for _, rank, _, loop in numbers if loop), len(ids)) for numbers in side.numbers]
        for side in (target, source)
    ]
    agree = np.zeros((len(ids), len(ids)), dtype=bool)
    for a, i in ids.items():
        for b, j in ids.items():
            agree[i, j] = bool(a) and bool(b) and a[: len(b)] == b[: len(a)]
    return agree[np.array(ranks[0])[t], np.array(ranks[1])[s]]


def _siblings(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Agreement of the innermost number's rank among its siblings."""
    last_t = np.array([numbers[-1][1] if numbers else -1 for numbers in target.numbers])[t]
    last_s = np.array([numbers[-1][1] if numbers else -1 for numbers in source.numbers])[s]
    return np.where((last_t < 0) | (last_s < 0), 0.0, np.where(last_t == last_s, 0.5, -0.5))


def _block_ranks(source: Side, target: Side, roles_t: Sequence[str], roles_s: Sequence[str], t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Agreement of the order among entries of one shape and role in the same repeated block."""

    def ranks(side: Side, roles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        def block(i: int) -> int:
            return next((node for node in reversed(side.paths[i]) if node in side.loop_nodes), 0)

        return _grouped_rank(side, lambda i: (block(i), canonical(side.shapes[i]), roles[i]), lambda i: side.position[i])

    (rank_t, size_t), (rank_s, size_s) = ranks(target, roles_t), ranks(source, roles_s)
    return (rank_t[t] == rank_s[s]) * np.where(size_t[t] == size_s[s], 1.0, 0.5)


def _positions(side: Side) -> np.ndarray:
    return (np.argsort(np.argsort(side.position, kind="stable")) + 0.5) / side.n


def _layouts(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    ids: dict[tuple[int, ...], int] = {}
    exact = [np.array([ids.setdefault(shape, len(ids)) for shape in side.shapes]) for side in (target, source)]
    ids = {}
    loose = [np.array([ids.setdefault(squeezed(shape), len(ids)) for shape in side.shapes]) for side in (target, source)]
    return np.where(exact[0][t] == exact[1][s], 1.0, np.where(loose[0][t] == loose[1][s], 0.5, 0.0))


# ---- context -------------------------------------------------------------------------------------------------


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


def _matrix(soft: np.ndarray, t: np.ndarray, s: np.ndarray, n_t: int, n_s: int) -> Soft:
    """The soft assignment as a matrix, dense where it is small."""
    if n_t * n_s > SMALL:
        return sp.csr_matrix((soft, (t, s)), shape=(n_t, n_s))
    matrix = np.zeros((n_t, n_s))
    matrix[t, s] = soft
    return matrix


def context(target: Groups, source: Groups, soft: Soft, t: np.ndarray, s: np.ndarray, *, compete: bool) -> np.ndarray:
    """How well the groups of a pair's items are matched with one another, in [0, 1].

    The similarity of two groups is the Jaccard index under the soft assignment; each group of an item
    takes its best partner among the groups of the other item, and small groups count more than large ones.
    """
    if target.dense is not None and source.dense is not None and isinstance(soft, np.ndarray):
        both = target.dense.T @ soft @ source.dense
    else:
        both = target.incidence.T @ soft @ source.incidence
        both = both if isinstance(both, np.ndarray) else both.toarray()
    jaccard = both / np.maximum(target.size[:, None] + source.size[None, :] - both, 1e-9)
    if compete:
        best = np.maximum(jaccard.max(1, keepdims=True), jaccard.max(0, keepdims=True))
        jaccard = jaccard * jaccard / np.maximum(best, 1e-9)
    jaccard = np.pad(jaccard, ((0, 1), (0, 1)))
    of_t, of_s = target.padded[t], source.padded[s]
    values = jaccard[of_t[:, :, None], of_s[:, None, :]]
    weight_t, weight_s = target.weight[of_t], source.weight[of_s]
    from_t = (values.max(2) * weight_t).sum(1) / np.maximum(weight_t.sum(1), 1e-9)
    from_s = (values.max(1) * weight_s).sum(1) / np.maximum(weight_s.sum(1), 1e-9)
    return 0.5 * (from_t + from_s)


def neighbours(source: Side, target: Side, soft: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """How far the items before and after a pair's items are matched with one another."""
    rank_t, rank_s = np.argsort(np.argsort(target.position, kind="stable")), np.argsort(np.argsort(source.position, kind="stable"))
    grid = np.zeros((target.n + 2, source.n + 2))
    grid[rank_t[t] + 1, rank_s[s] + 1] = soft
    return grid[rank_t[t] + 2, rank_s[s] + 2] + grid[rank_t[t], rank_s[s]]


def module_neighbours(source: Side, target: Side, soft: Soft, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """How far the modules before and after a pair's modules are matched with one another."""
    of_t, order_t, owners_t = target.owner_runs()
    of_s, order_s, owners_s = source.owner_runs()
    both = owners_t.T @ soft @ owners_s
    both = both if isinstance(both, np.ndarray) else both.toarray()
    size_t, size_s = np.asarray(owners_t.sum(0)).ravel(), np.asarray(owners_s.sum(0)).ravel()
    jaccard = np.pad(both / np.maximum(size_t[:, None] + size_s[None, :] - both, 1e-9), ((0, 1), (0, 1)))
    a, b = of_t[t], of_s[s]
    return jaccard[order_t[a, 0], order_s[b, 0]] + jaccard[order_t[a, 1], order_s[b, 1]]


class Lists:
    """The numbered siblings of a side: for every item the innermost ones around it, its rank there, and the group's size."""

    def __init__(self, side: Side) -> None:
        self.group = np.full((side.n, 2), -1)
        self.rank = np.zeros((side.n, 2), dtype=np.intp)
        self.size: list[int] = []
        ids: dict[tuple[int, int], int] = {}
        for i, path in enumerate(side.paths):
            numbered = [k for k in range(len(path) - 1, 0, -1) if path[k] in side.loop_nodes]
            for column, k in enumerate(numbered[:2]):
                rank, size = side.sibling_rank[path[k]]
                group = ids.setdefault((path[k - 1], size), len(ids))
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
    return np.clip(result, -1, 1)


def _kind_ids(side: Side) -> np.ndarray:
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(side.loop_template(i), len(ids)) for i in range(side.n)])


def consensus(kinds: tuple[np.ndarray, np.ndarray], soft: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The share of a target kind's soft pairs (the same key in three or more repeated modules) that go to the pair's source kind."""
    of_t, of_s = kinds[0][t], kinds[1][s]
    width = int(of_s.max()) + 1
    both = np.bincount(of_t * width + of_s, soft, (int(of_t.max()) + 1) * width)
    total = np.maximum(np.bincount(of_t, soft), 1e-9)
    many = np.bincount(kinds[0])[of_t] > 2
    return np.where(many, both[of_t * width + of_s] / np.maximum(total[of_t], 0.5), 0.0)


def soft_assignment(score: np.ndarray, t: np.ndarray, s: np.ndarray, n_t: int, n_s: int, none: float, beta: float) -> np.ndarray:
    """Sinkhorn's soft one-to-one assignment in which every item may also stay alone at the score ``none``."""
    x = np.exp(np.clip(beta * (score - none), -60, 60))
    of_t, of_s = np.ones(n_t), np.ones(n_s)
    for _ in range(4):
        of_t = 1.0 / (1.0 + np.bincount(t, x * of_s[s], n_t))
        of_s = 1.0 / (1.0 + np.bincount(s, x * of_t[t], n_s))
    return np.minimum(x * of_t[t] * of_s[s], 1.0)


@dataclass(slots=True)
class Solution:
    """Scores, soft assignment and evidence per candidate pair."""

    t: np.ndarray
    s: np.ndarray
    score: np.ndarray
    soft: np.ndarray
    evidence: dict[str, np.ndarray]


def solve(source: Side, target: Side, lexicon: Lexicon, weights: Weights | None = None) -> Solution:
    """Score all candidate pairs of two sides jointly."""
    w = weights or Weights()
    t, s = candidates(source, target)
    if not len(t):
        return Solution(t, s, np.zeros(0), np.zeros(0), {})
    evidence = unary_evidence(source, target, t, s, lexicon)
    unary = sum(getattr(w, name) * values for name, values in evidence.items())
    families = {
        "node": (module_groups(target), module_groups(source)),
        "template": (template_groups(target), template_groups(source)),
        "suffix": (suffix_groups(target), suffix_groups(source)),
    }
    lists = (Lists(source), Lists(target))
    kinds = (_kind_ids(target), _kind_ids(source))
    ordered = source.order == target.order == "registered"
    score = np.asarray(unary)
    for beta in w.betas:
        soft = soft_assignment(score, t, s, target.n, source.n, w.none, beta)
        matrix = _matrix(soft, t, s, target.n, source.n)
        score = np.array(unary)
        for name, (groups_t, groups_s) in families.items():
            evidence[name] = context(groups_t, groups_s, matrix, t, s, compete=name == "node")
            score += getattr(w, name) * evidence[name]
        evidence["direction"] = directions(*lists, soft, t, s)
        score += w.direction * evidence["direction"]
        evidence["consensus"] = consensus(kinds, soft, t, s)
        score += w.consensus * evidence["consensus"]
        if ordered:
            evidence["neighbour"] = neighbours(source, target, soft, t, s)
            score += w.neighbour * evidence["neighbour"]
            evidence["beside"] = module_neighbours(source, target, matrix, t, s)
            score += w.beside * evidence["beside"]
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
        gain = np.zeros((len(rows), len(cols) + len(rows)))
        gain[:, : len(cols)] = -1e6
        gain[row, col] = solution.score[pairs] - none
        for a, b in zip(*linear_sum_assignment(-gain), strict=True):
            if b < len(cols) and gain[a, b] > 0:
                result[int(rows[a])] = int(cols[b])
    return result
