"""Conversions of tensors as data: described, checked, inverted and applied without knowing any key.

A transform takes the tensors of a match's sources, in order, and gives the tensor of its target. All
but `Concat` and `Stack` take exactly one source. `apply_transform` works on torch tensors and numpy
arrays alike, and returns views where the library can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from automatch.errors import TransformError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """The source as it is."""

    op: ClassVar[str] = "copy"


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in the same order under another shape."""

    shape: Shape
    op: ClassVar[str] = "reshape"


@dataclass(frozen=True, slots=True)
class Permute:
    """Axes in another order: axis ``i`` of the target is axis ``dims[i]`` of the source."""

    dims: tuple[int, ...]
    op: ClassVar[str] = "permute"


@dataclass(frozen=True, slots=True)
class Slice:
    """``length`` entries along ``dim``, from ``start``."""

    dim: int
    start: int
    length: int
    op: ClassVar[str] = "slice"


@dataclass(frozen=True, slots=True)
class Concat:
    """The sources one after the other along ``dim``."""

    dim: int
    op: ClassVar[str] = "concat"


@dataclass(frozen=True, slots=True)
class Stack:
    """The sources, all of one shape, along a new axis ``dim``."""

    dim: int
    op: ClassVar[str] = "stack"


@dataclass(frozen=True, slots=True)
class PermuteElements:
    """Another order of the entries along ``dim``: split into axes, permute them, flatten again.

    Rotary rows from interleaved to half-split are ``split=(heads, head_dim // 2, 2), order=(0, 2, 1)``;
    per-head q/k/v grouping to blocks is ``split=(heads, 3, head_dim), order=(1, 0, 2)``.
    """

    dim: int
    split: Shape
    order: tuple[int, ...]
    op: ClassVar[str] = "permute_elements"


@dataclass(frozen=True, slots=True)
class Adapt:
    """A change that invents or drops values; never confident by itself, applied only when asked for.

    ``method`` is one of the names in ``automatch.adapt`` and ``shape`` is the target's shape.
    """

    method: str
    shape: Shape
    op: ClassVar[str] = "adapt"


@dataclass(frozen=True, slots=True)
class Chain:
    """Several transforms, one after the other; only the first may take several sources."""

    steps: tuple[Step, ...]
    op: ClassVar[str] = "chain"


Step = Copy | Reshape | Permute | Slice | Concat | Stack | PermuteElements | Adapt
Transform = Step | Chain
_CLASSES: dict[str, type[Any]] = {c.op: c for c in (Copy, Reshape, Permute, Slice, Concat, Stack, PermuteElements, Adapt)}
_SINGLE = (Copy, Reshape, Permute, Slice, PermuteElements)


def chain(*transforms: Transform) -> Transform:
    """Compose transforms, leaving out copies; one step is returned as itself."""
    steps: list[Step] = []
    for transform in transforms:
        steps.extend(transform.steps if isinstance(transform, Chain) else [transform])
    kept = tuple(step for step in steps if not isinstance(step, Copy))
    if not kept:
        return Copy()
    return kept[0] if len(kept) == 1 else Chain(kept)


