"""Pairs that could be exchanged within their block without any name or shape objecting."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from automatch.engine.features import MEANING
from automatch.engine.pipeline import Outcome
from automatch.keys import template_of

LEAD = 0.3  # of the score, out of about 25
CROWD = 12  # entries of one shape in one block, beyond which combinations are not tried


def exchangeable(outcome: Outcome) -> set[int]:
    """Kept target positions of decided pairs that only an order of keys that is not the model's own tells apart.

    Where both sides are in registration order, order is evidence, and the confidence model weighs it.
    """
    left, right = outcome.sides
    if left.order == right.order == "registered":
        return set()
    solution, weights = outcome.solution, outcome.weights
    meaning = np.asarray(sum(getattr(weights, name) * solution.evidence[name] for name in MEANING if name in solution.evidence))
    index = {(t, s): k for k, (t, s) in enumerate(zip(solution.t.tolist(), solution.s.tolist(), strict=True))}
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
            if pinned or crossed[0] is None or crossed[1] is None:
                continue
            lead = meaning[index[t, s]] + meaning[index[u, r]] - meaning[crossed[0]] - meaning[crossed[1]]
            if lead <= LEAD:
                found.update((one, two))
    return found
