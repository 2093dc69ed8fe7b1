"""What a conversion will write: every tensor's key, dtype, shape and, where it needs no decoding, its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping, Match
from automatch.readers import OpenCheckpoint
from automatch.readers._base import Region
from automatch.readers._dtypes import ITEM_BYTES
from automatch.transforms import Adapt, Chain, Concat, Copy, Reshape, Shape, Slice, Stack, Transform, output_shape, to_dict


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the output.

    Args:
        match: what feeds it.
        dtype: torch's name of its dtype.
        shape: its sizes.
        regions: the runs of bytes that it consists of, or None if its sources have to be decoded.
    """

    match: Match
    dtype: str
    shape: Shape
    regions: tuple[Region, ...] | None

    @property
    def key(self) -> str:
        """The model key."""
        return self.match.target

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_conversion(mapping: KeyMapping, source: OpenCheckpoint) -> tuple[Planned, ...]:
    """Plan every match of ``mapping``, in the model's order, before anything is written.

    Raises:
        MappingError: a match does not fit, or would invent or drop values.
    """
    return tuple(_planned(match, mapping, source) for match in mapping.matches)


def _planned(match: Match, mapping: KeyMapping, source: OpenCheckpoint) -> Planned:
    named = ", ".join(map(repr, match.sources))
    missing = [key for key in match.sources if key not in source.spec]
    if missing:
        raise MappingError(f"the mapping feeds {match.target!r} from {missing[0]!r}, which is not a key of {source.spec.origin}")
    if any(isinstance(step, Adapt) for step in _steps(match.transform)):
        raise MappingError(
            f"{match.target!r} is adapted ({to_dict(match.transform)}), which needs the model's own values; "
            f"load it with automatch.load, or leave it out with mapping.decide({match.target!r}, None)"
        )
    try:
        shape = output_shape(match.transform, [source.spec[key].shape for key in match.sources])
    except TransformError as error:
        raise MappingError(f"{match.target!r} cannot be made from {named}: {error}") from error
    target = mapping.target.spec
    if target is not None and match.target in target and target[match.target].shape != shape:
        raise MappingError(f"size mismatch for {match.target!r}: {named} gives {shape}, the model wants {target[match.target].shape}")
    dtypes = [source.spec[key].dtype for key in match.sources]
    unknown = next((dtype for dtype in dtypes if dtype not in ITEM_BYTES), None)
    if unknown is not None:
        raise MappingError(f"{match.target!r} is fed by a tensor of dtype {unknown!r}, which cannot be written; dequantise it first")
    same = len(set(dtypes)) == 1
    return Planned(match, dtypes[0] if same else _promoted(dtypes), shape, _regions(match, source) if same else None)


def _promoted(dtypes: Sequence[str]) -> str:
    import torch

    result = getattr(torch, dtypes[0])
    for name in dtypes[1:]:
        result = torch.promote_types(result, getattr(torch, name))
    return str(result).removeprefix("torch.")


def _steps(transform: Transform) -> Sequence[Transform]:
    return transform.steps if isinstance(transform, Chain) else (transform,)


def _regions(match: Match, source: OpenCheckpoint) -> tuple[Region, ...] | None:
    """The bytes of the result, where it is made of whole runs of its sources' bytes."""
    regions: list[Region] = []
    for key in match.sources:
        region = source.region(key)
        if region is None:
            return None
        regions.append(region)
    shapes = [source.spec[key].shape for key in match.sources]
    for step in _steps(match.transform):
        match step:
            case Copy() | Reshape() | Concat(0) | Stack(0):
                pass
            case Slice(0, start, length) if len(regions) == 1:
                row = regions[0].nbytes // max(shapes[0][0], 1)
                regions = [Region(regions[0].file, regions[0].offset + start * row, length * row)]
            case _:
                return None
        shapes = [output_shape(step, shapes)]
    return tuple(regions)
