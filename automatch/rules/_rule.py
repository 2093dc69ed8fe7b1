"""`RenameRule`: one readable line that says which source keys feed which target keys, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from automatch.rules._patterns import EACH, Index, Pattern, Row, with_numbers
from automatch.transforms import Chain, Copy, Transform, to_dict

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loop(Generic[T]):
    """Items repeated for every value of the variable ``n``; without values they stand once.

    Args:
        items: patterns (sources) or outputs (targets).
        values: what ``n`` runs over, e.g. the numbers of the experts that are stacked.
    """

    items: tuple[T, ...]
    values: Row = ()

    def each(self, bound: Mapping[str, int]) -> Iterator[tuple[T, Mapping[str, int]]]:
        """Every item with the variables it sees, in order."""
        for value in self.values or (None,):
            seen = bound if value is None else {**bound, EACH: value}
            for item in self.items:
                yield item, seen


@dataclass(frozen=True, slots=True)
class Output:
    """One target of a rule.

    Args:
        pattern: its key.
        transform: how the sources become it; `numbers` stand in for its integers.
        numbers: the integers of the transform, in order; an `Index` where one depends on a variable.
        takes: positions of its sources in the rule's list of sources, in the transform's order; None for all of them.
    """

    pattern: Pattern
    transform: Transform = field(default_factory=Copy)
    numbers: tuple[int | Index, ...] = ()
    takes: tuple[int, ...] | None = None

    def transform_for(self, bound: Mapping[str, int]) -> Transform | None:
        """The transform for bound variables, or None outside a table."""
        if not any(isinstance(number, Index) for number in self.numbers):
            return self.transform
        values = [number.value(bound) if isinstance(number, Index) else number for number in self.numbers]
        known = [value for value in values if value is not None]
        return with_numbers(self.transform, known) if len(known) == len(values) else None


@dataclass(frozen=True, slots=True)
class Domain:
    """The rows of values that variables may take; a rule matches nothing else."""

    variables: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RenameRule:
    """One rename rule: the first rule that matches a source key decides what becomes of it.

    The patterns hold text, numbers in braces (``{i}``, ``{i+1}``, ``{a[i]}`` for a value table) and at most a
    final ``*``, which stands for one or more whole segments that are copied.

    Args:
        sources: the source keys, in the order in which the transforms take them.
        outputs: the target keys; none for a rule that drops its sources.
        domains: values that the variables are limited to, where the patterns alone would match too much.
        targets: the target keys that this rule explains in the mapping it was inferred from, in its order.
        firsts: the first source key of every application of this rule to that mapping.
        confidence: the lowest confidence among the matches it explains, in [0, 1]; None for a dropping rule.
        example: the source keys and target keys of one application.
    """

    sources: tuple[Loop[Pattern], ...]
    outputs: tuple[Loop[Output], ...]
    domains: tuple[Domain, ...] = ()
    targets: tuple[str, ...] = ()
    firsts: tuple[str, ...] = ()
    confidence: float | None = None
    example: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def n_keys(self) -> int:
        """Number of target keys it explains (of source keys, for a rule that drops them)."""
        return len(self.targets) or len(self.firsts)

    @property
    def single(self) -> bool:
        """Whether every application takes one source key alone."""
        return len(self.sources) == 1 and len(self.sources[0].items) == 1 and not self.sources[0].values

    @property
    def dropped(self) -> tuple[str, ...]:
        """The source keys that a dropping rule keeps from the rules after it; none for other rules."""
        return () if self.outputs else self.firsts

    @property
    def pattern(self) -> str:
        """The source side as text, e.g. ``"layers.{i}.attention.wq.weight"``."""
        return " + ".join(_loop_text([str(item) for item in loop.items], loop) for loop in self.sources)

    @property
    def replacement(self) -> str:
        """The target side as text, with the transform where several targets differ in it."""
        if not self.outputs:
            return "(dropped)"
        several = len({self.transform_text(out) for loop in self.outputs for out in loop.items}) > 1
        texts = [
            _loop_text([f"{out.pattern} [{self.transform_text(out)}]" if several else str(out.pattern) for out in loop.items], loop)
            for loop in self.outputs
        ]
        return " + ".join(texts)

    @property
    def transform(self) -> str:
        """The transform as text, empty where keys are only renamed or the targets differ in it."""
        texts = {self.transform_text(out) for loop in self.outputs for out in loop.items}
        return texts.pop() if len(texts) == 1 else ""

    @property
    def where(self) -> str:
        """The value tables and limits as text, e.g. ``"a[i]: 0→1, 1→3; i = 0…11"``."""
        texts: dict[str, None] = {}
        for index in self.indices:
            if index.table:
                pairs = (f"{_row_text(row)}→{value}" for row, value in index.table)
                texts[f"{index.name}[{', '.join(index.variables)}]: {', '.join(pairs)}"] = None
        for domain in self.domains:
            names = domain.variables[0] if len(domain.variables) == 1 else f"({', '.join(domain.variables)})"
            rows = _range_text([row[0] for row in domain.rows]) if len(domain.variables) == 1 else ", ".join(map(_row_text, domain.rows))
            texts[f"{names} = {rows}"] = None
        return "; ".join(texts)

    @property
    def indices(self) -> tuple[Index, ...]:
        """Every number that varies, in the sources, the targets and their transforms."""
        found = [index for loop in self.sources for item in loop.items for index in item.indices]
        for out in (out for loop in self.outputs for out in loop.items):
            found.extend([*out.pattern.indices, *(number for number in out.numbers if isinstance(number, Index))])
        return tuple(found)

    def transform_text(self, out: Output) -> str:
        """The transform of one output as text; empty for a copy."""
        numbers = iter(out.numbers)
        steps = out.transform.steps if isinstance(out.transform, Chain) else (out.transform,)
        texts: list[str] = []
        for step in steps:
            data = to_dict(step)
            op = data.pop("op")
            shown = [f"{name} {_number_text(value, numbers)}" for name, value in data.items()]
            texts.append(" ".join([op.replace("_", " "), ", ".join(shown)]).strip())
        takes = "" if out.takes is None else " of " + " + ".join(str(position + 1) for position in out.takes)
        return ", then ".join(text for text in texts if text != "copy") + takes

    def __str__(self) -> str:
        extra = [text for text in (self.transform, self.where) if text]
        return f"{self.pattern} → {self.replacement}" + (f"  ({'; '.join(extra)})" if extra else "")


def _number_text(value: object, numbers: Iterator[int | Index]) -> str:
    if isinstance(value, list):
        return "×".join(str(next(numbers)) for _ in value)  # pyright: ignore[reportUnknownVariableType]
    return value if isinstance(value, str) else str(next(numbers))


def _loop_text(items: Sequence[str], loop: Loop[T]) -> str:
    text = " + ".join(items)
    if not loop.values:
        return text
    return f"{f'({text})' if len(items) > 1 else text} for {EACH} = {_range_text(loop.values)}"


def _range_text(values: Sequence[int]) -> str:
    """Consecutive runs as ``first…last``."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else (f"{a}, {b}" if b == a + 1 else f"{a}…{b}") for a, b in runs)


def _row_text(row: Row) -> str:
    return str(row[0]) if len(row) == 1 else f"({', '.join(map(str, row))})"
