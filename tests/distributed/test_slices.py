"""Reading slices out of stored tensors, and storage that is damaged or hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sharded_models import Old, mapping_of, new_model, old_model
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from worlds import save_alone

import automatch.distributed._slices as slices
import automatch.distributed.storage
from automatch.distributed import load
from automatch.distributed.storage import DirectoryReader, FolderReader, identity, open_reader
from automatch.errors import AutomatchError, CheckpointError, UnsafeCheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_alone({"model": old_model().state_dict(), "epoch": 3}, tmp_path / "old")


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    return shape, starts, [draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)]


@given(boxes(), st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]), st.booleans(), st.booleans())
def test_a_slice_is_what_indexing_gives(box: Any, dtype: torch.dtype, strided: bool, long_runs: bool) -> None:
    shape, starts, lengths = box
    whole = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    place = tuple(slice(a, a + n) for a, n in zip(starts, lengths, strict=True))
    room = torch.zeros([2 * n for n in lengths], dtype=dtype)
    target = room[tuple(slice(0, None, 2) for _ in lengths)] if strided else torch.zeros(lengths, dtype=dtype)
    with tempfile.TemporaryFile(buffering=0) as file, pytest.MonkeyPatch.context() as patch:
        file.write(b"before")
        buffer = io.BytesIO()
        torch.save(whole, buffer)
        file.write(buffer.getvalue())
        file.write(b"after")
        patch.setattr(slices, "_SMALLEST_RUN", 4096 if long_runs else 1)
        patch.setattr(slices, "_BLOCK", 8)
        stored = slices.stored_tensor(file.fileno(), 6, len(buffer.getvalue()), "it")
        assert stored is not None
        slices.read_slice(file.fileno(), stored, starts, lengths, target)
    assert torch.equal(target, whole[place])


def test_tensors_that_are_not_stored_plainly_are_read_whole(tmp_path: Path) -> None:
    base = torch.randn(8, 6)
    path = save_alone({"turned": base.t(), "part": base[2:5], "real": base[:, 1]}, tmp_path / "views")
    got = {"turned": torch.zeros(6, 8), "part": torch.zeros(3, 6), "real": torch.zeros(8)}
    load(got, path, mapping_from(got, got))
    assert torch.equal(got["turned"], base.t())
    assert torch.equal(got["part"], base[2:5])
    assert torch.equal(got["real"], base[:, 1])


def mapping_from(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> Any:
    from automatch.mapping import KeyMapping, Match, Side
    from automatch.specs import spec_of_state_dict

    sides = [Side.of(spec_of_state_dict(state)) for state in (source, target)]
    return KeyMapping(*sides, tuple(Match(b, (a,), decided=True) for a, b in zip(source, target, strict=True)))


def test_the_dtype_is_the_models(tmp_path: Path) -> None:
    value = torch.randn(4, 4)
    path = save_alone({"a": value}, tmp_path / "single")
    got = {"b": torch.zeros(4, 4, dtype=torch.bfloat16)}
    load(got, path, mapping_from({"a": value}, got))
    assert torch.equal(got["b"], value.bfloat16())


class _Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, (str(Path(os.environ["EVIL"])),))


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    return tmp_path / "executed"


def test_metadata_is_not_executed(saved: Path, evil: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(UnsafeCheckpointError, match=r"refers to posix.mkdir, which is code; pass trust=True"):
        open_reader(saved).read_metadata()
    assert not evil.exists()


@pytest.mark.parametrize(("of", "name"), [("pathlib Path", "home"), ("torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING", "mro")])
def test_only_members_of_enumerations_are_taken_by_name(saved: Path, of: str, name: str) -> None:
    module, cls = of.split()
    (saved / ".metadata").write_bytes(f"cbuiltins\ngetattr\n(c{module}\n{cls}\nV{name}\ntR.".encode())
    with pytest.raises(UnsafeCheckpointError, match=f"it takes '{name}' of .* which may be code; pass trust=True"):
        open_reader(saved).read_metadata()


def test_a_member_written_by_getattr_is_that_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)), raising=False)
    path, value = save_alone({"a": torch.arange(6.0)}, tmp_path / "old"), torch.zeros(6)
    load({"a": value}, path, mapping_from({"a": value}, {"a": value}))
    assert torch.equal(value, torch.arange(6.0))


def test_objects_are_not_executed(tmp_path: Path, evil: Path) -> None:
    path = save_alone({"a": torch.zeros(2), "thing": _Evil()}, tmp_path / "objects")
    state = {"a": torch.ones(2), "thing": None}
    with pytest.raises(UnsafeCheckpointError, match="entry 'thing' was not read"):
        load(state, path, mapping_from({"a": torch.zeros(2)}, {"a": torch.zeros(2)}))
    assert not evil.exists()
    assert torch.equal(state["a"], torch.ones(2))


def cut_short(path: Path) -> None:
    data = path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-3000])


def turn_bytes(path: Path) -> None:
    data = path / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[:] = bytes(len(raw))
    data.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"is damaged|cut short"),
        (turn_bytes, "is damaged: BadZipFile"),
        (lambda path: (path / "__0_0.distcp").unlink(), "cannot read .*No such file.*the checkpoint is incomplete"),
        (lambda path: (path / ".metadata").write_bytes(b"\x80\x04garbage"), r"\.metadata' is damaged"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps({"a": 1})), "holds dict, not the metadata"),
        (lambda path: (path / ".metadata").unlink(), "neither a torch.distributed.checkpoint directory"),
    ],
)
def test_damage_is_said_and_the_model_unchanged(saved: Path, damage: Any, message: str) -> None:
    damage(saved)
    model = new_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(model, saved, mapping_of(Old(), model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_path_out_of_the_checkpoint_is_refused(saved: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../old/__0_0.distcp"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="points outside the checkpoint"):
        load(new_model(), saved, mapping_of(Old(), new_model()))


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}']
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"not an index|not a file of that folder"):
        open_reader(tmp_path)


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_reader(tmp_path).read_metadata()


def test_a_safetensors_file_cut_short_under_the_reader_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    state = {"a": torch.randn(100, 100), "b": torch.randn(100, 100)}
    save_file(state, file)

    def cutting_read(*args: Any) -> int:
        os.truncate(file, file.stat().st_size // 2)
        return slices.read_slice(*args)

    monkeypatch.setattr(automatch.distributed.storage, "read_slice", cutting_read)
    got = {key: torch.zeros(100, 100) for key in state}
    with pytest.raises(CheckpointError, match=r"in model\.safetensors is cut short"):
        load(got, file, mapping_from(state, got))
    assert not any(value.any() for value in got.values())


def test_identity_changes_with_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    first = identity(saved)
    assert identity(saved) == first
    with (saved / "__0_0.distcp").open("ab") as file:
        file.write(b"more")
    assert identity(saved) != first


def test_one_safetensors_file_is_a_folder_of_one(tmp_path: Path) -> None:
    state = {"b": torch.randn(3), "scalar": torch.tensor(7.0)}
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"")
    got = {"b": torch.zeros(3), "scalar": torch.zeros(())}
    load(got, tmp_path / "x.safetensors", mapping_from(state, got))
    assert torch.equal(got["b"], state["b"])
    assert got["scalar"] == 7


def test_readers_are_torchs_own() -> None:
    assert issubclass(DirectoryReader, FileSystemReader)
    assert [base.__name__ for base in FolderReader.__mro__][1] == "HuggingFaceStorageReader"


def test_whatever_is_raised_is_automatchs(saved: Path) -> None:
    (saved / "junk").write_text(json.dumps({}))
    with pytest.raises(AutomatchError, match="cannot load into Parameter"):
        load(nn.Parameter(torch.zeros(1)), saved)
