"""From the text of a loading error to the keys and shapes it names, however it was pasted.

Every pattern has bounded repetitions or begins with a word of its own, so that the time is linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

from automatch.explain._clean import clean, unwrap
from automatch.explain._pairs import CONTAINERS

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


_SIZE = r"(?:torch\W{0,2}size)?\W{0,12}[\[(]([\d,\s]{0,200})[\])]\)?"
_WORDS = r"[^\[]{0,200}?"
_NAME = r"['\"`]?([^\s,:'\"`]{1,500})['\"`]?"
# (pattern over text with single spaces, the groups that hold the checkpoint's and the model's shape)
_MISMATCHES = (
    # torch; mmengine and Lightning repeat it, people retype it
    (rf"size mismatch for {_NAME} ?:? ?copying a param (?:with shape|of) ?{_SIZE}{_WORDS}(?:model is|shape is) ?{_SIZE}", (2, 3)),
    (rf"parameter named {_NAME}, whose dimensions in the model are ?{_SIZE}{_WORDS}checkpoint are ?{_SIZE}", (3, 2)),
    (rf"size mismatch between saved {_SIZE} and current: {_SIZE} for {_NAME}", (1, 2)),  # torch.distributed.checkpoint
    # transformers 4, then the table of transformers 5
    (rf"(?<=- ){_NAME}: found shape {_SIZE} in the checkpoint and {_SIZE} in the model", (2, 3)),
    (rf"(?<!\S){_NAME} \| MISMATCH \|[^\[|]{{0,99}}ckpt: {_SIZE} vs model: ?{_SIZE}", (2, 3)),
    # diffusers, then detectron2
    (rf"because {_NAME} expected shape{_WORDS}{_SIZE},? but got {_SIZE}", (3, 2)),
    (rf"(?<!\S){_NAME} to the model due to incompatible shapes: ?{_SIZE}{_WORDS}checkpoint but {_SIZE}", (2, 3)),
    (rf"(?<!\S){_NAME} has shape {_SIZE} in the checkpoint but {_SIZE} in the model", (2, 3)),
)
_MISSING, _UNEXPECTED, _OTHER = "missing", "unexpected", ""
_LIST = r"[\s_](?:adapter )?keys?(?:\s?\(s\))?(?:\s{1,20}[\w-]{1,30}){0,8}?\s{0,20}[:=(]"
# Where a list begins, and which one; the list ends where the next begins. A space may be a line break.
_HEADINGS = (
    (_MISSING, rf"missing{_LIST}"),
    (_UNEXPECTED, rf"unexpected{_LIST}"),
    (_MISSING, r"\bmissing: ?(?=\[)"),
    (_UNEXPECTED, r"\bunexpected: ?(?=\[)"),
    (_MISSING, r"keys that are in the model state dict but not in the checkpoint:"),
    (_UNEXPECTED, r"keys that are not in the model state dict but in the checkpoint:"),
    (_MISSING, r"following keys are missing:"),
    (_MISSING, r"model parameters or buffers are not found in the checkpoint:"),
    (_UNEXPECTED, r"contains keys that are not used by the model:"),
    (_UNEXPECTED, r"weights of the model checkpoint[^\[{:]{0,400}?were not used when initializing[^:\[{]{0,200}:"),
    (_MISSING, r"weights of[^\[{:]{0,400}?were not initialized from the model checkpoint[^\[{:]{0,400}?newly initialized:"),
    (
        _OTHER,
        r"size mismatch (?:for|between)|copying the parameter named|newly initialized because the shapes|this IS (?:NOT )?expected"
        r"|you should probably|LOAD REPORT|traceback \(most recent call last\)",
    ),
)
_MODEL = re.compile(
    r"loading state.{0,2}dict for (\w[\w.]{0,200})|initializing ([A-Z]\w{1,200})|weights of ([A-Z]\w{1,200}) were not initialized"
    r"|\b(\w{1,200}) LOAD REPORT"
)
_HEADING = re.compile(
    "|".join(f"(?P<h{place}>{pattern})" for place, (_, pattern) in enumerate(_HEADINGS)).replace(" ", r"\s{1,99}"), re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"\s*\{\w*\}")  # the line of code that raised the error, as a traceback shows it
_KEY = re.compile(r"[A-Za-z_][\w\-]*(?:[./][\w\-@:{}]+)+|[A-Za-z_]\w*")
_BRACED = re.compile(r"(?:^|(?<=\s))([^\s,{}|]*\{[^{}\n]{1,2000}\}[^\s,|]*|[^\s,{}|]+)$")
_ELIDED = re.compile(r"[\s,]*(?:\.\.\.|…|\[\.\.\.\.?\]|\[…\]|<truncated>|(?:and )?\d+ (?:more|others))")
_BETWEEN = re.compile(r"(\s{0,1000}(?:,\s{0,1000})?)")
_OLD = re.compile(r"(missing|unexpected) keys? (?:in state_dict: )?[\"']?(\{[^{}]*\}|[\w.]+)[\"']?(?: in state_dict)?", re.IGNORECASE)
_ONE_SIDED = re.compile(r"following\s{1,99}keys\s{1,99}are\s{1,99}missing:")  # diffusers does not say what it found instead
_MOST_KEYS = 50_000
_LONGEST_KEY = 500


def parse_error(text: str) -> ParsedError:
    """Read a message of PyTorch, Lightning, mmengine, transformers, diffusers, timm or detectron2, however it was pasted.

    Log prefixes, colours, quoting, wrapped lines and cut ends are expected.
    """
    whole = clean(text)
    readings = [_read(whole)]
    joined = unwrap(whole)
    if joined != whole:
        readings.append(_read(joined))
    return max(readings, key=lambda read: len(read.missing) + len(read.unexpected) + len(read.mismatched))


def _read(text: str) -> ParsedError:
    found: dict[str, dict[str, None]] = {_MISSING: {}, _UNEXPECTED: {}}
    cut = {_MISSING: False, _UNEXPECTED: False}
    for kind, section, last in _sections(text):
        keys, is_cut = _keys_of(section, last)
        found[kind].update(dict.fromkeys(keys))
        cut[kind] |= is_cut
    for key, kind in _rows(text):
        found[kind].update(dict.fromkeys(_unfolded([key])))
    if not any(found.values()):
        for match in _OLD.finditer(text):
            names = re.findall(r"[\w.]+", match[2])
            found[match[1].lower()].update(dict.fromkeys(sorted(names)) if "." in match[2] else {})
        cut = dict.fromkeys(cut, any(found.values()))  # PyTorch 0.3 stopped at the first key
    if not found[_UNEXPECTED] and (cut[_MISSING] or _ONE_SIDED.search(text)):
        cut[_UNEXPECTED] = True
    named = _MODEL.search(text)
    model = next((group for group in named.groups() if group), "") if named else ""
    mismatched = tuple(_mismatches(text))
    return ParsedError(model, tuple(found[_MISSING]), tuple(found[_UNEXPECTED]), mismatched, cut[_MISSING], cut[_UNEXPECTED])


def _sections(text: str) -> Iterator[tuple[str, str, bool]]:
    headings = list(_HEADING.finditer(text))
    for place, heading in enumerate(headings):
        kind = next(_HEADINGS[int(name[1:])][0] for name, group in heading.groupdict().items() if group is not None)
        last = place + 1 == len(headings)
        if kind and not _PLACEHOLDER.match(text, heading.end()):
            yield kind, text[heading.end() : len(text) if last else headings[place + 1].start()], last


def _keys_of(section: str, last: bool) -> tuple[list[str], bool]:
    """The keys of one list, and whether it is shortened."""
    quote = re.search(r"[\"'`]", section)
    before = section[: quote.start()] if quote else section
    if quote and not re.match(r"[\s\[({]*[A-Za-z_][\w\-]*\.[\w.\-]+", before):
        return _quoted(section, quote.start(), last)
    lines = section.lstrip().split("\n")
    keys, is_cut = _plain_lines(lines) if _is_one_per_line(section, lines) else _plain(section, last)
    certain = len(keys) == 1 or not CONTAINERS.isdisjoint(keys)
    return [key for key in _unfolded(keys) if certain or "." in key or "_" in key], is_cut


def _quoted(section: str, at: int, last: bool) -> tuple[list[str], bool]:
    """Keys in quotation marks, separated by commas."""
    quote, keys, is_cut = section[at], list[str](), bool(_ELIDED.match(section[:at]))
    while True:
        end = section.find(quote, at + 1)
        if end < 0:
            return keys, True
        item = "".join(map(str.strip, section[at + 1 : end].split("\n")))
        if "\n" in section[at + 1 : end] and " " in item:  # the end of the list is cut off, and this quotation mark is another text's
            return keys, True
        for key in item.split(", "):
            if key.strip(" ,") and len(key) <= _LONGEST_KEY and not re.fullmatch(r"\{\w*\}", key):
                keys.append(key)
        elided = _ELIDED.match(section, end + 1)
        is_cut |= elided is not None
        between = _BETWEEN.match(section, elided.end() if elided else end + 1)
        at = between.end() if between else end + 1
        if section[at : at + 1] != quote:
            unended = at >= len(section) and last
            return keys, is_cut or unended or (not last and between is not None and "," in between[0] and at < len(section))


def _is_one_per_line(section: str, lines: list[str]) -> bool:
    """Whether a list without quotes has a line for each key, as detectron2 writes it."""
    begins_below = "\n" in section[: len(section) - len(section.lstrip())]
    return begins_below and bool(_BRACED.fullmatch(lines[0].strip()))


def _plain_lines(lines: list[str]) -> tuple[list[str], bool]:
    keys: list[str] = []
    for line in lines:
        match = _BRACED.fullmatch(line.strip())
        if match is None:
            break
        keys.append(match[1])
    return keys, False


def _plain(section: str, last: bool) -> tuple[list[str], bool]:
    """Keys without quotation marks, separated by commas."""
    keys: list[str] = []
    line = section.lstrip(" \t\n[({")
    for token in re.finditer(r"[^\s,]+(,?)", line):
        text = token[0].rstrip(",")
        bare = text.rstrip(".;])}")
        if _ELIDED.match(text):
            return keys, True
        if len(bare) > _LONGEST_KEY or not _KEY.fullmatch(bare):
            break
        keys.append(bare)
        if _ELIDED.match(text, len(bare)):
            return keys, True
        if not token[1]:
            return keys, bool(_ELIDED.match(line, token.end()))
    return keys, last and line.rstrip().endswith(",")


def _rows(text: str) -> Iterator[tuple[str, str]]:
    """Key and kind of every row of the table that transformers prints."""
    for line in text.split("\n"):
        if "|" in line:
            cells = [cell.strip() for cell in line.split("|")]
            for key, status in pairwise(cells):
                if key and status in ("MISSING", "UNEXPECTED"):
                    match = _BRACED.search(key[-3000:])
                    if match is not None:
                        yield match[1], status.lower()


def _unfolded(keys: list[str]) -> list[str]:
    """Keys with what stands in braces written out: ``layers.{0, 1}.x``, ``layers.{0...3}.x``, ``conv.{bias, weight}``."""
    return list(islice((key for folded in keys for key in _braces(folded)), _MOST_KEYS))


def _braces(key: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]{1,2000})\}", key)
    if match is None:
        yield key
        return
    for part in match[1].split(","):
        ends = part.strip().split("...")
        if len(ends) == 2 and all(end.isdecimal() and len(end) < 9 for end in ends):
            names = map(str, range(int(ends[0]), int(ends[1]) + 1))
        else:
            names = iter((part.strip(),))
        for name in names:
            yield from _braces(f"{key[: match.start()]}{name}{key[match.end() :]}")


def _mismatches(text: str) -> Iterator[Mismatch]:
    seen: set[str] = set()
    text = " ".join(text.split())
    for pattern, (source, target) in _MISMATCHES:
        for match in re.finditer(pattern, text, re.IGNORECASE):
            key = match[6 - source - target]
            if key not in seen:
                seen.add(key)
                yield Mismatch(key, _shape(match[source]), _shape(match[target]))


def _shape(text: str) -> Shape:
    return tuple(int(number) for number in re.findall(r"\d{1,18}", text))
