from __future__ import annotations

import mmap
import os
import pickle
import sys

import pytest
import safetensors.torch
import torch
from handmade import assert_unchanged, mapping_of, snapshot_of
from torch import nn

import automatch
from automatch.atomic import replace_values
from automatch.errors import AutomatchError, CheckpointError, LoadError, MappingError, ModelError
from automatch.mapped import MappedCheckpoint, _in_memory
from automatch.mapping import Match, Option, Question
from automatch.readers._base import SourceFile
from automatch.specs import spec_of_state_dict
from automatch.transforms import Concat, Permute, Slice


class Net(nn.Module):
    """A bit of everything: norm statistics, a tied head, a plain, a derived and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("codes", torch.randn(3))
        self.register_buffer("position_ids", torch.arange(4))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


KEYS = {
    "embed.weight": "e.w",
    "conv.weight": "c.w",
    "conv.bias": "c.b",
    "norm.weight": "n.w",
    "norm.bias": "n.b",
    "norm.running_mean": "n.rm",
    "norm.running_var": "n.rv",
    "codes": "codebook",
}


@pytest.fixture
def ckpt() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = Net().state_dict()
    return {source: torch.rand_like(state[target]) for target, source in KEYS.items()} | {"loss.weight": torch.ones(2)}


@pytest.fixture
def model() -> Net:
    torch.manual_seed(2)
    return Net()


def test_everything_is_loaded_and_reported(model, ckpt):
    identities = {key: id(tensor) for key, tensor in model.named_parameters()}
    scratch = model.scratch.clone()
    report = automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, KEYS))
    for target, source in KEYS.items():
        assert torch.equal(model.state_dict()[target], ckpt[source]), target
    assert model.head.weight is model.embed.weight
    assert {key: id(tensor) for key, tensor in model.named_parameters()} == identities
    assert torch.equal(model.scratch, scratch)
    assert report[:2] == (("position_ids",), ("loss.weight",))
    assert set(report.loaded) == {*KEYS, "head.weight"}
    assert (report.converted, report.withheld, report.adapted, report.to_train) == ((), (), {}, ())
    assert repr(report) == "LoadReport(9 of 11 model keys loaded, 1 missing, 1 unexpected, 1 warnings)"
    assert "position_ids" in report.warnings[0]


def test_proposing_included(ckpt):
    torch.manual_seed(3)
    old, new = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    report = automatch.load(new, {"state_dict": {f"module.{key}": value for key, value in old.state_dict().items()}}, threshold=0.5)
    assert torch.equal(new(torch.eye(3)), old(torch.eye(3)))
    assert report.missing_keys == report.unexpected_keys == ()


def test_tied_parameter_may_be_fed_under_either_key(model, ckpt):
    feeds = KEYS | {"head.weight": "e.w"}
    del feeds["embed.weight"]
    automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, feeds))
    assert torch.equal(model.embed.weight, ckpt["e.w"])
    assert model.head.weight is model.embed.weight


def test_tied_keys_with_different_values_are_refused(model, ckpt):
    ckpt["h.w"] = ckpt["e.w"].clone()
    mapping = mapping_of(model, ckpt, KEYS | {"head.weight": "h.w"})
    automatch.load(model, ckpt, mapping=mapping)
    ckpt["h.w"] += 1
    before = snapshot_of(model)
    with pytest.raises(LoadError, match=r"'embed.weight' and 'head.weight' are one tensor.*pins=\{'head.weight': None\}"):
        automatch.load(model, ckpt, mapping=mapping)
    assert_unchanged(model, before)
    automatch.load(model, ckpt, mapping=mapping, pins={"head.weight": None})


@pytest.mark.parametrize("gone", ["conv.bias", "norm.running_mean", "codes", "embed.weight"])
def test_strict_names_what_would_stay_at_its_initial_value(model, ckpt, gone):
    mapping = mapping_of(model, ckpt, {key: value for key, value in KEYS.items() if key != gone})
    before = snapshot_of(model)
    with pytest.raises(LoadError, match=rf"1 of 11 tensors.*\n  '{gone}': nothing in the checkpoint feeds it\n.*strict=False") as error:
        automatch.load(model, ckpt, mapping=mapping)
    assert "conv.weight" not in str(error.value)
    assert_unchanged(model, before)
    report = automatch.load(model, ckpt, mapping=mapping, strict=False)
    assert gone in report.missing_keys
    assert torch.equal(dict(model.named_parameters())["norm.weight"], ckpt["n.w"])
    report = automatch.load(model, ckpt, mapping=mapping, pins={gone: None})
    assert gone in report.missing_keys


def test_to_train_goes_into_an_optimizer_group(model, ckpt):
    feeds = {key: value for key, value in KEYS.items() if not key.startswith("conv")}
    report = automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, feeds), strict=False)
    assert report.to_train_keys == ("conv.weight", "conv.bias")
    torch.optim.SGD([{"params": report.to_train, "lr": 0.1}])
    assert report.to_train[0] is model.conv.weight


def test_unsure_matches_are_withheld_unless_decided(model, ckpt):
    mapping = mapping_of(model, ckpt, KEYS)
    shaky = mapping_of(model, ckpt, {"conv.bias": "c.b", "conv.weight": "c.w"}, confidence=0.6).matches
    mapping = mapping.with_matches([m for m in mapping.matches if not m.target.startswith("conv.")] + list(shaky))
    before = snapshot_of(model)
    with pytest.raises(
        LoadError, match=r"'conv.bias': withheld, best is 'c.b' with confidence 0.60 < 0.95; accept with pins=\{'conv.bias': 'c.b'\}"
    ):
        automatch.load(model, ckpt, mapping=mapping)
    assert_unchanged(model, before)
    report = automatch.load(model, ckpt, mapping=mapping, strict=False)
    assert report.withheld == ("conv.weight", "conv.bias")
    assert "conv.weight" in report.mapping
    assert "conv.weight" not in report.applied
    report = automatch.load(model, ckpt, mapping=mapping, pins={"conv.bias": "c.b", "conv.weight": "c.w"})
    assert report.withheld == ()
    assert automatch.load(model, ckpt, mapping=mapping, threshold=0.5).withheld == ()


def test_an_open_question_about_needed_keys_is_named_and_can_be_answered(model, ckpt):
    straight = (Match("norm.weight", ("n.w",)), Match("norm.bias", ("n.b",)))
    crossed = (Match("norm.weight", ("n.b",)), Match("norm.bias", ("n.w",)))
    question = Question("q1", "which is the scale?", (Option("n.w", straight), Option("n.b", crossed)), ("norm.weight", "norm.bias"))
    mapping = mapping_of(model, ckpt, KEYS, questions=(question,))
    before = snapshot_of(model)
    with pytest.raises(
        LoadError, match=r"question q1 \('norm.weight', 'norm.bias'\): which is the scale\? \[0: n.w; 1: n.b\].*answer\('q1', 0\)"
    ):
        automatch.load(model, ckpt, mapping=mapping)
    assert_unchanged(model, before)
    automatch.load(model, ckpt, mapping=mapping.answer("q1", "n.b"))
    assert torch.equal(model.norm.weight, ckpt["n.b"])


def test_transforms_are_applied_and_listed(ckpt):
    source = {"qkv": torch.randn(6, 3), "a": torch.randn(1, 3), "b": torch.randn(1, 3)}
    model = nn.ModuleDict({"q": nn.Linear(3, 2, bias=False), "ab": nn.Linear(3, 2, bias=False)})
    mapping = mapping_of(model, source, {"q.weight": ("qkv", Slice(0, 2, 2)), "ab.weight": (("a", "b"), Concat(0))})
    report = automatch.load(model, source, mapping=mapping)
    assert report.converted == ("q.weight", "ab.weight")
    assert torch.equal(model["q"].weight, source["qkv"][2:4])
    assert torch.equal(model["ab"].weight, torch.cat([source["a"], source["b"]]))


def test_dtype_of_the_model_is_kept(ckpt):
    model = Net().to(torch.bfloat16)
    mapping = mapping_of(Net(), ckpt, KEYS)  # made for the model before it was converted
    report = automatch.load(model, ckpt, mapping=mapping)
    assert model.conv.weight.dtype is torch.bfloat16
    assert torch.equal(model.conv.weight, ckpt["c.w"].bfloat16())
    assert "8 tensors are rounded from float32 to the model's bfloat16" in report.warnings


def test_integers_are_not_cast_into_parameters(model, ckpt):
    ckpt["c.w"] = torch.ones(4, 4, 1, dtype=torch.uint8)
    before = snapshot_of(model)
    with pytest.raises(LoadError, match=r"dtype mismatch for 'conv.weight': checkpoint uint8, model float32.*quantised"):
        automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, KEYS))
    assert_unchanged(model, before)


@pytest.mark.parametrize("given", ["dict", "file"])
def test_models_on_the_meta_device_take_the_tensors_over(ckpt, given, tmp_path):
    with torch.device("meta"):
        model = Net().half()
    torch.save(ckpt, tmp_path / "c.pt")
    report = automatch.load(model, ckpt if given == "dict" else tmp_path / "c.pt", mapping=mapping_of(model, ckpt, KEYS))
    assert torch.equal(model.conv.weight, ckpt["c.w"].half())
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, nn.Parameter)
    assert not model.embed.weight.is_meta
    assert any("'position_ids', 'scratch'" in text and "meta device" in text for text in report.warnings)


def test_taken_over_tensors_do_not_share_memory():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)})
    source = {"w": torch.randn(2, 3)}
    automatch.load(model, source, mapping=mapping_of(model, source, {"a.weight": "w", "b.weight": "w"}))
    with torch.no_grad():
        model["a"].weight.zero_()
    assert model["b"].weight.abs().sum() > 0


def test_frozen_parameters_stay_frozen(model, ckpt):
    model.conv.weight.requires_grad_(False)
    automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, KEYS))
    assert not model.conv.weight.requires_grad
    assert model.conv.bias.requires_grad


def test_the_checkpoint_is_not_changed(model, ckpt):
    before = {key: value.clone() for key, value in ckpt.items()}
    automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, KEYS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(ckpt[key], value) for key, value in before.items())


class Refusing(nn.Linear):
    """Writes in place, then fails, as a hook of somebody's model may."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.weight.data.fill_(7)
        raise ValueError("no, thank you")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_that_fails_midway_leaves_the_model_as_it_was(device):
    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2), nn.Linear(2, 2, device=device))
    source = {key: torch.randn(value.shape) for key, value in model.state_dict().items()}
    before = {key: (id(value), value.clone()) for key, value in model.named_parameters()}
    with pytest.raises(LoadError, match="Sequential refused the tensors and is unchanged: no, thank you"):
        automatch.load(model, source, mapping=mapping_of(model, source, {key: key for key in source}))
    for key, value in model.named_parameters():
        assert id(value) == before[key][0]
        assert value.is_meta or torch.equal(value, before[key][1])


