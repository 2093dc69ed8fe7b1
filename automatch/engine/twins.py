"""Pairs that could be exchanged within their block without any name or shape objecting, and modules torn apart."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

from automatch.engine.conventions import numbered_norms, shipped_conventions
from automatch.engine.features import MEANING
from automatch.engine.items import canonical
from automatch.engine.pipeline import Outcome
from automatch.engine.sides import Side
from automatch.keys import numbers_of, template_of

LEAD, SURE, AGAINST = 0.3, 2.0, -0.05  # of the score, out of about 25
FEW = 3  # modules whose order can be compared
CROWD = 40  # entries of one shape in one block, beyond which combinations are not tried

_Pair = tuple[int, int, int]  # kept target position, and the places of target and source on their sides
_Owners = tuple[list[Counter[tuple[int, ...]]], list[Counter[tuple[int, ...]]]]


def torn(outcome: Outcome) -> set[int]:
    """Kept target positions of pairs whose module takes its weight from one module of the checkpoint and its bias from another."""
    left, right = outcome.sides
    solution = outcome.solution
    homes: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, k in outcome.pair_of.items():
        t, s = int(solution.t[k]), int(solution.s[k])
        plain = all(len(item.reals) == 1 and item.slot is None and item.key == item.reals[0] for item in (right.items[t], left.items[s]))
        if plain and len(right.paths[t]) > 1 and len(left.paths[s]) > 1:
            homes[right.paths[t][-1]][left.paths[s][-1]].append(position)
    return {position for sources in homes.values() if len(sources) > 1 for positions in sources.values() for position in positions}


def exchangeable(outcome: Outcome) -> set[int]:
    """Kept target positions of decided pairs that only an order of keys tells apart, where that order is not known to be the model's own.

    In a block both of whose sides are in registration order, the order is known to be the model's own if all
    pairs of the block that shapes and names decide stand in it, and the two between the same of them; unless names speak for the exchange.
    """
    left, right = outcome.sides
    solution, weights = outcome.solution, outcome.weights
    meaning = np.asarray(sum(getattr(weights, name) * solution.evidence[name] for name in MEANING if name in solution.evidence))
    registered = left.order == right.order == "registered"
    owners = _owners(left), _owners(right)
    numbered = [numbered_norms(side, shipped_conventions()) for side in outcome.sides]
    found: set[int] = set()
    for block in _blocks(outcome):
        leads = [lead for members in block.values() for lead in _leads(outcome, meaning, owners, members)]
        places = _sure_places(left, right, block, leads) if registered else []
        for one, two, lead in leads:
            needed = AGAINST if _fits(left, right, places, (one, two)) else LEAD
            ordered = _are_numbered(left, right, one, two) if registered else _order_is_sure(left, right, one, two)
            unsaid = numbered[0].issuperset((one[2], two[2])) != numbered[1].issuperset((one[1], two[1]))
            if (lead <= needed and not ordered) or unsaid:
                found.update((one[0], two[0]))
    return found


def _blocks(outcome: Outcome) -> list[dict[tuple[int, ...], list[_Pair]]]:
    """The decided pairs by the innermost repeated module around the target, or around the source, and by shape."""
    left, right = outcome.sides
    blocks: dict[tuple[bool, int], dict[tuple[int, ...], list[_Pair]]] = defaultdict(lambda: defaultdict(list))
    for position, k in outcome.pair_of.items():
        t, s = int(outcome.solution.t[k]), int(outcome.solution.s[k])
        for side, i in ((right, t), (left, s)):
            block = next((node for node in reversed(side.paths[i]) if node in side.loop_nodes), 0)
            blocks[side is right, block][right.shapes[t]].append((position, t, s))
    return list(blocks.values())


def _owners(side: Side) -> list[Counter[tuple[int, ...]]]:
    """For every item what its module holds: an entry is exchanged with all that stand beside it, or not at all."""
    held: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for path, shape in zip(side.paths, side.shapes, strict=True):
        held[path[-1]][canonical(shape)] += 1
    return [held[path[-1]] for path in side.paths]


def _leads(outcome: Outcome, meaning: np.ndarray, owners: _Owners, members: list[_Pair]) -> list[tuple[_Pair, _Pair, float]]:
    """How much more two pairs mean than they would with their sources exchanged, for every two that could be."""
    right, index = outcome.sides[1], outcome.solution.index
    result = []
    for one, two in combinations(members[:CROWD], 2):
        (_, t, s), (_, u, r) = one, two
        crossed = index.get((t, r)), index.get((u, s))
        pinned = template_of(right.keys[t]) in outcome.agreed or template_of(right.keys[u]) in outcome.agreed
        alike = owners[0][s] == owners[0][r] and owners[1][t] == owners[1][u]
        if crossed[0] is not None and crossed[1] is not None and alike and not pinned:
            result.append((one, two, float(meaning[index[t, s]] + meaning[index[u, r]] - meaning[crossed[0]] - meaning[crossed[1]])))
    return result


def _sure_places(
    left: Side, right: Side, block: Mapping[tuple[int, ...], list[_Pair]], leads: Sequence[tuple[_Pair, _Pair, float]]
) -> list[tuple[float, float]]:
    """Where the modules stand, on both sides, whose pairs cannot be exchanged at little cost; none if too few or not in one order."""
    doubtful = {pair for one, two, lead in leads if lead <= SURE for pair in (one, two)}
    sure = [pair for members in block.values() for pair in members if pair not in doubtful]
    modules = {(right.paths[t][-1], left.paths[s][-1]): (right.position[t], left.position[s]) for _, t, s in sure}
    places = sorted(modules.values())
    return places if len(places) >= FEW and all(a[1] < b[1] for a, b in pairwise(places)) else []


def _fits(left: Side, right: Side, places: Sequence[tuple[float, float]], pairs: Sequence[_Pair]) -> bool:
    """Whether pairs stand on both sides between the same of these places."""
    if not places:
        return False
    ats, ofs = zip(*places, strict=True)  # both rise
    return all(bisect_left(ats, right.position[t]) == bisect_left(ofs, left.position[s]) for _, t, s in pairs)


def _are_numbered(left: Side, right: Side, one: _Pair, two: _Pair) -> bool:
    """Whether two pairs differ first in a number, on both sides, and the numbers rise on both or fall on both."""
    (_, t, s), (_, u, r) = one, two
    rise = [_rise(right.segments[t], right.segments[u]), _rise(left.segments[s], left.segments[r])]
    return 0 not in rise and rise[0] == rise[1]


def _rise(one: Sequence[str], two: Sequence[str]) -> int:
    """Whether the number in which two keys differ first rises (1) or falls (-1); 0 if they differ first in something else."""
    a, b = next(((a, b) for a, b in zip(one, two, strict=False) if a != b), ("", ""))
    if template_of(a) != template_of(b):
        return 0
    return 1 if numbers_of(a) < numbers_of(b) else -1


def _order_is_sure(left: Side, right: Side, one: _Pair, two: _Pair) -> bool:
    """Whether two pairs stand in the same order on both sides, and that order is known on both."""
    (_, t, s), (_, u, r) = one, two
    parallel = bool((right.position[t] < right.position[u]) == (left.position[s] < left.position[r]))
    return parallel and left.order_is_sure(s, r) and right.order_is_sure(t, u)
