#!/usr/bin/env python3
"""The scoring rule: which matches of a mapping are right, and what that adds up to.

Counted: every model key except num_batches_tracked, and except buffers that the truth leaves out.

right    the match's sources equal the truth's, in order (or one of its "alt" lists; keys of one source alias group are equal)
exact    right, and the transform's op equals the truth's op too (a chain counts for every truth but a copy)
wrong    a match whose sources differ, or one where the truth has none
missed   the truth has sources and the mapping has no match

A case is perfect when nothing is wrong and nothing missed. Confident means confidence >= 0.95.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FREE = "num_batches_tracked"
CONFIDENT = 0.95
Case = Mapping[str, Any]


def aliases_of(case: Case) -> dict[str, str]:
    """Each aliased source key with the first key of its group."""
    return {key: group[0] for group in case["source"].get("aliases", []) for key in group}


def is_right(sources: Sequence[str], true: Mapping[str, Any] | None, alias: Mapping[str, str]) -> bool:
    """Whether ``sources`` are what the truth says, or one of its equals."""
    if true is None:
        return False
    same = [alias.get(key, key) for key in sources]
    return any(same == [alias.get(key, key) for key in keys] for keys in (true["sources"], *true.get("alt", [])))


def counted_keys(case: Case) -> list[str]:
    """The model keys on which a mapping is judged."""
    truth = case["truth"]
    return [key for key, _, _, kind in case["target"]["entries"] if not key.endswith(FREE) and (key in truth or kind != "buffer")]


def score_case(case: Case, mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    """Judge one mapping (its JSON form, or None for no answer)."""
    truth, alias = case["truth"], aliases_of(case)
    found = {match["target"]: match for match in (mapping or {}).get("matches", [])}
    right = exact = wrong = missed = 0
    rows: list[tuple[float, bool]] = []
    faults: list[tuple[float, str, list[str], list[str] | None]] = []
    for key in counted_keys(case):
        true, match = truth.get(key), found.get(key)
        if match is None:
            missed += true is not None
            continue
        ok = is_right(match["sources"], true, alias)
        rows.append((float(match["confidence"]), ok))
        if ok:
            right += 1
            op = match.get("transform", {}).get("op", "copy")
            exact += op == true["op"] or (op == "chain" and true["op"] != "copy")
        else:
            wrong += 1
            faults.append((float(match["confidence"]), key, list(match["sources"]), true and true["sources"]))
    return {
        "id": case["id"],
        "family": case["family"],
        "keys": sum(key in truth for key in counted_keys(case)),
        "right": right,
        "exact": exact,
        "wrong": wrong,
        "missed": missed,
        "perfect": wrong == 0 and missed == 0,
        "rows": rows,
        "faults": sorted(faults, key=lambda fault: (-fault[0], fault[1])),
    }


def expected_calibration_error(rows: Sequence[tuple[float, float, float]], bins: int = 10) -> float:
    """Mean distance between confidence and share of right pairs over equal bins.

    Args:
        rows: (confidence, right pairs, pairs) each.
        bins: number of equal bins over [0, 1].
    """
    gaps, total = [0.0] * bins, 0.0
    for confidence, right, count in rows:
        gaps[min(bins - 1, int(confidence * bins))] += confidence * count - right
        total += count
    return sum(abs(gap) for gap in gaps) / max(1.0, total)


def summarise(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures over all cases, as `score_case` gave them."""
    results = list(results)
    cases = len(results)
    keys = sum(r["keys"] for r in results)
    right = sum(r["right"] for r in results)
    wrong = sum(r["wrong"] for r in results)
    rows = [row for r in results for row in r["rows"]]
    confident = [ok for confidence, ok in rows if confidence >= CONFIDENT]
    with_truth = [r for r in results if r["keys"]]
    return {
        "cases": cases,
        "perfect": sum(r["perfect"] for r in results),
        "perfect_share": sum(r["perfect"] for r in results) / max(1, cases),
        "keys": keys,
        "precision": right / max(1, right + wrong),
        "recall": right / max(1, keys),
        "macro_recall": sum(r["right"] / r["keys"] for r in with_truth) / max(1, len(with_truth)),
        "exact_share": sum(r["exact"] for r in results) / max(1, right),
        "confident": len(confident),
        "confident_wrong": confident.count(False),
        "confident_cover": sum(confident) / max(1, keys),
        "ece": expected_calibration_error([(confidence, ok, 1) for confidence, ok in rows]),
    }


def main() -> None:
    """Score a directory of saved mappings against a directory of cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, help="directory of <id>.json.gz cases")
    parser.add_argument("mappings", type=Path, help="directory of <id>.json mappings; a case without one counts as all missed")
    parser.add_argument("--worst", type=int, default=0, help="list this many of the worst cases")
    args = parser.parse_args()
    results = []
    for path in sorted(args.cases.glob("*.json.gz")):
        case = json.loads(gzip.decompress(path.read_bytes()))
        file = args.mappings / f"{case['id']}.json"
        results.append(score_case(case, json.loads(file.read_text()) if file.exists() else None))
    for r in sorted(results, key=lambda r: -(r["wrong"] + r["missed"]))[: args.worst]:
        print(f"{r['id']:58} keys {r['keys']:6} right {r['right']:6} wrong {r['wrong']:5} missed {r['missed']:5}")
    print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in summarise(results).items()))


if __name__ == "__main__":
    main()
