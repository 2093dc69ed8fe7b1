"""Every true mapping of the corpus is reproduced by its rules, and they are few."""

from __future__ import annotations

import statistics

from corpus_cases import case_paths, load_case
from rules import RESULT, measure, reproduces, table, true_mapping

from automatch.errors import MappingError
from automatch.mapping import KeyMapping
from automatch.rules import apply_rules, infer_rules, invert_rules

# The largest case by far is left to the benchmark, so that this file runs in seconds.
PATHS = [path for path in case_paths() if path.stat().st_size < 100_000]


UNTOLD = {"permute_elements", "slice_elements", "interleave"}
"""Row orders of which the corpus says only that there is one: what stands for them fits no shape, so nothing leads back."""


def test_rules_reproduce_every_mapping_and_are_few() -> None:
    records = [measure(load_case(path))[0] for path in PATHS]
    assert [record.id for record in records if not record.exact] == []
    fed = [record for record in records if record.keys]
    assert statistics.median(record.rules for record in fed) <= 12
    assert sum(record.in_shared_rules for record in fed) >= 0.95 * sum(record.keys for record in fed)


def test_rules_lead_back() -> None:
    losing: list[str] = []
    for path in PATHS:
        case = load_case(path)
        if any(true["op"] in UNTOLD for true in case["truth"].values()):
            continue
        mapping = true_mapping(case)
        assert mapping.source.spec is not None
        try:
            back = invert_rules(infer_rules(mapping), {tensor.key: tensor.shape for tensor in mapping.source.spec})
        except MappingError as error:
            losing.append(str(error))
            continue
        made = {match.target: match for match in apply_rules(back, [match.target for match in mapping.matches])}
        assert set(made) == {key for match in mapping.matches for key in match.sources}, path.name
        feeds: dict[str, set[str]] = {}
        for match in mapping.matches:
            for key in match.sources:
                feeds.setdefault(key, set()).add(match.target)
        assert all(feeds[key].issuperset(match.sources) for key, match in made.items()), path.name
    assert len(losing) == 1, losing
    assert "used nowhere" in losing[0]


def test_a_rule_that_takes_too_much_is_noticed() -> None:
    mapping = true_mapping(load_case(PATHS[0]))
    rules = infer_rules(mapping)
    smaller: KeyMapping = mapping.with_matches(mapping.matches[1:])
    assert reproduces(rules, mapping)
    assert not reproduces(rules, smaller)


def test_the_stored_table_has_every_figure_of_a_new_one() -> None:
    records = [measure(load_case(path))[0] for path in PATHS[:2]]
    rows = [line.split("|")[1] for line in table(records).splitlines() if line.startswith("| ") and "goal" not in line]
    assert all(f"|{row}|" in RESULT.read_text(encoding="utf-8") for row in rows[:8])
