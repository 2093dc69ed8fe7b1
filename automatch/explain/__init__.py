"""What a pasted `load_state_dict` error says: the causes, the pairs that names alone can show, and code to paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from automatch.explain._causes import Cause, of_buffers, of_container, of_leftovers, of_matched, of_renamed, of_statistics, of_wrapped
from automatch.explain._pairs import Renamed, explains, find_renamed, is_buffer, is_statistic, jumps
from automatch.explain._parse import Mismatch, ParsedError, parse_error
from automatch.explain._sizes import of_mismatched
from automatch.mapping import KeyMapping, Match, Side
from automatch.matching import propose_mapping
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Copy

__all__ = ["Cause", "Explanation", "Mismatch", "ParsedError", "explain", "parse_error"]

# Shares of right pairs, measured by `benchmarks/explain.py` on whole messages made from the corpus and rounded down.
_CONFIDENCE = {"wrapper": 0.93, "prefix": 0.94, "renamed": 0.96, "shift": 0.46, "matched": 0.93}
_LIMIT = 3000
_UNKNOWN = (2, 2)  # stands for every shape, which the text does not tell; a matrix, so that row orders stay in doubt


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to a message.

    Args:
        causes: what is wrong, the main cause first; of kind "unknown" where the text does not tell.
        mapping: the pairs among the keys that the message names; from names alone.
        pairs: (kind of change, checkpoint key, model key) behind the mapping.
        code: Python to paste between reading the file and loading it; empty where no code helps.
        parsed: what was read from the text.
    """

    causes: tuple[Cause, ...]
    mapping: KeyMapping
    code: str
    parsed: ParsedError
    pairs: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        read = self.parsed
        lines = [
            f"Read {len(read.missing)} missing keys, {len(read.unexpected)} unexpected keys and {len(read.mismatched)} size mismatches"
            + (f" of {read.model}." if read.model else ".")
        ]
        if read.missing_cut or read.unexpected_cut:
            lines.append("The message is shortened or cut off, so there may be more.")
        for number, cause in enumerate(self.causes, 1):
            lines += ["", f"{number}. {cause.text}"]
        if self.mapping.matches:
            lines += ["", "Pairs, by their names alone:", *(f"  {rule}" for rule in self.mapping.rules)]
        if self.code:
            lines += ["", "Code:", "", *(f"    {line}" if line else "" for line in self.code.splitlines())]
        return "\n".join(lines)


def explain(text: str) -> Explanation:
    """Explain a loading error from its text alone.

    Args:
        text: what PyTorch, Lightning, mmengine or transformers printed; log prefixes and cut ends are expected.
    """
    parsed = parse_error(text)
    if not parsed:
        cause = Cause("unknown", "Cannot tell: the text names no missing, unexpected or mismatched keys. Paste the whole message.")
        return Explanation((cause,), _mapping(parsed, []), "", parsed)
    whole = of_container(parsed.unexpected) or ([] if parsed.missing else of_wrapped(parsed.unexpected, parsed.model))
    if whole:
        causes = [*whole, *of_mismatched(parsed.mismatched)]
        return Explanation(tuple(causes), _mapping(parsed, []), _code(causes), parsed)
    renamed = find_renamed(parsed.unexpected, parsed.missing)
    missing, unexpected, harmless = _without_harmless(*_unexplained(parsed, renamed))
    causes = [*(of_renamed(found, parsed.missing) for found in renamed), *harmless]
    matched = _matched(parsed, missing, unexpected)
    if matched:
        causes.append(of_matched(matched))
        missing = [key for key in missing if key not in matched]
        unexpected = [key for key in unexpected if key not in set(matched.values())]
    causes += of_mismatched(parsed.mismatched)
    rest = of_leftovers(missing, unexpected, certain=_is_certain(parsed, missing, unexpected))
    explained = sum(len(found.pairs) for found in renamed) + len(matched)
    open_sizes = bool(parsed.mismatched) and any(cause.kind == "unknown" for cause in rest)  # shapes that are shown say more
    causes = [*rest, *causes] if len(missing) + len(unexpected) > explained and not open_sizes else [*causes, *rest]
    pairs = tuple((found.kind, *pair) for found in renamed if not (found.kind == "shift" and jumps(found)) for pair in found.pairs)
    pairs += tuple(("matched", source, target) for target, source in matched.items())
    return Explanation(tuple(causes), _mapping(parsed, pairs), _code(causes), parsed, pairs)


