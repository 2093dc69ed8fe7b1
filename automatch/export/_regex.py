"""Rules as a sequence of regular expressions that all apply, one after the other, as mmengine and transformers do it.

Our rules say "the first that matches wins". In a sequence a later expression can hit what an earlier one has made,
so the sequence is tried on all source keys; where it goes wrong, every made key gets a mark in front that keeps later
expressions off, and a last expression takes the mark away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from automatch.errors import MappingError
from automatch.export import _text
from automatch.export._script import check_exact
from automatch.mapping import KeyMapping
from automatch.rules import Index, Pattern, RenameRule, drop_rules, split_numbers
from automatch.transforms import Copy

UNUSED = "unused."
# transformers makes an expression of every key that it loads, old and new.
_SIGNS = re.compile(r"[()^*?\\]")
# Names that transformers 5 takes for those of older versions, and renames after all that it is told.
_LEGACY = re.compile(
    r"\.weight_[gv](?!\w)|LayerNorm\.(?:gamma|beta)(?!\w)|^(?:model\.language_model\.model|language_model\.model\.model)(?!\w)"
)
_LIMIT = 30_000_000


@dataclass(frozen=True, slots=True)
class Renaming:
    """One expression and what it makes of its match; the comment stands above it."""

    pattern: str
    replacement: str
    comment: str = ""


Rename = Callable[[Renaming, str], str]


def substitute(renaming: Renaming, key: str) -> str:
    """What `re.sub` makes of a key, as mmengine calls it."""
    return re.sub(renaming.pattern, renaming.replacement, key)


def substitute_once(renaming: Renaming, key: str) -> str:
    """What transformers' `WeightRenaming` makes of a key: at most one group, and a name boundary at the end."""
    boundary = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", renaming.pattern) else ""
    match = re.search(renaming.pattern + boundary, key)
    text = renaming.replacement
    # A parenthesis or a leading ^ it reads as an expression for the way back; an escaped backslash it does not know.
    if match is None or "(" in text or text.startswith("^") or r"\\" in text:
        return key
    return key.replace(match[0], text.replace(r"\1", match[1]) if r"\1" in text else text, 1)


def revise_keys(mapping: KeyMapping) -> str:
    """The ``revise_keys`` argument of mmengine's `load_checkpoint`.

    Raises:
        MappingError: a match needs more than a new name.
    """
    renamings = plain_renamings(mapping, "revise_keys", substitute, groups=9)
    lines = [*_text.header(mapping, "revise_keys for mmengine"), *_USE_REVISE, "revise_keys = ["]
    for renaming in renamings or [_NOTHING]:
        lines += _entry(renaming, f"({_text.quote_regex(renaming.pattern)}, {_text.quote_regex(renaming.replacement)}),")
    return "\n".join([*lines, "]"]) + "\n"


def key_mapping(mapping: KeyMapping) -> str:
    """The ``key_mapping`` argument of transformers' `from_pretrained`.

    Raises:
        MappingError: a match needs more than a new name.
    """
    refuse_unloadable(mapping, "key_mapping")
    renamings = plain_renamings(mapping, "key_mapping", substitute_once, groups=1)
    lines = [*_text.header(mapping, "key_mapping for transformers"), *_USE_KEY_MAPPING, "key_mapping = {"]
    for renaming in renamings:
        lines += _entry(renaming, f"{_text.quote_regex(renaming.pattern)}: {_text.quote_regex(renaming.replacement)},")
    return "\n".join([*lines, "}"]) + "\n"


_USE_REVISE = [
    "#",
    "# load_checkpoint(model, path, strict=True, revise_keys=revise_keys)",
    "# Keys that feed nothing keep their names or become unused.*; strict=False ignores them.",
    "",
]
# Without any expression mmengine fails on a state_dict that is a plain dict.
_NOTHING = Renaming("^", "", _text.comment("Every key keeps its name."))
_USE_KEY_MAPPING = ["#", "# MyModel.from_pretrained(path, key_mapping=key_mapping)", ""]


def _entry(renaming: Renaming, text: str) -> list[str]:
    return _text.indent([renaming.comment, text] if renaming.comment else [text])


