"""Virtual items: merged axes, stacked repetitions and split fused tensors, so that matching is one to one.

Each step looks for shapes that one side has and the other lacks, while the other has what they would be
made of. Nothing is decided here: a virtual item that finds no partner stays unmatched.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from automatch.engine.columns import ColumnsOf
from automatch.engine.items import Item, Shape, canonical
from automatch.engine.splits import split_fused
from automatch.keys import segments_of
from automatch.transforms import Copy, Permute, Reshape, Slice, Stack, Transform, chain

LARGEST_KERNEL = 7  # pixels on a side


def with_virtual_items(source: Sequence[Item], target: Sequence[Item], columns: ColumnsOf) -> tuple[list[Item], list[Item]]:
    """Both sides with their axes merged, repetitions stacked and fused tensors split where the other side asks for it."""
    source, target = merge_axes(source, target, is_target=False), merge_axes(target, source, is_target=True)
    source = stack_repeats(source, target, columns, is_target=False)
    target = stack_repeats(target, source, columns, is_target=True)
    parts = split_fused(source, target, is_target=False)
    return parts, split_fused(target, parts, is_target=True)


# ---- axes ------------------------------------------------------------------------------------------------


def merge_axes(items: Sequence[Item], others: Sequence[Item], *, is_target: bool) -> list[Item]:
    """Merge the axes (heads, head size) of shapes the other side has only as one axis."""
    known = {canonical(item.shape) for item in others}
    found: dict[Shape, _Merged | None] = {}
    result = []
    for item in items:
        shape = item.shape
        if shape not in found:
            found[shape] = None if canonical(shape) in known else next((m for m in _merged(shape) if canonical(m.shape) in known), None)
        merged = found[shape]
        if merged is not None:
            spread = (merged.back,) if is_target else item.spread
            item = replace(item, shape=merged.shape, how=Copy() if is_target else merged.how, spread=spread)
        result.append(item)
    return result


@dataclass(frozen=True, slots=True)
class _Merged:
    """A shape with fewer axes, the way to it and the way back."""

    shape: Shape
    how: Transform
    back: Transform


def _merged(shape: Shape) -> list[_Merged]:
    """What merging neighbouring axes gives, fewest merged first; then (head, input, head size) as one matrix of inputs and outputs."""
    n = len(shape)
    convolves = n > 3 and 1 < shape[-1] == shape[-2] <= LARGEST_KERNEL  # its inputs and outputs are no heads and head size
    spans = [(i, j) for width in range(2, n + 1) for i in range(n - width + 1) for j in (i + width,)]
    plain = [
        (*shape[:i], math.prod(shape[i:j]), *shape[j:])
        for i, j in spans
        if min(shape[i:j]) > 1 and (j - i < n or n == 2) and not (convolves and j == 2)
    ]
    result = [_Merged(whole, Reshape(whole), Reshape(shape)) for whole in plain]
    if n == 3 and min(shape) > 1:
        heads, inputs, size = shape
        whole = (inputs, heads * size)
        back = chain(Reshape((inputs, heads, size)), Permute((1, 0, 2)))
        result.append(_Merged(whole, chain(Permute((1, 0, 2)), Reshape(whole)), back))
    return result


# ---- repetitions -------------------------------------------------------------------------------------------


def stack_repeats(items: list[Item], others: list[Item], columns: ColumnsOf, *, is_target: bool) -> list[Item]:
    """Stack tensors of numbered siblings (experts) that the other side holds as one tensor."""
    mine, theirs = Counter(canonical(item.shape) for item in items), Counter(canonical(item.shape) for item in others)
    if all(2 * theirs[shape] > count for shape, count in mine.items()):
        return items
    places = columns(items).all_places
    other_places = columns(others).all_places if any(dims for _, _, dims in places) else []
    repeated = {(place[2][-1], canonical(item.shape)) for item, place in zip(others, other_places, strict=False) if place[2]}
    shapes = Counter(item.shape for item in others)
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for i, (column, coordinates, dims) in enumerate(places):
        if dims and len(items[i].reals) == 1 and _numbered(items[i].key, column):
            groups[column, coordinates[:-1]].append(i)
    stacked: dict[int, Item] = {}
    dropped: set[int] = set()
    wanted: dict[tuple[int, Shape], Shape | None] = {}
    outer = Counter((column, len(members)) for (column, _), members in groups.items())
    for (column, _), members in groups.items():
        members.sort(key=lambda i: places[i][1][-1])
        n, shape = len(members), items[members[0]].shape
        if (n, shape) not in wanted:
            common = 2 * theirs[canonical(shape)] > mine[canonical(shape)]
            wanted[n, shape] = (
                None
                if (n, canonical(shape)) in repeated or not shape or common
                else _stacked_shape(n, shape, shapes, outer[column, n], flat=outer[column, n] > 1 or "expert" in column)
            )
        whole = wanted[n, shape]
        if whole is not None:
            stacked[members[0]] = _stack([items[i] for i in members], whole, is_target)
            dropped.update(members[1:])
    return [stacked.get(i, item) for i, item in enumerate(items) if i not in dropped] if stacked else items


def _numbered(key: str, column: str) -> bool:
    """Whether the innermost repetition is a list of its own (``experts.0``), not a numbered name (``norm1``)."""
    segments = column.split("/")
    innermost = max((i for i, segment in enumerate(segments) if "~" in segment), default=-1)
    return innermost >= 0 and segments_of(key)[innermost].isdigit()


def _stacked_shape(n: int, shape: Shape, shapes: Counter[Shape], groups: int, *, flat: bool) -> Shape | None:
    """The shape under which the other side holds n tensors of ``shape``: stacked, stacked and fused, or concatenated."""
    whole = (n, *shape)
    fused = [(n, *shape[:i], 2 * shape[i], *shape[i + 1 :]) for i in range(len(shape))]
    leading: Counter[Shape] = Counter()
    for other, count in shapes.items():
        if len(other) == len(whole) and other[0] == n:
            leading[canonical(other)] += count
    if any(leading[canonical(s)] >= groups for s in [whole, *fused]):
        return whole
    if flat and len(shape) == 2:
        for joined in ((n * shape[0], shape[1]), (n * shape[1], shape[0])):
            if shapes[joined] >= groups and n > 2:
                return joined
    return None


def _stack(members: Sequence[Item], whole: Shape, is_target: bool) -> Item:
    first = members[0]
    n, shape = len(members), first.shape
    flat = len(whole) == len(shape)
    key = _without_index(members)
    reals = tuple(item.reals[0] for item in members)
    if not is_target:
        how = chain(Stack(0), *((Reshape(whole),) if flat and whole[1] == shape[1] else ()))
        if flat and whole[1] != shape[1]:
            how = chain(Stack(0), Permute((0, 2, 1)), Reshape(whole))
        return replace(first, key=key, shape=whole, reals=reals, how=how)
    length = whole[0] // n
    back = []
    for i in range(n):
        part = Slice(0, i * length, length)
        if flat:
            back.append(part if whole[1] == shape[1] else chain(part, Permute((1, 0))))
        else:
            back.append(chain(part, Reshape(shape)))
    return replace(first, key=key, shape=whole, reals=reals, spread=tuple(back))


def _without_index(members: Sequence[Item]) -> str:
    a, b = segments_of(members[0].key), segments_of(members[-1].key)
    kept = [x for x, y in zip(a, b, strict=True) if x == y]
    return ".".join(kept)
