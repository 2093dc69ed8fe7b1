"""``automatch convert-distributed``: one voice, errors said once, sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from sharded_models import New, Old, mapping_of, matches
from worlds import HANG, run_ranks, values

from automatch.cli import main
from automatch.cli.convert_distributed import size

pytestmark = pytest.mark.distributed


def test_torchrun_speaks_with_one_voice(trained: Path, tmp_path: Path) -> None:
    mapping = mapping_of(Old(), New()).save(tmp_path / "mapping.json")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "automatch", "convert-distributed"]
    arguments = [str(trained), "--mapping", str(mapping), "-o", str(tmp_path / "out"), "--max-shard-size", "3kB"]
    done = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=HANG, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "30 tensors, 24,356 bytes in" in done.stdout
    assert done.stderr.count("Note: ") == 1


def command_line(rank: int, *arguments: str) -> tuple[int, str, str]:
    os.environ["RANK"] = str(rank)
    done = CliRunner().invoke(main, ["convert-distributed", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_errors_are_said_once(trained: Path, tmp_path: Path) -> None:
    first, second = values(run_ranks(2, command_line, tmp_path, str(trained), "-o", str(tmp_path)))
    assert first[:2] == (2, "")
    assert "exists; name a new directory" in first[2]
    assert second == (1, "", "")


def test_an_incomplete_mapping_is_refused(trained: Path, tmp_path: Path) -> None:
    path = mapping_of(Old(), New(), matches()[1:]).save(tmp_path / "mapping.json")
    command = ["convert-distributed", str(trained), "--mapping", str(path), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "Refused: 1 tensor of the model would stay without a source" in refused.stderr
    assert "tokens.weight" in refused.stderr
    written = CliRunner().invoke(main, [*command, "--partial", "--json"])
    assert json.loads(written.stdout)["n_tensors"] == len(New().state_dict()) - 1


@pytest.mark.parametrize(("text", "wanted"), [("7", 7), ("1.5kB", 1500), ("2GiB", 2**31), ("3 M", 3 * 10**6)])
def test_sizes(text: str, wanted: int) -> None:
    assert size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1", "2TB", "1i"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="500MB or 2GiB"):
        size(text)
