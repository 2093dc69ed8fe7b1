"""Two mappings, one after the other, as one."""

from __future__ import annotations

from collections.abc import Sequence

from automatch.errors import MappingError
from automatch.mapping import KeyMapping, Match
from automatch.specs import StateSpec
from automatch.transforms import Chain, Concat, Copy, Permute, PermuteElements, Slice, Step, Transform, chain

Part = tuple[tuple[str, ...], Transform]


def compose(first: KeyMapping, second: KeyMapping) -> KeyMapping:
    """The mapping that does ``first`` (old → middle) and then ``second`` (middle → new).

    Raises:
        MappingError: the two transforms of a key cannot be written as one.
    """
    matches: list[Match] = []
    for match in second.matches:
        parts = [first.get(key) for key in match.sources]
        fed = [part for part in parts if part is not None]
        if len(fed) < len(parts):
            continue
        try:
            sources, transform = join([(part.sources, part.transform) for part in fed], match.transform, first.source.spec)
        except MappingError as error:
            raise MappingError(
                f"two migrations do not compose for {match.target!r}: {error}; accept one from the oldest to the newest"
            ) from error
        confidence = match.confidence
        for part in fed:
            confidence *= part.confidence
        decided = match.decided and all(part.decided for part in fed)
        matches.append(Match(match.target, sources, transform, confidence=confidence, decided=decided))
    whole = KeyMapping(first.source, second.target, (), warnings=(*first.warnings, *second.warnings), verdict=second.verdict)
    return whole.with_matches(matches, questions=second.questions)


def join(parts: Sequence[Part], last: Transform, source: StateSpec | None) -> Part:
    """The sources and the one transform that do each part's own and then ``last``.

    Raises:
        MappingError: there is no such transform.
    """
    if len(parts) == 1:
        return parts[0][0], chain(parts[0][1], last)
    steps: tuple[Step, ...] = last.steps if isinstance(last, Chain) else (last,)
    head, tail = steps[0], chain(*steps[1:])
    if isinstance(head, Concat):
        parts = _merged(parts, head.dim, source)
        if len(parts) == 1:
            return parts[0][0], chain(parts[0][1], tail)
        if all(isinstance(t, Copy) or t == Concat(head.dim) for _, t in parts):
            return tuple(key for sources, _ in parts for key in sources), chain(head, tail)
        moved = _pulled_out(parts, head.dim)
        if moved is not None:
            return tuple(key for sources, _ in parts for key in sources), chain(moved, tail)
    elif all(isinstance(t, Copy) for _, t in parts):
        return tuple(key for sources, _ in parts for key in sources), last
    raise MappingError(f"{head.op!r} of {', '.join(sorted({t.op for _, t in parts}))}")


def _merged(parts: Sequence[Part], dim: int, source: StateSpec | None) -> list[Part]:
    """Slices of one tensor that lie one after the other, taken as one; a slice of all of it as a copy."""
    merged: list[Part] = []
    for sources, transform in parts:
        if merged and isinstance(transform, Slice) and transform.dim == dim:
            before_sources, before = merged[-1]
            if (
                isinstance(before, Slice)
                and before_sources == sources
                and before.dim == dim
                and before.start + before.length == transform.start
            ):
                merged[-1] = (sources, Slice(dim, before.start, before.length + transform.length))
                continue
        merged.append((sources, transform))
    return [(sources, _whole(sources, transform, source)) for sources, transform in merged]


def _whole(sources: tuple[str, ...], transform: Transform, source: StateSpec | None) -> Transform:
    if not isinstance(transform, Slice) or source is None or transform.start != 0:
        return transform
    return Copy() if transform.length == source[sources[0]].shape[transform.dim] else transform


def _pulled_out(parts: Sequence[Part], dim: int) -> Transform | None:
    """What all parts do alike, done once after they are joined."""
    transforms = [transform for _, transform in parts]
    first = transforms[0]
    if isinstance(first, Permute) and all(transform == first for transform in transforms):
        return chain(Concat(first.dims[dim]), first)
    if isinstance(first, PermuteElements) and first.dim == dim and first.order[0] == 0:
        alike = [
            t for t in transforms if isinstance(t, PermuteElements) and (t.dim, t.split[1:], t.order) == (dim, first.split[1:], first.order)
        ]
        if len(alike) == len(transforms):
            groups = sum(transform.split[0] for transform in alike)
            return chain(Concat(dim), PermuteElements(dim, (groups, *first.split[1:]), first.order))
    return None
