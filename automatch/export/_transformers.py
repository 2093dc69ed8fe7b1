"""`WeightRenaming` and `WeightConverter` for transformers 5 and later.

Keys are renamed first, in sequence; then at most one converter takes each. A rule with a transform therefore renames
its sources to the head of their first target and a tag (``blocks.3@1.0.2.weight``); its converter collects the tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from automatch.export import _text
from automatch.export._operations import RECIPE, operation
from automatch.export._regex import (
    Renaming,
    applications,
    expand,
    in_sequence,
    refuse_unloadable,
    regex_of,
    replacement_of,
    rows_to_expand,
    substitute_once,
)
from automatch.export._script import PERMUTE, check_exact
from automatch.mapping import KeyMapping
from automatch.rules import Index, Output, Pattern, RenameRule, split_numbers
from automatch.transforms import Copy

_USE = [
    "#",
    "# from transformers.conversion_mapping import register_checkpoint_conversion_mapping",
    '# register_checkpoint_conversion_mapping("MyModelClass", weight_conversions, overwrite=True)',
    "# MyModelClass.from_pretrained(path)",
    "",
]


@dataclass(frozen=True, slots=True)
class _Converter:
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operation: str
    comment: str


@dataclass(frozen=True, slots=True)
class _Source:
    """A source pattern with its numbers bound; a folded one still runs over ``n``."""

    pattern: Pattern
    folded: bool


def weight_conversions(mapping: KeyMapping) -> str:
    """The list that `register_checkpoint_conversion_mapping` takes.

    Raises:
        MappingError: the mapping adapts a shape, or its names cannot be said this way.
    """
    check_exact(mapping)
    refuse_unloadable(mapping, "weight_conversions")
    renamings: list[Renaming] = []
    converters: list[_Converter] = []
    wanted: dict[str, str] = {}
    for number, rule in enumerate(part for whole in mapping.rules for part in _named(whole)):
        outputs = _outputs(rule, mapping)
        single = len(rule.sources) == len(rule.sources[0].items) == 1 and not rule.sources[0].values
        if not outputs:
            renamings += expand(rule, 1, [])
        elif single and len(outputs) == 1 and isinstance(outputs[0].transform, Copy):
            renamings += expand(rule, 1, [outputs[0].pattern])
            for bound, tail in applications(rule):
                wanted[_key(rule.sources[0].items[0], bound, tail)] = _key(outputs[0].pattern, bound, tail)
        else:
            _convert(rule, outputs, number, mapping, (renamings, converters, wanted))
    sequence = in_sequence(renamings, wanted, mapping, "weight_conversions", substitute_once)
    return _code(mapping, sequence, converters)


def _named(rule: RenameRule) -> Iterator[RenameRule]:
    """The rule, or where a transform's target is all star one for each first segment of the tails: a converter has to name something."""
    outputs = [out for loop in rule.outputs for out in loop.items]
    if all(out.pattern.texts != ("",) or isinstance(out.transform, Copy) for out in outputs):
        yield rule
        return
    groups: dict[str, list[str]] = {}
    for first, (_, tail) in zip(rule.firsts, applications(rule), strict=True):
        groups.setdefault(tail[: tail.find(".") + 1] or tail, []).append(first)
    for segment, firsts in groups.items():
        sources = tuple(replace(loop, items=tuple(_with(item, segment) for item in loop.items)) for loop in rule.sources)
        made = tuple(
            replace(loop, items=tuple(replace(out, pattern=_with(out.pattern, segment)) for out in loop.items)) for loop in rule.outputs
        )
        yield replace(rule, sources=sources, outputs=made, firsts=tuple(firsts), targets=())


def _with(pattern: Pattern, segment: str) -> Pattern:
    texts, numbers = split_numbers(segment)
    joined = (*pattern.texts[:-1], pattern.texts[-1] + texts[0], *texts[1:])
    return Pattern(joined, (*pattern.numbers, *numbers), star=segment.endswith("."))


def _key(pattern: Pattern, bound: Mapping[str, int], tail: str) -> str:
    key = pattern.key(bound, tail)
    assert key is not None
    return key


