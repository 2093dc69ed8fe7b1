"""What is known of each decided pair, as the numbers from which confidence is computed."""

from __future__ import annotations

from collections import Counter

import numpy as np

from automatch.engine.items import canonical
from automatch.engine.names import runs_upward
from automatch.engine.pipeline import Outcome
from automatch.engine.sides import Side
from automatch.keys import numbers_of, pieces_of

NAMES = (
    "soft", "margin_t", "margin_s", "score", "name", "concept", "region", "role", "rank", "sibling", "block", "layout",
    "node", "template", "suffix", "neighbour", "beside", "agreement", "rivals", "cover_t", "cover_s", "cover_min",
    "mean_node", "mean_name", "mean_score", "home_t", "home_s", "fused", "registered", "whole_t", "whole_s",
    "mean_whole_t", "mean_whole_s", "conflict", "mean_layout", "list_name", "twins",
    "spare_t", "spare_s", "count", "upward", "root_conflict", "root_cover_t", "root_cover_s", "direction", "ending",
    "shape_share", "shape_kinds", "contrast", "sequence", "around",
)  # fmt: skip


def pair_features(outcome: Outcome) -> tuple[list[int], np.ndarray]:
    """Kept target positions of the decided pairs, and one row of `NAMES` for each."""
    solution = outcome.solution
    left, right = outcome.sides
    kept = sorted(outcome.pair_of)
    if not kept:
        return [], np.zeros((0, len(NAMES)))
    k = np.array([outcome.pair_of[j] for j in kept])
    t, s = solution.t[k], solution.s[k]
    zero = np.zeros(len(solution.t))
    evidence = {
        name: solution.evidence.get(name, zero)[k]
        for name in NAMES
        if name in solution.evidence or name in ("neighbour", "beside", "direction")
    }
    margin_t, rivals = _margins(solution.t, solution.score, solution.t, right.n)
    margin_s, _ = _margins(solution.s, solution.score, solution.s, left.n)
    cover_t, cover_s = _coverage(right, t), _coverage(left, s)
    parts = {
        **evidence,
        "soft": solution.soft[k],
        "margin_t": np.clip(margin_t[k], -5, 10) / 10,
        "margin_s": np.clip(margin_s[k], -5, 10) / 10,
        "score": solution.score[k] / 25,
        "agreement": _agreement(left, right, t, s),
        "rivals": np.log1p(rivals[t]) / 5,
        "cover_t": np.full(len(k), cover_t),
        "cover_s": np.full(len(k), cover_s),
        "cover_min": np.full(len(k), min(cover_t, cover_s)),
        "mean_node": np.full(len(k), evidence["node"].mean()),
        "mean_name": np.full(len(k), evidence["name"].mean()),
        "mean_score": np.full(len(k), solution.score[k].mean() / 25),
        "home_t": _home(right, t),
        "home_s": _home(left, s),
        "fused": np.array([float(len(outcome.target_items[j].reals) > 1 or outcome.target_items[j].slot is not None) for j in kept]),
        **_wholeness(left, right, t, s),
        "conflict": np.full(len(k), float((evidence["concept"] < 0).mean())),
        "mean_layout": np.full(len(k), float(evidence["layout"].mean())),
        "list_name": _list_names(left, right, t, s),
        "twins": np.array([_twins(right, int(j)) for j in t]),
        "spare_t": _spare(outcome, k, t, s, (solution.t, solution.s), left.n),
        "spare_s": _spare(outcome, k, s, t, (solution.s, solution.t), right.n),
        "count": _counts(left, right, t, s),
        "upward": np.array([_backwards_risk(left, right, int(j), int(i)) for j, i in zip(t, s, strict=True)]),
        **_roots(left, right, t, s, evidence["concept"]),
        "registered": left.order_trust[s] * right.order_trust[t],
        **_shapes(outcome, t),
    }
    return kept, np.stack([parts[name] for name in NAMES], axis=1)


