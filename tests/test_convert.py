from __future__ import annotations

import json
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import automatch
from automatch import CheckpointError, KeyMapping, MappingError, Match, open_checkpoint
from automatch.convert import convert_checkpoint
from automatch.convert.pickle_writer import write_pickle
from automatch.mapping import Side
from automatch.readers._pickle import read_pickle_bytes
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Adapt, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, chain, output_shape


class Settings:
    """A class that a training script pickles among its hyper-parameters."""

    def __init__(self, width: int) -> None:
        self.width, self.names = width, ["a", "b"]


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 4)).state_dict()
    state["head"] = state["2.weight"]
    state["half"] = torch.randn(3, 5).to(torch.bfloat16)
    state["flags"] = torch.tensor([True, False, True])
    return state


def mapping_of(ckpt, matches: list[Match]) -> KeyMapping:
    """A mapping whose target is exactly what the matches give."""
    source = open_checkpoint(ckpt).spec
    shapes = [output_shape(m.transform, [source[key].shape for key in m.sources]) for m in matches]
    target = StateSpec(
        tuple(TensorSpec(m.target, shape, source[m.sources[0]].dtype) for m, shape in zip(matches, shapes, strict=True)), "model"
    )
    return KeyMapping(Side.of(source), Side.of(target), tuple(matches))


def renamed(ckpt) -> KeyMapping:
    return mapping_of(ckpt, [Match(f"net.{key}", (key,)) for key in open_checkpoint(ckpt).spec.keys])


CONVERTED = [
    Match("joined", ("0.bias", "1.weight"), Concat(0)),
    Match("joined columns", ("2.weight", "2.weight"), Concat(1)),
    Match("stacked", ("0.bias", "1.weight"), Stack(0)),
    Match("rows", ("0.weight",), Slice(0, 2, 3)),
    Match("columns", ("2.weight",), Slice(1, 1, 2)),
    Match("turned", ("2.weight",), Permute((1, 0))),
    Match("flat", ("0.weight",), Reshape((8, 27))),
    Match("chained", ("0.weight",), chain(Slice(0, 0, 2), Reshape((2, 27)), Permute((1, 0)))),
    Match("rotary", ("2.weight",), PermuteElements(0, (2, 2), (1, 0))),
    Match("half again", ("half",), Copy()),
]


def lightning(state) -> dict:
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 10**12,
        "hyper_parameters": {
            "settings": Settings(3),
            "path": PurePosixPath("a/b"),
            "set": {1, 2},
            "bytes": b"\0x",
            "big": -(2**80),
        },
        "callbacks": {"best": torch.tensor(0.5), "scores": [1.5, float("inf"), None, True]},
        "loops": {"fit": {"state": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "state_dict": state,
    }


SOURCES = ["torch", "legacy", "protocol 4", "lightning", "safetensors", "shards", "npz", "dict"]


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    """The same tensors in every form that is written here."""
    state, path = state_dict(), tmp_path / "source"
    match request.param:
        case "torch" | "legacy" | "protocol 4":
            options = {"legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}.get(request.param, {})
            torch.save(state, path.with_suffix(".pt"), **options)
            return path.with_suffix(".pt")
        case "lightning":
            torch.save(lightning(state), path.with_suffix(".ckpt"))
            return path.with_suffix(".ckpt")
        case "safetensors":
            save_file({key: value.clone() for key, value in state.items()}, path.with_suffix(".safetensors"), metadata={"author": "me"})
            return path.with_suffix(".safetensors")
        case "shards":
            path.mkdir()
            keys = list(state)
            for i, part in enumerate((keys[::2], keys[1::2])):
                save_file({key: state[key].clone() for key in part}, path / f"model-{i}.safetensors")
            weight_map = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(keys)}
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
            return path
        case "npz":
            np.savez(path.with_suffix(".npz"), **{key: value.float().numpy() for key, value in state.items()})
            return path.with_suffix(".npz")
        case _:
            return lightning(state)


def read(path) -> dict[str, torch.Tensor]:
    """What the format's own library reads."""
    if path.is_dir():
        parts = sorted(path.glob("*.safetensors"))
        return {key: value for part in parts for key, value in load_file(part).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=False)
    return content.get("state_dict", content)


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out.ckpt", "out.bin", "out"])
@pytest.mark.parametrize("verify", [True, False])
def test_every_source_to_every_output(source, tmp_path, out, verify):
    mapping = mapping_of(source, [*renamed(source).matches, *CONVERTED])
    expected = mapping.apply(source)
    result = mapping.convert(source, tmp_path / out, verify=verify)
    written = read(tmp_path / out)
    assert set(written) == set(expected)
    for key, value in expected.items():
        assert written[key].dtype == value.dtype
        assert torch.equal(written[key], value), key
    assert result.n_keys == len(expected)
    assert result.verified is verify
    assert result.n_bytes == sum(value.nbytes for value in expected.values())
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["flax.msgpack", "flax_chunked.msgpack", "keras.weights.h5", "model.keras", "small.gguf", "dcp_two_ranks"])
def test_files_of_other_libraries_are_converted(tmp_path, name):
    pytest.importorskip("h5py" if "keras" in name else "gguf" if "gguf" in name else "torch")
    ckpt = Path(__file__).parent / "readers" / "data" / name
    expected = renamed(ckpt).apply(ckpt)
    for out in ("out.safetensors", "out.pt", "out"):
        renamed(ckpt).convert(ckpt, tmp_path / out, verify=True)
        written = read(tmp_path / out)
        assert set(written) == set(expected)
        assert all(torch.equal(written[key], value) for key, value in expected.items())


