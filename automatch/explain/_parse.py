"""From the text of a loading error to the keys and shapes it names, however it was pasted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A key that both sides have with different shapes."""

    key: str
    source: Shape
    target: Shape


@dataclass(frozen=True, slots=True)
class ParsedError:
    """What a message says.

    Args:
        model: the class that was loaded into; empty where the text does not say.
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        mismatched: keys with two shapes.
        missing_cut: whether the list of missing keys is shortened or cut off.
        unexpected_cut: whether the list of unexpected keys is.
    """

    model: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    missing_cut: bool = False
    unexpected_cut: bool = False

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


_SIZE = r"(?:torch\W{0,2}size)?\W*?\[([\d,\s]*)\]\)?"
_WORDS = r"[^\[]{0,200}?"
_MISMATCHES = (
    # torch; mmengine and Lightning repeat it, people retype it
    (
        rf"size mismatch for ([^\s,:]+)\s*:?\s*copying a param (?:with shape|of)\s*{_SIZE}{_WORDS}(?:model is|shape is)\s*{_SIZE}",
        (1, 2),
    ),
    (
        rf"copying the parameter named ['\"]?([^\s'\"]+)['\"]?, whose dimensions in the model are {_SIZE}{_WORDS}checkpoint are {_SIZE}",
        (2, 1),
    ),
    # transformers 4, then the table of transformers 5
    (rf"-\s*([^\s:]+): found shape {_SIZE} in the checkpoint and {_SIZE} in the model", (1, 2)),
    (rf"^[^\w\n]*([^\s|]+)\s*\|\s*MISMATCH\s*\|[^\[\n]*ckpt:\s*{_SIZE} vs model:\s*{_SIZE}", (1, 2)),
)
_MISSING, _UNEXPECTED, _OTHER = "missing", "unexpected", ""
# Where a list begins, and which one; the list ends where the next begins.
_HEADINGS = (
    (_MISSING, r"missing[ _]keys?(?:\(s\))?(?:\s+(?:in|from)\s+(?:the\s+|source\s+)?state.{0,2}dict)?\s*[:=]"),
    (_UNEXPECTED, r"unexpected[ _]keys?(?:\(s\))?(?:\s+(?:in|from)\s+(?:the\s+|source\s+)?state.{0,2}dict)?\s*[:=]"),
    (_MISSING, r"keys that are in the model state dict but not in the checkpoint:"),
    (_UNEXPECTED, r"keys that are not in the model state dict but in the checkpoint:"),
    (_UNEXPECTED, r"weights of the model checkpoint[^\[{]{0,400}?were not used when initializing[^:\[{]*:"),
    (_MISSING, r"weights of[^\[{]{0,400}?were not initialized from the model checkpoint[^\[{]{0,400}?newly initialized:"),
    (
        _OTHER,
        r"size mismatch for|copying the parameter named|newly initialized because the shapes|this IS (?:NOT )?expected|you should probably",
    ),
    (_OTHER, r"traceback \(most recent call last\)"),
)
_MODEL = re.compile(
    r"loading state.{0,2}dict for ([\w.]+)|initializing ([A-Z]\w+)|weights of ([A-Z]\w+) were not initialized|(\w+) LOAD REPORT"
)
_HEADING = re.compile("|".join(f"(?P<h{place}>{pattern})" for place, (_, pattern) in enumerate(_HEADINGS)), re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][\w\-]*(?:[./][\w\-@:]+)+|[A-Za-z_]\w*")
_QUOTED = re.compile(r"\"([^\"\n]+)\"|'([^'\n]+)'|“([^”\n]+)”")
_ROW = re.compile(r"^[^\w\n]*([^\s|][^|\n]*?)\s*\|\s*(MISSING|UNEXPECTED)\b", re.MULTILINE)
_ELIDED = re.compile(r"\.\.\.|…|\[\.\.\.\]")
_JUNK = re.compile(r"^[ \t]*(?:\[rank\d+\]:|>|E(?=\s)|[│|](?!.*\|\s*(?:MISSING|UNEXPECTED|MISMATCH)))[ \t]?", re.MULTILINE)
_STAMP = re.compile(
    r"^[ \t]*\[?\d{4}-\d\d-\d\d[T ][\d:.,]+\S*[^\"'\n]*?(?=(?:missing|unexpected|size mismatch)\b)", re.MULTILINE | re.IGNORECASE
)
_OLD = re.compile(r"(missing|unexpected) keys? (?:in state_dict: )?[\"']?(\{[^}]*\}|[\w.]+)[\"']?(?: in state_dict)?", re.IGNORECASE)


