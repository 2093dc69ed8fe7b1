"""Numbers as functions of other numbers: constants, shifts, multiples, value tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, count

from automatch.rules._patterns import Index, Row

Cell = int | Index


def _names(letters: str, further: str) -> Iterator[str]:
    return chain(letters, (f"{further}{number}" for number in count(1)))


def fit(rows: Sequence[Row], bound: int) -> list[Cell]:
    """Express every column of ``rows`` by the first ``bound`` columns, which differ from row to row.

    Returns:
        Per column a constant, a variable (one of the first ``bound``), or an `Index` on those variables.
    """
    columns = list(zip(*rows, strict=True))
    variables = _names("ijklm", "v")
    cells: list[Cell] = [column[0] if len(set(column)) == 1 else Index((next(variables),)) for column in columns[:bound]]
    free = {cell.variables[0]: columns[place] for place, cell in enumerate(cells) if isinstance(cell, Index)}
    titles = _names("abcdefgh", "t")
    tables: dict[tuple[tuple[str, ...], tuple[tuple[Row, int], ...]], str] = {}
    for column in columns[bound:]:
        cell = column[0] if len(set(column)) == 1 else _shift(column, free) or _multiple(column, free) or _table(column, free)
        if isinstance(cell, Index) and cell.table:
            content = (cell.variables, cell.table)
            if content not in tables:
                tables[content] = next(titles)
            cell = Index(cell.variables, table=cell.table, name=tables[content])
        cells.append(cell)
    return cells


def _shift(column: Row, free: dict[str, Row]) -> Index | None:
    found: list[Index] = []
    for name, values in free.items():
        offset = column[0] - values[0]
        if all(number - value == offset for number, value in zip(column, values, strict=True)):
            found.append(Index((name,), offset=offset))
    return min(found, key=lambda index: abs(index.offset), default=None)


def _multiple(column: Row, free: dict[str, Row]) -> Index | None:
    if len(set(column)) < 3:  # two points lie on many lines
        return None
    for name, values in free.items():
        other = next((place for place, value in enumerate(values) if value != values[0]), None)
        if other is None:
            continue
        scale, rest = divmod(column[other] - column[0], values[other] - values[0])
        offset = column[0] - scale * values[0]
        if rest == 0 and scale > 0 and all(number == scale * value + offset for number, value in zip(column, values, strict=True)):
            return Index((name,), scale, offset)
    return None


def _table(column: Row, free: dict[str, Row]) -> Index:
    for size in range(1, len(free) + 1):
        for names in combinations(free, size):
            table: dict[Row, int] = {}
            keys = zip(*(free[name] for name in names), strict=True)
            if all(table.setdefault(key, number) == number for key, number in zip(keys, column, strict=True)):
                return Index(names, table=tuple(sorted(table.items())))
    raise AssertionError("rows that agree in every bound number agree in all")