def _outputs(rule: RenameRule, mapping: KeyMapping) -> list[Output]:
    """The outputs with their loops unrolled, without those tied to the first one: transformers ties them by itself."""
    unrolled = [_bind_output(out, bound) for loop in rule.outputs for out, bound in loop.each({})]
    spec = mapping.target.spec
    if spec is None or not all(isinstance(out.transform, Copy) for out in unrolled):
        return unrolled
    kept = unrolled[:1]
    for out in unrolled[1:]:
        keys = [_key(out.pattern, bound, tail) for bound, tail in applications(rule)]
        if not all(spec[key].alias_of is not None for key in keys):
            kept.append(out)
    return kept


def _bind(value: int | Index, bound: Mapping[str, int]) -> int | Index:
    if isinstance(value, Index) and all(name in bound for name in value.variables):
        found = value.value(bound)
        return value if found is None else found
    return value


def _bind_pattern(pattern: Pattern, bound: Mapping[str, int]) -> Pattern:
    return replace(pattern, numbers=tuple(_bind(value, bound) for value in pattern.numbers))


def _bind_output(out: Output, bound: Mapping[str, int]) -> Output:
    return replace(out, pattern=_bind_pattern(out.pattern, bound), numbers=tuple(_bind(value, bound) for value in out.numbers))


def _cut(pattern: Pattern) -> tuple[Pattern, str]:
    """The pattern up to and with its last variable, and the text after that."""
    last = max((place for place, number in enumerate(pattern.numbers) if isinstance(number, Index)), default=-1)
    rest = pattern.texts[last + 1]
    for number, text in zip(pattern.numbers[last + 1 :], pattern.texts[last + 2 :], strict=True):
        rest += f"{number}{text}"
    return Pattern((*pattern.texts[: last + 1], ""), pattern.numbers[: last + 1]), rest


# ---- a rule with a transform ------------------------------------------------------------------------------

_Made = tuple[list[Renaming], list[_Converter], dict[str, str]]


def _convert(rule: RenameRule, outputs: Sequence[Output], number: int, mapping: KeyMapping, made: _Made) -> None:
    """Add the renamings that gather the sources of a rule and the converters that take them."""
    renamings, converters, wanted = made
    rows = _rows(rule, outputs)
    said = comment = _text.rule_comment(rule)
    for count, row in enumerate(rows):
        bound_outputs = [_bind_output(out, row) for out in outputs]
        head, _ = _cut(bound_outputs[0].pattern)
        rests = tuple(_cut(out.pattern)[1] for out in bound_outputs)
        sources = _sources(rule, row)
        tags = [f"@{number}.{count}.{place}" for place in range(len(sources))]
        for source, tag in zip(sources, tags, strict=True):
            renamings.append(_gather(source, head, tag, said))
            said = ""
        collected = tuple(_collect(source, tag) for source, tag in zip(sources, tags, strict=True))
        done = operation(rule, bound_outputs, [source.folded for source in sources], mapping)
        converters.append(_Converter(collected, rests, done, comment))
        for bound, tail in applications(rule):
            if all(bound[name] == value for name, value in row.items()):
                _want(rule, sources, tags, (head, bound, tail), wanted)


def _rows(rule: RenameRule, outputs: Sequence[Output]) -> list[dict[str, int]]:
    """The values to write out: of numbers that are computed, and of all where the names leave no other way."""
    first = rule.sources[0].items[0]
    patterns = [out.pattern for out in outputs]
    computed = {name for out in outputs for value in out.numbers if isinstance(value, Index) for name in value.variables}
    others = [item for loop in rule.sources for item in loop.items]
    computed |= {name for item in others for index in item.indices if index.table or index.offset for name in index.variables} - {"n"}
    rows = rows_to_expand(rule, first, 1, patterns, computed)
    for row in rows:
        cuts = [_cut(_bind_pattern(pattern, row)) for pattern in patterns]
        same = len({head for head, _ in cuts}) == 1 and all(rest for _, rest in cuts)
        keys = [
            (_key(cuts[0][0], bound, ""), _key(patterns[0], bound, tail))
            for bound, tail in applications(rule)
            if row.items() <= bound.items()
        ]
        if not same or any(key.find(cuts[0][1]) != len(head) for head, key in keys):
            return rows_to_expand(rule, first, 0, patterns, computed)
    return rows