def _margins(group: np.ndarray, score: np.ndarray, by: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lead of each pair over the best other pair of its group (10 where it is alone), and the size of each group."""
    order = np.lexsort((-score, group))
    sizes = np.bincount(group, minlength=n)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    best = np.full(n, -np.inf)
    second = np.full(n, -np.inf)
    has = sizes > 0
    best[has] = score[order][starts[has]]
    two = sizes > 1
    second[two] = score[order][starts[two] + 1]
    rival = np.where(score >= best[by], second[by], best[by])
    return np.where(np.isinf(rival), 10.0, score - rival), sizes


def _coverage(side: Side, matched: np.ndarray) -> float:
    """The share of the side's tensors, scalars left out, that are matched."""
    counts = np.array([bool(shape) for shape in side.shapes])
    return float(counts[matched].sum() / max(1, counts.sum()))


def _home(side: Side, matched: np.ndarray) -> np.ndarray:
    """For each matched item, the share of its surroundings (the smallest module of eight or more items) that is matched."""
    hit = np.zeros(side.n)
    hit[matched] = 1
    inside = np.asarray(side.ancestors.T @ hit).ravel()
    result = np.empty(len(matched))
    for row, i in enumerate(matched):
        node = next((p for p in reversed(side.paths[i]) if side.node_size[p] >= 8), 0)
        result[row] = inside[node] / side.node_size[node] if node else hit.mean()
    return result


MEANING = ("name", "concept", "region", "role", "ending", "layout")


def _spare(
    outcome: Outcome, pairs: np.ndarray, own: np.ndarray, other: np.ndarray, places: tuple[np.ndarray, np.ndarray], n_rivals: int
) -> np.ndarray:
    """Lead of each pair, in what names mean and shapes say alone, over the best partner that stayed alone (1 where there is none)."""
    solution, weights = outcome.solution, outcome.weights
    group, rival = places
    meaning = np.asarray(sum(getattr(weights, name) * solution.evidence[name] for name in MEANING))
    free = np.ones(n_rivals, dtype=bool)
    free[other] = False
    best = np.full(int(group.max()) + 1, -np.inf)
    idle = free[rival]
    np.maximum.at(best, group[idle], meaning[idle])
    return np.where(np.isinf(best[own]), 1.0, np.clip((meaning[pairs] - best[own]) / 10, -1, 1))


def _counts(left: Side, right: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """1 where the outermost repeated modules around a pair are equally many on both sides, less where not, 1 where there are none."""

    def outermost(side: Side, i: int) -> int | None:
        return next((side.sibling_rank[node][1] for node in side.paths[i] if node in side.loop_nodes), None)

    result = []
    for j, i in zip(t, s, strict=True):
        a, b = outermost(right, int(j)), outermost(left, int(i))
        result.append(1.0 if a is None or b is None else min(a, b) / max(a, b))
    return np.array(result)


def _backwards_risk(left: Side, right: Side, j: int, i: int) -> float:
    """1 where a pair lies in a decoder or neck and its numbers are not the same, so that the list may run backwards."""
    if not (runs_upward(right.keys[j]) or runs_upward(left.keys[i])):
        return 0.0
    a, b = numbers_of(right.keys[j]), numbers_of(left.keys[i])
    return float(a[: len(b)] != b[: len(a)])


def _roots(left: Side, right: Side, t: np.ndarray, s: np.ndarray, meaning: np.ndarray) -> dict[str, np.ndarray]:
    """How well the entries outside repeated modules fit: contradictions among their pairs, and the shares that are matched.

    ``around`` is the model's share, counted in the outermost modules with a match only: other models may stand beside.
    """
    outside = [np.array([not any(node in side.loop_nodes for node in path) for path in side.paths]) for side in (right, left)]
    both = outside[0][t] & outside[1][s]
    n = len(t)
    part = np.array([path[1] if len(path) > 1 else 0 for path in right.paths])
    touched = outside[0] & np.isin(part, part[t])
    return {
        "around": np.full(n, float(outside[0][t].sum() / max(1, touched.sum()))),
        "root_conflict": np.full(n, float((meaning[both] < 0).sum() / max(1, both.sum()))),
        "root_cover_t": np.full(n, float(outside[0][t].sum() / max(1, outside[0].sum()))),
        "root_cover_s": np.full(n, float(outside[1][s].sum() / max(1, outside[1].sum()))),
    }


def _shapes(outcome: Outcome, t: np.ndarray) -> dict[str, np.ndarray]:
    """How many of the matrices and kernels of the smaller side have a counterpart of their shape, and how many such shapes were matched."""
    one, two = (
        Counter(shape for item in items if len(shape := canonical(item.shape)) > 1)
        for items in (outcome.source_items, outcome.target_items)
    )
    share = (one & two).total() / max(1, min(one.total(), two.total()))
    right = outcome.sides[1]
    kinds = {shape for j in t if len(shape := canonical(right.shapes[int(j)])) > 1}
    return {"shape_share": np.full(len(t), share), "shape_kinds": np.full(len(t), np.log1p(len(kinds)) / 4)}


def _wholeness(left: Side, right: Side, t: np.ndarray, s: np.ndarray) -> dict[str, np.ndarray]:
    """The share of each pair's own modules that is matched, and its mean over all pairs."""
    result = {}
    for name, side, matched in (("t", right, t), ("s", left, s)):
        of, _, owners = side.owner_runs()
        hit = np.zeros(side.n)
        hit[matched] = 1
        whole = np.asarray(owners.T @ hit).ravel() / np.asarray(owners.sum(0)).ravel()
        result[f"whole_{name}"] = whole[of[matched]]
        result[f"mean_whole_{name}"] = np.full(len(matched), float(whole[of[matched]].mean()))
    return result


def _list_names(left: Side, right: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Whether the words of the innermost numbered segments of a pair agree (1), differ (0) or one has none (0.5)."""
    words_t = [_list_word(right, int(j)) for j in t]
    words_s = [_list_word(left, int(i)) for i in s]
    return np.array([0.5 if a is None or b is None else float(a == b) for a, b in zip(words_t, words_s, strict=True)])


def _list_word(side: Side, i: int) -> str | None:
    for depth in range(len(side.paths[i]) - 1, 0, -1):
        if side.paths[i][depth] in side.loop_nodes:
            segments = side.segments[i][:depth]
            words = [piece for segment in segments[-2:] for piece in pieces_of(segment) if isinstance(piece, str)]
            return words[-1].rstrip("s") if words else None
    return None


def _twins(side: Side, i: int) -> float:
    """How many siblings the innermost numbered module of an item has, on a log scale."""
    for node in reversed(side.paths[i]):
        if node in side.sibling_rank:
            return float(np.log1p(side.sibling_rank[node][1]) / 3)
    return 0.0


def _agreement(left: Side, right: Side, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The share of a target template's pairs that go to the same source template as this one."""
    templates_t = [right.loop_template(int(j)) for j in t]
    templates_s = [left.loop_template(int(i)) for i in s]
    total = Counter(templates_t)
    same = Counter(zip(templates_t, templates_s, strict=True))
    return np.array([same[a, b] / total[a] for a, b in zip(templates_t, templates_s, strict=True)])
