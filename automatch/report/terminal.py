"""The report for a terminal: rich where there is one, plain text of a fixed width elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from automatch.mapping import KeyMapping
from automatch.report.groups import Group
from automatch.report.leftovers import Leftover
from automatch.report.view import QuestionView, Row, View, WarningView, build_view
from automatch.report.wording import count, percent, short

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

MAX_LINES = 12
_STYLES = {"decided": "blue", "sure": "green", "uncertain": "yellow", "weak": "red", "missing": "red", "withheld": "yellow"}


def render_text(mapping: KeyMapping, *, all_keys: bool = False, width: int = 80) -> str:
    """The report as plain text.

    Args:
        mapping: what to report.
        all_keys: list every key, not only rules and what is open.
        width: columns, at least 40.
    """
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=max(width, 40), color_system=None, force_terminal=False, legacy_windows=False, _environ={})
    print_report(mapping, console, all_keys=all_keys)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def print_report(mapping: KeyMapping, console: Console | None = None, *, all_keys: bool = False) -> None:
    """Print the report; without a console, to stdout, in colour where that is wanted."""
    from rich.console import Console

    console = console or Console()
    for part in _parts(build_view(mapping), all_keys):
        console.print(part, markup=False, highlight=False, soft_wrap=False)


def _parts(view: View, all_keys: bool) -> Iterator[RenderableType]:
    yield from _head(view)
    yield from _rules(view, all_keys)
    yield from _questions(view)
    yield from _withheld(view, all_keys)
    yield from _leftovers("Missing", "nothing feeds them", view.missing, all_keys)
    yield from _leftovers("Unexpected", "they feed nothing", view.unexpected, all_keys)
    if all_keys:
        yield from _all_keys(view)
    if view.warnings:
        yield _section("Warnings", "")
        for warning in view.warnings:
            yield from _warning(warning, all_keys)
    yield _section("Next", view.next_step)


def _warning(warning: WarningView, all_keys: bool) -> Iterator[RenderableType]:
    more = f" ({warning.more}: --all)" if warning.others and not all_keys else ""
    yield _line(("  ! ", "yellow"), warning.text + more)
    for other in warning.others if all_keys else ():
        yield _line(("  ! ", "yellow"), other)


Piece = str | tuple[str, str]


def _line(lead: Piece, *pieces: Piece) -> RenderableType:
    """Text whose wrapped lines hang under it, right of ``lead``; styles, never markup, so that keys stay literal."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text.assemble(lead), Text.assemble(*pieces))
    return grid


def _text(*pieces: Piece) -> RenderableType:
    from rich.text import Text

    return Text.assemble(*pieces, overflow="fold")


def _section(title: str, detail: str) -> RenderableType:
    return _text("\n", (title, "bold"), f"  {detail}" if detail else "")


def _head(view: View) -> Iterator[RenderableType]:
    yield _text((view.source, "bold"), " → ", (view.target, "bold"))
    yield _text((view.title, "bold"), ": ", view.headline)
    for cause in view.causes:
        yield _line("  cause: ", cause)
    yield _bar(view)
    numbers = [f"{number:,} {words}" for _, number, words in view.stats if number or words == "confident"]
    yield _line(f"  {view.fed_text}: ", ", ".join(numbers))
    if view.rows:
        yield _line("  confidence: ", ", ".join(f"{number:,} at {label}" for label, number in view.bins if number))


def _bar(view: View, width: int = 60) -> RenderableType:
    from rich.text import Text

    total = max(view.n_target, 1)
    text = Text("  ")
    done = shown = 0
    for (band, number, _), glyph in zip(view.stats, "█▒·─", strict=True):
        done += number
        cells = round(done / total * width) - shown
        shown += cells
        text.append(glyph * cells, style=_STYLES.get(band, "dim"))
    return text


def _rules(view: View, all_keys: bool) -> Iterator[RenderableType]:
    if not view.groups:
        return
    yield _section("Rules", view.rules_text)
    groups = view.groups if all_keys else view.groups[:MAX_LINES]
    for group in groups:
        yield from _group(group, "")
    if rest := len(view.groups) - len(groups):
        yield _line(f"        … and {count(rest, 'rule')} more (--all)")


def _questions(view: View) -> Iterator[RenderableType]:
    if view.questions:
        yield _section("Questions", f"{count(len(view.questions), 'decision')} to take")
    for question in view.questions:
        yield from _question(question)


def _question(question: QuestionView) -> Iterator[RenderableType]:
    yield _line((f"  {question.id}  ", "bold"), question.text)
    for position, option in enumerate(question.options):
        yield _line(f"      {position}  ", option.label, f"  ({option.confidence})" if option.confidence else "")
        yield _line("         e.g. ", option.example)


def _withheld(view: View, all_keys: bool) -> Iterator[RenderableType]:
    if not view.withheld:
        return
    yield _section("Withheld", f"{count(view.n_withheld, 'pair')} not sure enough to load")
    groups = view.withheld if all_keys else view.withheld[:MAX_LINES]
    for group in groups:
        shapes = view.rows[group.rows[0]].shapes
        yield from _group(group, shapes if "→" in shapes else "")
    if rest := sum(len(group.rows) for group in view.withheld[len(groups) :]):
        yield _line(f"        … and {count(rest, 'pair')} more (--all)")


def _group(group: Group, shapes: str) -> Iterator[RenderableType]:
    lead = f"{len(group.rows):>6,}  {percent(group.confidence):>4}  "
    if group.pattern == group.replacement:
        yield _line(lead, "same key: ", (group.replacement, "bold"))
    else:
        yield _line(lead, group.pattern)
        yield _line(" " * 14 + "→ ", (group.replacement, "bold"))
    facts = [text for text in (group.transform, group.where, shapes) if text]
    if facts:
        yield _line(" " * 14, ("; ".join(facts), "cyan"))


def _pair(row: Row) -> Iterator[RenderableType]:
    style = _STYLES[row.band]
    yield _line((f"  {row.confidence_text:>7}  ", style), " + ".join(short(key) for key in row.sources))
    same = row.sources == (row.target,)
    yield _line("           → ", (short(row.target), "bold") if not same else "same key", f"  {row.shapes}")
    if row.transform:
        yield _line("           ", (row.transform, "cyan"))


def _leftovers(title: str, what: str, leftovers: tuple[Leftover, ...], all_keys: bool) -> Iterator[RenderableType]:
    if not leftovers:
        return
    total = sum(len(left.keys) for left in leftovers)
    harmless = sum(len(left.keys) for left in leftovers if left.harmless)
    tail = "" if not harmless else ", all harmless" if harmless == total else f", {harmless:,} harmless"
    yield _section(title, f"{count(total, 'key')}: {what}{tail}")
    for left in leftovers if all_keys else leftovers[:MAX_LINES]:
        yield _line(f"{len(left.keys):>6,}  ", short(left.template), f"  {left.shapes}")
        if left.harmless:
            yield _line("        ", (f"harmless: {left.harmless}", "green"))
    if not all_keys and len(leftovers) > MAX_LINES:
        rest = sum(len(left.keys) for left in leftovers[MAX_LINES:])
        yield _line(f"        … and {count(rest, 'key')} more (--all)")


def _all_keys(view: View) -> Iterator[RenderableType]:
    yield _section("Keys", f"every one of {len(view.rows):,}")
    for row in view.rows:
        yield from _pair(row)
