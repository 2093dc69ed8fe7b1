"""Solving repeated structure once: which items take part, and how their answer extends to the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from automatch.engine.columns import ColumnsOf, Kind, Place, is_kept
from automatch.engine.items import Item, canonical

_Lists = tuple[Mapping[Kind, Sequence[int]], Iterable[Kind]]
WHOLE = 2000  # items that are solved without leaving any out
ALIKE = 0.6  # of the shapes of two members that may stand for one another


@dataclass(frozen=True, slots=True)
class Reduction:
    """Which items of both sides take part (positions), and where every item stands."""

    source_kept: tuple[int, ...]
    target_kept: tuple[int, ...]
    source_places: list[Place]
    target_places: list[Place]


def reduce_repeats(source: Sequence[Item], target: Sequence[Item], columns: ColumnsOf, *, exhaustive: bool = False) -> Reduction:
    """Leave out the inner members of long classes that both sides have in the same length and with mostly the same shapes.

    A list of layers beside an equally long list of pairs of layers is solved member by member, and so is one whose
    counterpart is not a class of that length (a decoder whose first layer alone holds a bias). Where all shapes stand in one
    order on both sides, nothing is left out if that would leave more of one side than of the other.
    """
    sides = [columns(items) for items in (source, target)]
    numbers = (set[int](), set[int]()) if exhaustive else _reducible(*(side.long_lists() for side in sides))
    result = _reduced([side.place(reduced) for side, reduced in zip(sides, numbers, strict=True)])
    if len(result.source_kept) != len(result.target_kept) and _in_one_order(source, target):
        return _reduced([side.place(set()) for side in sides])
    return result


def _reduced(places: Sequence[list[Place]]) -> Reduction:
    kept = [tuple(i for i, (_, coordinates, dims) in enumerate(side) if is_kept(coordinates, dims)) for side in places]
    return Reduction(kept[0], kept[1], places[0], places[1])


def _in_one_order(source: Sequence[Item], target: Sequence[Item]) -> bool:
    """Whether both sides hold the same shapes in the same order, and few enough of them to solve them all."""
    return len(source) == len(target) <= WHOLE and all(
        canonical(one.shape) == canonical(two.shape) for one, two in zip(source, target, strict=True)
    )


def _reducible(one: _Lists, two: _Lists) -> tuple[set[int], set[int]]:
    """The numbers of each side's classes of a length that both have, without those that are rather like a list that is no class."""
    lengths = {a[0] for a in one[0] for b in two[0] if a[0] == b[0] and _alike(a, b) >= ALIKE}
    result = set[int](), set[int]()
    for found, (classes, _), (others, split) in zip(result, (one, two), (two, one), strict=True):
        for kind, numbers in classes.items():
            if kind[0] in lengths and _nearest(kind, split) <= _nearest(kind, others):
                found.update(numbers)
    return result


def _nearest(kind: Kind, others: Iterable[Kind]) -> float:
    return max((_alike(kind, other) for other in others if other[0] == kind[0]), default=0.0)


def _alike(one: Kind, two: Kind) -> float:
    a, b = Counter(dict(one[1])), Counter(dict(two[1]))
    return (a & b).total() / (a | b).total()


def expand(reduction: Reduction, solved: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """Extend an assignment of kept items to all items: target position to (source position, deciding target position).

    Args:
        reduction: what was left out.
        solved: target position to source position, of kept items only.
    """
    source_at = {(column, coordinates): i for i, (column, coordinates, _) in enumerate(reduction.source_places)}
    columns: dict[str, list[int]] = defaultdict(list)
    for j, (column, _, _) in enumerate(reduction.target_places):
        columns[column].append(j)
    kept = set(reduction.target_kept)
    result = {j: (i, j) for j, i in solved.items()}
    for members in columns.values():
        dims = reduction.target_places[members[0]][2]
        if not dims or len(members) == sum(j in kept for j in members):
            continue
        representatives = [j for j in members if j in solved]
        if not representatives:
            continue
        rule = _rule(reduction, solved, representatives, dims)
        if rule is None:
            continue
        column, flips, leader = rule
        for j in members:
            if j in kept:
                continue
            coordinates = tuple(n - 1 - c if flip else c for c, n, flip in zip(reduction.target_places[j][1], dims, flips, strict=True))
            i = source_at.get((column, coordinates))
            if i is not None:
                result[j] = (i, leader)
    return result


def _rule(
    reduction: Reduction, solved: Mapping[int, int], representatives: Sequence[int], dims: tuple[int, ...]
) -> tuple[str, tuple[bool, ...], int] | None:
    """The source column most representatives go to, which of its coordinates run backwards, and one that says so."""
    votes: Counter[tuple[str, tuple[bool, ...]]] = Counter()
    leaders: dict[tuple[str, tuple[bool, ...]], int] = {}
    for j in representatives:
        column, coordinates, source_dims = reduction.source_places[solved[j]]
        if source_dims != dims:
            continue
        mine = reduction.target_places[j][1]
        flips = tuple(c != d for c, d in zip(mine, coordinates, strict=True))
        if all(not flip or c == n - 1 - d for flip, c, d, n in zip(flips, mine, coordinates, dims, strict=True)):
            votes[column, flips] += 1
            leaders.setdefault((column, flips), j)
    if not votes:
        return None
    best, _ = max(votes.items(), key=lambda vote: (vote[1], vote[0]))
    return (*best, leaders[best])