def test_a_write_that_fails_midway_leaves_the_model_as_it_was(model, ckpt, monkeypatch):
    before = snapshot_of(model)
    mapping = mapping_of(model, ckpt, KEYS)
    calls, copy = [], torch.Tensor.copy_

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(LoadError, match="writing the tensors failed, the model is unchanged: out of memory"):
        automatch.load(model, ckpt, mapping=mapping)
    monkeypatch.undo()
    assert len(calls) > 4
    assert_unchanged(model, before)


def test_a_read_that_fails_midway_leaves_the_model_as_it_was(model, ckpt):
    class Broken:
        spec = spec_of_state_dict(ckpt)

        def tensor(self, key):
            if key == "n.b":
                raise OSError("the disk is gone")
            return ckpt[key]

    mapping = mapping_of(model, ckpt, KEYS)
    before = snapshot_of(model)
    with pytest.raises((OSError, AutomatchError), match="the disk is gone"):
        automatch.load(model, Broken(), mapping=mapping)
    assert_unchanged(model, before)


def test_a_buffer_rewritten_by_its_module_and_load_hooks_work_as_in_pytorch():
    class Doubling(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_load_state_dict_post_hook(self.double)

        def double(self, *_):
            self.weight.data.mul_(2)

    source = {"w": torch.ones(2, 2), "b": torch.zeros(2)}
    model = Doubling()
    automatch.load(model, source, mapping=mapping_of(model, source, {"weight": "w", "bias": "b"}))
    assert torch.equal(model.weight, torch.full((2, 2), 2.0))
    assert torch.equal(source["w"], torch.ones(2, 2))


def test_weights_under_parametrization_load_into_their_originals():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    old = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    source = {f"x.{key}": value for key, value in old.state_dict().items()}
    automatch.load(model, source, mapping=mapping_of(model, source, {key[2:]: key for key in source}))
    assert torch.equal(model.weight, old.weight)


def test_a_scripted_model_is_loaded_in_place():
    with pytest.warns(DeprecationWarning, match="jit"):
        model = torch.jit.script(nn.Linear(3, 2))
    source = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
    automatch.load(model, source, mapping=mapping_of(model, source, {"weight": "w", "bias": "b"}))
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 3.0))


