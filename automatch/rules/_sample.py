"""Rules of very many keys from few of them: experts that differ in their numbers alone need not all be looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from automatch.rules._apply import Application
from automatch.rules._components import Component
from automatch.rules._patterns import split_numbers
from automatch.rules._rule import RenameRule

_FIRST = 4


def sample(parts: Sequence[Component]) -> list[Component]:
    """Leave out components of one source in whose key two numbers or more are neither first nor last in their place.

    Every value that a number takes is still seen, beside the first and last values of all others.
    """
    columns: dict[tuple[str, ...], list[set[int]]] = {}
    split = [split_numbers(part.sources[0]) for part in parts]
    for texts, numbers in split:
        seen = columns.setdefault(texts, [set() for _ in numbers])
        for values, number in zip(seen, numbers, strict=True):
            values.add(number)
    ends = {texts: [_ends(values) for values in seen] for texts, seen in columns.items()}
    return [
        part
        for part, (texts, numbers) in zip(parts, split, strict=True)
        if len(part.sources) > 1 or sum(number not in few for number, few in zip(numbers, ends[texts], strict=True)) < 2
    ]


def _ends(values: set[int]) -> set[int]:
    ordered = sorted(values)
    return {*ordered[:_FIRST], *ordered[-1:]}


def with_explained(
    rules: Sequence[RenameRule], applied: Iterable[Application], confidence: Mapping[str, float], place: Mapping[str, int]
) -> tuple[RenameRule, ...]:
    """The rules with everything they explain, in the order of the mapping.

    Args:
        rules: the rules, found from a sample.
        applied: what they do with all source keys.
        confidence: of every target key's match.
        place: of every target key in the mapping.
    """
    parts: list[list[tuple[int, tuple[str, ...], tuple[str, ...]]]] = [[] for _ in rules]
    for at, order, sources, made in applied:
        targets = tuple(target for target, *_ in made)
        parts[order].append((min((place[target] for target in targets), default=at), sources, targets))
    return tuple(_explaining(rule, sorted(found), confidence, place) for rule, found in zip(rules, parts, strict=True))


def _explaining(
    rule: RenameRule,
    found: Sequence[tuple[int, tuple[str, ...], tuple[str, ...]]],
    confidence: Mapping[str, float],
    place: Mapping[str, int],
) -> RenameRule:
    targets = sorted((target for *_, targets in found for target in targets), key=place.__getitem__)
    return replace(
        rule,
        targets=tuple(targets),
        firsts=tuple(sources[0] for _, sources, _ in found),
        confidence=min((confidence[target] for target in targets), default=None),
        example=found[0][1:],
    )