def parse_error(text: str) -> ParsedError:
    """Read a message of PyTorch, Lightning, mmengine or transformers; log prefixes and cut ends are expected."""
    text = _STAMP.sub("", _JUNK.sub("", text.replace("\r\n", "\n")))
    found: dict[str, dict[str, None]] = {_MISSING: {}, _UNEXPECTED: {}}
    cut = {_MISSING: False, _UNEXPECTED: False}
    for kind, section, last in _sections(text):
        keys, is_cut = _keys_of(section, last)
        found[kind].update(dict.fromkeys(keys))
        cut[kind] |= is_cut
    for match in _ROW.finditer(text):
        found[match[2].lower()].update(dict.fromkeys(_braces(match[1])))
    if not any(found.values()):
        for match in _OLD.finditer(text):
            names = ast.literal_eval(match[2]) if match[2].startswith("{'") else [match[2]]
            found[match[1].lower()].update(dict.fromkeys(sorted(map(str, names))) if "." in match[2] else {})
    named = _MODEL.search(text)
    model = next((group for group in named.groups() if group), "") if named else ""
    mismatched = tuple(_mismatches(text))
    return ParsedError(model, tuple(found[_MISSING]), tuple(found[_UNEXPECTED]), mismatched, cut[_MISSING], cut[_UNEXPECTED])


def _sections(text: str) -> Iterator[tuple[str, str, bool]]:
    headings = list(_HEADING.finditer(text))
    for place, heading in enumerate(headings):
        kind = next(_HEADINGS[int(name[1:])][0] for name, group in heading.groupdict().items() if group is not None)
        last = place + 1 == len(headings)
        if kind:
            yield kind, text[heading.end() : len(text) if last else headings[place + 1].start()], last


def _keys_of(section: str, last: bool) -> tuple[list[str], bool]:
    """The keys of one list, and whether it is shortened."""
    quoted = list(_QUOTED.finditer(section))
    if quoted:
        keys = [next(group for group in match.groups() if group) for match in quoted]
        rest = section[quoted[-1].end() :]
        inside = section[: quoted[-1].start()]
        ended = bool(re.match(r"\s*[.\]})]", rest)) or (not last and not re.match(r"\s*,\s*\S", rest))
        return keys, bool(_ELIDED.search(re.sub(r"\"[^\"]*\"", "", inside) + rest[:12])) or not ended
    line = section.lstrip().split("\n\n")[0]
    keys = [match[0] for token in re.split(r"[,\s]+", line) if (match := _KEY.fullmatch(token.strip("'\"[]{}.;")))]
    cut = bool(_ELIDED.search(line)) or line.rstrip().endswith(",")
    return [key for key in keys if "." in key or len(keys) == 1 or "_" in key], cut


def _braces(key: str) -> Iterator[str]:
    """Unfold ``layers.{0, 1}.x`` and ``layers.{0...3}.x`` as transformers writes them."""
    match = re.search(r"\{(\d+(?:\s*(?:,|\.\.\.)\s*\d+)*)\}", key)
    if match is None:
        yield key
        return
    for part in match[1].split(","):
        ends = [int(number) for number in part.split("...")]
        for number in range(ends[0], min(ends[-1], ends[0] + 10_000) + 1):
            yield from _braces(f"{key[: match.start()]}{number}{key[match.end() :]}")


def _mismatches(text: str) -> Iterator[Mismatch]:
    seen: set[str] = set()
    for pattern, (source, target) in _MISMATCHES:
        for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE):
            key = match[1].strip("'\"`")
            if key not in seen:
                seen.add(key)
                yield Mismatch(key, _shape(match[1 + source]), _shape(match[1 + target]))


def _shape(text: str) -> Shape:
    return tuple(int(number) for number in re.findall(r"\d+", text))
