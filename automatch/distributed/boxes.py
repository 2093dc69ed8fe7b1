"""Which slices of which sources fill a slice of a target: transforms as reads, without touching a tensor.

A box is one ``(offset, size)`` per dimension. `cut` pulls a box of the target back through a transform, step
by step, and gives pieces: boxes of single stored chunks, each with the views that turn it into its part of the
target. A reshape is a box only where both shapes agree on a common factorisation; where they do not, nothing
smaller than the whole tensor will do, and `cut` says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from automatch.distributed.reshapes import MAX_PIECES, Box, NotSliceableError, Range, reshaped_boxes, whole
from automatch.errors import TransformError
from automatch.transforms import (
    Adapt,
    Chain,
    Concat,
    Copy,
    Permute,
    PermuteElements,
    Reshape,
    Shape,
    Slice,
    Stack,
    Step,
    Transform,
    output_shape,
    to_dict,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One read.

    Args:
        source: position of the source among the match's sources.
        chunk: position of the stored chunk among that source's chunks.
        box: what to read, in the source's coordinates; it lies within that chunk.
        target: what it fills, in the target's coordinates.
        views: what turns the tensor that was read into the target's part, applied in order.
    """

    source: int
    chunk: int
    box: Box
    target: Box
    views: tuple[Reshape | Permute, ...] = ()


@dataclass(frozen=True, slots=True)
class _Stage:
    """One step of a transform with the shapes on both sides of it."""

    step: Permute | Slice | Reshape
    before: Shape
    after: Shape


def sizes(box: Box) -> Shape:
    """The shape of a box."""
    return tuple(size for _, size in box)


def numel(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(size for _, size in box)


def overlap(left: Box, right: Box) -> Box | None:
    """What two boxes share; None for nothing."""
    shared: list[Range] = []
    for (a, n), (b, m) in zip(left, right, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if stop <= start:
            return None
        shared.append((start, stop - start))
    return tuple(shared)


def relative(box: Box, origin: Box) -> Box:
    """A box in the coordinates of another one that contains it."""
    return tuple((start - zero, size) for (start, size), (zero, _) in zip(box, origin, strict=True))


def cut(transform: Transform, chunks: Sequence[Sequence[Box]], shapes: Sequence[Shape], box: Box) -> list[Piece]:
    """The reads that fill ``box`` of the target.

    Args:
        transform: how the sources become the target.
        chunks: for each source, the boxes under which it is stored.
        shapes: for each source, its full shape.
        box: a box of the target, e.g. the shard of one rank.

    Raises:
        TransformError: the transform does not fit the shapes, or invents values.
        NotSliceableError: nothing smaller than the whole sources will do.
    """
    output_shape(transform, shapes)
    join, stages = _stages(transform, shapes)
    if not numel(box):
        return []
    return _Cutter(join, stages, chunks, shapes).pull(len(stages), box)


class _Cutter:
    def __init__(self, join: Step, stages: Sequence[_Stage], chunks: Sequence[Sequence[Box]], shapes: Sequence[Shape]) -> None:
        self._join, self._stages, self._chunks, self._shapes = join, stages, chunks, shapes

    def pull(self, depth: int, box: Box) -> list[Piece]:
        """The pieces of a box of what the first ``depth`` stages give."""
        if depth == 0:
            return list(self._sources(box))
        stage = self._stages[depth - 1]
        match stage.step:
            case Permute(dims):
                inner = tuple(box[dims.index(i)] for i in range(len(dims)))
                return [
                    replace(p, target=tuple(p.target[dim] for dim in dims), views=(*p.views, stage.step))
                    for p in self.pull(depth - 1, inner)
                ]
            case Slice(dim, start, _):
                pieces = self.pull(depth - 1, _moved(box, dim, start))
                return [replace(p, target=_moved(p.target, dim, -start)) for p in pieces]
            case Reshape():
                return self._reshaped(depth, stage, box)

    def _reshaped(self, depth: int, stage: _Stage, box: Box) -> list[Piece]:
        done: list[Piece] = []
        work = list(reshaped_boxes(stage.after, stage.before, box))
        while work:
            outer, inner = work.pop()
            pieces = self.pull(depth - 1, inner)
            for piece in pieces:
                if piece.target == inner:
                    done.append(replace(piece, target=outer, views=(*piece.views, Reshape(sizes(outer)))))
                else:  # an earlier step divides this box; what it leaves may be several boxes on this side
                    work.extend((b, a) for a, b in reshaped_boxes(stage.before, stage.after, piece.target))
            if len(done) + len(work) > MAX_PIECES:
                raise NotSliceableError(f"it would take more than {MAX_PIECES} reads")
        return done

    def _sources(self, box: Box) -> Iterator[Piece]:
        match self._join:
            case Concat(dim):
                start = 0
                for i, shape in enumerate(self._shapes):
                    part = overlap(_moved(box, dim, -start), whole(shape))
                    if part is not None:
                        for piece in self._stored(i, part):
                            yield replace(piece, target=_moved(piece.box, dim, start))
                    start += shape[dim]
            case Stack(dim):
                first, count = box[dim]
                part = (*box[:dim], *box[dim + 1 :])
                for i in range(first, first + count):
                    for piece in self._stored(i, part):
                        target = (*piece.box[:dim], (i, 1), *piece.box[dim:])
                        yield replace(piece, target=target, views=(Reshape(sizes(target)),))
            case _:
                yield from self._stored(0, box)

    def _stored(self, source: int, box: Box) -> Iterator[Piece]:
        start, stop = (box[0][0], sum(box[0])) if box else (0, 1)
        for i, chunk in enumerate(self._chunks[source]):
            if chunk and (chunk[0][0] >= stop or sum(chunk[0]) <= start):  # most chunks are other ranks'; say so fast
                continue
            part = overlap(box, chunk)
            if part is not None:
                yield Piece(source, i, part, part)


def _moved(box: Box, dim: int, by: int) -> Box:
    start, size = box[dim]
    return (*box[:dim], (start + by, size), *box[dim + 1 :])


def _stages(transform: Transform, shapes: Sequence[Shape]) -> tuple[Step, list[_Stage]]:
    """The join that a transform starts with, and its other steps as permutations, slices and reshapes."""
    steps = transform.steps if isinstance(transform, Chain) else (transform,)
    join: Step = Copy()
    if steps and isinstance(steps[0], Concat | Stack):
        join, steps = steps[0], steps[1:]
    shape = output_shape(join, shapes)
    stages: list[_Stage] = []
    for step in itertools.chain.from_iterable(_plain(step, output) for step, output in _walk(steps, shape)):
        after = output_shape(step, [shape])
        stages.append(_Stage(step, shape, after))
        shape = after
    return join, stages


def _walk(steps: Sequence[Step], shape: Shape) -> Iterator[tuple[Step, Shape]]:
    for step in steps:
        yield step, shape
        shape = output_shape(step, [shape])


def _plain(step: Step, shape: Shape) -> Iterator[Permute | Slice | Reshape]:
    match step:
        case Copy():
            return
        case Permute() | Slice() | Reshape():
            yield step
        case PermuteElements(dim, split, order):
            yield Reshape((*shape[:dim], *split, *shape[dim + 1 :]))
            rest = range(dim + len(split), len(shape) + len(split) - 1)
            yield Permute((*range(dim), *(dim + axis for axis in order), *rest))
            yield Reshape(shape)
        case Concat() | Stack():
            yield Reshape(output_shape(step, [shape]))
        case Adapt():
            raise TransformError(f"{to_dict(step)} invents or drops values; it cannot be applied while loading sharded")
