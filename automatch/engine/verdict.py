"""What the whole mapping says, in one sentence with its causes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from automatch.keys import segments_of, template_of
from automatch.mapping import CONFIDENT, Match, Verdict
from automatch.specs import StateSpec
from automatch.transforms import Copy

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "net", "state_dict")
_HARMLESS = ("num_batches_tracked", "position_ids", "inv_freq", "relative_position_index", "attn_mask")


def verdict_of(source: StateSpec, target: StateSpec, matches: Sequence[Match]) -> Verdict:
    """Judge the whole: the same, renamed, resized, a shared part, another architecture."""
    if not len(source) or not len(target):
        return Verdict("unknown", "There is nothing to match: one side has no tensors.")
    fed = {m.target: m for m in matches}
    wanted = [t for t in target if t.kind != "buffer" and not t.key.endswith(_HARMLESS)]
    share = sum(t.key in fed for t in wanted) / max(1, len(wanted))
    sure = sum(m.confidence >= CONFIDENT for m in matches) / max(1, len(matches))
    used = {key for m in matches for key in m.sources}
    left = [t for t in source if t.key not in used and not t.key.endswith(_HARMLESS)]
    missing = [t for t in wanted if t.key not in fed]
    causes = tuple(_causes(source, target, matches, missing))
    if share < 0.1:
        return Verdict("different", "This checkpoint is another architecture: hardly any tensor has a counterpart in the model.", causes)
    if all(m.sources == (m.target,) and isinstance(m.transform, Copy) for m in matches) and not missing and not left:
        return Verdict("same", "Checkpoint and model have the same keys.", causes)
    if share >= 0.999:
        text = "The same model under other names" if sure > 0.5 else "Probably the same model under other names"
        return Verdict("renamed", f"{text}: every parameter has a counterpart.", causes)
    sizes = {tuple(segments_of(t.key)[-2:]): t.shape for t in left}
    resized = [t for t in missing if len(sizes.get(tuple(segments_of(t.key)[-2:]), ())) == len(t.shape) > 0]
    if share >= 0.9 or (resized and len(resized) == len(missing)):
        kind = "resized" if resized else "partial" if len(missing) > 4 else "renamed"
        return Verdict(kind, f"The same architecture, but {len(missing)} {_plural(len(missing))} no counterpart.", causes)
    return Verdict("partial", f"A shared part: {share:.0%} of the model's parameters have a counterpart, the rest have none.", causes)


def _plural(count: int) -> str:
    return "parameter of the model has" if count == 1 else "parameters of the model have"


def _causes(source: StateSpec, target: StateSpec, matches: Sequence[Match], missing: Sequence[object]) -> list[str]:
    causes = []
    wrapper = _prefix_change(matches)
    if wrapper:
        causes.append(wrapper)
    renamed = sum(m.sources != (m.target,) for m in matches)
    if renamed and not (wrapper and _only_prefix(matches)):
        causes.append(f"renamed or re-nested modules ({renamed} keys)")
    ops = Counter(m.transform.op for m in matches if not isinstance(m.transform, Copy))
    names = {
        "concat": "fused tensors",
        "slice": "split tensors",
        "stack": "stacked tensors",
        "permute": "transposed weights",
        "reshape": "reshaped weights",
        "permute_elements": "rows in another order",
        "chain": "converted tensors",
    }
    causes.extend(f"{names.get(op, op)} ({count} keys)" for op, count in sorted(ops.items()))
    fed = {m.target for m in matches}
    sizes = [t.key for t in target if t.key in source and source[t.key].shape != t.shape and t.key not in fed]
    if sizes:
        causes.append(f"size mismatch: {sizes[0]}" + (f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""))
    return causes


def _prefix_change(matches: Sequence[Match]) -> str | None:
    """A wrapper prefix that nearly all pairs gained or lost."""
    changes: Counter[tuple[str, str]] = Counter()
    for match in matches:
        if len(match.sources) == 1:
            a, b = segments_of(match.sources[0]), segments_of(match.target)
            if len(a) > len(b) and a[len(a) - len(b) :] == b:
                changes["extra", ".".join(a[: len(a) - len(b)])] += 1
            elif len(b) > len(a) and b[len(b) - len(a) :] == a:
                changes["lost", ".".join(b[: len(b) - len(a)])] += 1
    if not changes:
        return None
    (kind, prefix), count = changes.most_common(1)[0]
    if 2 * count < len(matches):
        return None
    side = "checkpoint" if kind == "extra" else "model"
    what = "wrapper prefix" if prefix.split(".")[0] in _WRAPPERS else "prefix"
    return f"{what} '{prefix}.' in the {side}"


def _only_prefix(matches: Sequence[Match]) -> bool:
    return all(len(m.sources) == 1 and (m.sources[0].endswith(m.target) or m.target.endswith(m.sources[0])) for m in matches)


def shift_warnings(source: StateSpec, matches: Sequence[Match]) -> list[str]:
    """Keys whose namesake exists with the same shape, and was overruled: one line for every module they lie in."""
    shifted: Counter[str] = Counter()
    example: dict[str, tuple[str, str]] = {}
    for match in matches:
        namesake = match.target in source and not match.target.endswith(_HARMLESS)
        if namesake and len(match.sources) == 1 and match.sources[0] != match.target:
            outer = re.split(r"(?<=#)[./]", template_of(match.target), maxsplit=1)[0]
            shifted[outer] += 1
            example.setdefault(outer, (match.target, match.sources[0]))
    return [
        f"index shift: {count} keys like {example[outer][0]!r} take {example[outer][1]!r}, not the tensor of the same name"
        for outer, count in sorted(shifted.items())
    ]
