"""``automatch export`` writes every kind, leaves doubtful matches out, and refuses in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from automatch.cli import main
from automatch.cli.export import KINDS
from automatch.export import KINDS as EXPORTS
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import StateSpec, TensorSpec


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    source = StateSpec((TensorSpec("a.weight", (1,)), TensorSpec("c.weight", (1,))), "old.ckpt")
    target = StateSpec((TensorSpec("b.weight", (1,)), TensorSpec("d.weight", (1,))), "Model")
    matches = [Match("b.weight", ("a.weight",), confidence=0.99), Match("d.weight", ("c.weight",), confidence=0.5)]
    return KeyMapping(Side.of(source), Side.of(target), ()).with_matches(matches).save(tmp_path / "mapping.json")


def test_the_command_knows_every_kind() -> None:
    assert tuple(EXPORTS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_printed(mapping: Path, kind: str) -> None:
    done = CliRunner().invoke(main, ["export", str(mapping), "--kind", kind])
    assert done.exit_code == 0, done.output
    compile(done.stdout, kind, "exec")
    assert "b.weight" in done.stdout
    assert '"d.weight"' not in done.stdout
    assert "1 of 2 matches are below confidence 0.95 and left out." in done.stderr


def test_a_file_is_written(mapping: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(mapping), "-o", str(tmp_path / "convert.py"), "--threshold", "0"])
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert '"d.weight"' in (tmp_path / "convert.py").read_text()


def test_a_missing_mapping_is_bad_input(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(tmp_path / "no.json")])
    assert done.exit_code == 2
    assert "cannot read mapping" in done.stderr
