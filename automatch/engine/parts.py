"""Virtual items: merged axes, stacked repetitions and split fused tensors, so that matching is one to one.

Each step looks for shapes that one side has and the other lacks, while the other has what they would be
made of. Nothing is decided here: a virtual item that finds no partner stays unmatched.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from automatch.engine.columns import ColumnsOf
from automatch.engine.items import Item, Shape, Slot, canonical
from automatch.keys import pieces_of, segments_of, template_of
from automatch.transforms import Copy, Permute, Reshape, Slice, Stack, Transform, chain

PARTS = {3: ("q", "k", "v"), 2: ("k", "v")}
GATED = ("gate", "up")
PARALLEL = ("q", "k", "v", "mlp")
FUSED = frozenset(("qkv", "wqkv", "kv", "query", "key", "value", "in", "proj", "weight", "bias"))  # what their names are made of


def with_virtual_items(source: Sequence[Item], target: Sequence[Item], columns: ColumnsOf) -> tuple[list[Item], list[Item]]:
    """Both sides with their axes merged, repetitions stacked and fused tensors split where the other side asks for it."""
    source, target = merge_axes(source, target, is_target=False), merge_axes(target, source, is_target=True)
    source = stack_repeats(source, target, columns, is_target=False)
    target = stack_repeats(target, source, columns, is_target=True)
    return split_fused(source, target, is_target=False), split_fused(target, source, is_target=True)


# ---- axes ------------------------------------------------------------------------------------------------


def merge_axes(items: Sequence[Item], others: Sequence[Item], *, is_target: bool) -> list[Item]:
    """Merge the axes (heads, head size) of shapes the other side has only as one axis."""
    known = {canonical(item.shape) for item in others}
    found: dict[Shape, _Merged | None] = {}
    result = []
    for item in items:
        shape = item.shape
        if shape not in found:
            found[shape] = None if canonical(shape) in known else next((m for m in _merged(shape) if canonical(m.shape) in known), None)
        merged = found[shape]
        if merged is not None:
            spread = (merged.back,) if is_target else item.spread
            item = replace(item, shape=merged.shape, how=Copy() if is_target else merged.how, spread=spread)
        result.append(item)
    return result


@dataclass(frozen=True, slots=True)
class _Merged:
    """A shape with fewer axes, the way to it and the way back."""

    shape: Shape
    how: Transform
    back: Transform


def _merged(shape: Shape) -> list[_Merged]:
    """What merging neighbouring axes gives, fewest merged first; then (head, input, head size) as one matrix of inputs and outputs."""
    n = len(shape)
    spans = [(i, j) for width in range(2, n + 1) for i in range(n - width + 1) for j in (i + width,)]
    plain = [(*shape[:i], math.prod(shape[i:j]), *shape[j:]) for i, j in spans if min(shape[i:j]) > 1 and (j - i < n or n == 2)]
    result = [_Merged(whole, Reshape(whole), Reshape(shape)) for whole in plain]
    if n == 3 and min(shape) > 1:
        heads, inputs, size = shape
        whole = (inputs, heads * size)
        back = chain(Reshape((inputs, heads, size)), Permute((1, 0, 2)))
        result.append(_Merged(whole, chain(Permute((1, 0, 2)), Reshape(whole)), back))
    return result


# ---- repetitions -------------------------------------------------------------------------------------------


def stack_repeats(items: list[Item], others: list[Item], columns: ColumnsOf, *, is_target: bool) -> list[Item]:
    """Stack tensors of numbered siblings (experts) that the other side holds as one tensor."""
    mine, theirs = Counter(canonical(item.shape) for item in items), Counter(canonical(item.shape) for item in others)
    if all(2 * theirs[shape] > count for shape, count in mine.items()):
        return items
    places = columns(items).all_places
    other_places = columns(others).all_places if any(dims for _, _, dims in places) else []
    repeated = {(place[2][-1], canonical(item.shape)) for item, place in zip(others, other_places, strict=False) if place[2]}
    shapes = Counter(item.shape for item in others)
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for i, (column, coordinates, dims) in enumerate(places):
        if dims and len(items[i].reals) == 1 and _numbered(items[i].key, column):
            groups[column, coordinates[:-1]].append(i)
    stacked: dict[int, Item] = {}
    dropped: set[int] = set()
    wanted: dict[tuple[int, Shape], Shape | None] = {}
    outer = Counter((column, len(members)) for (column, _), members in groups.items())
    for (column, _), members in groups.items():
        members.sort(key=lambda i: places[i][1][-1])
        n, shape = len(members), items[members[0]].shape
        if (n, shape) not in wanted:
            common = 2 * theirs[canonical(shape)] > mine[canonical(shape)]
            wanted[n, shape] = (
                None
                if (n, canonical(shape)) in repeated or not shape or common
                else _stacked_shape(n, shape, shapes, outer[column, n], flat=outer[column, n] > 1 or "expert" in column)
            )
        whole = wanted[n, shape]
        if whole is not None:
            stacked[members[0]] = _stack([items[i] for i in members], whole, is_target)
            dropped.update(members[1:])
    return [stacked.get(i, item) for i, item in enumerate(items) if i not in dropped] if stacked else items


def _numbered(key: str, column: str) -> bool:
    """Whether the innermost repetition is a list of its own (``experts.0``), not a numbered name (``norm1``)."""
    segments = column.split("/")
    innermost = max((i for i, segment in enumerate(segments) if "~" in segment), default=-1)
    return innermost >= 0 and segments_of(key)[innermost].isdigit()


def _stacked_shape(n: int, shape: Shape, shapes: Counter[Shape], groups: int, *, flat: bool) -> Shape | None:
    """The shape under which the other side holds n tensors of ``shape``: stacked, stacked and fused, or concatenated."""
    whole = (n, *shape)
    fused = [(n, *shape[:i], 2 * shape[i], *shape[i + 1 :]) for i in range(len(shape))]
    leading: Counter[Shape] = Counter()
    for other, count in shapes.items():
        if len(other) == len(whole) and other[0] == n:
            leading[canonical(other)] += count
    if any(leading[canonical(s)] >= groups for s in [whole, *fused]):
        return whole
    if flat and len(shape) == 2:
        for joined in ((n * shape[0], shape[1]), (n * shape[1], shape[0])):
            if shapes[joined] >= groups and n > 2:
                return joined
    return None


def _stack(members: Sequence[Item], whole: Shape, is_target: bool) -> Item:
    first = members[0]
    n, shape = len(members), first.shape
    flat = len(whole) == len(shape)
    key = _without_index(members)
    reals = tuple(item.reals[0] for item in members)
    if not is_target:
        how = chain(Stack(0), *((Reshape(whole),) if flat and whole[1] == shape[1] else ()))
        if flat and whole[1] != shape[1]:
            how = chain(Stack(0), Permute((0, 2, 1)), Reshape(whole))
        return replace(first, key=key, shape=whole, reals=reals, how=how)
    length = whole[0] // n
    back = []
    for i in range(n):
        part = Slice(0, i * length, length)
        if flat:
            back.append(part if whole[1] == shape[1] else chain(part, Permute((1, 0))))
        else:
            back.append(chain(part, Reshape(shape)))
    return replace(first, key=key, shape=whole, reals=reals, spread=tuple(back))


def _without_index(members: Sequence[Item]) -> str:
    a, b = segments_of(members[0].key), segments_of(members[-1].key)
    kept = [x for x, y in zip(a, b, strict=True) if x == y]
    return ".".join(kept)


# ---- fused tensors -----------------------------------------------------------------------------------------


def split_fused(items: list[Item], others: Sequence[Item], *, is_target: bool) -> list[Item]:
    """Split tensors that the other side lacks into parts that the other side has in surplus."""
    mine = Counter(canonical(item.shape) for item in items)
    theirs = Counter(canonical(item.shape) for item in others)
    by_template: dict[tuple[str, Shape], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        have = theirs[canonical(item.shape)]
        if len(item.reals) == 1 and (not have or hinted_parts(item.key)):
            by_template[template_of(item.key), item.shape].append(i)
    pairs = any(hinted_parts(item.key) == 2 for item in others)
    plans: dict[int, tuple[int, tuple[int, ...]]] = {}
    for (_, shape), members in by_template.items():
        if len(shape) < 2 and not hinted_parts(items[members[0]].key):
            continue
        plan = _plan(items[members[0]].key, shape, len(members), mine, theirs, have=bool(theirs[canonical(shape)]), pairs=pairs)
        if plan:
            plans.update(dict.fromkeys(members, plan))
    for i in _left_whole(items, others, plans):
        del plans[i]
    if not plans:
        return items
    plans.update(_biases(items, plans))
    modules = Counter((stem, ending) for stem, _, ending in (_place(items[i].key) for i in plans))
    result: list[Item] = []
    for i, item in enumerate(items):
        result.extend(_split(item, *plans[i], modules, is_target=is_target) if i in plans else [item])
    return result


def _left_whole(items: Sequence[Item], others: Sequence[Item], plans: Mapping[int, object]) -> list[int]:
    """Which fused tensors stay whole, where the other side has some of their shape whole and others in parts: those most alike in name."""
    kinds: dict[Shape, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in plans:
        if len(items[i].shape) > 1:
            kinds[canonical(items[i].shape)][template_of(items[i].key)].append(i)
    result: list[int] = []
    for shape, templates in kinds.items():
        alike = [item.key for item in others if canonical(item.shape) == shape] if len(templates) > 1 else []
        whole = [key for key in alike if hinted_parts(key)]
        words = {word for key in whole for word in _words(key)}
        room = len(whole)
        for template in sorted(templates, key=lambda template: (-len(words & _words(template)), template)):
            members = templates[template]
            if len(members) <= room < sum(map(len, templates.values())):
                result.extend(members)
                room -= len(members)
    stems = {template_of(_stem(items[i].key)) for i in result}
    return [*result, *(i for i in plans if len(items[i].shape) == 1 and template_of(_stem(items[i].key)) in stems)]


def _words(key: str) -> set[str]:
    return {piece for segment in segments_of(key) for piece in pieces_of(segment) if isinstance(piece, str)}


def _biases(items: Sequence[Item], plans: Mapping[int, tuple[int, tuple[int, ...]]]) -> dict[int, tuple[int, tuple[int, ...]]]:
    """A vector is split only beside the matrix it belongs to, into parts of the same lengths."""
    lengths = {(template_of(_stem(items[i].key)), sum(plan[1])): plan[1] for i, plan in plans.items() if len(items[i].shape) > 1}
    result = {}
    for i, item in enumerate(items):
        if len(item.shape) == 1 and len(item.reals) == 1:
            found = lengths.get((template_of(_stem(item.key)), item.shape[0]))
            if found:
                result[i] = (0, found)
    return result


def _stem(key: str) -> str:
    """What a weight and its bias have in common."""
    return key.replace("weight", "").replace("kernel", "").replace("bias", "")


def _plan(
    key: str, shape: Shape, count: int, mine: Counter[Shape], theirs: Counter[Shape], *, have: bool, pairs: bool
) -> tuple[int, tuple[int, ...]] | None:
    """Along which axis a fused tensor falls into which lengths, or None."""
    best, best_score = None, 0.0
    hint = hinted_parts(key)
    for dim, size in enumerate(shape):
        rest = shape[:dim] + shape[dim + 1 :]
        options: list[tuple[int, ...]] = []
        if size % 3 == 0:
            options.append((size // 3,) * 3)
            if hint == 3 and pairs:
                options.append((size // 3, 2 * size // 3))
        if size % 2 == 0:
            options.append((size // 2,) * 2)
        options.extend(_grouped(size, rest, theirs))
        options.extend(_parallel(size, rest, theirs) if dim == 0 and len(shape) == 2 else ())
        for lengths in options:
            need = Counter(canonical((*rest, length)) for length in lengths)
            surplus = min((theirs[p] - mine[p]) / (n * count) for p, n in need.items())
            if min(lengths) < 2 or surplus < (0.8 if have else 0.5) or (hint and hint != len(lengths) and len(set(lengths)) == 1):
                continue
            uneven = len(lengths) == 3 and len(set(lengths)) > 1  # without a key bias, equal parts find two of three
            score = min(surplus, 1.0) + 0.1 * (hint == len(lengths)) + 0.05 * len(lengths) - 0.5 * uneven
            if score > best_score:
                best, best_score = (dim, lengths), score
    return best


def _grouped(size: int, rest: Shape, theirs: Counter[Shape]) -> list[tuple[int, ...]]:
    """(queries, keys, values) of grouped-query attention: two equal short parts and one a multiple as long."""
    result = []
    for shape in theirs:
        for short in set(shape):
            long = size - 2 * short
            if long > short > 0 and long % short == 0 and canonical((*rest, short)) == shape and canonical((*rest, long)) in theirs:
                result.append((long, short, short))
    return sorted(set(result))


def _parallel(size: int, rest: Shape, theirs: Counter[Shape]) -> list[tuple[int, ...]]:
    """(queries, keys, values, and the first matrix of the mlp beside them) of a block that computes all at once (Flux's ``linear1``)."""
    found = {third for shape in theirs for third in shape if canonical((*rest, third)) == shape and size - 3 * third > third}
    return sorted((third, third, third, size - 3 * third) for third in found if canonical((*rest, size - 3 * third)) in theirs)


def hinted_parts(key: str) -> int:
    """How many parts the name of a fused tensor promises; 0 where it says nothing."""
    return _hinted(*segments_of(key)[-2:])


@lru_cache(maxsize=1 << 14)
def _hinted(*segments: str) -> int:
    words = "".join(str(piece) for segment in segments for piece in pieces_of(segment))
    if "qkv" in words or "querykeyvalue" in words or "inproj" in words:
        return 3
    if "kv" in words or "gateup" in words or "w13" in words or "keyvalue" in words:
        return 2
    return 0


def part_names(key: str, lengths: tuple[int, ...]) -> tuple[str, ...]:
    """Names for the parts, in the order the field fuses them."""
    words = "".join(str(piece) for segment in segments_of(key)[-2:] for piece in pieces_of(segment))
    if len(lengths) == 4:
        return PARALLEL
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        return ("q", "kv")
    if len(lengths) == 2:
        return PARTS[2] if "kv" in words or "keyvalue" in words or "attn" in words or "attention" in words else GATED
    return PARTS[3]


def _place(key: str) -> tuple[tuple[str, ...], str, str]:
    """Of a fused tensor: the segments above the one that names what is fused, that one, and the word for its kind."""
    segments = segments_of(key)
    leaf = pieces_of(segments[-1])
    if len(segments) > 1 and len(leaf) == 1 and leaf[0] in ("weight", "bias", "kernel"):
        return tuple(segments[:-2]), segments[-2], segments[-1]
    return tuple(segments[:-1]), segments[-1], "bias" if "bias" in leaf else "weight"


def _split(
    item: Item, dim: int, lengths: tuple[int, ...], modules: Mapping[tuple[tuple[str, ...], str], int], *, is_target: bool
) -> list[Item]:
    """The parts; where ``modules`` counts another such tensor in the same module, with what its name says beyond being fused."""
    stem, own, ending = _place(item.key)
    more = [str(piece) for piece in pieces_of(own) if piece not in FUSED] if modules[stem, ending] > 1 else []
    parts = []
    start = 0
    for index, (name, length) in enumerate(zip(part_names(item.key, lengths), lengths, strict=True)):
        shape = (*item.shape[:dim], length, *item.shape[dim + 1 :])
        key = ".".join([*stem, "_".join([*more, name]), ending])
        if is_target:
            parts.append(replace(item, key=key, shape=shape, slot=Slot(item.reals[0], dim, index, len(lengths))))
        else:
            parts.append(replace(item, key=key, shape=shape, how=chain(item.how, Slice(dim, start, length))))
        start += length
    return parts
