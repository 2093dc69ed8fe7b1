from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import automatch
from automatch import packing
from automatch.errors import CheckpointError, ModelError
from automatch.golden import Golden, record_golden
from automatch.specs import spec_of_model

WHOLE = automatch.snapshot(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), sample=torch.ones(2, 3))
SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x, scale=1.0):
        return {"out": self.fc(x) * scale, "raw": (x,)}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's package in a git repository, and an instance of its model."""
    folder = tmp_path / "repo" / "mine" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "block.py").write_text(SOURCE)
    git = ["git", "-C", str(tmp_path / "repo"), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.syspath_prepend(str(tmp_path / "repo"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
    module = importlib.import_module("mine.models.block")
    return tmp_path / "repo", module.Block()


def test_a_snapshot_tells_where_a_model_came_from(package):
    repo, model = package
    read = automatch.read_snapshot({"state_dict": {}, "automatch_snapshot": automatch.snapshot(model)})
    assert read.model == "mine.models.block.Block"
    assert read.spec.tensors == spec_of_model(model).tensors
    assert read.spec.modules == (("", "Block"), ("fc", "Linear"))
    assert read.sources == {"mine/models/block.py": SOURCE}
    head = subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert read.commit == head
    assert read.versions["torch"] == torch.__version__.partition("+")[0] or read.versions["torch"] == torch.__version__
    assert read.golden is None
    (repo / "mine" / "models" / "block.py").write_text(SOURCE + "# changed\n")
    assert automatch.snapshot(model)["commit"] == head + "+"


def test_it_is_small_and_read_without_executing_anything(package, tmp_path):
    _, model = package
    path = automatch.save_snapshot(model, tmp_path / "m.pt", sample=torch.ones(2, 3))
    loaded = torch.load(path, weights_only=True)
    assert set(loaded) == {"state_dict", "automatch_snapshot"}
    assert path.stat().st_size < 20_000
    read = automatch.read_snapshot(path)
    assert torch.equal(read.golden.outputs[0], model(torch.ones(2, 3))["out"])
    assert read.spec.fingerprint == spec_of_model(model).fingerprint


def test_other_tools_and_automatch_itself_pass_over_it(package, tmp_path):
    _, model = package
    path = automatch.save_snapshot(model, tmp_path / "m.pt", sample=torch.ones(2, 3))
    with automatch.open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.keys == ("fc.weight", "fc.bias")
    torch.save(nn.Linear(3, 3).state_dict(), path)
    with automatch.open_checkpoint(automatch.save_snapshot(model, path)) as checkpoint:
        assert checkpoint.spec.keys == ("weight", "bias")


def test_adding_to_a_checkpoint_keeps_what_is_in_it(package, tmp_path):
    _, model = package
    torch.save({"model": model.state_dict(), "epoch": 7}, tmp_path / "c.pt")
    automatch.save_snapshot(model, tmp_path / "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    assert loaded["epoch"] == 7
    assert torch.equal(loaded["model"]["fc.weight"], model.fc.weight)
    assert automatch.read_snapshot(loaded).model == "mine.models.block.Block"
    assert automatch.read_snapshot({"model": loaded["model"]}) is None


@pytest.mark.parametrize("plain", [False, True])
def test_a_bare_state_dict_stays_one(package, tmp_path, plain):
    _, model = package
    path = tmp_path / "bare.pt"
    torch.save(dict(model.state_dict()) if plain else model.state_dict(), path)
    automatch.save_snapshot(model, path, sample=torch.ones(2, 3))
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["fc.weight", "fc.bias"]
    type(model)().load_state_dict(loaded)
    for ckpt in (path, loaded):
        assert automatch.read_snapshot(ckpt).model == "mine.models.block.Block"
        assert automatch.propose_mapping(model, ckpt).verify(model, ckpt)
    automatch.save_snapshot(model, path)
    assert automatch.read_snapshot(path).golden is None


def test_files_that_cannot_take_a_snapshot_stay_as_they_are(package, tmp_path):
    _, model = package
    path = tmp_path / "c.safetensors"
    for number in range(3):  # headers of several lengths
        save_file(model.state_dict(), path, metadata={"note": "x" * 60 * number})
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=r"cannot add a snapshot to .*c.safetensors': it is a safetensors file"):
            automatch.save_snapshot(model, path)  # torch.load may read it, and torch.save would make a pickle of it
        assert path.read_bytes() == before
    path = tmp_path / "c.pt"
    for content in (b"not a checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot add a snapshot"):
            automatch.save_snapshot(model, path)
        assert path.read_bytes() == content
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds no dict of names"):
        automatch.save_snapshot(model, path)


@pytest.mark.parametrize("sample", [torch.ones(2, 3), (torch.ones(2, 3), 2.0), {"x": torch.ones(2, 3), "scale": 2.0}])
def test_golden_batches_come_back(package, sample):
    _, model = package
    model.train()
    golden = record_golden(model, sample)
    assert model.training
    again = Golden.unpack(golden.pack())
    assert len(again.outputs) == 2
    assert again.error(golden.outputs) == 0
    assert again.error((golden.outputs[0] + 1, golden.outputs[1])) > 0.1
    assert again.error(golden.outputs[:1]) == float("inf")
    assert again.error((golden.outputs[0] * float("nan"), golden.outputs[1])) == float("inf")
    assert [path for path, _ in again.trace] == ["fc"]


def test_a_model_that_fails_on_the_sample_is_named(package):
    _, model = package
    with pytest.raises(ModelError, match="Block failed on the sample batch"):
        automatch.snapshot(model, sample=torch.ones(2, 99))


def test_optimizer_order_is_kept(package, tmp_path):
    _, model = package
    optimizer = torch.optim.SGD([{"params": [model.fc.bias]}, {"params": [model.fc.weight]}], lr=0.1)
    path = automatch.save_snapshot(model, tmp_path / "c.pt", optimizers=[optimizer])
    assert automatch.read_snapshot(path).optimizers == (("fc.bias", "fc.weight"),)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("layout"),
        lambda raw: raw.update(layout=raw["layout"][:-8]),
        lambda raw: raw.update(version=99),
        lambda raw: raw.update(sources="not base64!"),
        lambda raw: raw.update(golden={"content": "AAAA", "tensors": "AAAA"}),
        lambda raw: raw.update(golden={"content": raw["golden"]["content"], "tensors": raw["golden"]["content"]}),
        lambda raw: raw.update(versions=3),
    ],
)
def test_a_tampered_snapshot_is_an_error_and_runs_nothing(package, change):
    _, model = package
    raw = automatch.snapshot(model, sample=torch.ones(2, 3))
    change(raw)
    with pytest.raises(CheckpointError, match="the snapshot in the checkpoint is damaged"):
        automatch.read_snapshot({"automatch_snapshot": raw})


JUNK = [None, -1, 10**400, float("nan"), "", [], [[]], {}, {"tensor": "0"}, {"tuple": 3}, True, "AAAA"]


def tampered(tree: Any, junk: list[Any], data: st.DataObject) -> Any:
    """The tree with something else in one place."""
    if isinstance(tree, dict | list) and tree and data.draw(st.booleans()):
        copy = tree.copy()
        place = data.draw(st.sampled_from(list(copy) if isinstance(copy, dict) else range(len(copy))))
        copy[place] = tampered(copy[place], junk, data)
        return copy
    return data.draw(st.sampled_from(junk))


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_stands_in_a_snapshot_it_is_read_or_damaged(data):
    raw = WHOLE.copy()
    part = data.draw(st.sampled_from(["all", "layout", "golden"]))
    if part == "all":
        raw = tampered(raw, [*JUNK, torch.ones(2), torch.ones(()), b"x", {1: 2}], data)
    elif part == "layout":
        raw["layout"] = packing.pack(tampered(packing.unpack(raw["layout"]), JUNK, data))
    else:
        raw["golden"] = raw["golden"] | {"content": packing.pack(tampered(packing.unpack(raw["golden"]["content"]), JUNK, data))}
    with contextlib.suppress(CheckpointError):
        automatch.read_snapshot({"automatch_snapshot": raw})


def test_the_class_of_a_compiled_model_is_named(package):
    _, model = package
    raw = automatch.snapshot(torch.compile(model, backend="eager"), sample=torch.ones(2, 3))
    read = automatch.read_snapshot({"automatch_snapshot": raw})
    assert read.model == "mine.models.block.Block"
    assert read.spec.keys == ("_orig_mod.fc.weight", "_orig_mod.fc.bias")


def test_a_snapshot_that_wants_to_run_code_is_refused(package, tmp_path):
    _, model = package
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    raw = automatch.snapshot(model)
    raw["layout"] = Evil()
    torch.save({"state_dict": model.state_dict(), "automatch_snapshot": raw}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        automatch.read_snapshot(tmp_path / "evil.pt")
    assert not marker.exists()


def test_a_snapshot_that_swells_is_refused(monkeypatch):
    from automatch import packing

    monkeypatch.setattr(packing, "_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="unpacks to more than"):
        packing.unpack(packing.pack("x" * 2000))
