"""What a `WeightConverter` of transformers does to its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from automatch.export._script import expression
from automatch.mapping import KeyMapping
from automatch.rules import Output, RenameRule
from automatch.transforms import Concat, Permute, Slice, Stack

RECIPE = '''
class Recipe(ConversionOps):
    """Any other conversion: a function from the source tensors to the target tensors, both as lists."""

    supports_many_to_many = True

    def __init__(self, function):
        self.function = function

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensors = [t for pattern in source_patterns for t in input_dict[pattern]]
        made = [tensor.contiguous() for tensor in self.function(tensors)]
        return dict(zip(target_patterns, made, strict=True))
'''


def operation(rule: RenameRule, outputs: Sequence[Output], lists: Sequence[bool], mapping: KeyMapping) -> str:
    """The operation of one converter as code: the library's own where one fits.

    Args:
        rule: the rule.
        outputs: what it makes, with numbers bound.
        lists: for each source pattern, whether it collects a list.
        mapping: the mapping that the rule is part of.
    """
    first = outputs[0].transform
    one = len(outputs) == 1 and outputs[0].takes is None
    folded = any(lists)
    if one and isinstance(first, Concat) and (not folded or len(lists) == 1):
        return f"Concatenate(dim={first.dim})"
    if one and isinstance(first, Stack) and folded and len(lists) == 1:
        return f"MergeModulelist(dim={first.dim})"
    if one and isinstance(first, Permute):
        moved = [axis for axis, source in enumerate(first.dims) if axis != source]
        if len(moved) == 2:
            return f"Transpose({moved[0]}, {moved[1]})"
    if len(outputs) > 1 and _is_chunk(rule, outputs, mapping):
        return f"Chunk(dim={outputs[0].numbers[0]})"
    taken = "t" if len(lists) > 1 or folded else "t[0]"
    if folded and len(lists) > 1:
        count = len(rule.sources[0].values)
        taken = f"[t[p * {count} + n] for n in range({count}) for p in range({len(lists)})]"
    return f"Recipe(lambda t: [{', '.join(expression(out, taken) for out in outputs)}])"


def _is_chunk(rule: RenameRule, outputs: Sequence[Output], mapping: KeyMapping) -> bool:
    """Whether the outputs are all the equal parts of the source, in order."""
    spec = mapping.source.spec
    numbers = [tuple(value for value in out.numbers if isinstance(value, int)) for out in outputs]
    if spec is None or not all(isinstance(out.transform, Slice) for out in outputs):
        return False
    dim, _, length = numbers[0]
    parts = [(dim, place * length, length) for place in range(len(outputs))]
    return numbers == parts and all(spec[key].shape[dim] == length * len(outputs) for key in rule.firsts)
