"""The matches of a mapping under the rules that explain them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace

from automatch.mapping import KeyMapping, Match
from automatch.report.collapse import collapse
from automatch.report.wording import short, transform_text
from automatch.transforms import to_dict

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


MAX_FACTS = 400


@dataclass(frozen=True, slots=True)
class Group:
    """A rename rule and the rows it explains.

    Args:
        pattern: the checkpoint keys it takes.
        replacement: the model keys it gives.
        transform: what happens to the tensors, in words; empty for a copy.
        confidence: of its least sure match, in [0, 1].
        rows: positions among the mapping's matches.
        where: the limits of its variables, in words; empty where there are none.
    """

    pattern: str
    replacement: str
    transform: str
    confidence: float
    rows: tuple[int, ...]
    where: str = ""


def group_by_rule(mapping: KeyMapping) -> tuple[Group, ...]:
    """The matches under `KeyMapping.rules`, the rules that explain most first."""
    place = {match.target: position for position, match in enumerate(mapping.matches)}
    groups: list[Group] = []
    for rule in mapping.rules:
        rows = tuple(sorted(place[key] for key in rule.targets))
        if rows:
            matches = [mapping.matches[row] for row in rows]
            words = dict.fromkeys(transform_text(match.transform) for match in matches)
            transform = next(iter(words)) if len(words) == 1 else _facts(rule.transform)
            confidence = min(match.confidence for match in matches)
            groups.append(
                Group(
                    short(rule.pattern),
                    short(rule.replacement),
                    transform,
                    confidence,
                    rows,
                    short(rule.where, MAX_FACTS) if rule.where else "",
                )
            )
    return tuple(sorted(groups, key=lambda group: -len(group.rows)))


def _facts(text: str) -> str:
    return short(text, MAX_FACTS) if text else ""


def narrowed(mapping: KeyMapping, groups: Iterable[Group], positions: Set[int]) -> tuple[Group, ...]:
    """Only the matches at ``positions``, least sure first: under their rule where they are most of it, else by template."""
    found: list[Group] = []
    for group in groups:
        rows = tuple(row for row in group.rows if row in positions)
        if len(rows) > 1 and 2 * len(rows) >= len(group.rows):
            found.append(replace(group, rows=rows, confidence=min(mapping.matches[row].confidence for row in rows)))
        else:
            found.extend(group_by_template(mapping, rows))
    return tuple(sorted(found, key=lambda group: group.confidence))


def group_by_template(mapping: KeyMapping, positions: Iterable[int]) -> tuple[Group, ...]:
    """The matches at ``positions`` by template, those with most matches first."""
    found: dict[tuple[object, ...], list[int]] = {}
    for position in positions:
        found.setdefault(_skeleton(mapping.matches[position]), []).append(position)
    groups = [_group(mapping, members) for members in found.values()]
    return tuple(sorted(groups, key=lambda group: -len(group.rows)))


def _skeleton(match: Match) -> tuple[object, ...]:
    sources = tuple(_NUMBER.sub("#", key) for key in match.sources)
    return sources, _NUMBER.sub("#", match.target), str(to_dict(match.transform))


def _group(mapping: KeyMapping, positions: list[int]) -> Group:
    matches = [mapping.matches[position] for position in positions]
    columns = zip(*(match.sources for match in matches), strict=True)
    patterns = [collapse(column)[0].template for column in columns]
    return Group(
        pattern=short(" + ".join(patterns)),
        replacement=short(collapse(match.target for match in matches)[0].template),
        transform=transform_text(matches[0].transform),
        confidence=min(match.confidence for match in matches),
        rows=tuple(positions),
    )
