"""From one shape to another without inventing a value: reshape, permutation, or both."""

from __future__ import annotations

from itertools import permutations

from automatch.engine.items import Shape, squeezed
from automatch.transforms import Copy, Permute, Reshape, Transform, chain

# Orders that libraries use, most usual first: transposed linear, HWIO and WIO kernels, and their inverses.
_USUAL = ((1, 0), (3, 2, 0, 1), (2, 3, 1, 0), (2, 1, 0), (2, 0, 1), (1, 2, 0), (0, 2, 1), (1, 0, 2))


def layout(source: Shape, target: Shape, *, transposed: bool = False) -> Transform | None:
    """The transform from ``source`` to ``target``, or None if no permutation of axes gives it.

    With ``transposed`` a square matrix is transposed although its shape does not ask for it.
    """
    if transposed and len(source) == 2 and source == target:
        return Permute((1, 0))
    if source == target:
        return Copy()
    a, b = squeezed(source), squeezed(target)
    if a == b:
        return Reshape(target)
    if sorted(a) != sorted(b):
        return None
    if len(source) == len(target):
        dims = _order(source, target)
        if dims is not None:
            return Permute(dims)
    dims = _order(a, b)
    if dims is None:
        return None
    return chain(*(() if a == source else (Reshape(a),)), Permute(dims), *(() if b == target else (Reshape(target),)))


def _order(source: Shape, target: Shape) -> tuple[int, ...] | None:
    for dims in [d for d in _USUAL if len(d) == len(source)] + list(permutations(range(len(source)))):
        if tuple(source[d] for d in dims) == target:
            return dims
    return None
