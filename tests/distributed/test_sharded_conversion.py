"""Converting with several ranks: equal values under new keys, and a killed run that is taken up again."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversions import LIMIT, contents, convert_some
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_models import New, Old, expected, mapping_of, matches, new_model, old_model, split_back
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from worlds import run_ranks, save_alone, values

import automatch.distributed.conversion
import automatch.distributed.shard_files
import automatch.distributed.shards
from automatch.distributed import convert, load
from automatch.distributed.shards import Output, assign
from automatch.errors import CheckpointError, LoadError, MappingError
from automatch.mapping import Match
from automatch.transforms import apply_transform

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def old_state(trained: Path) -> dict[str, torch.Tensor]:
    model = old_model()
    load(model, trained, mapping_of(Old(), Old(), [replace(m, target=m.sources[0]) for m in identity_matches()]))
    return dict(model.state_dict())


def identity_matches() -> list[Match]:
    return [Match(key, (key,), decided=True) for key in Old().state_dict()]


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(names.values())}
    return {key: files[name][key] for key, name in names.items()}


def test_a_dcp_directory_becomes_a_folder(trained: Path, old_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (report, seen), (other, unseen) = values(run_ranks(2, convert_some, tmp_path, trained, tmp_path / "hf", "safetensors", None))
    assert report == other
    assert report.n_tensors == len(New().state_dict())
    assert seen[-1][1] == report.n_bytes
    assert unseen == []
    assert "epoch" in report.left_out
    got = read_folder(tmp_path / "hf")
    for match in matches():
        assert torch.equal(got[match.target], apply_transform(match.transform, [old_state[key] for key in match.sources])), match.target
    for name in (tmp_path / "hf").glob("*.safetensors"):
        with safe_open(name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_dcp_directory_keeps_optimizer_and_objects(trained: Path, tmp_path: Path) -> None:
    values(run_ranks(2, convert_some, tmp_path, trained, tmp_path / "dcp", "dcp", None))
    model = new_model()
    optimizer = torch.optim.AdamW(
        [{"params": [*model.lm_head.parameters()]}, {"params": [p for n, p in model.named_parameters() if "lm_head" not in n]}]
    )
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)) | {"epoch": 0}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=tmp_path / "dcp")  # torch reads it as one of its own
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert state["epoch"] == 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    reference = new_model()
    again = torch.optim.AdamW(
        [{"params": [*reference.lm_head.parameters()]}, {"params": [p for n, p in reference.named_parameters() if "lm_head" not in n]}]
    )
    load(reference, trained, mapping_of(Old(), New()), optimizer=again)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(optimizer.state[a]["exp_avg"], again.state[b]["exp_avg"]), name


def test_a_folder_becomes_a_dcp_directory_and_returns(tmp_path: Path) -> None:
    state = dict(old_model().state_dict())
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    forth = convert(tmp_path / "hf", tmp_path / "dcp", mapping_of(Old(), New()), to="dcp", max_shard_bytes=LIMIT)
    back = convert(tmp_path / "dcp", tmp_path / "again", mapping_of(New(), Old(), split_back()))
    assert (forth.n_shards > 3, back.n_shards) == (True, 1)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value), key
    assert expected(old_model()).keys() == {match.target for match in matches()}


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_a_rank_holds_a_portion_and_no_shard(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    made: list[tuple[weakref.ref[torch.Tensor], int]] = []
    held: list[int] = []

    def placeholder(output: Output) -> Any:
        value = automatch.distributed.shards.placeholder(output)
        if value is not None:
            made.append((weakref.ref(value), value.nbytes))
        held.append(sum(nbytes for tensor, nbytes in made if tensor() is not None))
        return value

    monkeypatch.setattr(automatch.distributed.conversion, "placeholder", placeholder)
    monkeypatch.setattr(automatch.distributed.shards, "PORTION_BYTES", 4000)
    report = convert(trained, tmp_path / "out", mapping_of(Old(), New()), to=to)
    assert report.n_shards == 1
    assert max(nbytes for _, nbytes in made) <= max(held) <= 4000 < report.n_bytes / 4


def test_a_dtype_that_the_format_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = save_alone({"z": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "old")
    with pytest.raises(MappingError, match=r"'z' is torch\.complex128, which safetensors has not; write a dcp directory instead"):
        convert(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_keys_stay_without_a_mapping(trained: Path, old_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    convert(trained, tmp_path / "same")
    got = load_file(tmp_path / "same" / "model.safetensors")
    assert got.keys() == old_state.keys()


def test_what_exists_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out' exists; name a new directory"):
        convert(trained, tmp_path / "out")
    (tmp_path / "other.incomplete").mkdir()
    with pytest.raises(CheckpointError, match="unfinished conversion of something that is not recorded"):
        convert(trained, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not a directory; create it first"):
        convert(trained, tmp_path / "nowhere" / "out")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        convert(trained, tmp_path / "zero", max_shard_bytes=0)


def stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion to a folder that ended after two files."""
    write, count = automatch.distributed.shard_files.ShardFiles.write, 0

    def some(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("the disk is full")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(automatch.distributed.shard_files.ShardFiles, "write", some)
        with pytest.raises(LoadError, match="the disk is full"):
            convert(source, out, mapping_of(Old(), New()), max_shard_bytes=LIMIT)
    return out.with_name(f"{out.name}.incomplete")


def test_only_the_same_conversion_is_taken_up(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = Path(shutil.copytree(trained, tmp_path / "source")), tmp_path / "out"
    kept = contents(stopped(source, out, monkeypatch))
    other = mapping_of(
        Old(), New(), [replace(m, sources=("layers.1.norm.bias",)) if m.target == "blocks.0.ln.bias" else m for m in matches()]
    )
    for mapping, limit in ((other, LIMIT), (mapping_of(Old(), New()), 2 * LIMIT)):
        with pytest.raises(
            CheckpointError, match=r"out\.incomplete' holds an unfinished conversion of this checkpoint with another mapping"
        ):
            convert(source, out, mapping, max_shard_bytes=limit)
    (source / "__0_0.distcp").touch()  # a checkpoint that was saved again has the same keys and sizes
    with pytest.raises(CheckpointError, match="of this one before it was written again; finish that one or remove the directory"):
        convert(source, out, mapping_of(Old(), New()), max_shard_bytes=LIMIT)
    assert contents(tmp_path / "out.incomplete") == kept


def test_a_checkpoint_that_is_written_to_meanwhile_is_not_converted(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    write = automatch.distributed.shard_files.ShardFiles.write

    def saved_again(*args: Any) -> None:
        (source / "__0_0.distcp").touch()
        write(*args)

    monkeypatch.setattr(automatch.distributed.shard_files.ShardFiles, "write", saved_again)
    with pytest.raises(CheckpointError, match="source' was written to while it was converted"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mapping_for_another_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="is not a key of the checkpoint"):
        convert(trained, tmp_path / "out", mapping_of(New(), Old(), split_back()))
    assert list(tmp_path.iterdir()) == []


def test_work_is_split_by_bytes() -> None:
    assert assign({0: 5, 1: 3, 2: 3, 3: 1}, 2) == [[0, 3], [1, 2]]
    assert assign({}, 3) == [[], [], []]
