"""Every true mapping of the corpus is reproduced by its rules, and they are few."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from corpus_cases import case_paths, load_case
from rules import RESULT, measure, reproduces, table, true_mapping

from automatch.errors import MappingError
from automatch.mapping import KeyMapping
from automatch.rules import infer_rules, invert_rules

# The largest case by far is left to the benchmark, so that this file runs in seconds.
PATHS = [path for path in case_paths() if path.stat().st_size < 100_000]


def test_rules_reproduce_every_mapping_and_are_few() -> None:
    records = [measure(load_case(path))[0] for path in PATHS]
    assert [record.id for record in records if not record.exact] == []
    fed = [record for record in records if record.keys]
    assert statistics.median(record.rules for record in fed) <= 12
    assert sum(record.in_shared_rules for record in fed) >= 0.95 * sum(record.keys for record in fed)


@pytest.mark.parametrize("path", PATHS[::9], ids=lambda path: path.name.removesuffix(".json.gz"))
def test_rules_lead_back(path: Path) -> None:
    mapping = true_mapping(load_case(path))
    assert mapping.source.spec is not None
    shapes = {tensor.key: tensor.shape for tensor in mapping.source.spec}
    try:
        back = invert_rules(infer_rules(mapping), shapes)
    except MappingError:
        pytest.skip("the mapping uses a part of a tensor only")
    fed = dict.fromkeys(key for match in mapping.matches for key in match.sources)
    assert {key for rule in back for key in rule.targets} == set(fed)


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