def test_plain_renames_and_whole_rows_are_not_decoded(tmp_path, monkeypatch):
    save_file({key: value.clone() for key, value in state_dict().items()}, tmp_path / "a.safetensors")
    rows = [match for match in CONVERTED if match.target in ("joined", "stacked", "rows", "flat")]
    mapping = mapping_of(tmp_path / "a.safetensors", [*renamed(tmp_path / "a.safetensors").matches, *rows])
    expected = mapping.apply(tmp_path / "a.safetensors")
    monkeypatch.setattr("automatch.readers._entries.tensor_from_bytes", lambda *_: pytest.fail("a tensor was decoded"))
    for out in ("b.safetensors", "b.pt", "b"):
        result = mapping.convert(tmp_path / "a.safetensors", tmp_path / out)
        assert result.n_moved == result.n_keys == len(expected)
        written = read(tmp_path / out)
        assert all(torch.equal(written[key], value) for key, value in expected.items())


def test_everything_else_of_a_lightning_checkpoint_is_kept(tmp_path):
    content = lightning(state_dict())
    torch.save(content, tmp_path / "a.ckpt")
    renamed(tmp_path / "a.ckpt").convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    written = torch.load(tmp_path / "b.ckpt", weights_only=False)
    assert list(written) == list(content)
    assert set(written["state_dict"]) == {f"net.{key}" for key in content["state_dict"]}
    held = written["hyper_parameters"]
    assert isinstance(held.pop("settings"), Settings)
    content["hyper_parameters"].pop("settings")
    assert held == content["hyper_parameters"]
    assert written["callbacks"] == content["callbacks"]
    adam, old = (c["optimizer_states"][0] for c in (written, content))
    assert adam["param_groups"] == old["param_groups"]
    assert all(torch.equal(adam["state"][0][name], value) for name, value in old["state"][0].items())


def test_other_entries_beside_the_weights_are_kept(tmp_path):
    torch.save({"w": torch.ones(2), "epoch": 3}, tmp_path / "a.pt")
    renamed(tmp_path / "a.pt").convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt")["epoch"] == 3


def test_a_file_of_plain_tensors_stays_loadable_without_trust_and_tied(tmp_path):
    torch.save(state_dict(), tmp_path / "a.pt")
    mapping = mapping_of(tmp_path / "a.pt", [*renamed(tmp_path / "a.pt").matches, CONVERTED[5], replace(CONVERTED[5], target="turned too")])
    mapping.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    written = torch.load(tmp_path / "b.pt", weights_only=True, mmap=True)
    assert written["net.head"].data_ptr() == written["net.2.weight"].data_ptr()
    assert written["turned"].data_ptr() == written["turned too"].data_ptr()
    assert written._metadata["net.1"] == {"version": 2}
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        assert archive.testzip() is None
        assert all(info.header_offset >= 0 for info in archive.infolist())


def test_storages_that_nothing_uses_any_more_are_left_out(tmp_path):
    torch.save({"big": torch.zeros(100_000), "small": torch.ones(3)}, tmp_path / "a.pt")
    mapping_of(tmp_path / "a.pt", [Match("x", ("small",))]).convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").stat().st_size < 4000


def test_metadata_is_kept_and_tensors_are_aligned(tmp_path):
    state = {"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(3, dtype=torch.float64), "word": torch.ones(3)}
    save_file(state, tmp_path / "a.safetensors", metadata={"author": "me", "format": "pt"})
    renamed(tmp_path / "a.safetensors").convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"author": "me", "format": "pt"}
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert all(checkpoint.region(t.key).offset % {"uint8": 1, "float64": 8, "float32": 4}[t.dtype] == 0 for t in checkpoint.spec)


