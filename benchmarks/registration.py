"""Which sibling is registered first, counted over the keys of real models and checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from automatch.engine.registration import LEVELS, families, pairs_of
from automatch.engine.sides import order_kind
from automatch.keys import segments_of

Observed = tuple[int, str, str, str, bool]  # level, two names, relation of their numbers, first comes first
LARGE = 6_000  # a case with more keys says nothing that its smaller relatives do not


def order_facts(case: Mapping[str, Any]) -> set[Observed]:
    """What a case shows of siblings whose keys are in the order of registration."""
    facts: set[Observed] = set()
    for side in ("source", "target"):
        keys = [entry[0] for entry in case[side]["entries"]]
        if len(keys) <= LARGE and order_kind(keys, [segments_of(key) for key in keys]) == "registered":
            facts.update((level, *fact, first) for siblings in families(keys) for level, fact, first in pairs_of(siblings))
    return facts


def fit_order(facts_by_group: Mapping[str, Iterable[Observed]], least: int = 2) -> dict[str, Any]:
    """The table in the form that `automatch.engine.registration.read_precedence` reads.

    Args:
        facts_by_group: what every family group shows; a fact counts once for each group.
        least: groups that must have seen two names together for them to be listed.
    """
    counts = Counter(fact for facts in facts_by_group.values() for fact in set(facts))
    levels: list[dict[tuple[str, str, str], list[int]]] = [{} for _ in LEVELS]
    for (level, a, b, relation, first), n in counts.items():
        levels[level].setdefault((a, b, relation), [0, 0])[not first] += n
    rows = [[[*fact, *n] for fact, n in sorted(found.items()) if sum(n) >= least] for found in levels]
    return {
        "note": "Two siblings, how their numbers compare, and in how many family groups of benchmarks/corpus(_extra) "
        "the first, the second is registered first; by names without numbers, by the words in which they differ, and by "
        "last words; fitted by benchmarks/fit.py",
        **dict(zip(LEVELS, rows, strict=True)),
    }
