"""The evidence that a pair of items carries by itself: names, meanings, roles, ranks, order, layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import numpy as np

from automatch.engine.conventions import concept_evidence, shipped_conventions
from automatch.engine.items import canonical, squeezed
from automatch.engine.names import Lexicon, key_similarity
from automatch.engine.sides import Side
from automatch.engine.sparse import DENSE, incidences
from automatch.keys import natural_order

ROLES = {
    **dict.fromkeys(("weight", "kernel", "gamma", "scale", "w", "weights", "embedding", "embeddings"), "weight"),
    **dict.fromkeys(("bias", "beta", "b", "biases", "offset"), "bias"),
    "mean": "mean",
    "var": "var",
    "variance": "var",
    "tracked": "tracked",
    "counter": "tracked",
    "hidden": "hidden",  # beside a running mean's `average`, before it is corrected for its start
    "index": "index",
    "ids": "index",
}

_AVERAGED = ("mean", "var")

BESIDE = frozenset(("pre", "post", "before", "after"))  # `post_attention_norm` is named after what it is not
NEARLY_ALL = 0.95  # of both sides must stand in one order for it to say which of two equal shapes is which


def role_of(words: Sequence[Sequence[str]]) -> str:
    """What an entry is within its module, from the words of its segments: of the last, or of the one before if that is a statistic."""
    last, before = ([word for word in segment if not word[-1].isdigit()] for segment in (words[-1], words[-2] if len(words) > 1 else ()))
    if last and last[-1] in ROLES:
        return ROLES[last[-1]]
    return next((ROLES[word] for word in before if ROLES.get(word) in _AVERAGED), "other")


def unary_evidence(source: Side, target: Side, t: np.ndarray, s: np.ndarray, lexicon: Lexicon) -> dict[str, np.ndarray]:
    """The evidence that a pair carries by itself, each signal's values per candidate pair."""
    roles_t, roles_s = [role_of(words) for words in target.words], [role_of(words) for words in source.words]
    trust = source.order_trust[s] * target.order_trust[t]
    position = _positions(target)[t] - _positions(source)[s]
    meaning, region = concept_evidence(source, target, t, s, shipped_conventions())
    return {
        "concept": meaning,
        "region": region,
        "name": _name_pairs(source, target, t, s, lexicon),
        "contrast": _contrasts(source, target, roles_t, roles_s, t, s, lexicon),
        "ending": _endings(source, target, t, s),
        "role": _roles(roles_t, roles_s, t, s),
        "rank": _ranks(source, target, t, s),
        "sibling": _siblings(source, target, t, s),
        "block": _block_ranks(source, target, roles_t, roles_s, t, s) * trust,
        "position": trust * (1 - 3 * np.abs(position)),
        "layout": _layouts(source, target, t, s),
        "sequence": trust * _sequences(source, target, t, s),
    }


def flat_words(side: Side) -> list[tuple[str, ...]]:
    """One word list per item, the last segment's words marked with ``~``."""
    return [tuple(x for seg in words[:-1] for x in seg) + tuple("~" + x for x in words[-1]) for words in side.words]


def _name_pairs(source: Side, target: Side, t: np.ndarray, s: np.ndarray, lexicon: Lexicon) -> np.ndarray:
    lists_t, lists_s = flat_words(target), flat_words(source)
    unique_t = {words: i for i, words in enumerate(dict.fromkeys(lists_t))}
    unique_s = {words: i for i, words in enumerate(dict.fromkeys(lists_s))}
    of_t = np.array([unique_t[words] for words in lists_t])
    of_s = np.array([unique_s[words] for words in lists_s])
    if len(unique_t) * len(unique_s) > DENSE:
        rows, cols = incidences(list(unique_t), list(unique_s))
        return np.clip(np.asarray(rows[of_t[t]].multiply(cols[of_s[s]]).sum(1)).ravel(), 0, 1)
    return key_similarity(list(unique_t), list(unique_s), lexicon)[of_t[t], of_s[s]]


