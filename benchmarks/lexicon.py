"""Which words stand for one another: IBM model 1 (Brown et al., 1993) on the word lists of true pairs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from automatch.engine.evidence import flat_words
from automatch.engine.items import Item
from automatch.engine.sides import Side

Words = tuple[str, ...]
Pair = tuple[Words, Words]
PLAIN = ("copy", "reshape", "permute", "permute_elements")
LARGE = 6_000  # a case with more keys says nothing that its smaller relatives do not


def word_pairs(case: Mapping[str, Any]) -> set[Pair]:
    """The distinct (target words, source words) of a case's one-to-one pairs."""
    if len(case["target"]["entries"]) > LARGE:
        return set()
    sides = [
        Side([Item(key, tuple(shape), None, None, (key,)) for key, shape, *_ in case[side]["entries"]]) for side in ("target", "source")
    ]
    words = [dict(zip(side.keys, flat_words(side), strict=True)) for side in sides]
    return {
        (words[0][key], words[1][true["sources"][0]])
        for key, true in case["truth"].items()
        if len(true["sources"]) == 1 and true["op"] in PLAIN
    }


def fit_lexicon(pairs_by_group: Mapping[str, Iterable[Pair]], rounds: int = 8, least: float = 0.3) -> dict[str, Any]:
    """The table in the form that `automatch.engine.tables.read_lexicon` reads.

    Args:
        pairs_by_group: word pairs of every family group; a pair counts once for each group that has it.
        rounds: of expectation maximisation.
        least: expected count below which a word pair is left out.
    """
    weight = Counter(pair for pairs in pairs_by_group.values() for pair in set(pairs))
    attested: dict[tuple[str, str], set[str]] = defaultdict(set)
    for group, pairs in pairs_by_group.items():
        for a, b in pairs:
            for x in set(a) - set(b):
                for y in set(b) - set(a):
                    attested[min(x, y), max(x, y)].add(group)
    chance: dict[str, dict[str, float]] = {}
    counts: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        counts = _expect(weight, chance)
        totals = {y: sum(row.values()) + 1.0 for y, row in counts.items()}
        chance = {y: {x: v / totals[y] for x, v in row.items() if v > 0.05} for y, row in counts.items()}
    rows = {}
    for y, row in chance.items():
        for x, p in row.items():
            q = chance.get(x, {}).get(y, 0.0)
            both = 0.5 * (max(p, q) + ((p * q) ** 0.5 if q else 0.3 * p))
            if x != y and counts[y][x] >= least and max(p, q) > 0.02:
                key = (min(x, y), max(x, y))
                rows[key] = max(rows.get(key, 0.0), min(0.95, 1.5 * both**0.5))
    return {
        "note": "Words that stand for one another across libraries (~: of a key's last segment): similarity, and how many family groups "
        "of benchmarks/corpus and benchmarks/corpus_extra attest the pair; fitted by benchmarks/fit.py",
        "pairs": [[a, b, round(value, 3), len(attested[a, b])] for (a, b), value in sorted(rows.items())],
    }


def _expect(weight: Mapping[Pair, int], chance: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Expected counts of word pairs, both ways; a word that both sides have stands for itself."""
    counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (one, two), n in weight.items():
        for a, b in ((one, two), (two, one)):
            rivals = [y for y in b if y not in a]
            for x in a:
                if x in b:
                    counts[x][x] += n
                    continue
                share = [(chance[y].get(x, 1e-4) if y in chance else 1e-4) if chance else 1.0 for y in rivals]
                share = [p * (1.0 if (x[0] == "~") == (y[0] == "~") else 0.2) for p, y in zip(share, rivals, strict=True)]
                total = sum(share) + (0.02 if chance else 0.3)
                for y, p in zip(rivals, share, strict=True):
                    counts[y][x] += n * p / total
    return counts
