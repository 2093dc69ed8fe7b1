"""A mapping as the page reads it: every key once, everything else by position, safe inside a script element."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from automatch.mapping import CONFIDENT, KeyMapping, Match, Side
from automatch.report.leftovers import harmless_missing, harmless_unexpected
from automatch.report.view import View
from automatch.report.wording import transform_text
from automatch.specs import TensorSpec
from automatch.transforms import Transform, to_dict

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def script_json(data: Any) -> str:
    """JSON that no HTML parser can be led out of."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for char, escape in _UNSAFE.items():
        text = text.replace(char, escape)
    return text


class _Table:
    """Values written once and named by their position."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[Hashable, int] = {}

    def place(self, name: Hashable, value: Callable[[], Any]) -> int:
        """The position of the value that ``name`` stands for."""
        found = self._places.get(name)
        if found is None:
            found = self._places[name] = len(self.values)
            self.values.append(value())
        return found


class _Packer:
    def __init__(self, mapping: KeyMapping, view: View) -> None:
        self.mapping, self.view = mapping, view
        self.shapes, self.words, self.transforms = _Table(), _Table(), _Table()
        named = [match.sources for match in self._all_matches()]
        named += [alternative.sources for match in mapping.matches for alternative in match.alternatives]
        source_keys = [*(key for sources in named for key in sources), *mapping.unexpected_keys]
        target_keys = [*(match.target for match in self._all_matches()), *mapping.missing_keys]
        target_keys += [key for question in mapping.questions for key in question.keys]
        self.sources, self.targets = _keys(mapping.source, source_keys), _keys(mapping.target, target_keys)
        self.source_places = {key: place for place, key in enumerate(self.sources)}
        self.target_places = {key: place for place, key in enumerate(self.targets)}

    def _all_matches(self) -> Iterable[Match]:
        yield from self.mapping.matches
        for question in self.mapping.questions:
            for option in question.options:
                yield from option.matches

    def pack(self) -> dict[str, Any]:
        mapping, view = self.mapping, self.view
        verdict = mapping.verdict
        sides = [self._side(mapping.source, self.sources), self._side(mapping.target, self.targets)]
        group_of = {row: place for place, group in enumerate(view.groups) for row in group.rows}
        matches = self._matches([group_of.get(row, -1) for row in range(len(mapping.matches))])
        questions = [self._question(place) for place in range(len(mapping.questions))]
        return {
            "threshold": CONFIDENT,
            "sides": sides,
            "matches": matches,
            "groups": [[g.pattern, g.replacement, g.transform, g.where] for g in view.groups],
            "harmless": [
                _harmless(mapping.source, self.sources, harmless_unexpected),
                _harmless(mapping.target, self.targets, harmless_missing),
            ],
            "questions": questions,
            "warnings": list(mapping.warnings),
            "verdict": {"kind": verdict.kind, "text": verdict.text, "causes": list(verdict.causes)} if verdict else None,
            "shapes": self.shapes.values,
            "words": self.words.values,
            "transforms": self.transforms.values,
        }

    def _side(self, side: Side, keys: Sequence[str]) -> dict[str, Any]:
        tensors = side.spec.tensors if side.spec is not None else ()
        places = {key: place for place, key in enumerate(keys)}
        return {
            "origin": side.origin,
            "fingerprint": side.fingerprint,
            "n": side.n_keys,
            "wrapper": list(side.spec.wrapper) if side.spec is not None else None,
            "keys": _front_code(keys),
            "shape": [self.shapes.place(t.shape, lambda shape=t.shape: list(shape)) for t in tensors],
            "dtype": [self._word(t.dtype) for t in tensors],
            "kind": [self._word(t.kind) for t in tensors],
            "owner": [self._word(t.owner) for t in tensors],
            "alias": {str(i): places.get(t.alias_of, -1) for i, t in enumerate(tensors) if t.alias_of is not None},
        }

    def _word(self, word: str | None) -> int:
        return self.words.place(word, lambda: word)

    def _transform(self, transform: Transform) -> int:
        return self.transforms.place(transform, lambda: [to_dict(transform), transform_text(transform)])

    def _places(self, sources: Iterable[str]) -> int | list[int]:
        places = [self.source_places[key] for key in sources]
        return places[0] if len(places) == 1 else places

    def _matches(self, groups: list[int]) -> dict[str, Any]:
        matches = self.mapping.matches
        return {
            "target": [self.target_places[m.target] for m in matches],
            "sources": [self._places(m.sources) for m in matches],
            "transform": [self._transform(m.transform) for m in matches],
            "score": [_finite(m.score, 6) or 0 for m in matches],
            "confidence": [_finite(m.confidence, 6) for m in matches],
            "evidence": [
                [_finite(v, 4) for v in (e.name, e.shape, e.size, e.order, e.context)] for e in (match.evidence for match in matches)
            ],
            "decided": [i for i, m in enumerate(matches) if m.decided],
            "alternatives": {
                str(i): [[self._places(a.sources), self._transform(a.transform), _finite(a.confidence, 6)] for a in m.alternatives]
                for i, m in enumerate(matches)
                if m.alternatives
            },
            "group": groups,
        }

    def _question(self, place: int) -> dict[str, Any]:
        question = self.mapping.questions[place]
        options = [
            {
                "label": option.label,
                "confidence": _finite(option.confidence, 6),
                "matches": [[self.target_places[m.target], self._places(m.sources), self._transform(m.transform)] for m in option.matches],
            }
            for option in question.options
        ]
        return {"id": question.id, "text": question.text, "keys": [self.target_places[key] for key in question.keys], "options": options}


def page_data(mapping: KeyMapping, view: View) -> dict[str, Any]:
    """Everything the page needs to show ``mapping``, and to write it back as JSON after decisions."""
    return _Packer(mapping, view).pack()


def _harmless(side: Side, keys: Iterable[str], reason_of: Callable[[str, TensorSpec | None], str]) -> list[tuple[str, list[int]]]:
    """Every reason for which keys do no harm when they are left over, with the places of those keys; the page sees to ties."""
    specs = {tensor.key: tensor for tensor in side.spec} if side.spec else {}
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(reason_of(key, specs.get(key)), []).append(place)
    return [(reason, found) for reason, found in places.items() if reason]


def _keys(side: Side, named: Iterable[str]) -> list[str]:
    tensors: tuple[TensorSpec, ...] = side.spec.tensors if side.spec is not None else ()
    return list(dict.fromkeys([*(tensor.key for tensor in tensors), *named]))


def _front_code(keys: Sequence[str]) -> list[int | str]:
    """Each key as what it shares with the key before it (a length) and the rest."""
    coded: list[int | str] = []
    previous = ""
    for key in keys:
        # Scripts count in UTF-16 units: only up to the first character beyond 0xFFFF do both counts agree.
        pairs = enumerate(zip(previous, key, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b or ord(b) > 0xFFFF), min(len(previous), len(key)))
        coded += [shared, key[shared:]]
        previous = key
    return coded


def _finite(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None
