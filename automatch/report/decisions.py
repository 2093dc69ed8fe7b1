"""What a person decided in a page or widget, put into a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping, Match
from automatch.transforms import Transform, from_dict, output_shape


def apply_decisions(mapping: KeyMapping, decisions: Mapping[str, Any]) -> KeyMapping:
    """A new mapping in which every answer and every decision of a review holds.

    Args:
        mapping: what was reviewed.
        decisions: ``{"answers": [[question id, position of the option]], "decisions": [[target, sources or None,
            transform]]}``, as the page sends it; a decision about one key wins over an answer.

    Raises:
        MappingError: it is malformed, or names a key, question, option or shape that does not exist or fit.
    """
    answers, pairs = _lists(decisions)
    for question, option in answers:
        if not isinstance(question, str) or not isinstance(option, int):
            raise MappingError(f"an answer must be [question id, position of an option], got {[question, option]!r}")
        mapping = mapping.answer(question, option)
    kept = {match.target: match for match in mapping.matches}
    for target, sources, transform in pairs:
        if sources is None:
            _check_key(mapping, target)
            kept.pop(target, None)
        else:
            match = _match(mapping, target, sources, transform)
            kept[match.target] = match
    return mapping.with_matches(kept.values()) if pairs else mapping


def _lists(decisions: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    if not isinstance(decisions, Mapping):
        raise MappingError(f"decisions must be an object with 'answers' and 'decisions', got {type(decisions).__name__}")
    answers, pairs = decisions.get("answers", []), decisions.get("decisions", [])
    well_formed = isinstance(answers, list) and isinstance(pairs, list)
    if not well_formed or any(not isinstance(a, list) or len(a) != 2 for a in answers):
        raise MappingError("answers must be a list of [question id, position of an option]")
    if any(not isinstance(p, list) or len(p) != 3 for p in pairs):
        raise MappingError("decisions must be a list of [model key, checkpoint keys or null, transform]")
    return answers, pairs


def _match(mapping: KeyMapping, target: Any, sources: Any, transform: Any) -> Match:
    _check_key(mapping, target)
    if not isinstance(sources, list) or not sources or not all(isinstance(key, str) for key in sources):
        raise MappingError(f"what feeds {target!r} must be a list of checkpoint keys or null, got {sources!r}")
    known = mapping.source.spec
    for key in sources:
        if known is not None and key not in known:
            raise MappingError(f"{key!r} is not a key of the checkpoint ({mapping.source.origin})")
    try:
        step = from_dict(transform)
        _check_shape(mapping, target, sources, step)
    except (TransformError, TypeError, AttributeError, KeyError) as error:
        raise MappingError(f"what is decided for {target!r} does not fit: {error}") from error
    before = mapping.get(target)
    if before is not None and before.sources == tuple(sources) and before.transform == step:
        return replace(before, confidence=1.0, decided=True)
    return Match(target, tuple(sources), step, confidence=1.0, decided=True)


def _check_key(mapping: KeyMapping, target: Any) -> None:
    known = mapping.target.spec or {*mapping.missing_keys, *(match.target for match in mapping.matches)}
    if not isinstance(target, str) or target not in known:
        raise MappingError(f"{target!r} is not a key of the model ({mapping.target.origin})")


def _check_shape(mapping: KeyMapping, target: str, sources: Sequence[str], transform: Transform) -> None:
    if mapping.source.spec is None or mapping.target.spec is None:
        return
    given = output_shape(transform, [mapping.source.spec[key].shape for key in sources])
    wanted = mapping.target.spec[target].shape
    if given != wanted:
        raise TransformError(f"{' + '.join(sources)} gives shape {given}, the model has {wanted}")
