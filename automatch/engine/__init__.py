"""The matching itself: two specs in, matches with calibrated confidence and questions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from scipy.optimize import linear_sum_assignment

from automatch.mapping import Evidence, Match, Question, Verdict
from automatch.specs import StateSpec, TensorSpec


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What the engine found."""

    matches: tuple[Match, ...]
    questions: tuple[Question, ...]
    warnings: tuple[str, ...]
    verdict: Verdict


def match_specs(source: StateSpec, target: StateSpec, pins: Mapping[str, str | Sequence[str] | None]) -> EngineResult:
    """Placeholder: plain name+order Hungarian per shape; the real engine replaces it."""
    blocks: dict[tuple[int, ...], tuple[list[tuple[int, TensorSpec]], list[tuple[int, TensorSpec]]]] = {}
    for side, spec in enumerate((source, target)):
        for i, tensor in enumerate(spec):
            blocks.setdefault(tensor.shape, ([], []))[side].append((i, tensor))
    matches = []
    for left, right in blocks.values():
        if not left or not right:
            continue
        names = cdist([t.key for _, t in left], [t.key for _, t in right], scorer=Indel.normalized_similarity)
        order = 1 - np.abs(np.linspace(0, 1, len(left))[:, None] - np.linspace(0, 1, len(right))[None, :])
        score = 0.7 * names + 0.3 * order
        for i, j in zip(*linear_sum_assignment(-score), strict=True):
            evidence = Evidence(name=float(names[i, j]), shape=1.0, size=1.0, order=float(order[i, j]))
            key = left[i][1].key
            matches.append(Match(right[j][1].key, (key,), score=float(score[i, j]), confidence=float(score[i, j]), evidence=evidence))
    return EngineResult(tuple(matches), (), (), Verdict("unknown", "placeholder engine"))
