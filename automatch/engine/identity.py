"""The plainest answer first: both sides have the same keys and shapes, one prefix aside."""

from __future__ import annotations

from collections.abc import Iterator

from automatch.mapping import Evidence, Match
from automatch.specs import StateSpec

CERTAIN = 0.999


def same_but_for_prefix(source: StateSpec, target: StateSpec) -> tuple[Match, ...] | None:
    """One match per model key if the keys agree one to one, with equal shapes, after one prefix is taken off either side."""
    if len(source) != len(target) or not len(source):
        return None
    for taken in _prefixes(source):
        own = {tensor.key[len(taken) :]: tensor for tensor in source}
        for given in _prefixes(target):
            if all((other := own.get(t.key[len(given) :])) is not None and other.shape == t.shape for t in target):
                evidence = Evidence(1.0, 1.0, 1.0, 1.0, 1.0)
                return tuple(
                    Match(t.key, (own[t.key[len(given) :]].key,), score=1.0, confidence=CERTAIN, evidence=evidence) for t in target
                )
    return None


def _prefixes(spec: StateSpec) -> Iterator[str]:
    """The prefixes, whole segments long, that all keys share; the empty one first."""
    yield ""
    low, high = min(spec.keys), max(spec.keys)
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return
        if a in "./":
            yield low[: i + 1]