def _contrasts(
    source: Side, target: Side, roles_t: Sequence[str], roles_s: Sequence[str], t: np.ndarray, s: np.ndarray, lexicon: Lexicon
) -> np.ndarray:
    """Similarity of the words in which items differ from those of their shape and role in the same repeated block.

    Beside its mean over both blocks, so that it favours no block over another; numbers are left to the ranks.
    """
    (group_t, rest_t), (group_s, rest_s) = _telling_words(target, roles_t), _telling_words(source, roles_s)
    unique_t = {words: i for i, words in enumerate(dict.fromkeys(rest_t))}
    unique_s = {words: i for i, words in enumerate(dict.fromkeys(rest_s))}
    if len(unique_t) * len(unique_s) > DENSE or len(unique_t) < 2 or len(unique_s) < 2:
        return np.zeros(len(t))
    similar = key_similarity(list(unique_t), list(unique_s), lexicon)
    of_t, of_s = np.array([unique_t[words] for words in rest_t]), np.array([unique_s[words] for words in rest_s])
    values = similar[of_t[t], of_s[s]]
    _, both = np.unique(group_t[t] * (int(group_s.max()) + 1) + group_s[s], return_inverse=True)
    return values - (np.bincount(both, values) / np.bincount(both))[both]


def _telling_words(side: Side, roles: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """For every item its group (block, shape and role) and its words without those that the whole group has."""
    ids: dict[Hashable, int] = {}
    groups = [ids.setdefault((_block_of(side, i), canonical(side.shapes[i]), roles[i]), len(ids)) for i in range(side.n)]
    words = [_without_numbers(found) for found in flat_words(side)]
    shared: dict[int, frozenset[str]] = {}
    for group, found in zip(groups, words, strict=True):
        shared[group] = shared[group].intersection(found) if group in shared else frozenset(found)
    rest = [tuple(word for word in found if word not in shared[group]) for group, found in zip(groups, words, strict=True)]
    return np.array(groups), [() if BESIDE.intersection(found) else found for found in rest]


@lru_cache(maxsize=1 << 14)
def _without_numbers(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if not any(character.isdigit() for character in word))


def _block_of(side: Side, i: int) -> int:
    """The innermost repeated module around an item; the root where there is none."""
    return next((node for node in reversed(side.paths[i]) if node in side.loop_nodes), 0)


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
        return _grouped_rank(side, lambda i: (_block_of(side, i), canonical(side.shapes[i]), roles[i]), lambda i: side.position[i])

    (rank_t, size_t), (rank_s, size_s) = ranks(target, roles_t), ranks(source, roles_s)
    return (rank_t[t] == rank_s[s]) * np.where(size_t[t] == size_s[s], 1.0, 0.5)


def _positions(side: Side) -> np.ndarray:
    return (np.argsort(np.argsort(side.position, kind="stable")) + 0.5) / side.n


def _sequences(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Whether a pair stands in every longest common subsequence of the shapes in order, by how much of both sides that covers."""
    if target.n * source.n > DENSE:
        return np.zeros(len(t))
    ids: dict[tuple[int, ...], int] = {}
    orders = [np.argsort(side.position, kind="stable") for side in (target, source)]
    shapes = [
        np.array([ids.setdefault(canonical(side.shapes[i]), len(ids)) for i in order])
        for side, order in zip((target, source), orders, strict=True)
    ]
    before, after = _common(*shapes), _common(shapes[0][::-1], shapes[1][::-1])[::-1, ::-1]
    longest = int(before[-1, -1])
    within = (shapes[0][:, None] == shapes[1][None, :]) & (before[:-1, :-1] + after[1:, 1:] + 1 == longest)
    within &= (within.sum(1, keepdims=True) == 1) & (within.sum(0, keepdims=True) == 1)
    places = [np.argsort(order) for order in orders]
    share = longest / max(target.n, source.n)
    return within[places[0][t], places[1][s]] * max(0.0, (share - NEARLY_ALL) / (1 - NEARLY_ALL))


def _common(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The length of the longest common subsequence of every beginning of one sequence with every beginning of the other."""
    length = np.zeros((len(one) + 1, len(two) + 1), dtype=np.int32)
    for i, value in enumerate(one):
        np.maximum(length[i, 1:], length[i, :-1] + (two == value), out=length[i + 1, 1:])
        np.maximum.accumulate(length[i + 1], out=length[i + 1])
    return length


def _layouts(source: Side, target: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    ids: dict[tuple[int, ...], int] = {}
    exact = [np.array([ids.setdefault(shape, len(ids)) for shape in side.shapes]) for side in (target, source)]
    ids = {}
    loose = [np.array([ids.setdefault(squeezed(shape), len(ids)) for shape in side.shapes]) for side in (target, source)]
    return np.where(exact[0][t] == exact[1][s], 1.0, np.where(loose[0][t] == loose[1][s], 0.5, 0.0))
