from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from automatch import CheckpointError, open_checkpoint
from automatch.specs import StateSpec, TensorSpec, spec_of_model, spec_of_state_dict


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "ema", "net", "params", "weights_v2", "Modell"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_weights_are_found_under_any_name_and_depth(name, depth):
    model, optimizer = trained()
    content = {"epoch": 3, "optimizer": optimizer.state_dict(), name: model.state_dict(), "best": torch.tensor(0.5)}
    for level in range(depth):
        content = {f"level{level}": content, "other": "text"}
    for like in (None, spec_of_model(model)):
        spec = open_checkpoint(content, like=like).spec
        assert spec.keys == tuple(model.state_dict())
        assert spec.wrapper == (*(f"level{i}" for i in reversed(range(depth))), name)
        assert open_checkpoint(content, wrapper=spec.wrapper).spec.fingerprint == spec.fingerprint


def test_the_set_that_fits_the_model_is_taken_not_the_larger_one():
    content = {"teacher_backbone": net(64).state_dict(), "student": net(4).state_dict(), "head": nn.Linear(9, 9).state_dict()}
    assert open_checkpoint(content, like=spec_of_model(net(4))).spec.wrapper == ("student",)
    assert open_checkpoint(content, like=spec_of_model(net(64))).spec.wrapper == ("teacher_backbone",)
    assert open_checkpoint(content).spec.wrapper == ("teacher_backbone",)


def test_shapes_decide_where_no_key_agrees():
    renamed = {f"x{i}": value for i, value in enumerate(net(4).state_dict().values())}
    content = {"a": net(5).state_dict(), "b": renamed}
    assert open_checkpoint(content, like=spec_of_model(net(4))).spec.wrapper == ("b",)


@pytest.mark.parametrize("ema", ["state_dict_ema", "ema", "model_ema", "swa_model", "averaged"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("with_like", [True, False])
def test_an_average_beside_raw_weights_is_said_and_the_raw_ones_are_taken(ema, first, with_like):
    raw, mean = net(), net()
    pairs = [(ema, mean.state_dict()), ("state_dict", raw.state_dict())]
    content = dict(pairs if first else pairs[::-1])
    spec = open_checkpoint(content, like=spec_of_model(raw) if with_like else None).spec
    assert spec.wrapper == ("state_dict",)
    (note,) = spec.notes
    assert "2 sets of weights" in note
    assert f"wrapper=('{ema}',)" in note
    other = open_checkpoint(content, wrapper=(ema,))
    assert torch.equal(other.tensor("0.weight"), mean.state_dict()["0.weight"])


def test_an_average_alone_is_taken_without_a_word():
    spec = open_checkpoint({"state_dict_ema": net().state_dict()}, like=spec_of_model(net())).spec
    assert (spec.wrapper, spec.notes) == (("state_dict_ema",), ())


@pytest.mark.parametrize("named", [True, False])
def test_an_optimizer_state_is_never_taken_for_the_weights(named):
    model, optimizer = trained()
    state = optimizer.state_dict()
    if named:  # as FSDP and DCP key it: by parameter names
        names = [name for name, _ in model.named_parameters()]
        state = {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": state["param_groups"]}
    with pytest.raises(CheckpointError, match=r"optimizer state .* but no weights"):
        open_checkpoint(state)
    with pytest.raises(CheckpointError, match="optimizer state"):
        open_checkpoint({"optimizer": state, "epoch": 3}, like=spec_of_model(model))
    moments = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="optimizer state"):
        open_checkpoint({"optimizer": {"exp_avg": moments}}, like=spec_of_model(model))
    flat = {f"state.{name}.exp_avg": value for name, value in moments.items()}
    with pytest.raises(CheckpointError, match="optimizer state"):
        open_checkpoint(flat)


def test_weights_kept_as_a_tree_are_joined_by_dots():
    tree = {"params": {"Dense_0": {"kernel": torch.ones(3, 2), "bias": torch.ones(2)}, "Dense_1": {"kernel": torch.ones(2, 2)}}}
    spec = open_checkpoint(tree).spec
    assert spec.keys == ("Dense_0.kernel", "Dense_0.bias", "Dense_1.kernel")
    assert spec.wrapper == ("params", "*")
    assert open_checkpoint(tree, wrapper=spec.wrapper).spec == spec


def test_several_state_dicts_of_one_model_are_joined_when_that_fits():
    model = nn.ModuleDict({"generator": net(4), "critic": net(5)})
    content = {"generator": model["generator"].state_dict(), "critic": model["critic"].state_dict(), "epoch": 1}
    spec = open_checkpoint(content, like=spec_of_model(model)).spec
    assert (spec.wrapper, set(spec.keys)) == (("*",), set(model.state_dict()))
    assert open_checkpoint(content, like=spec_of_model(net(4))).spec.wrapper == ("generator",)


def test_a_wrapper_that_is_not_there_is_an_error_that_lists_those_that_are():
    with pytest.raises(CheckpointError, match=r"no tensors at 'ema'; there are tensors at: 'model'"):
        open_checkpoint({"model": net().state_dict()}, wrapper=("ema",))


def test_lists_and_tuples_are_looked_into():
    assert open_checkpoint((net().state_dict(), 3)).spec.wrapper == ("0",)


def test_arrays_count_and_numpy_scalars_do_not():
    checkpoint = open_checkpoint({"w": np.zeros((2, 3), np.float32), "best": np.float64(0.9)})
    assert checkpoint.spec.tensors == (TensorSpec("w", (2, 3), "float32"),)


def test_tied_weights_are_aliases():
    weight = torch.ones(2, 2)
    spec = open_checkpoint({"model": {"a": weight, "b": weight}}).spec
    assert spec["b"].alias_of == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no tensors, but nothing at all"),
        ({"a": 1, "b": "x"}, r"holds no tensors, but 'a' \(int\), 'b' \(str\)"),
        ({0: torch.zeros(1)}, "key 0 of state_dict is int, not a string"),
        ([1, 2], "is a list, not a mapping"),
        ({"a": nn.LazyLinear(2).weight}, "uninitialised"),
        ({"a\x1b[31m": torch.zeros(1)}, r"'a\\x1b\[31m'.*control characters"),
        ({"\u202eabc": torch.zeros(1)}, "control characters"),
        ({"caf\u00e9": torch.zeros(1), "cafe\u0301": torch.zeros(1)}, "differ only in Unicode form"),
        ({"k" * 5000: torch.zeros(1)}, "5000 characters"),
    ],
)
def test_bad_dicts_are_one_clear_error_each(content, words):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(content)


