"""A slice of a reshaped tensor as slices of the tensor before: boxes whose elements stand in the same order on both sides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from automatch.transforms import Shape

Range = tuple[int, int]
Box = tuple[Range, ...]
MAX_PIECES = 10_000


class NotSliceableError(Exception):
    """No set of reads smaller than the whole sources gives this box; the reason is the message."""


def whole(shape: Shape) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def reshaped_boxes(left: Shape, right: Shape, box: Box) -> Iterator[tuple[Box, Box]]:
    """Boxes that make up ``box`` of ``left``, each with the box of ``right`` that has its elements in the same order.

    Raises:
        NotSliceableError: the shapes have no common factorisation, and the box is not all of the tensor.
    """
    groups: list[list[tuple[Box, Box]]] = []
    for (a, b), (c, d) in _groups(left, right):
        groups.append(list(_group_boxes(left[a:b], right[c:d], box[a:b])))
    if math.prod(len(group) for group in groups) > MAX_PIECES:
        raise NotSliceableError(f"it would take more than {MAX_PIECES} reads")
    for parts in itertools.product(*groups):
        yield tuple(itertools.chain(*(a for a, _ in parts))), tuple(itertools.chain(*(b for _, b in parts)))


def _groups(left: Shape, right: Shape) -> Iterator[tuple[Range, Range]]:
    """The shortest runs of dimensions with equal products on both sides."""
    i = j = 0
    while i < len(left) or j < len(right):
        a, b, m, n = i, j, 1, 1
        while m != n or (a == i and b == j):
            if b == len(right) or (a < len(left) and m <= n):
                m, a = m * left[a], a + 1
            else:
                n, b = n * right[b], b + 1
        while a < len(left) and left[a] == 1:
            a += 1
        while b < len(right) and right[b] == 1:
            b += 1
        yield (i, a), (j, b)
        i, j = a, b


def _group_boxes(left: Shape, right: Shape, box: Box) -> Iterator[tuple[Box, Box]]:
    if left == right:
        yield box, box
        return
    if box == whole(left):
        yield box, whole(right)
        return
    fine = _refine(left, right)
    sides = (_runs(left, fine), _runs(right, fine))
    split = [_split(start, size, fine[a:b]) for (start, size), (a, b) in zip(box, sides[0], strict=True)]
    count = itertools.count()
    for parts in itertools.product(*split):
        for settled in _settle(tuple(itertools.chain(*parts)), fine, sides):
            if next(count) > MAX_PIECES:
                raise NotSliceableError(f"it would take more than {MAX_PIECES} reads")
            yield _merged(settled, fine, sides[0]), _merged(settled, fine, sides[1])


def _refine(left: Shape, right: Shape) -> Shape:
    """The common factorisation of two shapes with equal products."""
    marks: set[int] = {1}
    for shape in (left, right):
        marks.update(itertools.accumulate(reversed(shape), lambda a, b: a * b))
    ordered = sorted(marks)
    for small, large in itertools.pairwise(ordered):
        if large % small:
            raise NotSliceableError(f"shapes {left} and {right} have no common factorisation")
    return tuple(large // small for small, large in itertools.pairwise(ordered))[::-1]


def _runs(shape: Shape, fine: Shape) -> list[Range]:
    """For each dimension, the run of fine dimensions that it consists of."""
    runs: list[Range] = []
    start = 0
    for size in shape:
        stop, product = start, 1
        while product < size:
            product, stop = product * fine[stop], stop + 1
        runs.append((start, stop))
        start = stop
    return runs


def _split(start: int, size: int, fine: Shape) -> list[Box]:
    """A range of a dimension as boxes of the fine dimensions that it consists of."""
    if not fine:
        return [()]
    if len(fine) == 1:
        return [((start, size),)]
    inner = math.prod(fine[1:])
    first, last = start // inner, (start + size - 1) // inner
    if first == last:
        return [((first, 1), *rest) for rest in _split(start - first * inner, size, fine[1:])]
    parts: list[Box] = []
    begin = start - first * inner
    if begin:
        parts.extend(((first, 1), *rest) for rest in _split(begin, inner - begin, fine[1:]))
        first += 1
    end = start + size - last * inner
    rows = last - first + (end == inner)
    if rows:
        parts.append(((first, rows), *whole(fine[1:])))
    if end != inner:
        parts.extend(((last, 1), *rest) for rest in _split(0, end, fine[1:]))
    return parts


def _settle(box: Box, fine: Shape, sides: tuple[list[Range], list[Range]]) -> Iterator[Box]:
    """A fine box as boxes that are one contiguous range in every dimension of both sides."""
    for a, b in itertools.chain(*sides):
        partial = next((i for i in range(b - 1, a - 1, -1) if box[i] != (0, fine[i])), a)
        offending = next((i for i in range(a, partial) if box[i][1] > 1), None)
        if offending is not None:
            start, size = box[offending]
            for i in range(start, start + size):
                yield from _settle((*box[:offending], (i, 1), *box[offending + 1 :]), fine, sides)
            return
    yield box


def _merged(box: Box, fine: Shape, runs: list[Range]) -> Box:
    merged: list[Range] = []
    for a, b in runs:
        start, size = 0, 1
        for (offset, count), full in zip(box[a:b], fine[a:b], strict=True):
            start, size = start * full + offset, size * count
        merged.append((start, size))
    return tuple(merged)
