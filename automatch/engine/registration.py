"""The order in which modules register their children, restored for keys that a file holds in another order.

Which of two siblings comes first (``conv1`` before ``bn1``, ``self_attn`` before ``cross_attn``) is counted over
known models: by their names without numbers; where those were never seen together, by the words in which they
differ; and failing that by their last words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from automatch.keys import natural_order, pieces_of, segments_of, template_of

Fact = tuple[str, str, str]  # two names in alphabetical order, and how the number of the first compares to that of the second
LEVELS = ("names", "differences", "words")
SURE = 2.0  # log odds: about 88 % of the family groups agree
NUMBERED = 4.0  # siblings that differ in nothing but their numbers
OWN = (4.0, 1.0, 0.5)  # what siblings of the same names (differences, last words) in the model itself count, by level
UNKNOWN = 0.3  # the alphabet decides, weakly
MANY = 60  # siblings beyond which only numbers and the alphabet are looked at
_TURNED = {"<": ">", ">": "<", "=": "="}


@dataclass(frozen=True, slots=True)
class Precedence:
    """Log odds that the first of two siblings is registered first, by level (see `LEVELS`)."""

    tables: tuple[Mapping[Fact, float], ...] = field(default=({}, {}, {}))

    def with_order_of(self, keys: Iterable[str]) -> Precedence:
        """The same with what these keys, in order of registration, show of the names they use."""
        seen: Counter[tuple[int, Fact]] = Counter()
        for siblings in families(keys):
            for level, fact, first in pairs_of(siblings):
                seen[level, fact] += 1 if first else -1
        own: tuple[dict[Fact, float], ...] = ({}, {}, {})
        for (level, fact), n in seen.items():
            if n:
                own[level][fact] = math.copysign(OWN[level], n)
        names, *others = self.tables
        return Precedence(({**names, **own[0]}, *({**mine, **known} for mine, known in zip(own[1:], others, strict=True))))

    def odds(self, one: str, two: str) -> float:
        """Log odds that the segment ``one`` comes before its sibling ``two``; 0 where nothing is known."""
        if template_of(one) == template_of(two):
            return NUMBERED if natural_order(one) < natural_order(two) else -NUMBERED
        for level, turned, fact in _facts(one, two):
            known = self.tables[level].get(fact)
            if known is not None:
                return -known if turned else known
        return 0.0


@lru_cache(maxsize=1 << 16)
def _facts(one: str, two: str) -> tuple[tuple[int, bool, Fact], ...]:
    """What to look up of two siblings: the level, whether they stand the other way round, and the fact."""
    a, b = _described(one), _described(two)
    if not a[1] or not b[1]:
        return ()
    relation = "=" if a[2] == b[2] else "<" if a[2] < b[2] else ">"
    shared = set(a[1]) & set(b[1])
    rest = [next((word for word in reversed(words) if word not in shared), "") for words in (a[1], b[1])]
    pairs = ((a[0], b[0]), (rest[0], rest[1]), (a[1][-1], b[1][-1]))
    return tuple(
        (level, False, (x, y, relation)) if x < y else (level, True, (y, x, _TURNED[relation]))
        for level, (x, y) in enumerate(pairs)
        if x != y
    )


def _described(segment: str) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """A segment's template, its words and its numbers."""
    pieces = pieces_of(segment)
    words = tuple(piece for piece in pieces if isinstance(piece, str))
    return template_of(segment).lower(), words, tuple(piece for piece in pieces if isinstance(piece, int))


def read_precedence(data: Mapping[str, Any]) -> Precedence:
    """The table from its JSON form: rows of two names, relation of their numbers, and how many groups have which first."""
    return Precedence(
        tuple({(a, b, relation): math.log((p + 0.3) / (m + 0.3)) for a, b, relation, p, m in data[level]} for level in LEVELS)
    )


def families(keys: Iterable[str]) -> list[list[str]]:
    """The children of every module, in order of first appearance; of many only the first."""
    children: dict[tuple[str, ...], dict[str, None]] = {}
    for key in keys:
        segments = segments_of(key)
        for depth, segment in enumerate(segments):
            children.setdefault(tuple(segments[:depth]), {})[segment] = None
    return [list(found)[:MANY] for found in children.values() if len(found) > 1]


def pairs_of(siblings: Sequence[str]) -> Iterator[tuple[int, Fact, bool]]:
    """For all pairs of siblings in order: the level, the fact, and whether its first name comes first."""
    for i, one in enumerate(siblings):
        for two in siblings[i + 1 :]:
            for level, turned, fact in _facts(one, two):
                yield level, fact, not turned


def restored(siblings: Sequence[str], precedence: Precedence) -> tuple[list[str], float]:
    """Siblings in the order in which they were most likely registered, and how much of it is known, in [0, 1].

    Each one's lead over the others is summed up; then neighbours change places where the two of them alone say so.
    """
    order = sorted(siblings, key=natural_order)
    if len({template_of(segment) for segment in order}) == 1:
        return order, 1.0
    if len(order) > MANY:
        return order, 0.0
    odds = {(one, two): precedence.odds(one, two) or UNKNOWN for i, one in enumerate(order) for two in order[i + 1 :]}
    odds.update({(two, one): -value for (one, two), value in odds.items()})
    lead = {one: sum(odds[one, two] for two in order if two != one) for one in order}
    order.sort(key=lambda segment: -lead[segment])
    for _ in order:
        for i in range(len(order) - 1):
            if odds[order[i], order[i + 1]] < 0:
                order[i], order[i + 1] = order[i + 1], order[i]
    return order, sum(min(1.0, abs(value) / SURE) for value in odds.values() if abs(value) != UNKNOWN) / len(odds)