def plain_renamings(mapping: KeyMapping, kind: str, rename: Rename, *, groups: int) -> list[Renaming]:
    """The sequence for a mapping of new names alone.

    Args:
        mapping: the mapping.
        kind: the export kind, for messages.
        rename: how the library applies one expression to one key.
        groups: how many groups an expression may have.

    Raises:
        MappingError: a match needs a transform, several sources, or a source that feeds several keys.
    """
    check_exact(mapping)
    wanted: dict[str, str] = {}
    spec = mapping.target.spec
    for match in mapping.matches:
        if len(match.sources) != 1 or not isinstance(match.transform, Copy):
            raise MappingError(
                f"{kind} only renames, and {match.target!r} needs {match.transform.op} of {len(match.sources)} source(s); "
                "export kind 'script', 'pre_hook' or 'weight_conversions' instead"
            )
        alias = spec[match.target].alias_of if spec is not None and match.target in spec else None
        first = wanted.setdefault(match.sources[0], match.target)
        if first != match.target and alias is None:
            raise MappingError(f"{kind} only renames, and {match.sources[0]!r} feeds both {first!r} and {match.target!r}; export 'script'")
    steps = [step for rule in mapping.rules for step in expand(rule, groups, [rule.outputs[0].items[0].pattern] if rule.outputs else [])]
    return in_sequence(steps, wanted, mapping, kind, rename)


def refuse_unloadable(mapping: KeyMapping, kind: str) -> None:
    """Refuse where transformers would load a key that feeds nothing, because a model key has its name, and names it cannot load.

    Raises:
        MappingError: naming the key.
    """
    for key in (name for match in mapping.matches for name in (match.target, *match.sources)):
        if _SIGNS.search(key):
            raise MappingError(f"{key!r} holds a sign that transformers reads as a regular expression; export kind 'script' instead")
    for match in mapping.matches:
        if _LEGACY.search(match.target):
            raise MappingError(f"{kind} cannot make {match.target!r}, an old name that transformers changes by itself; export 'script'")
    for key in mapping.unexpected_keys:
        sides = (mapping.source.spec, mapping.target.spec)
        shapes = {spec[key].shape for spec in sides if spec is not None and key in spec}
        if key in mapping or (key in mapping.missing_keys and len(shapes) < 2):
            raise MappingError(
                f"{kind} cannot leave {key!r} of the checkpoint out: the model has a key of that name, and transformers would load it; "
                "export kind 'script' instead"
            )


def source_keys(mapping: KeyMapping) -> tuple[str, ...]:
    """Every key of the checkpoint."""
    used = (key for match in mapping.matches for key in match.sources)
    return mapping.source.spec.keys if mapping.source.spec else tuple(dict.fromkeys((*used, *mapping.unexpected_keys)))


# ---- one rule -------------------------------------------------------------------------------------------


def expand(rule: RenameRule, groups: int, targets: Sequence[Pattern]) -> Iterator[Renaming]:
    """Expressions that do to the first source of a rule what ``targets[0]`` says; several where numbers are computed.

    Args:
        rule: the rule.
        groups: how many numbers an expression may copy.
        targets: the pattern to make; none for a key to be set aside.
    """
    source = rule.sources[0].items[0]
    said = _text.rule_comment(rule)
    for bound in rows_to_expand(rule, source, groups, targets):
        yield Renaming(regex_of(source, bound), replacement_of(targets[0] if targets else None, source, bound), said)
        said = ""


def rows_to_expand(
    rule: RenameRule, source: Pattern, groups: int, targets: Sequence[Pattern], computed: Iterable[str] = ()
) -> list[dict[str, int]]:
    """The values of those variables that an expression cannot copy: computed, limited, or one too many."""
    names = [name for name in (index.variables[0] for index in source.indices) if name != "n"]
    fixed = {*computed, *(name for domain in rule.domains for name in domain.variables)}
    for index in (index for target in targets for index in target.indices):
        if index.table or index.offset or index.scale != 1:
            fixed.update(index.variables)
    rows = [bound for bound, _ in applications(rule)]
    free = [name for name in names if name not in fixed]
    free.sort(key=lambda name: len({row[name] for row in rows}))
    fixed.update(free[: max(0, len(free) - groups)])
    kept = [name for name in names if name in fixed]
    unique = dict.fromkeys(tuple(row[name] for name in kept) for row in rows)
    return [dict(zip(kept, row, strict=True)) for row in sorted(unique)]