def test_mappings_for_other_models_are_refused(model, ckpt, tmp_path):
    mapping = mapping_of(model, ckpt, KEYS)
    other = nn.Linear(4, 4)
    before = snapshot_of(other)
    with pytest.raises(MappingError, match=r"made for another model: Net with 11 keys, not Linear with 2 keys"):
        automatch.load(other, ckpt, mapping=mapping)
    assert_unchanged(other, before)
    automatch.load(model, ckpt, mapping=mapping.save(tmp_path / "m.json"))
    with pytest.raises(MappingError, match=r"cannot read mapping"):
        automatch.load(model, ckpt, mapping=tmp_path / "gone.json")


def test_only_modules_can_be_loaded_into(ckpt):
    with pytest.raises(ModelError, match=r"needs an nn.Module, got dict; for a state_dict use mapping.apply"):
        automatch.load({}, ckpt)  # type: ignore[arg-type]


def test_meta_checkpoints_have_nothing_to_load(model, ckpt):
    empty = {key: value.to("meta") for key, value in ckpt.items()}
    before = snapshot_of(model)
    with pytest.raises(LoadError, match="is on the meta device and has no values"):
        automatch.load(model, empty, mapping=mapping_of(model, empty, KEYS))
    assert_unchanged(model, before)


def test_loaded_models_still_pickle(model, ckpt):
    automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, KEYS))
    assert torch.equal(pickle.loads(pickle.dumps(model)).codes, ckpt["codebook"])


