"""A switched-off signal weighs nothing, inside the block only."""

from __future__ import annotations

import ablation
import pytest

from automatch.engine import solve


def test_signal_is_off_inside_the_block():
    before = solve.Weights()
    with ablation.without("name", "region"):
        inside = solve.Weights()
        assert (inside.name, inside.region) == (0.0, 0.0)
        assert inside.role == before.role
    assert solve.Weights() == before
    with pytest.raises(ValueError, match="unknown signals"), ablation.without("colour"):
        pass


def test_groups_name_signals_that_there_are():
    assert {name for names in ablation.GROUPS.values() for name in names} <= set(ablation.signals())


def test_page_shows_the_difference():
    row = {"perfect_share": 0.5, "one_answer_share": 0.6, "macro_recall": 0.9, "wrong": 4, "confident_wrong": 1, "cases": 10}
    rows = [row | {"off": "nothing", "order": "file"}, row | {"off": "`name`", "order": "file", "perfect_share": 0.25}]
    assert "| `name` | 25.0 % | -25.0 | 60.0 % | 0.9000 | +0.0000 | 4 | 1 |" in ablation.markdown(rows, "python benchmarks/ablation.py")