class Odd:
    dtype, ndim = "float32", 1

    def __init__(self, *shape):
        self.shape = shape


@pytest.mark.parametrize("shape", [(float("nan"),), (-3,), ("x",)])
def test_impossible_shapes_are_an_error(shape):
    with pytest.raises(CheckpointError, match="shape"):
        open_checkpoint({"w": Odd(*shape)})


@pytest.mark.parametrize("thing", [3, None, torch.zeros(2), nn.Linear(2, 2)])
def test_what_is_no_checkpoint_is_named(thing):
    with pytest.raises(CheckpointError, match="is not a checkpoint; pass a path"):
        open_checkpoint(thing)


def test_keys_that_differ_in_case_alone_and_markup_are_kept():
    keys = ("cell.W", "cell.w", "<script>alert(1)</script>")
    assert open_checkpoint({key: torch.zeros(1) for key in keys}).spec.keys == keys


def test_a_spec_passes_through_and_has_no_tensors():
    spec = spec_of_state_dict(net().state_dict())
    checkpoint = open_checkpoint(spec)
    assert checkpoint.spec is spec
    with pytest.raises(CheckpointError, match=r"spec without tensors; pass the checkpoint to read '0\.weight'"):
        checkpoint.tensor("0.weight")


def test_an_open_checkpoint_is_not_closed_by_its_borrower(tmp_path):
    torch.save(net().state_dict(), tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as mine:
        with open_checkpoint(mine) as borrowed:
            assert borrowed.spec is mine.spec
        assert mine.tensor("0.bias").shape == (4,)
    with pytest.raises(CheckpointError, match="is closed"):
        mine.tensor("0.bias")


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp", "Mn")), min_size=1, max_size=8)
leaves = st.one_of(st.integers(), st.none(), st.text(max_size=3), st.builds(lambda n: torch.zeros(n), st.integers(0, 3)))
contents = st.recursive(leaves, lambda inner: st.dictionaries(names | st.integers(), inner, max_size=4) | st.lists(inner, max_size=3))


@given(contents, st.booleans())
def test_any_nesting_gives_a_spec_or_one_of_our_errors(content, with_like):
    like = StateSpec((TensorSpec("a", (1,)), TensorSpec("b", (2,)))) if with_like else None
    try:
        checkpoint = open_checkpoint(content, like=like)
    except CheckpointError:
        return
    again = open_checkpoint(content, wrapper=checkpoint.spec.wrapper)
    assert again.spec.fingerprint == checkpoint.spec.fingerprint
    assert all(tuple(checkpoint.tensor(t.key).shape) == t.shape for t in checkpoint.spec)
