"""Python source text from keys, which are hostile input: every literal is quoted, every comment stays on its line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from automatch.mapping import CONFIDENT, KeyMapping
from automatch.rules import Index, Pattern, RenameRule


def quote(text: str) -> str:
    """A string literal, in double quotes where that needs no escapes."""
    literal = repr(text)
    return literal if '"' in text or literal[0] == '"' else f'"{literal[1:-1]}"'


def quote_regex(pattern: str) -> str:
    """A regular expression as a raw string literal where it can be one."""
    plain = pattern.isprintable() and '"' not in pattern and not pattern.endswith("\\")
    return f'r"{pattern}"' if plain else quote(pattern)


def comment(text: str, width: int = 200) -> str:
    """``text`` as one comment line: no control character survives."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)
    return f"# {shown if len(shown) <= width else shown[: width - 1] + '…'}"


def rule_comment(rule: RenameRule) -> str:
    """What a rule does, how many keys it explains, and a warning where it is not sure."""
    unsure = rule.confidence is not None and rule.confidence < CONFIDENT
    doubt = f"; confidence {rule.confidence:.2f}, check it" if unsure else ""
    return comment(f"{rule.n_keys} {'key' if rule.n_keys == 1 else 'keys'}{doubt}: {rule}")


def header(mapping: KeyMapping, what: str) -> list[str]:
    """The first comment lines of an export: what it is, from what to what, and what is open."""
    lines = [
        comment(f"{what}, written by automatch from a mapping of {len(mapping)} keys."),
        comment(f"From {mapping.source.origin or 'a checkpoint'} ({mapping.source.n_keys} keys)"),
        comment(f"to {mapping.target.origin or 'a model'} ({mapping.target.n_keys} keys)."),
    ]
    unsure = sum(match.confidence < CONFIDENT for match in mapping.matches)
    if unsure:
        lines.append(comment(f"{unsure} of the matches have a confidence below {CONFIDENT}: review them before you rely on this."))
    if mapping.questions:
        lines.append(comment(f"{len(mapping.questions)} questions of the mapping are open."))
    if mapping.missing_keys:
        lines.append(comment(f"{len(mapping.missing_keys)} keys of the model are fed by nothing and keep the model's values."))
    return lines


def number(index: Index | int) -> str:
    """An expression for a number; loop variables are strings of digits, ``n`` and table values are integers."""
    if isinstance(index, int):
        return str(index)
    if index.table:
        return f"{index.name}[{', '.join(index.variables)}]"
    name = index.variables[0] if index.variables[0] == "n" else f"int({index.variables[0]})"
    factor = name if index.scale == 1 else f"{index.scale} * {name}"
    return factor if not index.offset else f"{factor} {'+' if index.offset > 0 else '-'} {abs(index.offset)}"


def key(pattern: Pattern) -> str:
    """An expression for the key of a pattern, from the loop variables and ``tail``."""
    if not pattern.indices and not pattern.star:
        return quote(pattern.key({}, "") or "")
    if pattern.star and pattern.texts == ("",):
        return "tail"
    pieces = [_braces(pattern.texts[0])]
    for value, text in zip(pattern.numbers, pattern.texts[1:], strict=True):
        plain = isinstance(value, Index) and not value.table and (value.scale, value.offset) == (1, 0)
        shown = str(value) if isinstance(value, int) else f"{{{value.variables[0] if plain else number(value)}}}"
        pieces.extend((shown, _braces(text)))
    return "f" + quote("".join(pieces) + ("{tail}" if pattern.star else ""))


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def values(numbers: Sequence[int]) -> str:
    """An expression for the values of a loop."""
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"range({numbers[-1] + 1})" if numbers[0] == 0 else f"range({numbers[0]}, {numbers[-1] + 1})"
    return f"({', '.join(map(str, numbers))})"


def indent(lines: Iterable[str], depth: int = 1) -> list[str]:
    """Lines moved right by ``depth`` steps."""
    return ["    " * depth + line if line else line for line in lines]
