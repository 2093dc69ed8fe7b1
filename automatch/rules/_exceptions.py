"""Few keys that break an arithmetic which all others of their rule follow: each is better said on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from automatch.rules._patterns import Index, Row, split_numbers
from automatch.rules._rule import RenameRule

_ROWS = 10
_SHARE = 0.9


def exceptions(rules: Iterable[RenameRule]) -> set[str]:
    """Source keys without which a value table would be a sum or a constant."""
    found: set[str] = set()
    for rule in rules:
        odd = {index.variables: _odd(index) for index in rule.indices if len(index.table) >= _ROWS}
        if not rule.single or not any(odd.values()):
            continue
        pattern = rule.sources[0].items[0]
        columns = {number.variables[0]: column for column, number in enumerate(pattern.numbers) if isinstance(number, Index)}
        for key in rule.firsts:
            numbers = split_numbers(key)[1]
            if any(tuple(numbers[columns[name]] for name in names) in rows for names, rows in odd.items()):
                found.add(key)
    return found


def _odd(index: Index) -> set[Row]:
    """The rows that do not follow the sum or constant of at least nine in ten; none where nothing is followed so widely."""
    for column in (*range(len(index.variables)), None):
        differences = {row: value - (0 if column is None else row[column]) for row, value in index.table}
        ((usual, number),) = Counter(differences.values()).most_common(1)
        if number >= _SHARE * len(index.table):
            return {row for row, difference in differences.items() if difference != usual}
    return set()
