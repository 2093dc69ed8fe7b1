"""Many keys as few lines: ``layers.{0…11}.attn.{bias, weight}``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from automatch.report.wording import visible

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_MAX_RUNS = 4
_MAX_LEAVES = 4


@dataclass(frozen=True, slots=True)
class Collapsed:
    """Keys that one template names.

    Args:
        template: the line to show, already safe to look at.
        keys: the keys it stands for, in their order.
    """

    template: str
    keys: tuple[str, ...]


def collapse(keys: Iterable[str]) -> tuple[Collapsed, ...]:
    """Group keys that differ in index numbers or in their last word alone, by first appearance."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_NUMBER.sub("#", key), []).append(key)
    leaves: dict[str, dict[str, list[str]]] = {}
    for members in groups.values():
        parent, dot, leaf = _template(members).rpartition(".")
        leaves.setdefault(parent + dot, {})[leaf] = members
    result: list[Collapsed] = []
    for parent, by_leaf in leaves.items():
        if len(by_leaf) == 1 or not parent or len(by_leaf) > _MAX_LEAVES:
            result.extend(Collapsed(parent + leaf, tuple(members)) for leaf, members in by_leaf.items())
        else:
            merged = tuple(key for members in by_leaf.values() for key in members)
            result.append(Collapsed(f"{parent}{{{', '.join(sorted(by_leaf))}}}", merged))
    return tuple(result)


def _template(keys: list[str]) -> str:
    """One text for keys of one skeleton; index numbers that vary become ``{0…11}``."""
    if len(keys) == 1:
        return visible(keys[0])
    columns = zip(*(map(int, _NUMBER.findall(key)) for key in keys), strict=True)
    numbers = [ranges(column) for column in columns]
    pieces = _NUMBER.split(keys[0])
    text = visible(pieces[0])
    for number, piece in zip(numbers, pieces[1:], strict=True):
        text += number + visible(piece)
    return text


def ranges(numbers: Iterable[int]) -> str:
    """``7`` for one number, else runs in braces: ``{0…11}``, ``{0, 2, 5…8}``, ``{14 of 0…30}``."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) > _MAX_RUNS:
        return f"{{{len(ordered)} of {ordered[0]}…{ordered[-1]}}}"
    return "{" + ", ".join(str(a) if a == b else f"{a}…{b}" for a, b in runs) + "}"