def test_a_folder_is_cut_into_shards_that_an_index_lists(tmp_path):
    torch.save({f"l{i}.w": torch.full((100,), float(i)) for i in range(10)}, tmp_path / "a.pt")
    mapping = renamed(tmp_path / "a.pt")
    convert_checkpoint(mapping, tmp_path / "a.pt", tmp_path / "out", max_shard_bytes=1200, verify=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.spec.keys == tuple(match.target for match in mapping.matches)


def test_progress_counts_bytes_up_to_all_of_them(tmp_path):
    torch.save(state_dict(), tmp_path / "a.pt")
    mapping = mapping_of(tmp_path / "a.pt", [*renamed(tmp_path / "a.pt").matches, *CONVERTED])
    for out in ("b.safetensors", "b"):
        seen: list[tuple[int, int]] = []
        result = mapping.convert(
            tmp_path / "a.pt", tmp_path / out, progress=lambda done, total, seen=seen: seen.append((done, total)), verify=True
        )
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (2 * result.n_bytes, 2 * result.n_bytes)


def test_a_proposed_mapping_converts(tmp_path):
    model = nn.ModuleDict({"net": nn.Linear(3, 2)})
    torch.save({"state_dict": {"model.module.net.weight": torch.ones(2, 3), "model.module.net.bias": torch.ones(2)}}, tmp_path / "a.ckpt")
    mapping = automatch.propose_mapping(model, tmp_path / "a.ckpt")
    mapping.convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    model.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert float(model["net"].weight.detach().sum()) == 6.0


# ---- refusals -----------------------------------------------------------------------------------


def refused(mapping, ckpt, out, words, error=CheckpointError):
    before = sorted(path.name for path in out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(error, match=words):
        mapping.convert(ckpt, out)
    if before is not None:
        assert sorted(path.name for path in out.parent.iterdir()) == before


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    ckpt = tmp_path / "a.pt"
    torch.save({"w": torch.ones(4, 4), "c": torch.ones(2, dtype=torch.complex128)}, ckpt)
    mapping = renamed(ckpt)
    refused(mapping, ckpt, ckpt, "is the checkpoint itself")
    refused(mapping, ckpt, tmp_path / "b.xyz", "does not say its format; name it")
    refused(mapping, ckpt, tmp_path / "no" / "b.pt", r"folder .*no' does not exist")
    refused(mapping, ckpt, tmp_path / "b.safetensors", "'net.c' is complex128, which safetensors has not; write a .pt file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refused(mapping, ckpt, tmp_path / "full", "exists and is not empty; name a new folder")
    other = mapping_of({"w": torch.ones(5, 4)}, [Match("w", ("w",))])
    refused(other, ckpt, tmp_path / "b.pt", "made for another checkpoint", MappingError)
    adapted = replace(mapping, matches=(Match("net.w", ("w",), Adapt("resize", (8, 4))),))
    refused(adapted, ckpt, tmp_path / "b.pt", r"needs the model's own values; load it with automatch\.load", MappingError)
    wrong = replace(mapping, matches=(Match("net.w", ("w",), Reshape((2, 8))),))
    refused(wrong, ckpt, tmp_path / "b.pt", r"size mismatch for 'net\.w'.*\(2, 8\), the model wants \(4, 4\)", MappingError)
    gone = replace(mapping, matches=(Match("net.w", ("v",)),))
    refused(gone, ckpt, tmp_path / "b.pt", "'v', which is not a key", MappingError)


# ---- the pickle writer ---------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5)
)
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4),
        st.sets(st.integers(), max_size=3),
        st.frozensets(st.text(max_size=2), max_size=3),
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(plain, st.integers(2, 5))
def test_a_pickle_read_as_data_and_written_again_means_the_same(value, protocol):
    tree, _ = read_pickle_bytes(pickle.dumps(value, protocol), "test")
    assert pickle.loads(write_pickle(tree, lambda node: node)) == value


def test_objects_shared_and_recursive_parts_survive():
    shared = [1]
    value = {"a": shared, "b": shared, "c": Settings(3), "p": PurePosixPath("x/y"), "r": range(3)}
    value["self"] = value
    for protocol in (2, 4):
        tree, names = read_pickle_bytes(pickle.dumps(value, protocol), "test")
        again = pickle.loads(write_pickle(tree, lambda node: node))
        assert again["a"] is again["b"]
        assert again["self"] is again
        assert (again["c"].width, again["c"].names, again["p"], again["r"]) == (3, ["a", "b"], value["p"], range(3))
        assert f"{Settings.__module__}.Settings" in names


def test_deep_nesting_is_an_error_and_no_crash():
    tree: list = []
    for _ in range(sys.getrecursionlimit()):
        tree = [tree]
    with pytest.raises(CheckpointError, match="nested too deeply to be written again"):
        write_pickle(tree, lambda node: node)
