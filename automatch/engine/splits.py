"""Fused tensors split into parts where the other side has the parts: queries, keys and values, gates, parallel blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from automatch.engine.items import Item, Shape, Slot, canonical
from automatch.keys import pieces_of, segments_of, template_of
from automatch.transforms import Slice, chain

Plan = tuple[int, tuple[int, ...]]  # the axis along which a tensor falls apart, and the lengths of its parts
PARTS = {4: ("q", "k", "v", "mlp"), 3: ("q", "k", "v"), 2: ("k", "v")}
GATED = ("gate", "up")
FUSED = frozenset(("qkv", "wqkv", "kv", "query", "key", "value", "in", "proj", "weight", "bias"))  # what their names are made of


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
    plans: dict[int, Plan] = {}
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


def _biases(items: Sequence[Item], plans: Mapping[int, Plan]) -> dict[int, Plan]:
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


def _plan(key: str, shape: Shape, count: int, mine: Counter[Shape], theirs: Counter[Shape], *, have: bool, pairs: bool) -> Plan | None:
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
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        return ("q", "kv")
    if len(lengths) == 2:
        return PARTS[2] if "kv" in words or "keyvalue" in words or "attn" in words or "attention" in words else GATED
    return PARTS[len(lengths)]


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
