"""Every format of the README's table, as a user meets it: proposed, converted and verified on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from automatch import open_checkpoint
from automatch.cli import main

DATA = Path(__file__).parents[1] / "readers" / "data"


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"net.{key}": value for key, value in nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).state_dict().items()}


def shards(folder: Path, suffix: str) -> None:
    folder.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {key: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(state())}
    for name in set(weight_map.values()):
        part = {key: value for key, value in state().items() if weight_map[key] == name}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


WRITTEN = {
    "a.safetensors": lambda path: save_file(state(), path),
    "a.pt": lambda path: torch.save(state(), path),
    "a.ckpt": lambda path: torch.save({"state_dict": state(), "epoch": 3}, path),
    "a.pth": lambda path: torch.save(state(), path, _use_new_zipfile_serialization=False),
    "a.npz": lambda path: np.savez(path, **{key: value.numpy() for key, value in state().items()}),
    "safetensors_folder": lambda path: shards(path, "safetensors"),
    "bin_folder": lambda path: shards(path, "bin"),
}
KEPT = {
    "flax.msgpack": None,
    "keras.weights.h5": "h5py",
    "model.keras": "h5py",
    "small.gguf": "gguf",
    "dcp_two_ranks": None,
    "lightning_fsdp.ckpt": None,
    "deepspeed": None,
}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", [*WRITTEN, *KEPT])
def test_a_format_is_proposed_converted_and_verified(tmp_path, name):
    if name in WRITTEN:
        source = tmp_path / name
        WRITTEN[name](source)
    else:
        source = DATA / name
        pytest.importorskip(KEPT[name] or "torch")
    with open_checkpoint(source) as checkpoint:
        target = {f"renamed.{key}": torch.zeros(checkpoint.spec[key].shape) for key in checkpoint.spec.keys}
        values = {f"renamed.{key}": checkpoint.tensor(key) for key in checkpoint.spec.keys}
        trained = checkpoint.spec.wrapper != ()
    save_file(target, tmp_path / "target.safetensors")
    run("propose", source, "--model", tmp_path / "target.safetensors", "-o", tmp_path / "mapping.json")
    for out in ("out.safetensors", "out.ckpt", "out_folder"):
        said = run("apply", source, "--mapping", tmp_path / "mapping.json", "-o", tmp_path / out, "--verify")
        assert f"{len(target)} tensors" in said
        assert "verified" in said
        keeps_the_rest = out.endswith(".ckpt") and name in ("a.ckpt", "deepspeed")
        assert ("is not in it" in said) == (trained and not keeps_the_rest)
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[key], value) for key, value in values.items())
