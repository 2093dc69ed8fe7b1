#!/usr/bin/env python3
"""Count how many family groups use each name of the conventions table, and write the counts into it.

    python benchmarks/conventions.py            # automatch/engine/data/conventions.json, in place

The names themselves are written by hand, from the field's libraries; 0 says that no case of the two corpora has one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import corpus_cases
from fit import DATA, EXTRA, group_of_case
from lexicon import LARGE

from automatch.engine.conventions import LEAVES, numbered_words, shipped_conventions, words_in_order
from automatch.engine.items import Item
from automatch.engine.sides import Side

Words = tuple[str, ...]


def words_by_group() -> dict[str, set[Words]]:
    """The words of every key of both corpora, by family group."""
    found: dict[str, set[Words]] = defaultdict(set)
    numbered = numbered_words(shipped_conventions())
    for path in [*corpus_cases.case_paths(), *corpus_cases.case_paths(directory=EXTRA)]:
        case = corpus_cases.load_case(path)
        for name in ("source", "target"):
            keys = [entry[0] for entry in case[name]["entries"]]
            if len(keys) <= LARGE:
                side = Side([Item(key, (), None, None, (key,)) for key in keys])
                found[group_of_case(case)].update(words_in_order(side, i, numbered) for i in range(side.n))
    return found


def counted(aliases: Iterable[str], groups: dict[str, set[Words]], *, anywhere: bool) -> dict[str, int]:
    """Every alias with the number of groups that have it, at the end of a module path or anywhere in a key."""
    return {alias: sum(any(_holds(words, alias, anywhere=anywhere) for words in found) for found in groups.values()) for alias in aliases}


def _holds(words: Words, alias: str, *, anywhere: bool) -> bool:
    before, _, run = alias.rpartition(">")
    wanted, context = tuple(run.split()), tuple(before.split())
    end = len(words)
    while end > 1 and words[end - 1] in LEAVES:
        end -= 1
    stops = range(len(wanted), len(words) + 1) if anywhere else range(max(0, end - 1), len(words) + 1)
    return any(
        words[stop - len(wanted) : stop] == wanted and (not context or _contains(words[: stop - len(wanted)], context))
        for stop in stops
        if stop >= len(wanted)
    )


def _contains(words: Words, run: Words) -> bool:
    return any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def main() -> None:
    """Recount, and write the table with a line for every part."""
    path = DATA / "conventions.json"
    table: dict[str, Any] = json.loads(path.read_text())
    groups = words_by_group()
    for section in ("areas", "regions"):
        for parts in table[section].values():
            for part, aliases in parts.items():
                parts[part] = counted(aliases, groups, anywhere=section == "regions")
    table["note"] = (
        "What the field's names mean, written by hand. An alias is matched as a run of words at the end of a module path; 'a > b' asks for "
        "a somewhere before b. Within an area, two parts are different things. Each alias with the number of family groups of "
        f"benchmarks/corpus and benchmarks/corpus_extra ({len(groups)} in all) that use it, counted by benchmarks/conventions.py."
    )
    path.write_text(_lines(table))


def _lines(table: dict[str, Any]) -> str:
    """The table as JSON with a line for every part or set."""
    sections = [f' "note": {json.dumps(table["note"])}']
    for name in ("areas", "regions"):
        areas = []
        for area, parts in table[name].items():
            rows = ",\n".join(f"   {json.dumps(part)}: {json.dumps(aliases)}" for part, aliases in parts.items())
            areas.append(f"  {json.dumps(area)}: {{\n{rows}\n  }}")
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(areas) + "\n }")
    sections.append(' "sets": [\n' + ",\n".join(f"  {json.dumps(known)}" for known in table["sets"]) + "\n ]")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    main()
