"""Which keys that nothing feeds, or that feed nothing, are harmless, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from automatch.mapping import KeyMapping, Side
from automatch.refusal import is_harmless
from automatch.report.collapse import collapse
from automatch.report.wording import shape_text, short
from automatch.specs import TensorSpec

_CONSTANTS = frozenset(
    {
        "position_ids",
        "token_type_ids",
        "relative_position_index",
        "relative_coords_table",
        "relative_position_bucket",
        "attn_mask",
        "causal_mask",
        "attention_mask",
        "masked_bias",
        "inv_freq",
        "original_inv_freq",
        "freqs_cis",
        "cos_cached",
        "sin_cached",
        "rel_pos_index",
    }
)
_POSITIONS = re.compile(r"(^|_)(pos|positions?|token_types?|relative|causal|attn|attention)(_|$)")
_WHOLE = frozenset({"int64", "int32", "bool"})
_LOSS = re.compile(r"(^|[._])(loss|losses|criterion|criteria|lpips|metric|metrics)([._]|$)")

COUNTER = "BatchNorm's counter of batches; changes no output in evaluation"
CONSTANT = "a constant that the model computes itself"
LOSS = "belongs to a loss or a metric, not to the network"


@dataclass(frozen=True, slots=True)
class Leftover:
    """Keys of one kind that are left over.

    Args:
        template: the keys as one line, e.g. ``layers.{0…11}.attn.bias``.
        keys: the keys themselves.
        shapes: their shape, or the first of several with ``…``.
        harmless: why it does no harm that they are left over; empty if it may.
    """

    template: str
    keys: tuple[str, ...]
    shapes: str
    harmless: str = ""


def missing_leftovers(mapping: KeyMapping) -> tuple[Leftover, ...]:
    """The model's keys that nothing feeds, harmful ones first; harmless is what `load` does not refuse."""
    fed = {match.target for match in mapping.matches}
    tied = _tied(mapping.target, fed, "which is fed")
    return _group(mapping.missing_keys, mapping.target, lambda key, spec: tied.get(key) or harmless_missing(key, spec))


def unexpected_leftovers(mapping: KeyMapping) -> tuple[Leftover, ...]:
    """The checkpoint's keys that feed nothing, those that may matter first."""
    used = {key for match in mapping.matches for key in match.sources}
    tied = _tied(mapping.source, used, "which is used")
    return _group(mapping.unexpected_keys, mapping.source, lambda key, spec: tied.get(key) or harmless_unexpected(key, spec))


def harmless_missing(key: str, spec: TensorSpec | None) -> str:
    """Why it does no harm if nothing feeds this model key, ties apart; empty if it may."""
    if spec is not None and spec.kind is not None:
        return (harmless_unexpected(key, spec) or CONSTANT) if is_harmless(spec) else ""
    return "" if _LOSS.search(key) else harmless_unexpected(key, spec)


def harmless_unexpected(key: str, spec: TensorSpec | None) -> str:
    """Why it does no harm if this checkpoint key feeds nothing, ties apart; empty if it may."""
    leaf = key.rpartition(".")[2]
    shape = spec.shape if spec else None
    if _LOSS.search(key):
        return LOSS
    if spec is not None and spec.kind == "parameter":
        return ""
    if leaf == "num_batches_tracked" and shape in ((), (1,), None):
        return COUNTER
    counted = spec is not None and spec.dtype in _WHOLE and _POSITIONS.search(leaf)
    return CONSTANT if counted or leaf in _CONSTANTS or (leaf == "bias" and _is_causal_mask(shape)) else ""


def _is_causal_mask(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] and shape[2] > 1


def _tied(side: Side, done: set[str], state: str) -> Mapping[str, str]:
    """For every left-over key that is one tensor with a key in ``done``: the reason in words."""
    if side.spec is None:
        return {}
    first: dict[str, str] = {}
    for tensor in side.spec:
        if tensor.key in done:
            first.setdefault(tensor.alias_of or tensor.key, tensor.key)
    roots = ((tensor.key, first.get(tensor.alias_of or tensor.key)) for tensor in side.spec if tensor.key not in done)
    return {key: f"tied to {short(other, 120)}, {state}" for key, other in roots if other is not None}


def _group(keys: Iterable[str], side: Side, reason_of: Callable[[str, TensorSpec | None], str]) -> tuple[Leftover, ...]:
    by_reason: dict[str, list[str]] = {"": []}
    specs = {tensor.key: tensor for tensor in side.spec} if side.spec else {}
    for key in keys:
        by_reason.setdefault(reason_of(key, specs.get(key)), []).append(key)
    return tuple(
        Leftover(group.template, group.keys, _shapes(group.keys, specs), reason)
        for reason, members in by_reason.items()
        for group in collapse(members)
    )


def _shapes(keys: tuple[str, ...], specs: Mapping[str, TensorSpec]) -> str:
    shapes = dict.fromkeys(shape_text(specs[key].shape) for key in keys if key in specs)
    if not shapes:
        return "?"
    return next(iter(shapes)) + (" …" if len(shapes) > 1 else "")
