"""Siblings that the evidence has exchanged although their own names, or the order of registration, say which is which."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from automatch.engine.sides import Side
from automatch.keys import numbers_of, template_of

SERIES = 3  # norms, numbered from the first to the last of a block


def keep_names(chosen: Mapping[int, int], candidates: Container[tuple[int, int]], source: Side, target: Side) -> dict[int, int]:
    """The assignment in which no two modules that are called the same on both sides, and lie side by side there, are exchanged.

    Modules that differ in their numbers alone are left as they are: an index may have been shifted.
    """
    within: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for j, i in chosen.items():
        for of in _modules(source.segments[i]):
            for to in _modules(target.segments[j]):
                within[to[:-1], of[:-1]][to[-1], of[-1]].append(j)
    result = dict(chosen)
    at = {tuple(segments): i for i, segments in enumerate(source.segments)}
    for (_, parent), feeds in within.items():
        for one, other in list(feeds):
            crossed = one < other and template_of(one) != template_of(other) and (other, one) in feeds
            if crossed and (one, one) not in feeds and (other, other) not in feeds:
                moved = {
                    j: at.get((*parent, name, *source.segments[result[j]][len(parent) + 1 :]), -1)
                    for name, theirs in ((one, other), (other, one))
                    for j in feeds[name, theirs]
                }
                elsewhere = {i for j, i in result.items() if j not in moved}
                if all(pair in candidates for pair in moved.items()) and not elsewhere & set(moved.values()):
                    result.update(moved)
    return result


def _modules(segments: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The paths of the modules around an item whose names hold letters."""
    for depth in range(1, len(segments)):
        if not segments[depth - 1].isdigit():
            yield tuple(segments[:depth])


def keep_series(
    chosen: Mapping[int, int], candidates: Container[tuple[int, int]], source: Side, target: Side
) -> tuple[dict[int, int], set[int]]:
    """The assignment in which the numbered norms of a block and named ones go together in order of registration, and what was changed.

    Only where nothing shows which module each of them belongs to: where others stand between all of them on both sides
    (attention, its norm, the next attention, its norm), the numbers may run in another order.
    """
    result, moved = dict(chosen), set[int]()
    for numbered, named, pairs in (
        (target, source, [(j, i, j) for j, i in chosen.items()]),
        (source, target, [(i, j, j) for j, i in chosen.items()]),
    ):
        for series in _series(numbered, named, pairs):
            if numbered.order != "registered" or any(result[j] != chosen[j] for _, _, j in series):
                continue
            in_order = sorted((named.position[b], b) for _, b, _ in series)
            sure = all(named.order_is_sure(one, two) for (_, one), (_, two) in pairwise(in_order))
            if (
                not sure
                or [b for _, b in in_order] == [b for _, b, _ in series]
                or (_apart(numbered, [a for a, _, _ in series]) and _apart(named, [b for _, b, _ in series]))
            ):
                continue
            feeds = {
                (a if numbered is target else b): (b if numbered is target else a)
                for (a, _, _), (_, b) in zip(series, in_order, strict=True)
            }
            if all(pair in candidates for pair in feeds.items()):
                moved.update(j for j, i in feeds.items() if result[j] != i)
                result.update(feeds)
    return result, moved


def _series(numbered: Side, named: Side, pairs: Iterable[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Entries of three or more norms of one block that only their numbers tell apart, by number, whose partners have names."""
    found: dict[tuple[str, ...], list[tuple[int, tuple[int, int, int]]]] = defaultdict(list)
    for pair in pairs:
        segments, owner = numbered.segments[pair[0]], numbered.nodes[numbered.paths[pair[0]][-1]]
        if len(segments) > 1 and not segments[-2].isdigit() and all(len(numbered.shapes[i]) < 2 for i in owner.keys):
            numbers = numbers_of(segments[-2])
            if len(numbers) == 1:
                found[*segments[:-2], template_of(segments[-2]), segments[-1]].append((numbers[0], pair))
    for members in found.values():
        members.sort()
        own = [pair for _, pair in members]
        theirs = Counter(template_of(named.segments[b][-2]) if len(named.segments[b]) > 1 else "" for _, b, _ in own)
        if len(own) >= SERIES and len({number for number, _ in members}) == len(own) == len(theirs):
            yield own


def _apart(side: Side, items: Iterable[int]) -> bool:
    """Whether other items stand between every two of the modules that hold these."""
    places = sorted(sorted(side.position[i] for i in side.nodes[side.paths[item][-1]].keys) for item in items)
    return all(two[0] - one[-1] > 1 for one, two in pairwise(places))
