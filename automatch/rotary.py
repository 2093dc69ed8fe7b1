"""Row orders of rotary query and key weights: interleaved as in Meta's code, or in halves as in most others.

Shapes and names do not tell one from the other, and a model loads and runs with the wrong one.
"""

from __future__ import annotations

import re
from dataclasses import replace

from automatch.mapping import KeyMapping, Match, Option, Question
from automatch.transforms import PermuteElements, chain, output_shape

_QUERY_OR_KEY = re.compile(r"(^|[._])(q|k|wq|wk|query|key|q_proj|k_proj|to_q|to_k|q_lin|k_lin|linear_q|linear_k)\.(weight|bias)$")
ROTARY = "rotary"
_HEAD_DIMS = (64, 128, 32, 80, 96, 16, 256, 40, 48, 112, 8, 4, 6, 12, 20, 24)


def rotary_questions(mapping: KeyMapping) -> tuple[Question, ...]:
    """One question whose options are the row orders that the query and key weights of a mapping may have.

    Returns:
        The question, as a tuple of one; or none where the mapping feeds no separate query and key weights.
    """
    source = mapping.source.spec
    if source is None:
        return ()
    matches = [match for match in mapping.matches if _QUERY_OR_KEY.search(match.target)]
    rows = {match.target: output_shape(match.transform, [source[key].shape for key in match.sources])[0] for match in matches}
    if not matches:
        return ()
    options: list[Option] = []
    for size in _HEAD_DIMS:
        if any(count % size for count in rows.values()):
            continue
        for label, halves_first in (("interleaved to halves", False), ("halves to interleaved", True)):
            permuted = tuple(_permuted(match, rows[match.target], size, halves_first) for match in matches)
            options.append(Option(f"{label}, heads of {size}", permuted, 0.5 / (1 + len(options))))
    if not options:
        return ()
    keys = tuple(match.target for match in matches)
    text = f"in which order are the rows of rotary queries and keys? {len(keys)} keys hang on it"
    return (Question(ROTARY, text, tuple(options), keys),)


def _permuted(match: Match, rows: int, head_dim: int, halves_first: bool) -> Match:
    split = (rows // head_dim, 2, head_dim // 2) if halves_first else (rows // head_dim, head_dim // 2, 2)
    return replace(match, transform=chain(match.transform, PermuteElements(0, split, (0, 2, 1))))
