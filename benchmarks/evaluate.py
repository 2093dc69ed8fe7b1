"""One tool on one case: what it answers through its public face, and how right that is."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import baselines
import corpus_cases
import scoring
from families import group_of

from automatch import KeyMapping, Match, Question, propose_mapping
from automatch.transforms import to_dict

Case = dict[str, Any]
FIELDS = {"permute": ("dims",), "slice": ("dim", "start", "length"), "concat": ("dim",), "stack": ("dim",)}


def engine_record(case: Case, order: str, seed: int = 0, timeout: float = 120.0) -> dict[str, Any]:
    """Run `propose_mapping` on a case and judge the answer; an exception or time-out is all missed."""
    model, ckpt = corpus_cases.skeleton(case), corpus_cases.state_dict(case, order, seed)
    start = time.process_time()
    try:
        with baselines.time_limit(timeout):
            mapping = propose_mapping(model, ckpt)
    except Exception as error:
        return _record(case, None, time.process_time() - start, error=f"{type(error).__name__}: {error}")
    seconds = time.process_time() - start
    scored = _record(case, _as_scored(mapping.matches), seconds)
    scored["questions"] = len(mapping.questions)
    scored["one_answer"], scored["all_answers"] = _with_answers(case, mapping, scored["perfect"])
    scored["ops_right"], scored["ops"] = _ops(case, mapping)
    return scored


def baseline_record(tool: str, case: Case, order: str, seed: int = 0, timeout: float = 30.0) -> dict[str, Any]:
    """Run one of the `baselines` on a case and judge its answer."""
    entries = corpus_cases.ordered_entries(case, order, seed)
    start = time.process_time()
    try:
        with baselines.time_limit(timeout):
            pairs = baselines.BASELINES[tool](case, entries)
    except (baselines.RefusedError, TimeoutError, RecursionError, MemoryError) as error:
        return _record(case, None, time.process_time() - start, error=f"{type(error).__name__}: {str(error)[:200]}")
    return _record(case, baselines.as_mapping(pairs), time.process_time() - start)


def _record(case: Case, mapping: Mapping[str, Any] | None, seconds: float, error: str = "") -> dict[str, Any]:
    scored = scoring.score_case(case, mapping)
    rows, faults = scored.pop("rows"), scored.pop("faults")
    histogram: dict[float, list[int]] = defaultdict(lambda: [0, 0])
    for confidence, ok in rows:
        cell = histogram[round(confidence, 3)]
        cell[0] += ok
        cell[1] += 1
    return scored | {
        "group": group_of(case["family"]),
        "confident": sum(confidence >= scoring.CONFIDENT for confidence, _ in rows),
        "confident_right": sum(ok for confidence, ok in rows if confidence >= scoring.CONFIDENT),
        "squared_error": sum((confidence - ok) ** 2 for confidence, ok in rows),
        "gaps": _gaps(rows),
        "histogram": [[confidence, *cell] for confidence, cell in sorted(histogram.items())],
        "one_answer": scored["perfect"],
        "all_answers": scored["perfect"],
        "questions": 0,
        "ops_right": scored["exact"],
        "ops": scored["right"],
        "seconds": round(seconds, 4),
        "error": error,
        "faults": [[round(c, 3), key, sources[:3], (true or [])[:3]] for c, key, sources, true in faults[:3]],
    }


def _gaps(rows: Sequence[tuple[float, bool]], bins: int = 10) -> list[float]:
    """Sum of confidence minus right over each of ``bins`` equal bins: what ECE is made of, before rounding."""
    gaps = [0.0] * bins
    for confidence, ok in rows:
        gaps[min(bins - 1, int(confidence * bins))] += confidence - ok
    return gaps


def _as_scored(matches: Sequence[Match]) -> dict[str, Any]:
    """What scoring reads of a mapping; `KeyMapping.to_dict` holds much more."""
    return {
        "matches": [
            {"target": m.target, "sources": list(m.sources), "confidence": m.confidence, "transform": {"op": m.transform.op}}
            for m in matches
        ]
    }


def _with_answers(case: Case, mapping: KeyMapping, perfect: bool) -> tuple[bool, bool]:
    """Whether one answer of a person who knows the truth makes the case perfect; and whether all answers do."""
    if perfect or not mapping.questions:
        return perfect, perfect
    one, answered = False, mapping
    for question in mapping.questions:
        option = _truest(case, question)
        if option is None:
            continue
        alone = mapping.answer(question.id, option)
        one = one or scoring.score_case(case, _as_scored(alone.matches))["perfect"]
        if any(open_.id == question.id for open_ in answered.questions):
            answered = answered.answer(question.id, option)
    return one, one or scoring.score_case(case, _as_scored(answered.matches))["perfect"]


def _truest(case: Case, question: Question) -> int | None:
    """The option that agrees with the truth on most of the question's keys; None if none agrees at all."""
    truth, alias = case["truth"], scoring.aliases_of(case)

    def agreement(matches: Sequence[Match]) -> int:
        found = {match.target: match.sources for match in matches}
        return sum(scoring.is_right(found[key], truth.get(key), alias) if key in found else key not in truth for key in question.keys)

    scores = [agreement(option.matches) for option in question.options]
    return scores.index(max(scores)) if scores and max(scores) else None


def _ops(case: Case, mapping: KeyMapping) -> tuple[int, int]:
    """Of the matches with right sources: those whose op and its fields are the truth's, and all of them.

    A truth whose fields are not recorded (row orders that plain strides cannot say) is compared by op alone.
    """
    truth, alias = case["truth"], scoring.aliases_of(case)
    right = total = 0
    for key in scoring.counted_keys(case):
        match, true = mapping.get(key), truth.get(key)
        if match is None or true is None or not scoring.is_right(match.sources, true, alias):
            continue
        total += 1
        found = to_dict(match.transform)
        if found["op"] == "chain":
            right += true["op"] not in ("copy", *FIELDS)
        else:
            right += found["op"] == true["op"] and all(found[f] == true[f] for f in FIELDS.get(true["op"], ()) if f in true)
    return right, total