@pytest.fixture(params=["pt", "safetensors"])
def large(request, tmp_path):
    """A file whose weight is large enough to be mapped, a linear layer to load it into, and the mapping."""
    values = {"w": torch.randn(300, 200), "b": torch.randn(300)}
    path = tmp_path / f"large.{request.param}"
    torch.save(values, path) if request.param == "pt" else safetensors.torch.save_file(values, path)
    return path, values, {"weight": "w", "bias": "b"}


def test_large_tensors_are_read_from_the_files_own_pages(large):
    path, values, feeds = large
    before = path.read_bytes()
    model = nn.Linear(200, 300)
    automatch.load(model, path, mapping=mapping_of(model, path, feeds))
    assert torch.equal(model.weight, values["w"])
    assert torch.equal(model.bias, values["b"])
    with torch.device("meta"):
        taken_over = nn.Linear(200, 300)
    automatch.load(taken_over, path, mapping=mapping_of(taken_over, path, feeds))
    assert torch.equal(taken_over.weight, values["w"])
    with torch.no_grad():
        taken_over.weight.zero_()
    taken_over(torch.ones(1, 200)).sum().backward()
    torch.optim.SGD(taken_over.parameters(), lr=0.1).step()
    assert path.read_bytes() == before


@pytest.mark.parametrize("told", [True, False])
def test_pages_are_brought_in_unless_the_kernel_holds_them(large, monkeypatch, told):
    path, values, feeds = large
    asked = []
    monkeypatch.setattr("automatch.mapped._in_memory", lambda pages, start, length: asked.append((start, length)) or told)
    monkeypatch.setattr("automatch.mapped._POPULATE_READ", -1)  # an advice that the kernel refuses, as an older one does
    model = nn.Linear(200, 300)
    automatch.load(model, path, mapping=mapping_of(model, path, feeds))
    assert torch.equal(model.weight, values["w"])
    assert [start % mmap.PAGESIZE for start, _ in asked] == [0]
    assert asked[0][1] >= values["w"].nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="mincore(2)")
def test_the_kernel_holds_what_was_written_and_not_what_nobody_has_read(tmp_path):
    written, hole = tmp_path / "written", tmp_path / "hole"
    written.write_bytes(b"x" * (1 << 20))
    hole.touch()
    os.truncate(hole, 1 << 20)
    for path, held in ((written, True), (hole, False)):
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        assert _in_memory(pages, 0, len(pages)) is held


def test_a_file_that_changes_while_it_is_loaded_is_refused(large, monkeypatch):
    path, _, feeds = large
    model = nn.Linear(200, 300)
    mapping = mapping_of(model, path, feeds)
    before = snapshot_of(model)
    bring_in = MappedCheckpoint.bring_in

    def changing(self):
        with path.open("ab") as file:
            file.write(b"more")
        bring_in(self)

    monkeypatch.setattr(MappedCheckpoint, "bring_in", changing)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        automatch.load(model, path, mapping=mapping)
    assert_unchanged(model, before)


