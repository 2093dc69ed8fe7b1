"""The text of a message as it was printed: without colours, escapes, log prefixes, frames and hard line breaks."""

from __future__ import annotations

import html
import re

_COLOUR = re.compile(r"(?:\x1b|\^\[|␛|\\u001[bB]|\\x1[bB]|\\033)\[[0-9;?]*[A-Za-z]|\[\d{1,3}(?:;\d{1,3}){0,8}m")
_QUOTES = str.maketrans({**dict.fromkeys("“”„‟″«»", '"'), **dict.fromkeys("‘’‚‛′", "'"), "\u00a0": " ", **dict.fromkeys("\u200b\ufeff")})
_ESCAPED = re.compile(r"\\n(?:\\t|\s)*(?:missing|unexpected|size mismatch)|dict: ?\\[\"']", re.IGNORECASE)
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "", '\\"': '"', "\\'": "'"}
_STAMP = r"\[?\d{4}[-/]\d\d[-/]\d\d[T ,][\d:.,]{5,20}Z?\]?"
# What loggers, launchers, containers and mail put before each line.
_BEFORE = re.compile(
    rf"""[ \t]*(?:
        \[(?:default|rank)_?\d+\][:|]? | rank_?\d+[:|] | \[\d+,\d+\]<std\w+>:? | \d{{1,4}}:(?=\s)
      | \([^()\n]{{0,80}}pid=\d+[^()\n]{{0,80}}\)
      | [A-Z]\d{{4}}[ ][\d:.]+[ ]+\d+[ ][^\s\]]{{1,200}}\] | {_STAMP} | \d\d/\d\d[ ]\d\d:\d\d:\d\d(?=\s-)
      | [A-Z][a-z]{{2}}[ ][ \d]\d[ ]\d\d:\d\d:\d\d[ ]\S{{1,60}}[ ][^\s:]{{1,60}}:
      | [\w.-]{{1,60}}[ ]+\|(?=[ ]) (?! [ ]*(?:MISSING|UNEXPECTED|MISMATCH) )
      | (?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL)\b:?(?:[\w.]{{1,60}}:)?
      | [│┃║❱|>] | E(?=\s) | \#(?=\s)
    )""",
    re.VERBOSE,
)
_LEVEL = re.compile(
    r"[^\"'`\n]{0,100}?\b(?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)\b[\])\s:|>-]*"
    r"(?:[\w.<>]{1,60}(?::[\w<>]{1,60}){0,2} - )?"
)
_WIDEST_PREFIX = 6
_NARROWEST = 40


def clean(text: str) -> str:
    """Undo what happened to a message between the library and the reader."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _COLOUR.sub("", text)
    if text.count("\\n") > text.count("\n") or _ESCAPED.search(text):  # the repr of an exception, or the JSON of a notebook or log
        text = re.sub(r"\\[ntr\"']", lambda match: _ESCAPES[match[0]], text)
    if "&quot;" in text or "&#" in text:
        text = html.unescape(text)
    text = text.translate(_QUOTES)
    return "\n".join(map(_bare, text.split("\n")))


def _bare(line: str) -> str:
    """A line without what loggers and frames put around it; its own indentation stays."""
    at = 0
    for _ in range(_WIDEST_PREFIX):
        match = _BEFORE.match(line, at)
        if match is None or match.end() == at:
            break
        at = match.end()
    rest = line[at:].removeprefix(" ") if at else line
    if at:
        level = _LEVEL.match(rest)
        rest = rest[level.end() :] if level else rest
    framed = rest.rstrip(" \t")
    return framed[:-1].rstrip(" \t") if framed[-1:] in ("│", "┃", "║") else rest


def unwrap(text: str) -> str:
    """Join lines that a terminal of fixed width may have broken inside a word; words at its edge lose the space between them."""
    lines = text.split("\n")
    width = max(map(len, lines))
    if width < _NARROWEST or sum(len(line) == width for line in lines) < 2:
        return text
    joined: list[str] = []
    full = False
    for line in lines:
        if full and line[:1] not in ("", " ", "\t"):
            joined[-1] += line
        else:
            joined.append(line)
        full = len(line) == width and " " in line.strip() and line[-1] not in " |,])}" and not line.endswith((").", '".'))
    return "\n".join(joined)
