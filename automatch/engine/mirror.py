"""The direction of lists: forwards or backwards as a whole, where only one of the two lets every member find its shapes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from automatch.engine.items import canonical
from automatch.engine.sides import Side

LEAST = 0.5  # of a target list's entries that a source list must feed for the two to be compared


@dataclass(slots=True)
class _List:
    """Numbered siblings: for every entry in them its rank and the rest of its key."""

    size: int
    entries: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict[int, tuple[int, tuple[str, ...]]])


def keep_directions(
    chosen: Mapping[int, int], candidates: Container[tuple[int, int]], source: Side, target: Side
) -> tuple[dict[int, int], set[int]]:
    """The assignment in which no list is torn: its members go forwards, or all of them backwards, where shapes leave one way only.

    Members that are alike in every shape (the widest stages of a decoder) are otherwise taken in the order of the file.
    The second value holds the target items of the lists that were torn before.
    """
    result, torn = dict(chosen), set[int]()
    left, right = _lists(source), _lists(target)
    inside: dict[int, list[int]] = defaultdict(list)
    for number, found in enumerate(left):
        for i in found.entries:
            inside[i].append(number)
    for to in right:
        feeds = Counter(number for j in to.entries for number in inside.get(result.get(j, -1), ()) if left[number].size >= to.size)
        for number, count in feeds.items():
            if count >= LEAST * len(to.entries):
                moved = _straightened(result, to, left[number], source, target)
                if moved and all(pair in candidates for pair in moved.items()):
                    result = {**{j: i for j, i in result.items() if j not in moved}, **moved}
                    torn.update(moved)
    return result, torn


def _straightened(chosen: Mapping[int, int], to: _List, of: _List, source: Side, target: Side) -> dict[int, int]:
    """What every entry of the target list takes in the only direction that fits; empty where both or none do, or it does already.

    A list that is shorter than the checkpoint's takes its first members, if one of its own was fed from two of them.
    """
    names: dict[tuple[str, ...], Counter[tuple[str, ...]]] = defaultdict(Counter)
    current: dict[int, int] = {}
    for j, (_, rest) in to.entries.items():
        if chosen.get(j) in of.entries:
            current[j] = chosen[j]
            names[rest][of.entries[chosen[j]][1]] += 1
    at = {place: i for i, place in of.entries.items()}
    ways = []
    shorter = of.size > to.size
    for backwards in (False, True) if not shorter else (False,):
        way = {}
        for j, (rank, rest) in to.entries.items():
            if rest in names:
                i = at.get((of.size - 1 - rank if backwards else rank, names[rest].most_common(1)[0][0]))
                if i is not None and canonical(source.shapes[i]) == canonical(target.shapes[j]):
                    way[j] = i
        ways.append(way)
    whole = sum(rest in names for _, rest in to.entries.values())
    best = max(ways, key=len)
    feeders = _feeders(current, to, of)
    torn = any(len(found) > 1 for found in feeders.values())
    in_order = not torn and all(a < b for a, b in pairwise(next(iter(feeders[rank])) for rank in sorted(feeders)))
    undecided = not torn if shorter else len(ways[0]) == len(ways[1]) or (in_order and len(current) == whole)
    if undecided or len(best) < whole or all(current.get(j) == i for j, i in best.items()):
        return {}
    elsewhere = {i for j, i in chosen.items() if j not in to.entries}
    return {} if elsewhere & set(best.values()) or len(set(best.values())) < len(best) else best


def _feeders(current: Mapping[int, int], to: _List, of: _List) -> dict[int, set[int]]:
    """The members of the source list that each member of the target list is fed from."""
    feeders: dict[int, set[int]] = defaultdict(set)
    for j, i in current.items():
        feeders[to.entries[j][0]].add(of.entries[i][0])
    return feeders


def _lists(side: Side) -> list[_List]:
    """All lists of three or more repeated members, outer ones first."""
    found: dict[tuple[int, int], _List] = {}
    for i, (path, segments) in enumerate(zip(side.paths, side.segments, strict=True)):
        for depth, (parent, rank, size) in _ranked(side, path):
            found.setdefault((parent, size), _List(size)).entries[i] = (rank, tuple(segments[depth:]))
    return [found[key] for key in sorted(found)]


def _ranked(side: Side, path: Sequence[int]) -> Iterator[tuple[int, tuple[int, int, int]]]:
    for depth in range(1, len(path)):
        if path[depth] in side.loop_nodes:
            rank, size = side.sibling_rank[path[depth]]
            if size > 2:
                yield depth, (path[depth - 1], rank, size)
