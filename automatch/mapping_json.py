"""The JSON form of a mapping, version 1 (``automatch/mapping.schema.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from automatch.errors import MappingError, TransformError
from automatch.mapping import Alternative, Evidence, KeyMapping, Match, Option, Question, Side, Verdict
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import from_dict, to_dict

FORMAT, VERSION = "automatch-mapping", 1


def mapping_to_dict(mapping: KeyMapping) -> dict[str, Any]:
    """The JSON form of a mapping."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": _side_to_dict(mapping.source),
        "target": _side_to_dict(mapping.target),
        "matches": [_match_to_dict(match) for match in mapping.matches],
        "missing_keys": list(mapping.missing_keys),
        "unexpected_keys": list(mapping.unexpected_keys),
        "questions": [_question_to_dict(question) for question in mapping.questions],
        "warnings": list(mapping.warnings),
    }
    if mapping.verdict is not None:
        data["verdict"] = {"kind": mapping.verdict.kind, "text": mapping.verdict.text, "causes": list(mapping.verdict.causes)}
    return data


def mapping_from_dict(data: Any) -> KeyMapping:
    """The mapping of a JSON form.

    Raises:
        MappingError: it is not a mapping of a known version, or a field is missing or malformed.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise MappingError(f'not a mapping: "format" must be {FORMAT!r}')
    if data.get("version") != VERSION:
        raise MappingError(f"mapping version {data.get('version')!r} is not supported; this automatch reads version {VERSION}")
    try:
        return _read(data)
    except (KeyError, TypeError, ValueError, TransformError) as error:
        raise MappingError(f"malformed mapping: {type(error).__name__}: {error}") from error


def _side_to_dict(side: Side) -> dict[str, Any]:
    data: dict[str, Any] = {"origin": side.origin, "fingerprint": side.fingerprint, "keys": side.n_keys}
    if side.spec is not None:
        data["wrapper"] = list(side.spec.wrapper)
        data["entries"] = [[t.key, list(t.shape), t.dtype, t.kind, t.owner, t.alias_of] for t in side.spec]
    return data


def _side_from_dict(data: Mapping[str, Any]) -> Side:
    spec = None
    if "entries" in data:
        tensors = tuple(
            TensorSpec(key, tuple(shape), dtype, kind, alias, owner) for key, shape, dtype, kind, owner, alias in data["entries"]
        )
        spec = StateSpec(tensors, data["origin"], tuple(data.get("wrapper", ())))
    return Side(str(data["origin"]), str(data["fingerprint"]), int(data["keys"]), spec)


def _match_to_dict(match: Match) -> dict[str, Any]:
    data: dict[str, Any] = {
        "target": match.target,
        "sources": list(match.sources),
        "transform": to_dict(match.transform),
        "score": round(match.score, 6),
        "confidence": round(match.confidence, 6),
        "evidence": asdict(match.evidence),
        "alternatives": [
            {"sources": list(a.sources), "transform": to_dict(a.transform), "confidence": round(a.confidence, 6)}
            for a in match.alternatives
        ],
    }
    return data | ({"decided": True} if match.decided else {})


def _match_from_dict(data: Mapping[str, Any]) -> Match:
    if isinstance(data["sources"], str) or not all(isinstance(key, str) for key in data["sources"]):
        raise MappingError(f"sources of {data['target']!r} must be a list of keys, got {data['sources']!r}")
    confidence = float(data.get("confidence", 0.0))
    if not 0.0 <= confidence <= 1.0:
        raise MappingError(f"confidence of {data['target']!r} must lie in [0, 1], got {confidence}")
    return Match(
        target=str(data["target"]),
        sources=tuple(data["sources"]),
        transform=from_dict(data.get("transform", {"op": "copy"})),
        score=float(data.get("score", 0.0)),
        confidence=confidence,
        evidence=Evidence(**{f.name: data.get("evidence", {}).get(f.name) for f in fields(Evidence)}),
        alternatives=tuple(
            Alternative(tuple(a["sources"]), from_dict(a["transform"]), float(a["confidence"])) for a in data.get("alternatives", ())
        ),
        decided=bool(data.get("decided", False)),
    )


def _question_to_dict(question: Question) -> dict[str, Any]:
    options = [
        {
            "label": option.label,
            "confidence": round(option.confidence, 6),
            "matches": [{"target": m.target, "sources": list(m.sources), "transform": to_dict(m.transform)} for m in option.matches],
        }
        for option in question.options
    ]
    return {"id": question.id, "text": question.text, "keys": list(question.keys), "options": options}


def _question_from_dict(data: Mapping[str, Any]) -> Question:
    options = tuple(
        Option(str(o["label"]), tuple(_match_from_dict(m) for m in o["matches"]), float(o.get("confidence", 0.0))) for o in data["options"]
    )
    return Question(str(data["id"]), str(data["text"]), options, tuple(data["keys"]))


def _read(data: Mapping[str, Any]) -> KeyMapping:
    matches = tuple(_match_from_dict(match) for match in data["matches"])
    if len({match.target for match in matches}) != len(matches):
        raise MappingError("malformed mapping: a model key has two matches")
    verdict = data.get("verdict")
    return KeyMapping(
        source=_side_from_dict(data["source"]),
        target=_side_from_dict(data["target"]),
        matches=matches,
        missing_keys=tuple(data["missing_keys"]),
        unexpected_keys=tuple(data["unexpected_keys"]),
        questions=tuple(_question_from_dict(question) for question in data.get("questions", ())),
        warnings=tuple(data.get("warnings", ())),
        verdict=Verdict(verdict["kind"], verdict["text"], tuple(verdict.get("causes", ()))) if verdict else None,
    )
