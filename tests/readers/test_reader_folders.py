from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from automatch import CheckpointError, UnsafeCheckpointError, open_checkpoint

DATA = Path(__file__).with_name("data")


def layers(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(3, 2) for name in names}


def write_shards(folder, suffix: str = "safetensors"):
    """Two shards and an index, as Hugging Face libraries lay them out."""
    parts = [layers("z", "b"), layers("a", "c")]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return index, parts[0] | parts[1], names


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_behind_an_index(tmp_path, suffix):
    index, state, _ = write_shards(tmp_path, suffix)
    for path in (index, tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec.keys == tuple(state)
            assert all(torch.equal(checkpoint.tensor(key), value) for key, value in state.items())


def test_a_model_folder_prefers_safetensors_and_ignores_what_lies_beside(tmp_path):
    save_file(layers("safe"), tmp_path / "model.safetensors")
    torch.save(layers("bin"), tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    assert open_checkpoint(tmp_path).spec.keys == ("safe.weight",)
    (tmp_path / "model.safetensors").unlink()
    assert open_checkpoint(tmp_path).spec.keys == ("bin.weight",)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "epoch3.pt")
    assert open_checkpoint(tmp_path).spec.keys == ("bin.weight",)


def test_several_checkpoints_in_a_folder_are_a_question_not_a_guess(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(layers(name), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several checkpoints: 'a\.pt', 'b\.pt'; pass one of them"):
        open_checkpoint(tmp_path)


def test_a_key_that_the_index_leaves_out_is_said(tmp_path):
    index, state, names = write_shards(tmp_path)
    data = json.loads(index.read_text())
    del data["weight_map"]["c.weight"]
    index.write_text(json.dumps(data))
    spec = open_checkpoint(index).spec
    assert set(spec.keys) == set(state) - {"c.weight"}
    assert spec.notes == (f"the index does not list 1 keys of '{names[1]}', e.g. 'c.weight'; they are left out",)


def change(index, **weight_map):
    data = json.loads(index.read_text())
    data["weight_map"] |= {key.replace("_", "."): name for key, name in weight_map.items()}
    index.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside.safetensors", "a/../../outside.safetensors", "..\\outside", "", "a\0b", "x" * 5000]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / "m").mkdir()
    save_file(layers("evil"), tmp_path / "outside.safetensors")
    index, _, _ = write_shards(tmp_path / "m")
    change(index, evil_weight=name)
    with pytest.raises(CheckpointError, match="does not lie in its own folder"):
        open_checkpoint(index)


def test_a_link_out_of_the_folder_is_refused_but_the_hub_cache_is_read(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    index, state, names = write_shards(snapshot)
    shutil.move(snapshot / names[0], blobs / "0123")
    (snapshot / names[0]).symlink_to("../../blobs/0123")
    assert open_checkpoint(index).spec.keys == tuple(state)
    shutil.move(blobs / "0123", tmp_path / "elsewhere")
    (snapshot / names[0]).unlink()
    (snapshot / names[0]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link out of its own folder"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "valid JSON"),
        ("[]", "not an object"),
        ("{}", 'no "weight_map"'),
        ('{"weight_map": {}}', 'no "weight_map"'),
        ('{"weight_map": {"a": 3}}', "something else than text"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' stands twice"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "No such file"),
        ('{"weight_map": {"a": "."}}', "no file of tensors"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "no file of tensors"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_index_is_one_clear_error(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


def test_a_key_that_is_not_in_its_shard_is_named(tmp_path):
    index, _, names = write_shards(tmp_path)
    change(index, ghost_weight=names[0])
    with pytest.raises(CheckpointError, match=r"says that 'ghost\.weight' lies in"):
        open_checkpoint(index)


# ---- trainers' folders ----------------------------------------------------------------------------


SHAPES = {"0.weight": (16, 8), "0.bias": (16,), "1.weight": (16,), "1.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)}


@pytest.mark.parametrize(("name", "prefix", "wrapper"), [("deepspeed", "", ("module",)), ("lightning_fsdp.ckpt", "net.", ("state_dict",))])
def test_folders_that_trainers_wrote(name, prefix, wrapper):
    """Of two ranks, where the trainer shards; every tensor counts from 1."""
    with open_checkpoint(DATA / name) as checkpoint:
        assert checkpoint.spec.wrapper == wrapper
        assert {key.removeprefix(prefix): checkpoint.spec[key].shape for key in checkpoint.spec.keys} == SHAPES
        for key in checkpoint.spec.keys:
            assert torch.equal(checkpoint.tensor(key).reshape(-1), torch.arange(1.0, 1 + checkpoint.spec[key].numel)), key


def test_partitioned_deepspeed_weights_are_named_with_the_way_out(tmp_path):
    """The names that DeepSpeed gives the files of two ranks at ZeRO stage 3, in its own folder and in Lightning's."""
    for folder in ("global_step1", "checkpoint"):
        (tmp_path / folder).mkdir()
        (tmp_path / "latest").write_text(folder)
        for rank in (0, 1):
            torch.save({"module": {"w": torch.empty(0)}}, tmp_path / folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            torch.save({}, tmp_path / folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        with pytest.raises(CheckpointError, match=r"DeepSpeed checkpoint in 2 partitions; join them with the zero_to_fp32\.py"):
            open_checkpoint(tmp_path)


def test_more_shards_than_files_may_be_open_names_the_limit(tmp_path, monkeypatch):
    index, _, _ = write_shards(tmp_path)

    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(CheckpointError, match=r"Too many open files; raise the limit with ulimit -n"):
        open_checkpoint(index)


@pytest.fixture(params=["by value", "by getattr"])
def saved(tmp_path, request, monkeypatch):
    """As the Python at hand writes the members of an enumeration, and as 3.11.0 to 3.11.3 (of Debian 12, say) did."""
    if request.param == "by getattr":
        monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)), raising=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, checkpoint_id=tmp_path / "dcp")
    return model, tmp_path / "dcp"


def test_distributed_checkpoints(saved):
    model, folder = saved
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.wrapper == ("model",)
        assert checkpoint.spec.keys == tuple(model.state_dict())
        assert all(torch.equal(checkpoint.tensor(key), value) for key, value in model.state_dict().items())


def test_distributed_checkpoints_describe_without_reading_tensors(saved):
    _, folder = saved
    for part in folder.glob("*.distcp"):
        part.write_bytes(os.urandom(part.stat().st_size))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec["0.weight"].shape == (4, 3)
        with pytest.raises(CheckpointError, match="zip archive"):
            checkpoint.tensor("0.weight")


def test_distributed_checkpoints_that_lead_elsewhere_or_lack_files_are_refused(saved):
    _, folder = saved
    metadata = folder / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(CheckpointError, match="does not lie in its own folder"):
        open_checkpoint(folder)
    metadata.write_bytes(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    with pytest.raises(UnsafeCheckpointError, match=r"would run 'posix\.system'"):
        open_checkpoint(folder)
    metadata.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(folder)
    metadata.write_bytes(whole)
    part = next(folder.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(folder)
    part.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("offsets", [(0, 0), (3, 0), (8, 0), (2**62, 0)])
def test_chunks_that_do_not_tile_their_tensor_are_refused(tmp_path, offsets):
    """The second rank's rows begin at 4; anywhere else they overlap the first ones, or leave a hole."""
    shutil.copytree(DATA / "dcp_two_ranks", tmp_path / "dcp")
    metadata = tmp_path / "dcp" / ".metadata"
    tree = pickle.loads(metadata.read_bytes())
    for chunk in tree.state_dict_metadata["sharded"].chunks[1:]:
        chunk.offsets = torch.Size(offsets)
    tree.storage_data = {
        replace(i, offset=i.offset and torch.Size(offsets if any(i.offset) else (0, 0))): v for i, v in tree.storage_data.items()
    }
    metadata.write_bytes(pickle.dumps(tree))
    with pytest.raises(CheckpointError, match=r"do not tile its shape \[7, 2\]|2\^60|is missing"):
        open_checkpoint(tmp_path / "dcp")


def test_tensors_that_several_ranks_wrote_are_joined():
    """`data/dcp_two_ranks` holds rows 1 to 4 of a 7 × 2 tensor from one rank and 5 to 7 from the other."""
    with open_checkpoint(DATA / "dcp_two_ranks") as checkpoint:
        assert checkpoint.spec["sharded"].shape == (7, 2)
        assert torch.equal(checkpoint.tensor("sharded"), torch.arange(1.0, 15.0).reshape(7, 2))
        assert torch.equal(checkpoint.tensor("whole"), torch.arange(1.0, 4.0))
