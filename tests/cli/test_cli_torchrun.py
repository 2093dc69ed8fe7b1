"""Under torchrun: rank 0 alone speaks and writes, whatever the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from automatch.cli import COMMANDS, TOGETHER

HANG = 600  # seconds after which a run hangs: each starts an agent and a rank that import torch, which takes minutes on a crowded machine


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "automatch"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*run, *map(str, arguments)], capture_output=True, text=True, timeout=HANG, env=environment, check=False)


@pytest.mark.distributed
def test_propose_and_apply_speak_and_write_once(folder: Path) -> None:
    proposed = torchrun("propose", "net.ckpt", "--model", "models_here.py:Net", "-o", "mapping.json", "--json")
    assert proposed.returncode == 0, proposed.stderr
    assert json.loads(proposed.stdout)["format"] == "automatch-mapping"
    assert proposed.stderr.count("Mapping written to") == 1
    applied = torchrun("apply", "net.ckpt", "--mapping", "mapping.json", "-o", "new.safetensors", "--verify")
    assert applied.returncode == 0, applied.stderr
    assert applied.stdout.count("new.safetensors") == 1
    assert "verified" in applied.stdout


@pytest.mark.distributed
def test_a_refusal_is_said_once(folder: Path) -> None:
    done = torchrun("apply", "gone.ckpt", "--mapping", "gone.json", "-o", "new.safetensors")
    assert done.returncode != 0
    assert done.stderr.count("Error: cannot read mapping") == 1


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in TOGETHER] + ["--help", "--version", "propse", "--wrong"])
def test_other_ranks_do_nothing(cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli(name, "wrong", "--usage")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(("arguments", "code"), [(("--help",), 0), (("--wrong",), 2), (("gone", "-o", "out"), 2)])
def test_other_ranks_are_silent_where_they_share_the_work(cli, monkeypatch, arguments: tuple[str, ...], code: int) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli("convert-distributed", *arguments)
    assert (result.exit_code, result.output) == (code, "")


def test_a_rank_that_is_left_in_the_environment_silences_nothing(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli("--version").output
