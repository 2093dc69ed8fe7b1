"""Keys that no assignment feeds: tied tensors, tensors that a model keeps twice, and vocabularies padded to a round number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from automatch.engine.assemble import Fed
from automatch.engine.conventions import concept, segment_words, shipped_conventions
from automatch.engine.items import canonical
from automatch.keys import segments_of
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Copy, Slice

_TIED = {("embedding", "token"), ("head", "lm")}
_VOCABULARY = frozenset(("decoder", "predictions", "shared", "embed", "lm"))
_PADDING = 128  # rows; vocabularies are padded to a multiple of this on every tensor-parallel rank


def with_padded(source: StateSpec, target: StateSpec, fed: Sequence[Fed], decided: set[str]) -> list[Fed]:
    """The fed keys, and the token embedding from the first rows of one that was padded (Megatron, tensor-parallel serving)."""
    done, used = {f.target for f in fed} | decided, {key for f in fed for key in f.sources}
    result = list(fed)
    for tensor in target:
        if tensor.key in done or tensor.alias_of is not None or len(tensor.shape) != 2 or not _holds_words(tensor.key):
            continue
        rows, width = tensor.shape
        padded = [
            t.key
            for t in source
            if len(t.shape) == 2 and t.shape[1] == width and 0 < t.shape[0] - rows < _PADDING and t.key not in used and _holds_words(t.key)
        ]
        if len(padded) == 1:
            result.append(Fed(tensor.key, (padded[0],), Slice(0, 0, rows), ()))
    return result


def with_ties(source: StateSpec, target: StateSpec, fed: Sequence[Fed], decided: set[str]) -> tuple[list[Fed], dict[str, str]]:
    """The fed keys and those that repeat one of them (aliases, tied vocabulary, shared buffers), each of these with the key it repeats."""
    result, tied = list(fed), dict[str, str]()
    known = {f.target: f for f in fed}
    for tensor in target:
        if tensor.alias_of in known and tensor.key not in known and tensor.key not in decided:
            base = known[tensor.alias_of]
            sources = _namesake(source, base, tensor) or base.sources
            result.append(Fed(tensor.key, sources, base.transform, base.items))
            tied[tensor.key] = tensor.alias_of
    unfed = [t for t in target if t.key not in known and t.key not in decided and t.alias_of is None]
    used = {key for f in result for key in f.sources}
    spare = {canonical(t.shape) for t in source if t.key not in used}
    vocabulary = _vocabulary(target, known) if unfed else {}
    for tensor in unfed:
        if canonical(tensor.shape) in spare:
            continue
        base = vocabulary.get(tensor.shape) if tensor.kind != "buffer" else None
        if base is None or not (len(tensor.shape) == 2 or _names_vocabulary(tensor.key)):
            base = _shared(tensor, target, known)
        if base is not None:
            result.append(Fed(tensor.key, base.sources, base.transform, base.items))
            tied[tensor.key] = base.target
    return result, tied


def _shared(tensor: TensorSpec, target: StateSpec, fed: Mapping[str, Fed]) -> Fed | None:
    """The only fed key of the same name and shape in another module, where one of the two modules calls itself shared."""
    own = segments_of(tensor.key)
    alike = [f for key, f in fed.items() if target[key].shape == tensor.shape and segments_of(key)[-1] == own[-1] and tensor.shape]
    if len(alike) != 1 or not any("shared" in segment for segment in (*own, *segments_of(alike[0].target))):
        return None
    return alike[0]


def _namesake(source: StateSpec, base: Fed, tensor: TensorSpec) -> tuple[str] | None:
    """The checkpoint's own copy of a tied tensor: the key that relates to it as the base's source does to the base."""
    key, found = base.target, base.sources[0]
    if isinstance(base.transform, Copy) and (found.endswith(key) or key.endswith(found)):
        own = found[: -len(key)] + tensor.key if found.endswith(key) else tensor.key.removeprefix(key[: -len(found)])
        if own in source and source[own].shape == tensor.shape:
            return (own,)
    return None


def _vocabulary(target: StateSpec, fed: Mapping[str, Fed]) -> dict[tuple[int, ...], Fed]:
    """The fed vocabulary tensors by shape: the token embedding or output layer, and the bias of the latter."""
    result: dict[tuple[int, ...], Fed] = {}
    for key, f in fed.items():
        shape = target[key].shape
        if len(shape) == 2 and shape[0] > shape[1] > 1 and len(f.sources) == 1 and _names_vocabulary(key):
            result.setdefault(shape, f)
    rows = {shape[0] for shape in result}
    for key, f in fed.items():
        shape = target[key].shape
        if len(shape) == 1 and shape[0] in rows and len(f.sources) == 1:
            result.setdefault(shape, f)
    return result


def _names_vocabulary(key: str) -> bool:
    return _holds_words(key) or "head" in _plain_words(key)


def _holds_words(key: str) -> bool:
    """Whether the name is that of a vocabulary, not of any other head."""
    own = segments_of(key)[-2:]  # what lies in a module called decoder is no vocabulary
    named = {word for segment in own for word in segment_words(segment, loop=False)}
    return concept(_plain_words(key), shipped_conventions()) in _TIED or bool(named & _VOCABULARY)


def _plain_words(key: str) -> tuple[str, ...]:
    return tuple(word for segment in segments_of(key) for word in segment_words(segment, loop=False))
