"""Pairs that could be exchanged within their block without any name or shape objecting, and modules torn apart."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from automatch.engine.features import MEANING
from automatch.engine.pipeline import Outcome
from automatch.engine.sides import Side
from automatch.keys import template_of

LEAD = 0.3  # of the score, out of about 25
CROWD = 12  # entries of one shape in one block, beyond which combinations are not tried


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
    """Kept target positions of decided pairs that only an order of keys tells apart that nobody knows to be the model's own.

    Where both sides are in registration order, order is evidence, and the confidence model weighs it.
    """
    left, right = outcome.sides
    if left.order == right.order == "registered":
        return set()
    solution, weights = outcome.solution, outcome.weights
    meaning = np.asarray(sum(getattr(weights, name) * solution.evidence[name] for name in MEANING if name in solution.evidence))
    index = solution.index
    blocks: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = defaultdict(list)
    for position, k in outcome.pair_of.items():
        t, s = int(solution.t[k]), int(solution.s[k])
        block = next((node for node in reversed(right.paths[t]) if node in right.loop_nodes), 0)
        blocks[block, right.shapes[t]].append((position, t, s))
    found: set[int] = set()
    for members in blocks.values():
        for (one, t, s), (two, u, r) in combinations(members[:CROWD], 2):
            crossed = index.get((t, r)), index.get((u, s))
            pinned = template_of(right.keys[t]) in outcome.agreed or template_of(right.keys[u]) in outcome.agreed
            ordered = left.order_is_sure(s, r) and right.order_is_sure(t, u) and _parallel(left, right, (t, s), (u, r))
            if pinned or ordered or crossed[0] is None or crossed[1] is None:
                continue
            lead = meaning[index[t, s]] + meaning[index[u, r]] - meaning[crossed[0]] - meaning[crossed[1]]
            if lead <= LEAD:
                found.update((one, two))
    return found


def _parallel(left: Side, right: Side, one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Whether two pairs stand in the same order on both sides."""
    return bool((right.position[one[0]] < right.position[two[0]]) == (left.position[one[1]] < left.position[two[1]]))
