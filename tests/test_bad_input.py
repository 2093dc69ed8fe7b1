"""Bad input, from end to end: one clear error each, and a model that is bit for bit what it was."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from handmade import assert_unchanged, snapshot_of
from safetensors.torch import save_file
from torch import nn
from zoo import Mlp

import automatch
from automatch import AutomatchError, CheckpointError, LoadError, ModelError, UnsafeCheckpointError
from automatch.cli import main


class Runs:
    """Unpickling it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.place),)


def _truncated(folder: Path) -> Path:
    path = folder / "truncated.ckpt"
    torch.save({"state_dict": Mlp().state_dict()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _truncated_safetensors(folder: Path) -> Path:
    path = folder / "truncated.safetensors"
    save_file(Mlp().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def _empty(folder: Path) -> Path:
    path = folder / "empty.pt"
    path.touch()
    return path


def _text(folder: Path) -> Path:
    path = folder / "text.pt"
    path.write_text("404: not found")
    return path


def _with_code(folder: Path) -> Path:
    path = folder / "hostile.pt"
    torch.save({"state_dict": Mlp().state_dict(), "callbacks": Runs(folder / "pwned")}, path)
    return path


def _only_code(folder: Path) -> Path:
    path = folder / "hostile.pkl"
    path.write_bytes(pickle.dumps(Runs(folder / "pwned"), protocol=2))
    return path


def _twice(folder: Path) -> Path:
    entry = '{"dtype":"F32","shape":[3],"data_offsets":[0,12]}'
    header = f'{{"head.bias":{entry},"head.bias":{entry}}}'.encode()
    path = folder / "twice.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    return path


def _negative(folder: Path) -> Path:
    header = json.dumps({"head.bias": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}).encode()
    path = folder / "negative.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    return path


def _nan_shaped(_: Path) -> dict[str, Any]:
    return {"head.bias": SimpleNamespace(shape=(float("nan"),), dtype=torch.float32, ndim=1)}


CASES: dict[str, tuple[Callable[[Path], Any], type[AutomatchError], str]] = {
    "missing file": (lambda folder: folder / "gone.ckpt", CheckpointError, "gone.ckpt"),
    "directory": (lambda folder: folder, CheckpointError, "."),
    "empty file": (_empty, CheckpointError, "empty.pt' is empty"),
    "text": (_text, CheckpointError, "text.pt' is of no known format"),
    "truncated torch file": (_truncated, CheckpointError, "truncated.ckpt"),
    "truncated safetensors": (_truncated_safetensors, CheckpointError, "truncated.safetensors"),
    "code beside the weights": (_with_code, UnsafeCheckpointError, "mkdir"),
    "pickle that runs code": (_only_code, UnsafeCheckpointError, "mkdir"),
    "duplicate keys": (_twice, CheckpointError, "head.bias"),
    "negative shape": (_negative, CheckpointError, "head.bias"),
    "no tensors": (lambda _: {"epoch": 3, "lr": 0.1}, CheckpointError, "no tensors"),
    "empty dict": (lambda _: {}, CheckpointError, "no tensors"),
    "keys that are no strings": (lambda _: {1: torch.zeros(3), 2: torch.zeros(3)}, CheckpointError, "not a string|no tensors|1"),
    "NaN as a size": (_nan_shaped, CheckpointError, r"\(nan,\)"),
    "a number": (lambda _: 3, CheckpointError, "int is not a checkpoint"),
    "another model's": (lambda _: nn.LSTM(5, 7).state_dict(), LoadError, "would keep their initial values"),
}

NOT_FILES = ("no tensors", "empty dict", "keys that are no strings", "NaN as a size", "a number", "another model's")


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error_and_the_model_is_unchanged(name: str, tmp_path: Path) -> None:
    make, error, message = CASES[name]
    ckpt, model = make(tmp_path), Mlp()
    before = snapshot_of(model)
    with pytest.raises(error, match=message):
        automatch.load(model, ckpt)
    assert_unchanged(model, before)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_FILES])
def test_the_command_line_says_it_in_a_line_and_exits_with_2(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(CASES[name][0](tmp_path))])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert not (tmp_path / "pwned").exists()


def test_a_model_with_lazy_parameters_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ModelError, match=r"'0.weight' is not initialised yet"):
        automatch.load(model, {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)})
    assert isinstance(model[0].weight, nn.parameter.UninitializedParameter)
