"""`convert_checkpoint_keys` as readable Python that needs nothing of automatch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from automatch.errors import MappingError
from automatch.export import _text
from automatch.mapping import KeyMapping
from automatch.rules import Domain, Index, Loop, Output, Pattern, RenameRule, drop_rules
from automatch.transforms import Adapt, Chain, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, Transform

_TAKE = '''
def take(state_dict, pattern):
    """The variable parts of every key that fits the pattern: a string where there is one part, else a tuple."""
    for key in list(state_dict):
        match = re.fullmatch(pattern, key, re.DOTALL)
        if match and key in state_dict:
            yield match.groups() if len(match.groups()) > 1 else match.groups()[0]
'''
PERMUTE = '''
def permute_elements(tensor, dim, split, order):
    """Reorder the entries along dim: split it into axes, permute these, flatten them again."""
    tensor = tensor.unflatten(dim, split)
    last = dim + len(split)
    axes = [*range(dim), *(dim + axis for axis in order), *range(last, tensor.ndim)]
    return tensor.permute(axes).flatten(dim, last - 1)
'''
_DOC = '''    """Return the state_dict under the model's keys.

    Keys that no rule knows are kept as they are, so that strict loading still complains about them.
    """'''


def script(mapping: KeyMapping) -> str:
    """The whole script.

    Raises:
        MappingError: a match adapts a shape, which code without automatch cannot do.
    """
    lines = [*_text.header(mapping, "convert_checkpoint_keys"), "", *function(mapping), ""]
    lines += ['if __name__ == "__main__":']
    lines += _text.indent(_MAIN.splitlines())
    return "\n".join(lines) + "\n"


_MAIN = """import sys

import torch

