"""``automatch explain`` reads a file or stdin and says in its exit code whether it could tell."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from automatch.cli import main

TEXT = 'Missing key(s) in state_dict: "a.weight". \n\tUnexpected key(s) in state_dict: "module.a.weight". '


def test_stdin_and_file(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(TEXT)
    piped = CliRunner().invoke(main, ["explain"], input=TEXT)
    read = CliRunner().invoke(main, ["explain", str(tmp_path / "error.txt")])
    assert piped.exit_code == read.exit_code == 0
    assert piped.stdout == read.stdout
    assert "DataParallel" in read.stdout
    assert 'if part != "module"' in read.stdout


def test_json() -> None:
    done = CliRunner().invoke(main, ["explain", "--json"], input=TEXT)
    data = json.loads(done.stdout)
    assert data["causes"][0]["kind"] == "wrapper"
    assert data["pairs"] == [{"change": "wrapper", "source": "module.a.weight", "target": "a.weight"}]


def test_what_cannot_be_told_is_said_and_control_characters_are_not_printed() -> None:
    done = CliRunner().invoke(main, ["explain"], input='Missing key(s) in state_dict: "a\x1b[2J.b". Unexpected key(s): "c.d"')
    assert done.exit_code == 1
    assert "Cannot tell" in done.stdout
    assert "\x1b" not in done.stdout
