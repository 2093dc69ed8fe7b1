from __future__ import annotations

from collections.abc import Callable

import pytest
import report_zoo as zoo

from automatch.report.markdown import render_markdown
from automatch.report.terminal import render_text

Golden = Callable[[str, str], None]


@pytest.mark.parametrize("all_keys", [False, True])
def test_terminal_report(golden: Golden, all_keys: bool) -> None:
    golden(f"transformer{'_all' if all_keys else ''}.txt", render_text(zoo.transformer(), all_keys=all_keys))


@pytest.mark.parametrize("all_keys", [False, True])
def test_markdown_report(golden: Golden, all_keys: bool) -> None:
    golden(f"transformer{'_all' if all_keys else ''}.md", render_markdown(zoo.transformer(), all_keys=all_keys))


def test_hostile_keys_in_a_terminal(golden: Golden) -> None:
    golden("hostile.txt", render_text(zoo.hostile()))


def test_hostile_keys_in_markdown(golden: Golden) -> None:
    golden("hostile.md", render_markdown(zoo.hostile()))
