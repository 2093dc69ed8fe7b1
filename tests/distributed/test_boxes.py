"""Slices of transforms, against the transform of the whole."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automatch.distributed.boxes import Box, cut, overlap, relative, sizes
from automatch.distributed.reshapes import NotSliceableError
from automatch.errors import TransformError
from automatch.transforms import (
    Adapt,
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
    apply_transform,
    chain,
    output_shape,
)


def factors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def steps(draw: st.DrawFn, shape: Shape) -> Step:
    dim = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    rows = draw(st.sampled_from(factors(shape[dim])))
    new, left = [], math.prod(shape)
    for _ in range(draw(st.integers(0, 2))):
        new.append(draw(st.sampled_from(factors(left))))
        left //= new[-1]
    return draw(
        st.sampled_from(
            [
                Permute(tuple(draw(st.permutations(range(len(shape)))))),
                Slice(dim, start, draw(st.integers(1, shape[dim] - start))),
                PermuteElements(dim, (rows, shape[dim] // rows), (1, 0)),
                Reshape((*new, left)),
            ]
        )
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Transform, list[Shape], list[list[Box]], Box]:
    """A transform, its sources' shapes, how they are stored, and a box of the target."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3)))
    dim, count = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
    join = draw(st.sampled_from([Copy(), Concat(dim), Stack(dim)]))
    shapes = [shape] if isinstance(join, Copy) else [shape] * count
    if isinstance(join, Concat):
        shapes = [(*shape[:dim], draw(st.integers(1, 5)), *shape[dim + 1 :]) for _ in range(count)]
    transform, current = chain(join), output_shape(join, shapes)
    for _ in range(draw(st.integers(0, 3))):
        transform = chain(transform, draw(steps(current)))
        current = output_shape(transform, shapes)
    starts = [draw(st.integers(0, size - 1)) for size in current]
    box = tuple((start, draw(st.integers(1, size - start))) for start, size in zip(starts, current, strict=True))
    return transform, shapes, [draw(grids(shape)) for shape in shapes], box


@st.composite
def grids(draw: st.DrawFn, shape: Shape) -> list[Box]:
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    return list(itertools.product(*([(a, b - a) for a, b in itertools.pairwise(cuts)] for cuts in edges)))


def read(transform: Transform, arrays: list[np.ndarray], chunks: list[list[Box]], box: Box) -> np.ndarray:
    result = np.full(sizes(box), -1)
    for piece in cut(transform, chunks, [array.shape for array in arrays], box):
        assert overlap(piece.box, chunks[piece.source][piece.chunk]) == piece.box
        part = arrays[piece.source][tuple(slice(a, a + n) for a, n in piece.box)]
        for view in piece.views:
            part = apply_transform(view, [part])
        place = tuple(slice(a, a + n) for a, n in relative(piece.target, box))
        assert (result[place] == -1).all(), "an element is read twice"
        result[place] = part
    return result


@given(cases())
@settings(max_examples=200)
def test_pieces_make_up_the_box(case: tuple[Transform, list[Shape], list[list[Box]], Box]) -> None:
    transform, shapes, chunks, box = case
    starts = itertools.accumulate((math.prod(shape) for shape in shapes), initial=0)
    arrays = [np.arange(start, start + math.prod(shape)).reshape(shape) for start, shape in zip(starts, shapes, strict=False)]
    wanted = apply_transform(transform, arrays)[tuple(slice(a, a + n) for a, n in box)]
    with contextlib.suppress(NotSliceableError):
        assert (read(transform, arrays, chunks, box) == wanted).all()


def test_a_shard_of_a_fused_tensor_reads_only_the_sources_it_overlaps() -> None:
    shapes = [(8, 4), (8, 4), (8, 4)]
    whole = [[((0, 8), (0, 4))]] * 3
    pieces = cut(Concat(0), whole, shapes, ((4, 8), (0, 4)))
    assert [(piece.source, piece.box) for piece in pieces] == [(0, ((4, 4), (0, 4))), (1, ((0, 4), (0, 4)))]


def test_a_rotary_order_is_read_head_by_head() -> None:
    rotary = PermuteElements(0, (4, 8, 2), (0, 2, 1))
    pieces = cut(rotary, [[((0, 64), (0, 16))]], [(64, 16)], ((16, 32), (0, 16)))
    assert [piece.box for piece in pieces] == [((16, 32), (0, 16))]


def test_an_empty_shard_reads_nothing() -> None:
    assert cut(Copy(), [[((0, 3), (0, 2))]], [(3, 2)], ((3, 0), (0, 2))) == []


def test_a_scalar_is_one_piece() -> None:
    assert len(cut(Copy(), [[()]], [()], ())) == 1


def test_what_invents_values_is_refused() -> None:
    with pytest.raises(TransformError, match="invents or drops values"):
        cut(Adapt("resize", (4,)), [[((0, 2),)]], [(2,)], ((0, 4),))


def test_shapes_without_a_common_factorisation_cannot_be_sliced() -> None:
    with pytest.raises(NotSliceableError, match=r"\(6, 8\) and \(4, 12\) have no common factorisation"):
        cut(Reshape((6, 8)), [[((0, 4), (0, 12))]], [(4, 12)], ((0, 3), (0, 8)))
    assert len(cut(Reshape((6, 8)), [[((0, 4), (0, 12))]], [(4, 12)], ((0, 6), (0, 8)))) == 1


def test_too_many_reads_are_not_made() -> None:
    with pytest.raises(NotSliceableError, match="more than 10000 reads"):
        cut(Reshape((60_003, 2)), [[((0, 20_001), (0, 6))]], [(20_001, 6)], ((0, 60_003), (0, 1)))
