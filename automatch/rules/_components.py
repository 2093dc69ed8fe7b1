"""What must be explained together: source keys that feed common targets, and what is the same in their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from automatch.mapping import Match
from automatch.transforms import Transform

Made = tuple[str, Transform, tuple[int, ...] | None]
"""A target (its key or the part of it before the common tail), its transform, and the positions of its sources."""


@dataclass(frozen=True, slots=True)
class Component:
    """Source keys and everything they feed, once for a rule to explain.

    Args:
        sources: the source keys, each once.
        outputs: the targets they feed, in the model's order; none for keys that a rule has to leave out.
        confidence: the lowest confidence of its matches.
        common: number of final segments that all keys share.
        position: where it stands among components of its kind.
    """

    sources: tuple[str, ...]
    outputs: tuple[Made, ...]
    confidence: float | None
    common: int
    position: int

    def heads(self, common: int) -> tuple[tuple[str, ...], tuple[Made, ...]]:
        """Sources and outputs without their last ``common`` segments."""
        return (
            tuple(head(key, common) for key in self.sources),
            tuple((head(key, common), transform, takes) for key, transform, takes in self.outputs),
        )


def head(key: str, cut: int) -> str:
    """``key`` without its last ``cut`` segments, the final dot kept: ``head("a.b.c", 1) == "a.b."``."""
    end = len(key)
    for _ in range(cut):
        end = key.rfind(".", 0, end)
        if end < 0:
            return ""
    return key[: end + 1] if cut else key


def components(matches: Sequence[Match]) -> tuple[Component, ...]:
    """Group matches that share source keys, in order of their first target."""
    root: dict[str, str] = {}

    def find(key: str) -> str:
        while root.setdefault(key, key) != key:
            root[key] = root[root[key]]
            key = root[key]
        return key

    for match in matches:
        for key in match.sources:
            root[find(key)] = find(match.sources[0])
    groups: dict[str, list[Match]] = {}
    for match in matches:
        if match.sources:
            groups.setdefault(find(match.sources[0]), []).append(match)
    return tuple(_component(group, position) for position, group in enumerate(groups.values()))


def _component(group: list[Match], position: int) -> Component:
    sources = tuple(dict.fromkeys(key for match in group for key in match.sources))
    place = {key: position for position, key in enumerate(sources)}
    outputs = tuple(
        (match.target, match.transform, None if match.sources == sources else tuple(place[key] for key in match.sources)) for match in group
    )
    keys = [*sources, *(match.target for match in group)]
    return Component(sources, outputs, min(match.confidence for match in group), _common(keys), position)


def _common(keys: Sequence[str]) -> int:
    first, *rest = (key.split(".") for key in keys)
    count = len(first)
    for other in rest:
        count = min(count, len(other))
        shared = 0
        while shared < count and first[-1 - shared] == other[-1 - shared]:
            shared += 1
        count = shared
    return count
