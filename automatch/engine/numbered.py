"""Numbered siblings (``conv1``, ``conv2``, …) that feed numbered siblings: in the order of their numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from automatch.engine.names import runs_upward
from automatch.engine.sides import Side
from automatch.keys import numbers_of, template_of

_Member = tuple[int, int, int, int]  # the target's number, the source's number, the target item, the source item


def keep_numbers(chosen: Mapping[int, int], candidates: Container[tuple[int, int]], source: Side, target: Side) -> dict[int, int]:
    """The assignment in which keys that differ in one number alone take those that feed them in the order of that number.

    Nothing but an order of registration, or one number that happens to be the same, speaks for another order. Lists that
    fall from the first to the last are left alone where they may: three members or more, or a decoder or neck.
    """
    feeds: dict[tuple[str, str], list[_Member]] = defaultdict(list)
    size = Counter(family for segments in target.segments for family, _ in _families(segments))
    for j, i in chosen.items():
        for family, number in _families(target.segments[j]):
            if size[family] > 1:
                for other, of in _families(source.segments[i]):
                    feeds[family, other].append((number, of, j, i))
    result = dict(chosen)
    for (family, _), members in feeds.items():
        if len(members) < size[family] or any(result[j] != i for _, _, j, i in members):
            continue
        members.sort()
        numbers = [of for _, of, _, _ in members]
        _, _, one, other = members[0]
        may_fall = len(numbers) > 2 or runs_upward(target.keys[one]) or runs_upward(source.keys[other])
        if len(set(numbers)) < len(numbers) or _rises(numbers) or (may_fall and _rises(numbers[::-1])):
            continue
        in_order = sorted((of, i) for _, of, _, i in members)
        moved = {j: i for (_, _, j, _), (_, i) in zip(members, in_order, strict=True)}
        if all(pair in candidates for pair in moved.items()):
            result.update(moved)
    return result


def _rises(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _families(segments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """For every segment with one number in it, the last aside, the key without that number, and the number."""
    for depth, segment in enumerate(segments[:-1]):
        found = _numbered(segment)
        if found is not None:
            yield "/".join([*segments[:depth], found[0], *segments[depth + 1 :]]), found[1]


@lru_cache(maxsize=1 << 14)
def _numbered(segment: str) -> tuple[str, int] | None:
    """The template and the number of a segment with one number in it."""
    numbers = numbers_of(segment)
    return (template_of(segment), numbers[0]) if len(numbers) == 1 else None
