"""Applying rules to keys: every key is looked up by its template, never tried against every rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from automatch.mapping import Match
from automatch.rules._patterns import EACH, Index, Pattern, Row, split_numbers
from automatch.rules._rule import RenameRule
from automatch.transforms import Transform

Made = tuple[str, tuple[str, ...], Transform]
"""A target key, what feeds it, and how."""
Application = tuple[int, int, tuple[str, ...], list[Made]]
"""Where the first source stands among the keys, which rule decided, its sources, and what it makes of them."""


def apply_rules(rules: Iterable[RenameRule], source_keys: Iterable[str]) -> tuple[Match, ...]:
    """Work out what feeds what: the first rule that matches a source key decides about it.

    A rule with several sources matches when all of them are there and none is taken by an earlier rule.

    Args:
        rules: the rules, in order of precedence.
        source_keys: the keys of the checkpoint, e.g. a `StateSpec`'s ``keys``.

    Returns:
        One match per target key, in the order in which the sources come; the confidence is the rule's.
    """
    rules = tuple(rules)
    found: dict[str, Match] = {}
    for _, order, _, made in applications(rules, source_keys):
        for target, sources, transform in made:
            found[target] = Match(target, sources, transform, confidence=rules[order].confidence or 0.0)
    return tuple(found.values())


def applications(rules: Iterable[RenameRule], source_keys: Iterable[str]) -> list[Application]:
    """Every application of a rule, in the order in which the first sources come."""
    index = _Index(rules)
    keys = tuple(dict.fromkeys(source_keys))
    present = set(keys)
    offers = [(hit.order, place, hit) for place, key in enumerate(keys) for hit in index.hits(key)]
    offers.sort(key=lambda offer: offer[:2])
    taken: set[str] = set()
    found: list[Application] = []
    for order, place, hit in offers:
        if keys[place] in taken:
            continue
        sources = hit.sources(keys[place])
        if not all(key in present and key not in taken for key in sources):
            continue
        made = hit.made(sources)
        if made is not None:
            taken.update(sources)
            found.append((place, order, sources, made))
    found.sort(key=lambda application: application[0])
    return found


@dataclass(frozen=True, slots=True)
class _Hit:
    """A rule whose first source pattern matches a key."""

    rule: RenameRule
    order: int
    bound: Mapping[str, int]
    tail: str

    def sources(self, first: str) -> tuple[str, ...]:
        """The source keys; the empty key, which no checkpoint has, stands for one outside a value table."""
        if self.rule.single:
            return (first,)
        return tuple(item.key(seen, self.tail) or "" for loop in self.rule.sources for item, seen in loop.each(self.bound))

    def made(self, sources: tuple[str, ...]) -> list[Made] | None:
        """What the rule makes of its sources; None where a value table has no entry, so that it does not match."""
        made: list[Made] = []
        for loop in self.rule.outputs:
            for out, seen in loop.each(self.bound):
                target, transform = out.pattern.key(seen, self.tail), out.transform_for(seen)
                if target is None or transform is None:
                    return None
                made.append((target, sources if out.takes is None else tuple(sources[position] for position in out.takes), transform))
        return made


class _Index:
    """Rules by the template of their first source pattern and by the numbers that they are limited to."""

    def __init__(self, rules: Iterable[RenameRule]) -> None:
        self._entries: dict[tuple[tuple[str, ...], bool, tuple[int, ...], Row], list[tuple[int, RenameRule]]] = {}
        self._columns: dict[tuple[tuple[str, ...], bool], set[tuple[int, ...]]] = {}
        self._domains: dict[int, list[tuple[tuple[str, ...], frozenset[Row]]]] = {}
        depths: set[int] = set()
        for order, rule in enumerate(rules):
            first = rule.sources[0].items[0]
            columns, rows = _selector(rule, first)
            self._columns.setdefault((first.texts, first.star), set()).add(columns)
            for row in rows:
                self._entries.setdefault((first.texts, first.star, columns, row), []).append((order, rule))
            self._domains[order] = [(domain.variables, frozenset(domain.rows)) for domain in rule.domains]
            if first.star:
                depths.add(first.depth)
        self._depths = sorted(depths)

    def hits(self, key: str) -> Iterator[_Hit]:
        """Every rule whose first source pattern matches the key, in no particular order."""
        yield from self._matching(key, "", star=False)
        end = depth = 0
        for wanted in self._depths:
            while depth < wanted and end >= 0:
                end = key.find(".", end) + 1 or -1
                depth += 1
            if end < 0:
                return
            yield from self._matching(key[:end], key[end:], star=True)

    def _matching(self, text: str, tail: str, *, star: bool) -> Iterator[_Hit]:
        texts, numbers = split_numbers(text)
        for columns in self._columns.get((texts, star), ()):
            for order, rule in self._entries.get((texts, star, columns, tuple(numbers[column] for column in columns)), ()):
                bound = _bind(rule, numbers)
                if bound is not None and all(
                    tuple(bound[variable] for variable in variables) in rows for variables, rows in self._domains[order]
                ):
                    yield _Hit(rule, order, bound, tail)


def _selector(rule: RenameRule, first: Pattern) -> tuple[tuple[int, ...], Iterable[Row]]:
    """Positions of numbers in the first pattern, and the rows there that the rule can match at all."""
    limits = [(domain.variables, domain.rows) for domain in rule.domains]
    limits.extend((index.variables, tuple(index.lookup)) for index in rule.indices if index.table)
    if not limits:
        fixed = [(column, number) for column, number in enumerate(first.numbers) if isinstance(number, int)]
        return tuple(column for column, _ in fixed), (tuple(number for _, number in fixed),)
    variables, rows = min(limits, key=lambda limit: len(limit[1]))
    place = {number.variables[0]: column for column, number in enumerate(first.numbers) if isinstance(number, Index)}
    return tuple(place[variable] for variable in variables), rows


def _bind(rule: RenameRule, numbers: Row) -> dict[str, int] | None:
    bound: dict[str, int] = {}
    for wanted, number in zip(rule.sources[0].items[0].numbers, numbers, strict=True):
        if isinstance(wanted, int):
            if wanted != number:
                return None
        elif wanted.variables[0] == EACH:
            if wanted.value({EACH: rule.sources[0].values[0]}) != number:
                return None
        else:
            bound[wanted.variables[0]] = number
    return bound
