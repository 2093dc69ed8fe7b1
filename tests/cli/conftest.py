"""Files that the command line is pointed at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from zoo import Mlp

from automatch.cli import main

Cli = Callable[..., Result]

MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8, depth=3, classes=3):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

class Computing(Net):
    def __init__(self):
        super().__init__()
        self.mean = float(self.head.weight.mean())

def not_a_model():
    return {"a": 1}

def broken():
    raise ValueError("no such backbone")

def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def cli() -> Cli:
    """Run a command line; the result has stdout, stderr and exit_code."""

    def run(*args: object) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: ``net.ckpt`` (an Mlp's, Lightning's layout) and ``models_here.py`` with factories."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Mlp().state_dict(), "epoch": 3}, tmp_path / "net.ckpt")
    (tmp_path / "models_here.py").write_text(MODELS)
    return tmp_path