def _sources(rule: RenameRule, row: Mapping[str, int]) -> list[_Source]:
    """The source patterns; a list of experts stays folded where transformers collects it in the same order."""
    sources: list[_Source] = []
    for loop in rule.sources:
        items = [_bind_pattern(item, row) for item in loop.items]
        cuts = [_cut(item) for item in items]
        folded = bool(loop.values) and list(loop.values) == sorted(loop.values) and len(rule.sources) == 1
        folded = folded and all(head.numbers and _is_plain_n(head.numbers[-1]) and rest.startswith(".") for head, rest in cuts)
        if folded:
            sources += [_Source(item, True) for item in items]
        else:
            sources += [_Source(_bind_pattern(item, {**row, **bound}), False) for item, bound in loop.each({})]
    return sources


def _is_plain_n(number: int | Index) -> bool:
    return isinstance(number, Index) and number.variables == ("n",) and (number.scale, number.offset) == (1, 0)


def _gather(source: _Source, head: Pattern, tag: str, said: str) -> Renaming:
    end = "." if source.pattern.star or source.folded else ""
    target = replace(head, texts=(*head.texts[:-1], head.texts[-1] + tag + end))
    if not source.folded:
        return Renaming(regex_of(source.pattern, {}), replacement_of(target, source.pattern, {}), said)
    before, rest = _cut(source.pattern)
    start = Pattern(before.texts[:-1], before.numbers[:-1], star=True)
    ahead = rf"(?=\d+{re.escape(rest)}{'' if source.pattern.star else '$'})"
    return Renaming(regex_of(start, {}) + ahead, replacement_of(target, start, {}), said)


def _collect(source: _Source, tag: str) -> str:
    """The converter's source pattern; ``*.`` is its way to say that a list is collected."""
    if not source.folded:
        return re.escape(tag) + (r"\." if source.pattern.star else "$")
    _, rest = _cut(source.pattern)
    return re.escape(tag) + r"\.*." + re.escape(rest[1:]) + ("" if source.pattern.star else "$")


def _want(
    rule: RenameRule, sources: Sequence[_Source], tags: Sequence[str], place: tuple[Pattern, Mapping[str, int], str], wanted: dict[str, str]
) -> None:
    head, bound, tail = place
    for source, tag in zip(sources, tags, strict=True):
        staged = _key(head, bound, "") + tag
        if not source.folded:
            wanted[_key(source.pattern, bound, tail)] = staged + ("." + tail if source.pattern.star else "")
            continue
        _, rest = _cut(source.pattern)
        for value in rule.sources[0].values:
            wanted[_key(source.pattern, {**bound, "n": value}, tail)] = f"{staged}.{value}{rest}{tail}"


def _code(mapping: KeyMapping, renamings: Sequence[Renaming], converters: Sequence[_Converter]) -> str:
    body = ["", "weight_conversions = ["]
    for renaming in renamings:
        said = [renaming.comment] if renaming.comment else []
        body += _text.indent([*said, f"WeightRenaming({_text.quote_regex(renaming.pattern)}, {_text.quote_regex(renaming.replacement)}),"])
    for converter in converters:
        sources, targets = (
            ", ".join(map(quote, side)) for quote, side in ((_text.quote_regex, converter.sources), (_text.quote, converter.targets))
        )
        body += _text.indent([converter.comment, f"WeightConverter([{sources}], [{targets}], operations=[{converter.operation}]),"])
    text = "\n".join([*body, "]"])
    used = [name for name in _NAMES if f"{name}(" in text]
    if "Recipe(" in text:
        used.append("ConversionOps")
    helpers = [source for source, name in ((PERMUTE, "permute_elements("), (RECIPE, "Recipe(")) if name in text]
    imports = ["import torch"] if "torch." in text else []
    imports += [f"from transformers.core_model_loading import {', '.join(sorted(used))}"] if used else []
    return "\n".join([*_text.header(mapping, "weight_conversions for transformers"), *_USE, *imports, *helpers, text]) + "\n"


_NAMES = ("Chunk", "Concatenate", "MergeModulelist", "Transpose", "WeightConverter", "WeightRenaming")
