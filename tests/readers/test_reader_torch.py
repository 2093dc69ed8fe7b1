from __future__ import annotations

import collections
import enum
import functools
import os
import pathlib
import pickle
import zipfile

import pytest
import torch
from torch import nn

import automatch
from automatch import CheckpointError, UnsafeCheckpointError, open_checkpoint


class Hyper:
    def __init__(self) -> None:
        self.width, self.again = 3, self


class Colour(enum.Enum):
    RED = 1


class Named:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 wrote it, and what can be done with one."""

    def __reduce__(self):
        return getattr, (Colour, "RED")

    def __call__(self):
        raise AssertionError


class Calls:
    def __reduce__(self):
        return Named(), ()


class Passes:
    def __reduce__(self):
        return functools.partial, (getattr, Colour)


class Digs:
    def __reduce__(self):
        return getattr, (Named(), "__class__")


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 4))


FORMS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
    "legacy protocol 5": {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
def test_spec_and_tensors_are_those_of_the_state_dict(tmp_path, form):
    state = model().state_dict()
    torch.save(state, tmp_path / "model.pt", **form)
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert checkpoint.spec.keys == tuple(state)
        assert checkpoint.spec.wrapper == ()
        for key, value in state.items():
            assert checkpoint.spec[key].shape == tuple(value.shape)
            assert checkpoint.spec[key].kind is None
            assert checkpoint.tensor(key).dtype == value.dtype
            assert torch.equal(checkpoint.tensor(key), value)


@every_form
def test_every_dtype(tmp_path, form):
    names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128 float8_e4m3fn"
    state = {name: torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.float32).to(getattr(torch, name)) for name in names.split()}
    torch.save(state, tmp_path / "model.pt", **form)
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        for key, value in state.items():
            assert checkpoint.spec[key].dtype == key
            assert checkpoint.tensor(key).dtype == value.dtype
            assert torch.equal(checkpoint.tensor(key).view(torch.uint8), value.view(torch.uint8))


@every_form
def test_views_strides_aliases_scalars_and_empty_tensors(tmp_path, form):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"base": base, "same": base, "column": base[:, 2], "turned": base.T, "part": base[1:3, 2:5], "scalar": torch.tensor(7)}
    state |= {"empty": torch.empty(0, 3), "wide": torch.ones(1).expand(5), "parameter": nn.Parameter(base.clone())}
    torch.save(state, tmp_path / "model.pt", **form)
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert {t.key: t.alias_of for t in checkpoint.spec if t.alias_of} == {"same": "base"}
        for key, value in state.items():
            assert torch.equal(checkpoint.tensor(key), value), key


@every_form
def test_hyper_parameters_with_classes_do_not_block_the_weights(tmp_path, form, monkeypatch):
    state = model().state_dict()
    held = {"h": Hyper(), "e": Colour.RED, "f": functools.partial(torch.nn.functional.relu, inplace=True), "p": pathlib.Path("x")}
    held |= {
        "n": [Named(), Named()],
        "c": collections.Counter("aab"),
        "d": collections.defaultdict(list, a=[1]),
        "s": {1, 2},
        "b": b"bytes",
    }
    torch.save({"epoch": 3, "hyper_parameters": held, "state_dict": state}, tmp_path / "model.ckpt", **form)
    monkeypatch.setattr(Hyper, "__setstate__", lambda self, state: pytest.fail("code of the file ran"), raising=False)
    with open_checkpoint(tmp_path / "model.ckpt") as checkpoint:
        assert checkpoint.spec.wrapper == ("state_dict",)
        assert all(torch.equal(checkpoint.tensor(key), value) for key, value in state.items())


@every_form
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_a_pickle_that_would_run_something_is_refused_with_its_name(tmp_path, form, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = dict(model().state_dict())
    content = {"beside": {"state_dict": state, "x": Runs()}, "inside": state | {"x": Runs()}, "alone": Runs()}[place]
    torch.save(content, "model.pt", **form)
    with pytest.raises(UnsafeCheckpointError, match=r"would run 'posix\.system'.*trust=True"):
        open_checkpoint("model.pt")
    assert not pathlib.Path("ran").exists()


@every_form
@pytest.mark.parametrize("what", [Calls(), Passes(), Digs(), [Named(), getattr], [Named(), Calls()]], ids=lambda what: type(what).__name__)
def test_a_getattr_that_does_more_than_name_a_member_is_refused(tmp_path, form, what):
    torch.save({"state_dict": model().state_dict(), "x": what}, tmp_path / "model.pt", **form)
    with pytest.raises(UnsafeCheckpointError, match=r"would run '(builtins|__builtin__)\.getattr'"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_pickled_module_is_refused_with_the_classes_it_wants(tmp_path):
    torch.save(model(), tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"only code can build: 'torch\.nn\.modules\.batchnorm\.BatchNorm2d'.*state_dict"):
        open_checkpoint(tmp_path / "model.pt")


def test_trust_runs_the_code_for_this_call_only(tmp_path):
    state = model().state_dict()
    torch.save({"state_dict": state, "hyper": Hyper()}, tmp_path / "model.ckpt")
    with open_checkpoint(tmp_path / "model.ckpt", trust=True) as checkpoint:
        assert all(torch.equal(checkpoint.tensor(key), value) for key, value in state.items())
    torch.save(state | {"x": Runs()}, tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpointError, match="would run"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_tensor_that_only_code_can_build_is_not_left_out_silently(tmp_path):
    state = {"plain": torch.zeros(2), "sparse": torch.eye(3).to_sparse()}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"'sparse'.*_rebuild_sparse_tensor"):
        open_checkpoint(tmp_path / "model.pt")


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    torch.save({"weight": torch.ones(2), "epoch": 3, "name": "x", "_extra_state": None, "_metadata": {"a": 1}}, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").spec.keys == ("weight",)


def test_plain_pickles_of_tensors_are_read_or_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"holds no tensors, but 'a' \(int\)"):
        open_checkpoint(tmp_path / "model.pkl")


@every_form
def test_a_truncated_file_is_an_error_at_once(tmp_path, form):
    torch.save({"state_dict": model().state_dict()}, tmp_path / "model.pt", **form)
    whole = (tmp_path / "model.pt").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"empty|truncated|damaged|known format|needs"):
            open_checkpoint(tmp_path / "cut.pt")


def test_a_recompressed_archive_is_read(tmp_path):
    state = model().state_dict()
    torch.save(state, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with open_checkpoint(tmp_path / "small.pt") as checkpoint:
        assert all(torch.equal(checkpoint.tensor(key), value) for key, value in state.items())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "model.pt")


def test_proposing_reads_no_tensor_data(tmp_path):
    layer = nn.Linear(1000, 1000)
    torch.save(layer.state_dict(), tmp_path / "model.pt")
    with (tmp_path / "model.pt").open("r+b") as file:  # the weights become noise that no header can see
        data = file.read()
        at = data.index(layer.weight.detach().numpy().tobytes()[:4000])
        file.seek(at)
        file.write(os.urandom(4_000_000))
    mapping = automatch.propose_mapping(layer, tmp_path / "model.pt")
    assert mapping.target.n_keys == 2


def test_a_missing_file_a_folder_and_other_things_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*nope\.pt.*No such file"):
        open_checkpoint(tmp_path / "nope.pt")
    with pytest.raises(CheckpointError, match="holds no checkpoint, but nothing"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe")
    for name, content, words in [
        ("lfs.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("page.pt", b"<!DOCTYPE html><html>", "web page"),
        ("text.pt", b"hello world, this is text", "no known format"),
        ("empty.pt", b"", "is empty"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / name)