def _unexplained(parsed: ParsedError, renamed: Sequence[Renamed]) -> tuple[list[str], list[str]]:
    """The missing and the unexpected keys that no simple change explains."""
    used = {key for found in renamed for pair in found.pairs for key in pair}
    missing = [key for key in parsed.missing if key not in used]
    modules = {key.rpartition(".")[0] for found in renamed for key, _ in found.pairs}  # BatchNorm does not report its counter as missing
    counters = {key for key in parsed.unexpected if key.endswith(".num_batches_tracked") and key.rpartition(".")[0] in modules}
    unexpected = [key for key in parsed.unexpected if key not in used and key not in counters]
    if parsed.unexpected_cut:  # what is no longer shown is explained by the same changes
        missing = [key for key in missing if not any(explains(found, key) for found in renamed)]
    if parsed.missing_cut and any(found.kind in ("wrapper", "prefix") for found in renamed):
        unexpected = []
    return missing, unexpected


def _without_harmless(missing: Sequence[str], unexpected: Sequence[str]) -> tuple[list[str], list[str], list[Cause]]:
    """The keys that matter, and what is to be said of buffers and of statistics without a module of their own."""
    causes = of_buffers([key for key in unexpected if is_buffer(key)], [key for key in missing if is_buffer(key)])
    missing, unexpected = ([key for key in keys if not is_buffer(key)] for keys in (missing, unexpected))
    modules = {key.rpartition(".")[0] for key in (*missing, *unexpected) if not is_statistic(key)}
    statistics = [key for key in unexpected if is_statistic(key) and key.rpartition(".")[0] not in modules]
    return missing, [key for key in unexpected if key not in set(statistics)], [*causes, *of_statistics(statistics)]


def _matched(parsed: ParsedError, missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str]:
    """What matching by names and structure is sure of among keys that no simple change explains: model key to checkpoint key.

    Only whole lists are matched: in a part of one, the right counterpart may be what is not shown.
    """
    if not missing or not unexpected or parsed.missing_cut or parsed.unexpected_cut or max(len(missing), len(unexpected)) > _LIMIT:
        return {}
    source, target = (StateSpec(tuple(TensorSpec(key, _UNKNOWN) for key in keys)) for keys in (unexpected, missing))
    matches = propose_mapping(target, source).confident().matches
    found = {match.target: match.sources[0] for match in matches if len(match.sources) == 1 and isinstance(match.transform, Copy)}
    return found if 2 * len(found) > min(len(missing), len(unexpected)) else {}


def _is_certain(parsed: ParsedError, missing: Sequence[str], unexpected: Sequence[str]) -> bool:
    """Whether one side shows more keys without a counterpart than the other side has in all."""
    return (not parsed.missing_cut and len(unexpected) > len(missing)) or (not parsed.unexpected_cut and len(missing) > len(unexpected))


def _mapping(parsed: ParsedError, pairs: Sequence[tuple[str, str, str]]) -> KeyMapping:
    """The pairs as a mapping of the keys that the message names; shapes that it does not name are ()."""
    shapes = {mismatch.key: (mismatch.source, mismatch.target) for mismatch in parsed.mismatched}
    source = StateSpec(
        tuple(TensorSpec(key, shapes.get(key, ((), ()))[0]) for key in dict.fromkeys((*parsed.unexpected, *shapes))), "checkpoint"
    )
    target = StateSpec(
        tuple(TensorSpec(key, shapes.get(key, ((), ()))[1]) for key in dict.fromkeys((*parsed.missing, *shapes))), parsed.model or "model"
    )
    matches = [Match(model_key, (key,), confidence=_CONFIDENCE[kind]) for kind, key, model_key in pairs]
    return KeyMapping(Side.of(source), Side.of(target), ()).with_matches(matches)


def _code(causes: Sequence[Cause]) -> str:
    if any(cause.kind in ("architecture", "unknown") for cause in causes[:1]):
        return ""
    steps = _steps(causes)
    if not steps:
        return ""
    incomplete = any(cause.kind not in ("wrapper", "prefix", "renamed", "shift") and not cause.code for cause in causes)
    partial = incomplete or any(cause.kind in ("classes", "vocabulary", "positions") for cause in causes)
    lines = [
        *(["import re", ""] if any("re.compile" in line for line in steps) else []),
        "import torch",
        "",
        'checkpoint = torch.load("checkpoint.ckpt", map_location="cpu", weights_only=True)',
        'state_dict = checkpoint.get("state_dict", checkpoint)',
        *steps,
        f"model.load_state_dict(state_dict{', strict=False' if partial else ''})",
    ]
    return "\n".join(lines) + "\n"


def _steps(causes: Sequence[Cause]) -> list[str]:
    """The code of all causes; what two of them begin with stands once."""
    steps: list[str] = []
    for cause in causes:
        first, *others = cause.code or ("",)
        steps += [*([first] if first not in steps and first else []), *others]
    return steps
