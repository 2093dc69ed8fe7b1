"""Numbered siblings (``conv1``, ``conv2``, …) that feed numbered siblings: in the order of their numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise

from automatch.engine.names import runs_upward
from automatch.engine.sides import Side
from automatch.keys import numbers_of, template_of


def keep_numbers(chosen: Mapping[int, int], candidates: Container[tuple[int, int]], source: Side, target: Side) -> dict[int, int]:
    """The assignment in which keys that differ in one number alone take those that feed them in the order of that number.

    Nothing but the order of registration, or one number that happens to be the same, speaks for any other order: siblings are
    numbered from the first one by everybody, decoders and necks aside.
    """
    feeds: dict[tuple[str, str], list[tuple[int, int, int, int]]] = defaultdict(list)
    whole: dict[str, int] = defaultdict(int)
    for j, segments in enumerate(target.segments):
        for family, _ in _families(segments):
            whole[family] += 1
        if j in chosen:
            for family, number in _families(segments):
                for other, of in _families(source.segments[chosen[j]]):
                    feeds[family, other].append((number, of, j, chosen[j]))
    result = dict(chosen)
    for (family, _), members in feeds.items():
        if 1 < len(members) == whole[family] and all(result[j] == i for _, _, j, i in members):
            members.sort()
            numbers = [of for _, of, _, _ in members]
            if _is_order(numbers) or len(set(numbers)) < len(numbers):
                continue
            if _is_order(numbers[::-1]) and (
                len(numbers) > 2 or any(runs_upward(side.keys[x]) for side, x in ((target, members[0][2]), (source, members[0][3])))
            ):
                continue
            moved = {j: i for (_, _, j, _), (_, i) in zip(members, sorted((of, i) for _, of, _, i in members), strict=True)}
            if all(pair in candidates for pair in moved.items()):
                result.update(moved)
    return result


def _is_order(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _families(segments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """For every segment with one number in it, the last aside, the key without that number, and the number."""
    for depth, segment in enumerate(segments[:-1]):
        numbers = numbers_of(segment)
        if len(numbers) == 1:
            yield "/".join([*segments[:depth], template_of(segment), *segments[depth + 1 :]]), numbers[0]