def to_dict(transform: Transform) -> dict[str, Any]:
    """The JSON form, e.g. ``{"op": "concat", "dim": 0}``."""
    if isinstance(transform, Chain):
        return {"op": "chain", "steps": [to_dict(step) for step in transform.steps]}
    values = {f.name: getattr(transform, f.name) for f in fields(transform)}
    return {"op": transform.op} | {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_dict(data: Mapping[str, Any]) -> Transform:
    """Read the JSON form.

    Raises:
        TransformError: the op is unknown, or a field is missing or of the wrong type.
    """
    op = data.get("op")
    if op == "chain":
        return Chain(tuple(_step(step) for step in data.get("steps", ())))
    return _step(data)


def _step(data: Mapping[str, Any]) -> Step:
    cls = _CLASSES.get(str(data.get("op")))
    if cls is None:
        raise TransformError(f"unknown transform op {data.get('op')!r}; expected one of {', '.join([*_CLASSES, 'chain'])}")
    names = [f.name for f in fields(cls)]
    if set(data) != {"op", *names}:
        raise TransformError(f"transform {dict(data)!r} must have exactly the fields {', '.join(['op', *names])}")
    values = {
        name: tuple(data[name]) if isinstance(data[name], Sequence) and not isinstance(data[name], str) else data[name] for name in names
    }
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name != "method" and not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise TransformError(f"field {name!r} of transform {dict(data)!r} must hold integers")
    return cls(**values)


def output_shape(transform: Transform, shapes: Sequence[Shape]) -> Shape:
    """The target's shape that results from sources of ``shapes``.

    Raises:
        TransformError: the transform does not fit these shapes.
    """
    if isinstance(transform, Chain):
        current = list(shapes)
        for step in transform.steps:
            current = [output_shape(step, current)]
        return _only(transform, current)
    if isinstance(transform, Concat | Stack):
        return _joined_shape(transform, shapes)
    shape = _only(transform, shapes)
    match transform:
        case Copy():
            return shape
        case Adapt(_, wanted):
            return wanted
        case Reshape(wanted) if math.prod(wanted) == math.prod(shape) and min(wanted, default=0) >= 0:
            return wanted
        case Permute(dims) if sorted(dims) == list(range(len(shape))):
            return tuple(shape[dim] for dim in dims)
        case Slice(dim, start, length) if 0 <= dim < len(shape) and 0 <= start and 0 <= length and start + length <= shape[dim]:
            return (*shape[:dim], length, *shape[dim + 1 :])
        case PermuteElements(dim, split, order) if (
            0 <= dim < len(shape) and math.prod(split) == shape[dim] and sorted(order) == list(range(len(split)))
        ):
            return shape
        case _:
            raise TransformError(f"transform {to_dict(transform)} does not fit a tensor of shape {shape}")


def _joined_shape(transform: Concat | Stack, shapes: Sequence[Shape]) -> Shape:
    error = TransformError(f"transform {to_dict(transform)} does not fit tensors of shapes {[tuple(s) for s in shapes]}")
    if not shapes:
        raise error
    first, dim = shapes[0], transform.dim
    if isinstance(transform, Stack):
        if not 0 <= dim <= len(first) or any(shape != first for shape in shapes):
            raise error
        return (*first[:dim], len(shapes), *first[dim:])
    if not 0 <= dim < len(first) or any((s[:dim], s[dim + 1 :]) != (first[:dim], first[dim + 1 :]) for s in shapes):
        raise error
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


def _only(transform: Transform, shapes: Sequence[Shape]) -> Shape:
    if len(shapes) != 1:
        raise TransformError(f"transform {to_dict(transform)} takes one source, got {len(shapes)}")
    return tuple(shapes[0])


def apply_transform(transform: Transform, tensors: Sequence[Any]) -> Any:
    """Compute the target's tensor from its sources (torch tensors or numpy arrays, all of one library).

    Raises:
        TransformError: the transform does not fit the tensors, or is an `Adapt`, which is not exact.
    """
    output_shape(transform, [tuple(tensor.shape) for tensor in tensors])
    current = list(tensors)
    for step in transform.steps if isinstance(transform, Chain) else (transform,):
        current = [_apply_step(step, current)]
    return current[0]


def _apply_step(step: Step, tensors: list[Any]) -> Any:
    if isinstance(step, Concat | Stack):
        return _join(step, tensors)
    tensor = tensors[0]
    match step:
        case Copy():
            return tensor
        case Reshape(shape):
            return tensor.reshape(shape)
        case Permute(dims):
            return _permute(tensor, dims)
        case Slice(dim, start, length):
            return tensor[(slice(None),) * dim + (slice(start, start + length),)]
        case PermuteElements(dim, split, order):
            shape = tuple(tensor.shape)
            axes = (*range(dim), *(dim + axis for axis in order), *range(dim + len(split), len(shape) + len(split) - 1))
            return _permute(tensor.reshape((*shape[:dim], *split, *shape[dim + 1 :])), axes).reshape(shape)
        case _:
            raise TransformError(f"{to_dict(step)} invents or drops values; ask for it with adapt=")


def _permute(tensor: Any, dims: Sequence[int]) -> Any:
    return tensor.permute(tuple(dims)) if hasattr(tensor, "permute") else tensor.transpose(tuple(dims))


def _join(step: Concat | Stack, tensors: list[Any]) -> Any:
    if hasattr(tensors[0], "permute"):
        import torch

        return torch.cat(tensors, step.dim) if isinstance(step, Concat) else torch.stack(tensors, step.dim)
    import numpy as np

    return np.concatenate(tensors, step.dim) if isinstance(step, Concat) else np.stack(tensors, step.dim)


def invert(transform: Transform, shapes: Sequence[Shape]) -> list[Transform]:
    """For each source, the transform that gives it back from the target.

    Raises:
        TransformError: a `Slice` or `Adapt` step loses values and has no inverse.
    """
    output_shape(transform, shapes)
    if not isinstance(transform, Chain):
        return _invert_step(transform, shapes)
    first, *rest = transform.steps
    backs = _invert_step(first, shapes)
    shape = output_shape(first, shapes)
    tail: Transform = Copy()
    for step in rest:
        tail = chain(_invert_step(step, [shape])[0], tail)
        shape = output_shape(step, [shape])
    return [chain(tail, back) for back in backs]


def _invert_step(step: Step, shapes: Sequence[Shape]) -> list[Transform]:
    match step:
        case Concat(dim):
            starts = [sum(shape[dim] for shape in shapes[:i]) for i in range(len(shapes))]
            return [Slice(dim, start, shape[dim]) for start, shape in zip(starts, shapes, strict=True)]
        case Stack(dim):
            return [chain(Slice(dim, i, 1), Reshape(tuple(shape))) for i, shape in enumerate(shapes)]
        case Copy():
            return [step]
        case Reshape():
            return [Reshape(tuple(shapes[0]))]
        case Permute(dims):
            return [Permute(tuple(dims.index(i) for i in range(len(dims))))]
        case PermuteElements(dim, split, order):
            return [PermuteElements(dim, tuple(split[i] for i in order), tuple(order.index(i) for i in range(len(order))))]
        case _:
            raise TransformError(f"{to_dict(step)} loses values and has no inverse")
