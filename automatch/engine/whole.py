"""Modules stay whole: a bias (or running mean) follows the weight beside it, and does not come without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping

from automatch.engine.evidence import role_of
from automatch.engine.items import Item
from automatch.engine.sides import Side
from automatch.specs import StateSpec

FOLLOWERS = ("bias", "mean", "var", "tracked")
STATISTICS = frozenset(("running", "moving", "num", "batches"))  # words of a batch norm's statistics beside their role

Modules = dict[tuple[int, tuple[str, ...]], dict[str, int]]


def keep_whole(
    chosen: Mapping[int, int], candidates: Container[tuple[int, int]], source: Side, target: Side, specs: tuple[StateSpec, StateSpec]
) -> dict[int, int]:
    """The assignment with every follower fed from the module that feeds its weight, or not at all.

    A follower that comes from one module while its weight comes from another, or does not fit, belongs to
    something else: a resized layer's bias fits by accident. Only `candidates` (pairs of target and source) take
    the place of others; `specs` are those of both sides.
    """
    left, right = _modules(source), _modules(target)
    result = _with_weights(chosen, candidates, left, right)
    of_weight = {parts["weight"]: node for node, parts in left.items() if "weight" in parts}
    home = {i: node for node, parts in left.items() for role, i in parts.items() if role in FOLLOWERS}
    moved: dict[int, int] = {}
    for parts in right.values():
        if "weight" not in parts:
            continue
        feeder = result.get(parts["weight"])
        node = of_weight.get(feeder) if feeder is not None else None
        for role in FOLLOWERS:
            if role not in parts:
                continue
            j, beside = parts[role], left[node].get(role) if node is not None else None
            if beside is not None and (j, beside) in candidates:
                if result.get(j) != beside:
                    moved[j] = beside
            elif j in result and result[j] in home:
                weight = left[home[result[j]]].get("weight")
                if weight not in (None, feeder) and not _same_outputs(specs, source.items[weight], target.items[parts["weight"]]):
                    del result[j]
    taken = set(moved.values())
    return {**{j: i for j, i in result.items() if i not in taken and j not in moved}, **moved}


def _with_weights(chosen: Mapping[int, int], candidates: Container[tuple[int, int]], left: Modules, right: Modules) -> dict[int, int]:
    """The assignment with weights that stayed alone fed from the module that feeds all the rest of theirs."""
    result, used = dict(chosen), set(chosen.values())
    home = {i: node for node, parts in left.items() for i in parts.values()}
    for parts in right.values():
        j = parts.get("weight")
        others = {home.get(result.get(k, -1)) for role, k in parts.items() if role != "weight"}
        node = next(iter(others)) if len(others) == 1 else None
        i = left[node].get("weight") if node is not None else None
        if j is not None and i is not None and j not in result and i not in used and (j, i) in candidates:
            result[j] = i
            used.add(i)
    return result


def _same_outputs(specs: tuple[StateSpec, StateSpec], one: Item, two: Item) -> bool:
    """Whether two convolutions differ in nothing but their kernel sizes or their input channels."""
    a, b = specs[0][one.reals[0]].shape, specs[1][two.reals[0]].shape
    return len(a) == len(b) > 2 and a != b and a[0] == b[0] and (a[1] == b[1] or a[2:] == b[2:])


def _modules(side: Side) -> Modules:
    """Entries that belong together (``weight``, ``bias``; ``in_proj_weight``, ``in_proj_bias``) by role, where every role is there once."""
    found: dict[tuple[int, tuple[str, ...]], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, path in enumerate(side.paths):
        words = [word for word in side.words[i][-1] if word not in STATISTICS]
        if len(path) > 1 and words:
            found[path[-1], tuple(words[:-1])][role_of([words])].append(i)
    return {module: {role: entries[0] for role, entries in parts.items() if len(entries) == 1} for module, parts in found.items()}
