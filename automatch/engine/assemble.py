"""From matched items back to real keys: slices, stacks and concatenations put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from automatch.engine.items import Item, Shape
from automatch.engine.layout import layout
from automatch.transforms import Concat, Copy, Permute, Reshape, Slice, Stack, Transform, chain


@dataclass(frozen=True, slots=True)
class Fed:
    """What feeds one real target key, and the target items that decided it."""

    target: str
    sources: tuple[str, ...]
    transform: Transform
    items: tuple[int, ...]


def assemble(source: Sequence[Item], target: Sequence[Item], pairs: Mapping[int, int], transposed: Callable[[int, int], bool]) -> list[Fed]:
    """Turn an assignment of items into one transform per real target key; fused targets need all their parts."""
    result: list[Fed] = []
    slots: dict[str, list[tuple[int, Item, Item]]] = defaultdict(list)
    for j, i in pairs.items():
        t, s = target[j], source[i]
        if t.slot is not None:
            slots[t.slot.key].append((j, t, s))
            continue
        between = layout(s.shape, t.shape, transposed=transposed(j, i))
        if between is None:
            continue
        result.extend(Fed(real, s.reals, chain(s.how, between, spread), (j,)) for real, spread in zip(t.reals, t.spread, strict=True))
    ends = _ends(source) if slots else {}
    for key, parts in slots.items():
        parts.sort(key=lambda part: part[1].slot.index if part[1].slot else 0)
        fused = _fuse(key, parts, ends)
        if fused is not None:
            result.append(fused)
    return result


def _ends(source: Sequence[Item]) -> dict[str, int]:
    """How far the slices of each tensor that was split reach."""
    ends: dict[str, int] = {}
    for item in source:
        if isinstance(item.how, Slice):
            key = item.reals[0]
            ends[key] = max(ends.get(key, 0), item.how.start + item.how.length)
    return ends


def _fuse(key: str, parts: Sequence[tuple[int, Item, Item]], ends: Mapping[str, int]) -> Fed | None:
    first = parts[0][1]
    slot = first.slot
    if slot is None or len(parts) != slot.count:
        return None
    items = tuple(j for j, _, _ in parts)
    pairs = _rejoined(parts, slot.dim, ends)
    sources = [s for s, _ in pairs]
    between = {layout(s.shape, t.shape) if s.shape != t.shape else Copy() for _, t, s in parts}
    tail = first.spread[0]
    if len(sources) == 1:
        return Fed(key, sources[0].reals, chain(sources[0].how, tail), items)
    if all(len(s.reals) == 1 and isinstance(s.how, Copy | Reshape) for s in sources):
        return _concat(key, sources, [shape for _, shape in pairs], slot.dim, items, tail)
    if all(len(s.reals) > 1 and isinstance(s.how, Stack) for s in sources) and between == {Copy()}:
        return _stack_and_fuse(key, sources, slot.dim, items, tail)
    return None


def _rejoined(parts: Sequence[tuple[int, Item, Item]], dim: int, ends: Mapping[str, int]) -> list[tuple[Item, Shape]]:
    """What feeds the parts and their shapes; neighbours that lie side by side in one tensor are one (``q`` and ``kv``)."""
    result: list[tuple[Item, Shape]] = []
    for _, t, s in parts:
        how, before = s.how, result[-1][0] if result else s
        if not isinstance(how, Slice) or how.dim != dim or s.shape != t.shape:
            result.append((s, t.shape))
        elif (
            isinstance(before.how, Slice)
            and before is not s
            and before.reals == s.reals
            and before.how.start + before.how.length == how.start
        ):
            joined = Slice(dim, before.how.start, before.how.length + how.length)
            shape = (*t.shape[:dim], joined.length, *t.shape[dim + 1 :])
            result[-1] = replace(s, shape=shape, how=joined), shape
        else:
            result.append((s, t.shape))
    whole = [isinstance(s.how, Slice) and s.how.start == 0 and s.how.length == ends[s.reals[0]] for s, _ in result]
    return [(replace(s, how=Copy()) if all_of_it else s, shape) for (s, shape), all_of_it in zip(result, whole, strict=True)]


def _concat(
    key: str, sources: Sequence[Item], shapes: Sequence[tuple[int, ...]], dim: int, items: tuple[int, ...], tail: Transform
) -> Fed | None:
    real = tuple(s.reals[0] for s in sources)
    plain = all(isinstance(s.how, Copy) for s in sources)
    if plain and all(s.shape == shape for s, shape in zip(sources, shapes, strict=True)):
        return Fed(key, real, chain(Concat(dim), tail), items)
    if plain and all(len(s.shape) == 2 and s.shape == shape[::-1] for s, shape in zip(sources, shapes, strict=True)):
        return Fed(key, real, chain(Concat(1 - dim), Permute((1, 0)), tail), items)
    if len({s.shape for s in sources}) != 1 or len({*shapes}) != 1 or len(shapes[0]) > 2:
        return None
    k, shape = len(sources), sources[0].shape
    steps: list[Transform] = [Stack(0), Reshape((k, *shape))]
    if shape != shapes[0]:
        steps.append(Permute((0, 2, 1)))
    if dim == 1:
        steps.append(Permute((1, 0, 2)))
    whole = (*shapes[0][:dim], k * shapes[0][dim], *shapes[0][dim + 1 :])
    return Fed(key, real, chain(*steps, Reshape(whole), tail), items)


def _stack_and_fuse(key: str, sources: Sequence[Item], dim: int, items: tuple[int, ...], tail: Transform) -> Fed | None:
    """Repetitions stacked on a new first axis and fused along ``dim``: sources interleaved by repetition."""
    n, k, shape = len(sources[0].reals), len(sources), sources[0].shape[1:]
    real = tuple(s.reals[index] for index in range(n) for s in sources)
    if dim == 1:
        return Fed(key, real, chain(Stack(0), Reshape((n, k * shape[0], *shape[1:])), tail), items)
    if dim == 2 and len(shape) == 2:
        steps = (Stack(0), Reshape((n, k, *shape)), Permute((0, 2, 1, 3)), Reshape((n, shape[0], k * shape[1])))
        return Fed(key, real, chain(*steps, tail), items)
    return None