def test_a_file_that_changes_while_its_values_are_copied_is_said(large, monkeypatch):
    path, _, feeds = large
    model = nn.Linear(200, 300)
    mapping = mapping_of(model, path, feeds)

    def changing(model, state):
        replace_values(model, state)
        with path.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr("automatch.atomic.replace_values", changing)
    with pytest.raises(CheckpointError, match=r"was changed while it was read.*may hold values of both files"):
        automatch.load(model, path, mapping=mapping)


def test_a_model_outlives_its_file(large):
    """One with memory of its own whatever happens to the file; one that took over its pages if the file goes or is replaced."""
    path, values, feeds = large
    model = nn.Linear(200, 300)
    with torch.device("meta"):
        taken_over = nn.Linear(200, 300)
    for one in (model, taken_over):
        automatch.load(one, path, mapping=mapping_of(one, path, feeds))
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    assert torch.equal(taken_over.weight, values["w"])
    path.unlink()
    assert torch.equal(taken_over.weight, values["w"])
    path.write_bytes(b"")
    assert torch.equal(model.weight, values["w"])


def test_a_model_that_is_loaded_from_memory_needs_no_file(large):
    path, values, feeds = large
    state = torch.load(path) if path.suffix == ".pt" else safetensors.torch.load(path.read_bytes())
    with torch.device("meta"):
        model = nn.Linear(200, 300)
    automatch.load(model, state, mapping=mapping_of(model, state, feeds))
    path.write_bytes(b"")
    assert torch.equal(model.weight, values["w"])


def test_a_load_opens_its_file_once(large, monkeypatch):
    path, values, _ = large
    opened = []
    monkeypatch.setattr(SourceFile, "__init__", lambda self, name, real=SourceFile.__init__: (opened.append(name), real(self, name))[1])
    model = nn.ModuleDict({"inner": nn.Linear(200, 300)})
    renamed = {"weight": values["w"], "bias": values["b"]}
    torch.save(renamed, path) if path.suffix == ".pt" else safetensors.torch.save_file(renamed, path)
    automatch.load(model, path)
    assert torch.equal(model["inner"].weight, values["w"])
    assert len(opened) == 1


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale_weight", "scale"])
def test_eight_bit_floats_are_not_loaded_without_their_scales(scale):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state |= {"0.weight": state["0.weight"].to(torch.float8_e4m3fn), f"0.{scale}": torch.ones(1)}
    before = snapshot_of(model)
    mapping = mapping_of(model, state, {key: key for key in model.state_dict()})
    with pytest.raises(LoadError, match=r"'0\.weight' of state_dict is quantised \(8-bit floats with scales.*dequantise"):
        automatch.load(model, state, mapping=mapping)
    assert_unchanged(model, before)
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)  # this one knows what to do with them
    automatch.load(model, state, mapping=mapping_of(model, state, {key: key for key in model.state_dict()}))
    assert torch.equal(model[0].weight.view(torch.uint8), state["0.weight"].view(torch.uint8))


def test_a_buffer_that_cannot_be_written_to_fails_the_load_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("flag", torch.ones(1).expand(3))
    source = {"flag": torch.zeros(3)} | {key: torch.randn_like(value) for key, value in model.state_dict().items() if key != "flag"}
    before = snapshot_of(model)
    with pytest.raises(LoadError, match="the model is unchanged"):
        automatch.load(model, source, mapping=mapping_of(model, source, {key: key for key in source}))
    assert_unchanged(model, before)


def test_pins_upon_a_mapping_keep_or_find_the_transform(ckpt):
    source = {"a": torch.randn(2, 3), "b": torch.randn(2, 3), "t": torch.randn(3, 4), "s": torch.randn(2, 3)}
    model = nn.ParameterDict({"ab": torch.zeros(4, 3), "t": torch.zeros(4, 3), "s": torch.zeros(2, 2, 3)})
    mapping = mapping_of(model, source, {"t": ("t", Permute((1, 0)))}, confidence=0.4)
    automatch.load(model, source, mapping=mapping, pins={"ab": ["a", "b"], "t": "t", "s": ["s", "s"]})
    assert torch.equal(model["ab"], torch.cat([source["a"], source["b"]]))
    assert torch.equal(model["t"], source["t"].T)
    assert torch.equal(model["s"], torch.stack([source["s"]] * 2))
    with pytest.raises(MappingError, match=r"'ab' cannot be made from 'a', 't'"):
        automatch.load(model, source, mapping=mapping, pins={"ab": ["a", "t"], "t": "t", "s": ["s", "s"]})
