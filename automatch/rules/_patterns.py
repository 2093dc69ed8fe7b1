"""Patterns of keys: text, numbers that vary, and a tail that is copied; and the same for transforms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from automatch.transforms import Transform

# Leading zeros belong to the text before a number ("block_0" and 10), for int() would lose them; long digit runs stay text.
_NUMBER = re.compile(r"(?<![1-9])(?<![1-9]0)(0|[1-9][0-9]{0,8})(?![0-9])")

EACH = "n"
"""The variable that runs over a list of sources or targets within one application of a rule."""
Row = tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """A number computed from variables: ``scale * variable + offset``, or looked up in a table.

    Args:
        variables: the names it depends on; exactly one without a table.
        scale: factor of the variable.
        offset: what is added.
        table: (values of the variables, result) pairs, sorted; empty for the linear form.
        name: the table's name in the text form, e.g. ``"a"`` in ``{a[i]}``.
    """

    variables: tuple[str, ...]
    scale: int = 1
    offset: int = 0
    table: tuple[tuple[Row, int], ...] = ()
    name: str = ""

    @cached_property
    def lookup(self) -> dict[Row, int]:
        """The table as a dict."""
        return dict(self.table)

    def value(self, bound: Mapping[str, int]) -> int | None:
        """The number, or None where the table has no entry for the bound variables."""
        if not self.table:
            return self.scale * bound[self.variables[0]] + self.offset
        return self.lookup.get(tuple(bound[name] for name in self.variables))

    def __str__(self) -> str:
        if self.table:
            return f"{{{self.name}[{', '.join(self.variables)}]}}"
        factor = "" if self.scale == 1 else f"{self.scale}*"
        return f"{{{factor}{self.variables[0]}{self.offset:+d}}}" if self.offset else f"{{{factor}{self.variables[0]}}}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """One key or many: texts with numbers between them, then (with ``star``) a tail of whole segments that is copied.

    Args:
        texts: the texts around the numbers; one more than numbers.
        numbers: constants and numbers that vary.
        star: whether a tail follows; the last text then ends with a dot, or the pattern is empty.
    """

    texts: tuple[str, ...]
    numbers: tuple[int | Index, ...] = ()
    star: bool = False

    def __str__(self) -> str:
        texts = [re.sub(r"([*{}\\])", r"\\\1", text) for text in self.texts]
        numbers = [*(str(number) for number in self.numbers), "*" if self.star else ""]
        return "".join(text + number for text, number in zip(texts, numbers, strict=True))

    def key(self, bound: Mapping[str, int], tail: str) -> str | None:
        """The key for bound variables and a tail, or None outside a table."""
        pieces = [self.texts[0]]
        for number, text in zip(self.numbers, self.texts[1:], strict=True):
            value = number if isinstance(number, int) else number.value(bound)
            if value is None:
                return None
            pieces.extend((str(value), text))
        return "".join(pieces) + tail

    @property
    def depth(self) -> int:
        """Number of segments that the pattern fixes."""
        return sum(text.count(".") for text in self.texts) + (not self.star)

    @property
    def indices(self) -> tuple[Index, ...]:
        """The numbers that vary."""
        return tuple(number for number in self.numbers if isinstance(number, Index))


@lru_cache(maxsize=1 << 19)
def split_numbers(text: str) -> tuple[tuple[str, ...], Row]:
    """The texts around the numbers of ``text``, and the numbers; one text more than numbers."""
    pieces = _NUMBER.split(text)
    return tuple(pieces[::2]), tuple(map(int, pieces[1::2]))


@lru_cache(maxsize=4096)
def numbers_of(transform: Transform) -> Row:
    """All integers of a transform, in order of its fields."""
    return tuple(_numbers(transform))


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _numbers(item)
    elif not isinstance(value, str):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name))


def with_numbers(transform: Transform, numbers: Sequence[int]) -> Transform:
    """The transform with its integers replaced, in the order of `numbers_of`."""
    return _refill(transform, iter(numbers)) if numbers else transform


def _refill(value: Any, numbers: Iterator[int]) -> Any:
    if isinstance(value, int):
        return next(numbers)
    if isinstance(value, tuple):
        return tuple(_refill(item, numbers) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str):
        return value
    return replace(value, **{field.name: _refill(getattr(value, field.name), numbers) for field in fields(value)})


@lru_cache(maxsize=4096)
def shape_of_transform(transform: Transform) -> Transform:
    """The transform with every integer 0: equal for transforms that differ in numbers alone."""
    return with_numbers(transform, [0] * len(numbers_of(transform)))