checkpoint = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
inner = checkpoint.get("state_dict", checkpoint)
torch.save(convert_checkpoint_keys(inner), sys.argv[2])"""


def function(mapping: KeyMapping) -> list[str]:
    """The imports, the helpers and the function, as lines."""
    check_exact(mapping)
    rules = mapping.rules
    known = {name for rule in rules for name in rule.dropped}
    body: list[str] = []
    for rule in rules:
        body += ["", _text.rule_comment(rule), *_statements(rule)]
    for rule in drop_rules(name for name in mapping.unexpected_keys if name not in known):
        body += ["", _text.rule_comment(rule), *_statements(rule)]
    text = "\n".join(body)
    imports = [f"import {name}" for name, used in (("re", "take(" in text), ("torch", "torch." in text)) if used]
    helpers = [source for source, name in ((_TAKE, "take("), (PERMUTE, "permute_elements(")) if name in text]
    return [
        *("\n\n".join(["\n".join(imports), *(helper.strip("\n") + "\n" for helper in helpers)]).splitlines()),
        "",
        "",
        "def convert_checkpoint_keys(state_dict):",
        *_DOC.splitlines(),
        "    old, new = dict(state_dict), {}",
        *_text.indent(body),
        "",
        "    return {**old, **new}",
        "",
    ]


def check_exact(mapping: KeyMapping) -> None:
    """Refuse a mapping that invents or drops values.

    Raises:
        MappingError: naming the first key that is adapted.
    """
    for match in mapping.matches:
        steps = match.transform.steps if isinstance(match.transform, Chain) else (match.transform,)
        for step in steps:
            if isinstance(step, Adapt):
                raise MappingError(
                    f"{match.target!r} is adapted ({step.method}), which an export cannot do; "
                    "reject it with mapping.decide(key, None), or load with automatch"
                )


# ---- one rule -------------------------------------------------------------------------------------------


def _statements(rule: RenameRule) -> list[str]:
    first = rule.sources[0].items[0]
    conditions = list(_conditions(rule))
    several = sum(len(loop.items) + len(loop.values) for loop in rule.sources) > 1
    inner = _several(rule) if several else _one(rule, first)
    if conditions:
        inner = [f"if {' and '.join(conditions)}:", *_text.indent(inner)]
    names = [*(index.variables[0] for index in first.indices if index.variables[0] != "n"), *(["tail"] if first.star else [])]
    if names:
        inner = [f"for {', '.join(names)} in take(old, {_text.quote_regex(_regex(rule, first))}):", *_text.indent(inner)]
    return [*_tables(rule), *inner]


def _one(rule: RenameRule, source: Pattern) -> list[str]:
    outputs = [out for loop in rule.outputs for out in loop.items]
    taken = f"old.pop({_text.key(source)})"
    if not outputs:
        return [taken]
    if len(outputs) == 1 and not rule.outputs[0].values:
        return [f"new[{_text.key(outputs[0].pattern)}] = {expression(outputs[0], taken)}"]
    return [f"tensor = {taken}", *(line for loop in rule.outputs for line in _assignments(loop, "tensor"))]


def _several(rule: RenameRule) -> list[str]:
    lists = [_keys(loop) for loop in rule.sources]
    joined = lists[0] if len(lists) == 1 else f"[{', '.join(f'*{text}' if text[0] == '[' else text for text in lists)}]"
    if all(not loop.values for loop in rule.sources):
        joined = f"[{', '.join(_text.key(item) for loop in rule.sources for item in loop.items)}]"
    assigned = [line for loop in rule.outputs for line in _assignments(loop, "tensors")]
    return [f"keys = {joined}", "if old.keys() >= set(keys):", *_text.indent(["tensors = [old.pop(key) for key in keys]", *assigned])]


def _keys(loop: Loop[Pattern]) -> str:
    keys = [_text.key(item) for item in loop.items]
    if not loop.values:
        return f"[{', '.join(keys)}]"
    if len(keys) == 1:
        return f"[{keys[0]} for n in {_text.values(loop.values)}]"
    return f"[key for n in {_text.values(loop.values)} for key in ({', '.join(keys)})]"


def _assignments(loop: Loop[Output], taken: str) -> Iterator[str]:
    lines = [f"new[{_text.key(out.pattern)}] = {expression(out, taken)}" for out in loop.items]
    if loop.values:
        yield f"for n in {_text.values(loop.values)}:"
        lines = _text.indent(lines)
    yield from lines


def _regex(rule: RenameRule, first: Pattern) -> str:
    pieces = [re.escape(first.texts[0])]
    for number, text in zip(first.numbers, first.texts[1:], strict=True):
        if isinstance(number, Index) and number.variables[0] == "n":
            number = number.value({"n": rule.sources[0].values[0]})
        pieces.extend((str(number) if isinstance(number, int) else r"(\d+)", re.escape(text)))
    return "".join(pieces) + ("(.+)" if first.star else "")


def _tables(rule: RenameRule) -> Iterator[str]:
    for index in dict.fromkeys(index for index in rule.indices if index.table):
        entries = ", ".join(f"{_row(row)}: {value}" for row, value in index.table)
        yield f"{index.name} = {{{entries}}}"


def _conditions(rule: RenameRule) -> Iterator[str]:
    for index in dict.fromkeys(index for index in rule.indices if index.table):
        yield f"{_variables(index.variables)} in {index.name}"
    for domain in rule.domains:
        yield _domain(domain)


def _domain(domain: Domain) -> str:
    numbers = [row[0] for row in domain.rows]
    if len(domain.variables) == 1 and len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"int({domain.variables[0]}) in {_text.values(numbers)}"
    return f"{_variables(domain.variables)} in {{{', '.join(map(_row, domain.rows))}}}"


def _variables(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"({', '.join(names)})"


def _row(row: tuple[int, ...]) -> str:
    return f'"{row[0]}"' if len(row) == 1 else f"({', '.join(f'{chr(34)}{value}{chr(34)}' for value in row)})"


# ---- transforms as expressions ----------------------------------------------------------------------------


def expression(out: Output, taken: str) -> str:
    """An expression for an output: ``taken`` is the source tensor, or the list of them where there are several."""
    if out.takes is not None:
        chosen = [f"{taken}[{position}]" for position in out.takes]
        taken = chosen[0] if len(chosen) == 1 else f"[{', '.join(chosen)}]"
    numbers = iter([_text.number(value) for value in out.numbers])
    for step in out.transform.steps if isinstance(out.transform, Chain) else (out.transform,):
        taken = _step(step, taken, numbers)
    return taken


def _step(step: Transform, taken: str, numbers: Iterator[str]) -> str:
    def some(count: int) -> str:
        return ", ".join(next(numbers) for _ in range(count))

    def row(count: int) -> str:
        return f"({some(count)}{',' if count == 1 else ''})"

    match step:
        case Copy():
            return taken
        case Reshape(shape):
            return f"{taken}.reshape({some(len(shape)) or '()'})"
        case Permute(dims):
            return f"{taken}.permute({some(len(dims)) or '()'})"
        case Slice():
            return f"{taken}.narrow({some(3)})"
        case Concat():
            return f"torch.cat({taken}, {some(1)})"
        case Stack():
            return f"torch.stack({taken}, {some(1)})"
        case PermuteElements(_, split, order):
            return f"permute_elements({taken}, {some(1)}, {row(len(split))}, {row(len(order))})"
        case _:
            raise MappingError(f"no code stands for transform {step.op!r}")
