"""From literal rules that differ in numbers alone to one rule with variables, tables and limits."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from automatch.rules._components import head
from automatch.rules._cover import Literal
from automatch.rules._fit import fit
from automatch.rules._patterns import EACH, Index, Pattern, Row, numbers_of, shape_of_transform, split_numbers, with_numbers
from automatch.rules._rule import Domain, Loop, Output, RenameRule
from automatch.transforms import Transform

Linear = tuple[int, int]
Cell = int | Index


@dataclass(frozen=True, slots=True)
class _Item:
    """A source or target with its numbers taken out; ``steady`` says per number how it follows ``n`` (None: it does not)."""

    texts: tuple[str, ...]
    transform: Transform | None = None
    takes: tuple[int, ...] | None = None
    steady: tuple[Linear | None, ...] = ()


@dataclass(frozen=True, slots=True)
class _Run:
    items: tuple[_Item, ...]
    values: Row


@dataclass(frozen=True, slots=True)
class _Skeleton:
    sources: tuple[_Run, ...]
    outputs: tuple[_Run, ...]
    star: bool


class Universe:
    """The numbers that occur in the source keys, per template of a key or of a prefix."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._rows: dict[tuple[tuple[str, ...], bool], set[Row]] = {}
        seen: set[str] = set()
        for key in keys:
            self._add(key, star=False)
            path = head(key, 1)
            while path not in seen:
                seen.add(path)
                self._add(path, star=True)
                path = head(path[:-1], 1)

    def _add(self, text: str, *, star: bool) -> None:
        texts, numbers = split_numbers(text)
        self._rows.setdefault((texts, star), set()).add(numbers)

    def rows(self, texts: tuple[str, ...], *, star: bool) -> set[Row]:
        """Every row of numbers with which the template occurs."""
        return self._rows.get((texts, star), set())


def generalise(literals: Iterable[Literal], universe: Universe, place: Mapping[str, int]) -> list[RenameRule]:
    """One rule per group of literal rules that differ in numbers alone.

    Args:
        literals: the literal rules.
        universe: the numbers in all source keys; rules are limited where they would match too much.
        place: position of every target key, for the order of what a rule explains.
    """
    literals = list(literals)
    narrowed = [literal for literal in literals if not literal.star]
    for group in _grouped(literal for literal in literals if literal.star):
        narrowed.extend(_without_star([literal for _, literal in group]))
    return [_rule(_skeleton(group[0][1])[0], group, universe, place) for group in _grouped(narrowed)]


def _grouped(literals: Iterable[Literal]) -> list[list[tuple[Row, Literal]]]:
    groups: dict[Hashable, list[tuple[Row, Literal]]] = {}
    for literal in literals:
        name, numbers = _abstract(literal)
        groups.setdefault(name, []).append((numbers, literal))
    return list(groups.values())


def _abstract(literal: Literal) -> tuple[Hashable, Row]:
    """What literal rules that differ in numbers alone have in common, and the numbers."""
    if len(literal.sources) != 1 or len(literal.outputs) != 1:
        return _skeleton(literal)
    texts, numbers = split_numbers(literal.sources[0])
    ((key, transform, takes),) = literal.outputs
    target_texts, target_numbers = split_numbers(key)
    name = (texts, target_texts, shape_of_transform(transform), takes, literal.star)
    return name, numbers + target_numbers + numbers_of(transform)


def _without_star(group: list[Literal]) -> list[Literal]:
    """Where the tail is the same for all keys, say so instead of allowing any."""
    if not group[0].star:
        return group
    tails = {part.sources[0][len(literal.sources[0]) :] for literal in group for part in literal.explains}
    if len(tails) > 1:
        return group
    tail = tails.pop()
    return [
        replace(
            literal,
            star=False,
            sources=tuple(key + tail for key in literal.sources),
            outputs=tuple((key + tail, transform, takes) for key, transform, takes in literal.outputs),
        )
        for literal in group
    ]


# ---- taking the numbers out ---------------------------------------------------------------------------


def _skeleton(literal: Literal) -> tuple[_Skeleton, Row]:
    sources = [(_Item(texts), numbers) for texts, numbers in map(split_numbers, literal.sources)]
    outputs: list[tuple[_Item, Row]] = []
    for key, transform, takes in literal.outputs:
        texts, numbers = split_numbers(key)
        outputs.append((_Item(texts, shape_of_transform(transform), takes), numbers + numbers_of(transform)))
    runs = [_runs(sources), _runs(outputs)]
    numbers = tuple(number for side in runs for _, row in side for number in row)
    return _Skeleton(tuple(run for run, _ in runs[0]), tuple(run for run, _ in runs[1]), literal.star), numbers


