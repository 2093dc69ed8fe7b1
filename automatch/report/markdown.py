"""The report as Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from automatch.mapping import KeyMapping
from automatch.report.groups import Group
from automatch.report.leftovers import Leftover
from automatch.report.view import Row, View, build_view
from automatch.report.wording import count, percent, short

MAX_LINES = 30
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+\-!|~@$&])")


def render_markdown(mapping: KeyMapping, *, all_keys: bool = False) -> str:
    """The report as GitHub-flavoured Markdown; every key with ``all_keys``."""
    view = build_view(mapping)
    blocks = [*_head(view), *_rules(view, all_keys), *_questions(view), *_withheld(view, all_keys)]
    blocks += _leftovers("Missing", "nothing feeds them", view.missing, all_keys)
    blocks += _leftovers("Unexpected", "they feed nothing", view.unexpected, all_keys)
    if all_keys:
        blocks.append(_folded(f"Every pair ({len(view.rows):,})", _pairs(view.rows)))
    blocks.append(f"**Next:** {plain(view.next_step)}")
    return "\n\n".join(blocks) + "\n"


def code(text: str) -> str:
    """A code span that no key can break out of, also within a table."""
    shown = short(text).replace("|", "\\|")
    runs = re.findall(r"`+", shown)
    fence = "`" * (max(map(len, runs), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def plain(text: str) -> str:
    """Text in which no character means anything to Markdown."""
    return _MARKUP.sub(r"\\\1", text)


def _head(view: View) -> list[str]:
    numbers = ", ".join(f"{number:,} {words}" for _, number, words in view.stats if number or words == "confident")
    bins = ", ".join(f"{number:,} at {plain(label)}" for label, number in view.bins if number)
    blocks = [f"### {view.title}: {code(view.source)} → {code(view.target)}", plain(view.headline)]
    facts = [*(f"cause: {plain(cause)}" for cause in view.causes), f"{view.fed_text}: {numbers}"]
    facts += [f"confidence: {bins}"] if bins else []
    facts += [f"⚠ {plain(warning.text)}{f' ({warning.more})' if warning.others else ''}" for warning in view.warnings]
    return [*blocks, "\n".join(f"- {fact}" for fact in facts)]


def _rules(view: View, all_keys: bool) -> list[str]:
    if not view.groups:
        return []
    groups = view.groups if all_keys else view.groups[:MAX_LINES]
    rest = len(view.groups) - len(groups)
    more = [f"… and {count(rest, 'rule')} more"] if rest else []
    return [f"#### Rules: {view.rules_text}", _groups(groups), *more]


def _questions(view: View) -> list[str]:
    blocks = [f"#### Questions: {count(len(view.questions), 'decision')} to take"] if view.questions else []
    for question in view.questions:
        lines = [f"- {code(question.id)} {plain(question.text)}"]
        for position, option in enumerate(question.options):
            sure = f" ({plain(option.confidence)})" if option.confidence else ""
            lines.append(f"  - {position}: {plain(option.label)}{sure}, e.g. {code(option.example)}")
        blocks.append("\n".join(lines))
    return blocks


def _withheld(view: View, all_keys: bool) -> list[str]:
    if not view.withheld:
        return []
    shown = view.withheld if all_keys else view.withheld[:MAX_LINES]
    rest = sum(len(group.rows) for group in view.withheld[len(shown) :])
    more = [f"… and {count(rest, 'pair')} more"] if rest else []
    return [f"#### Withheld: {count(view.n_withheld, 'pair')} not sure enough to load", _groups(shown), *more]


def _groups(groups: Iterable[Group]) -> str:
    rows = [
        (
            f"{len(g.rows):,}",
            code(g.pattern),
            code(g.replacement),
            plain("; ".join(filter(None, (g.transform, g.where)))),
            percent(g.confidence),
        )
        for g in groups
    ]
    return _table(("keys", "checkpoint", "model", "transform", "confidence"), rows)


def _pairs(rows: Sequence[Row]) -> str:
    cells = [
        (" + ".join(map(code, row.sources)), code(row.target), plain(row.shapes), plain(row.transform), plain(row.confidence_text))
        for row in rows
    ]
    return _table(("checkpoint key", "model key", "shape", "transform", "confidence"), cells)


def _leftovers(title: str, what: str, leftovers: tuple[Leftover, ...], all_keys: bool) -> list[str]:
    if not leftovers:
        return []
    shown = leftovers if all_keys else leftovers[:MAX_LINES]
    total = sum(len(left.keys) for left in leftovers)
    harmless = sum(len(left.keys) for left in leftovers if left.harmless)
    tail = "" if not harmless else ", all harmless" if harmless == total else f", {harmless:,} harmless"
    rows = [(f"{len(left.keys):,}", code(left.template), plain(left.shapes), plain(left.harmless) or "no") for left in shown]
    body = _table(("keys", "key", "shape", "harmless?"), rows)
    rest = sum(len(left.keys) for left in leftovers[len(shown) :])
    more = f"\n\n… and {count(rest, 'key')} more" if rest else ""
    return [_folded(f"{title}: {count(total, 'key')}, {what}{tail}", body + more)]


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