def applications(rule: RenameRule) -> list[tuple[dict[str, int], str]]:
    """The variables and the tail of every application of a rule."""
    source = rule.sources[0].items[0]
    named = [(column, number.variables[0]) for column, number in enumerate(source.numbers) if isinstance(number, Index)]
    found: list[tuple[dict[str, int], str]] = []
    for key in rule.firsts:
        end = _prefix_length(key, source) if source.star else len(key)
        numbers = split_numbers(key[:end])[1]
        found.append(({name: numbers[column] for column, name in named if name != "n"}, key[end:]))
    return found


def _prefix_length(key: str, source: Pattern) -> int:
    end = 0
    for _ in range(source.depth):
        end = key.index(".", end) + 1
    return end


def regex_of(source: Pattern, bound: Mapping[str, int]) -> str:
    """The expression for a source pattern whose expanded variables are bound."""
    pieces = ["^", re.escape(source.texts[0])]
    for number, text in zip(source.numbers, source.texts[1:], strict=True):
        value = number if isinstance(number, int) else bound.get(number.variables[0])
        pieces.extend((r"(\d+)" if value is None else str(value), re.escape(text)))
    return "".join(pieces) + ("" if source.star else "$")


def replacement_of(target: Pattern | None, source: Pattern, bound: Mapping[str, int]) -> str:
    """What the expression makes: the target's text with the copied numbers as groups."""
    free = [index.variables[0] for index in source.indices if index.variables[0] not in bound]
    groups = {name: rf"\{place}" for place, name in enumerate(free, 1)}
    if target is None:
        target, prefix = source, UNUSED
    else:
        prefix = ""
    pieces = [prefix, _literal(target.texts[0])]
    for number, text in zip(target.numbers, target.texts[1:], strict=True):
        name = "" if isinstance(number, int) else number.variables[0]
        pieces.extend((groups[name] if name in groups else str(_value(number, bound)), _literal(text)))
    return "".join(pieces)


def _value(number: int | Index, bound: Mapping[str, int]) -> int | None:
    return number if isinstance(number, int) else number.value(bound)


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\")


# ---- the sequence ----------------------------------------------------------------------------------------


def in_sequence(steps: Sequence[Renaming], wanted: Mapping[str, str], mapping: KeyMapping, kind: str, rename: Rename) -> list[Renaming]:
    """The shortest of a few sequences that turn every source key into what is wanted, and no other into a model key.

    Raises:
        MappingError: none of them does.
    """
    keys = source_keys(mapping)
    forbidden = {*wanted.values(), *mapping.missing_keys, *(match.target for match in mapping.matches)}
    if (len(steps) + 1) * len(keys) > _LIMIT:
        raise MappingError(f"{kind} would need {len(steps)} expressions for {len(keys)} keys, one by one; export kind 'script' instead")
    wrong: list[str] = []
    for sequence in _sequences(steps, wanted, forbidden, keys):
        wrong = _wrong(sequence, wanted, forbidden, keys, rename)
        if not wrong:
            return sequence
    raise MappingError(f"{kind} cannot say what becomes of {wrong[0]!r}; export kind 'script' instead")


def _sequences(steps: Sequence[Renaming], wanted: Mapping[str, str], forbidden: set[str], keys: Sequence[str]) -> Iterator[list[Renaming]]:
    yield [step for step in steps if (step.pattern, step.replacement) != ("^", "")]
    mark = "@"
    while any(key.startswith(mark) for key in (*keys, *wanted.values())):
        mark += "@"
    in_the_way = [key for key in keys if key not in wanted and key in forbidden]
    aside = [step for rule in drop_rules(in_the_way) for step in expand(rule, 1, [])]
    unused = [step for step in aside if step.pattern not in {other.pattern for other in steps}]
    marked = [
        Renaming(f"^(?!{mark})" if step.pattern == "^" else step.pattern, mark + step.replacement, step.comment)
        for step in (*unused, *steps)
    ]
    yield [*marked, Renaming(f"^{mark}", "", _text.comment("The mark kept every key from being renamed twice."))]


def _wrong(sequence: Sequence[Renaming], wanted: Mapping[str, str], forbidden: set[str], keys: Sequence[str], rename: Rename) -> list[str]:
    wrong: list[str] = []
    for key in keys:
        name = key
        for renaming in sequence:
            name = rename(renaming, name)
        if (key in wanted and name != wanted[key]) or (key not in wanted and name in forbidden):
            wrong.append(key)
    return wrong