def _runs(items: Sequence[tuple[_Item, Row]]) -> list[tuple[_Run, Row]]:
    """Fold a list that repeats itself with one running number (experts) into loops."""
    if len(items) > 1:
        for period in range(1, len(items) // 2 + 1):
            if len(items) % period == 0 and all(items[k][0] == items[k % period][0] for k in range(len(items))):
                run = _run(items, period)
                return [run] if run else [_once(item) for item in items]
    folded: list[tuple[_Run, Row]] = []
    start = 0
    for end in range(1, len(items) + 1):
        if end == len(items) or items[end][0] != items[start][0]:
            run = _run(items[start:end], 1) if end - start > 1 else None
            folded.extend([run] if run else [_once(item) for item in items[start:end]])
            start = end
    return folded


def _once(item: tuple[_Item, Row]) -> tuple[_Run, Row]:
    return _Run((replace(item[0], steady=(None,) * len(item[1])),), ()), item[1]


def _run(items: Sequence[tuple[_Item, Row]], period: int) -> tuple[_Run, Row] | None:
    columns = [list(zip(*(row for _, row in items[place::period]), strict=True)) for place in range(period)]
    values = next((column for column in columns[0] if len(set(column)) == len(column)), None)
    if values is None:
        return None
    numbers: list[int] = []
    folded: list[_Item] = []
    for (item, _), cells in zip(items, columns, strict=False):
        steady: list[Linear | None] = []
        for column in cells:
            if len(set(column)) == 1:
                steady.append(None)
                numbers.append(column[0])
                continue
            scale, rest = divmod(column[1] - column[0], values[1] - values[0])
            offset = column[0] - scale * values[0]
            if rest or any(number != scale * value + offset for number, value in zip(column, values, strict=True)):
                return None
            steady.append((scale, offset))
        folded.append(replace(item, steady=tuple(steady)))
    return _Run(tuple(folded), values), tuple(numbers)


# ---- putting variables in ------------------------------------------------------------------------------


def _rule(skeleton: _Skeleton, group: list[tuple[Row, Literal]], universe: Universe, place: Mapping[str, int]) -> RenameRule:
    first = skeleton.sources[0].items[0]
    bound = sum(steady is None for steady in first.steady)
    rows = [row for row, _ in group]
    cells = fit(rows, bound)
    filling = iter(cells)
    sources = tuple(Loop(tuple(_pattern(item, filling, skeleton.star)[0] for item in run.items), run.values) for run in skeleton.sources)
    outputs = tuple(Loop(tuple(_output(item, filling, skeleton.star) for item in run.items), run.values) for run in skeleton.outputs)
    explained = sorted((part for _, literal in group for part in literal.explains), key=lambda part: part.position)
    targets = sorted((key for part in explained for key, *_ in part.outputs), key=place.__getitem__)
    sure = [part.confidence for part in explained if part.confidence is not None]
    return RenameRule(
        sources,
        outputs,
        _domains(first, cells[:bound], cells, {row[:bound] for row in rows}, universe.rows(first.texts, star=skeleton.star)),
        tuple(targets),
        tuple(part.sources[0] for part in explained),
        min(sure) if sure else None,
        (explained[0].sources, tuple(key for key, *_ in explained[0].outputs)),
    )


def _pattern(item: _Item, filling: Iterator[Cell], star: bool) -> tuple[Pattern, list[Cell]]:
    numbers: list[Cell] = [next(filling) if steady is None else Index((EACH,), *steady) for steady in item.steady]
    count = len(item.texts) - 1
    return Pattern(item.texts, tuple(numbers[:count]), star), numbers[count:]


def _output(item: _Item, filling: Iterator[Cell], star: bool) -> Output:
    assert item.transform is not None
    pattern, numbers = _pattern(item, filling, star)
    known = [number if isinstance(number, int) else 0 for number in numbers]
    return Output(pattern, with_numbers(item.transform, known), tuple(numbers), item.takes)


def _domains(first: _Item, own: Sequence[Cell], cells: Sequence[Cell], rows: set[Row], occurring: set[Row]) -> tuple[Domain, ...]:
    """Limit the variables where the pattern would match prefixes that the rule does not explain."""
    names = [cell.variables[0] if isinstance(cell, Index) else "" for cell in own]
    free = [column for column, name in enumerate(names) if name]
    if not free or len(occurring) == len(rows):
        return ()
    if len(occurring) > 100 + 64 * len(rows):  # looking at all of them for every small group would be quadratic
        return (_limit(names, free, rows),)
    columns = [column for column, steady in enumerate(first.steady) if steady is None]
    extra = {tuple(row[column] for column in columns) for row in occurring} - rows
    for column, cell in enumerate(own):
        if isinstance(cell, int):
            extra = {row for row in extra if row[column] == cell}
    for index in (cell for cell in cells if isinstance(cell, Index) and cell.table):
        places = [names.index(variable) for variable in index.variables]
        extra = {row for row in extra if tuple(row[place] for place in places) in index.lookup}
    if not extra:
        return ()
    for size in range(1, len(free)):
        for chosen in combinations(free, size):
            domain = _limit(names, chosen, rows)
            if not {tuple(row[column] for column in chosen) for row in extra}.intersection(domain.rows):
                return (domain,)
    return (_limit(names, free, rows),)


def _limit(names: Sequence[str], columns: Sequence[int], rows: set[Row]) -> Domain:
    return Domain(tuple(names[column] for column in columns), tuple(sorted({tuple(row[column] for column in columns) for row in rows})))
