"""Which keys of a model a load must feed, and the words for refusing when it does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from automatch.adapt import explain_mismatch, resized_sources
from automatch.counterparts import Counterparts
from automatch.mapping import KeyMapping, Question
from automatch.specs import StateSpec, TensorSpec

# Buffers that a constructor computes: a model that was not given them works all the same. Others (running
# statistics, code books) hold what training has found, and count like parameters.
_DERIVED = re.compile(
    r"\w*inv_freq|freqs\w*|rel\w*_index|rel\w*_coords\w*|\w*mask|(masked_)?bias|(\w+_)?(cos|sin)(_\w+)?|anchors?|grid|anchor_grid"
    r"|((pixel|image|img)_)?(mean|std)|\w*window|mel_\w+|pe"
)
_SHOWN = 20


def needed_keys(target: StateSpec, fed: Iterable[str]) -> tuple[str, ...]:
    """Model keys that would keep an initial value that training has to replace, in the model's order.

    Args:
        target: the model.
        fed: the keys that are fed; a tied tensor is fed under any of its keys.
    """
    done = {_tensor_of(target[key]) for key in fed if key in target}
    return tuple(t.key for t in target if t.alias_of is None and t.key not in done and not is_harmless(t))


def _tensor_of(tensor: TensorSpec) -> str:
    return tensor.alias_of or tensor.key


def is_harmless(tensor: TensorSpec) -> bool:
    """Whether a model works as well without being given this entry: counters and buffers that it derives itself."""
    if tensor.kind == "parameter":
        return False
    if not tensor.dtype.startswith(("float", "bfloat", "complex")):
        return True
    return _DERIVED.fullmatch(tensor.key.rpartition(".")[2]) is not None


def fed_keys(target: StateSpec, matched: Iterable[str]) -> frozenset[str]:
    """The matched keys, with those that are tied to one of them."""
    done = {_tensor_of(target[key]) for key in matched if key in target}
    return frozenset(t.key for t in target if _tensor_of(t) in done)


def shorten(keys: Sequence[str], shown: int = 5) -> str:
    """The first keys, quoted, and how many more there are."""
    rest = len(keys) - shown
    return ", ".join(map(repr, keys[:shown])) + (f" and {rest} more" if rest > 0 else "")


def without_open_questions(mapping: KeyMapping) -> KeyMapping:
    """The mapping without the matches that hang on an open question and that nobody has decided."""
    open_keys = {key for question in mapping.questions for key in question.keys}
    return mapping.with_matches(m for m in mapping.matches if m.decided or m.target not in open_keys)


def explain_refusal(mapping: KeyMapping, needed: Iterable[str], threshold: float) -> str:
    """Why loading is refused: each key that nothing sure feeds, what was withheld, and how to answer."""
    needed = tuple(needed)
    lines = [f"{len(needed)} of {mapping.target.n_keys} tensors of the model would keep their initial values; nothing was loaded."]
    if mapping.verdict is not None:
        lines.append(f"({mapping.verdict.text})")
    asked = [question for question in mapping.questions if set(question.keys) & set(needed)]
    settled = {key for question in asked for key in question.keys}
    lines.extend(_question_line(question) for question in asked[:_SHOWN])
    rest = [key for key in needed if key not in settled]
    resized, counterparts = resized_sources(rest[:_SHOWN], mapping), Counterparts(mapping)
    lines.extend(_key_line(key, mapping, threshold, resized.get(key), counterparts) for key in rest[:_SHOWN])
    if len(rest) > _SHOWN:
        lines.append(f"  … and {len(rest) - _SHOWN} more")
    lines.append(
        "See mapping.report(); fix pairs with pins={key: source}, keep an initial value on purpose with pins={key: None}, "
        "or load what is sure with strict=False."
    )
    return "\n".join(lines)


def _question_line(question: Question) -> str:
    options = "; ".join(f"{i}: {option.label}" for i, option in enumerate(question.options))
    return (
        f"  question {question.id} ({shorten(question.keys, 3)}): {question.text} [{options}] — answer with "
        f"load(model, ckpt, mapping=mapping.answer({question.id!r}, 0)), mapping = propose_mapping(model, ckpt)"
    )


def _key_line(key: str, mapping: KeyMapping, threshold: float, resized: TensorSpec | None, counterparts: Counterparts) -> str:
    match = mapping.get(key)
    if resized is not None and mapping.target.spec is not None:
        why = explain_mismatch(key, resized.shape, mapping.target.spec[key].shape)
        return f"  {key!r}: size mismatch with {resized.key!r}, {why}; ask for it with adapt={{{key!r}: method}}"
    named = counterparts.renamed(key)
    if match is None and named is not None:
        return f"  {key!r}: nothing sure feeds it; by its name it is {named!r}, of the same shape; accept with pins={{{key!r}: {named!r}}}"
    if match is None:
        return f"  {key!r}: nothing in the checkpoint feeds it"
    sources = match.sources[0] if len(match.sources) == 1 else list(match.sources)
    return (
        f"  {key!r}: withheld, best is {', '.join(map(repr, match.sources))} with confidence {match.confidence:.2f} < {threshold:g}; "
        f"accept with pins={{{key!r}: {sources!r}}}"
    )
