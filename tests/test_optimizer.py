from __future__ import annotations

import copy

import pytest
import torch
from handmade import mapping_of
from torch import nn

from automatch import load, remap_optimizer_state
from automatch.errors import MappingError
from automatch.transforms import Concat, Permute, Slice

KINDS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, centered=True),
}


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.q(x) * self.k(x))))


class New(nn.Module):
    """Re-ordered, re-nested, and with q and k fused."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"fc": nn.Linear(4, 2)})
        self.ln = nn.BatchNorm1d(4)
        self.qk = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return self.head["fc"](torch.relu(self.ln(q * k)))


FEEDS = {
    "head.fc.weight": "out.weight",
    "head.fc.bias": "out.bias",
    **{f"ln.{leaf}": f"norm.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    "qk.weight": (("q.weight", "k.weight"), Concat(0)),
    "qk.bias": (("q.bias", "k.bias"), Concat(0)),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(16, 4)
        y = model(x)
        loss = (y - x[:, : y.shape[1]]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_group(model: nn.Module) -> list:
    return list(model.parameters())


def two_groups(model: nn.Module) -> list:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "lr": 3e-3},
    ]


def named_groups(model: nn.Module) -> list:
    return list(model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouping", [one_group, two_groups, named_groups])
def test_training_goes_on_as_if_nothing_had_been_renamed(kind, grouping):
    torch.manual_seed(0)
    old = Old()
    optimizer = KINDS[kind](grouping(old))
    train(old, optimizer, range(5))
    ckpt = {key: value.clone() for key, value in old.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    new = New()
    mapping = mapping_of(new, ckpt, FEEDS)
    new.load_state_dict(mapping.apply(ckpt))
    resumed = KINDS[kind](grouping(new))
    resumed.load_state_dict(remap_optimizer_state(state, mapping, resumed, new))
    goes_on = train(old, optimizer, range(5, 12))
    assert train(new, resumed, range(5, 12)) == pytest.approx(goes_on, rel=2e-5)


def test_without_the_remapping_moments_go_astray():
    # the reason for this module: PyTorch accepts the state, when shapes are not compared, and trains something else
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(old.parameters())
    train(old, optimizer, range(2))
    new = nn.ModuleDict({"second": nn.Linear(4, 4), "first": nn.Linear(4, 4)})
    feeds = {"first.weight": "0.weight", "first.bias": "0.bias", "second.weight": "1.weight", "second.bias": "1.bias"}
    resumed = torch.optim.Adam(new.parameters())
    moved = remap_optimizer_state(optimizer.state_dict(), mapping_of(new, old.state_dict(), feeds), resumed, new)
    moments = {key: moved["state"][i]["exp_avg"] for i, (key, _) in enumerate(new.named_parameters())}
    for key, source in feeds.items():
        assert torch.equal(moments[key], optimizer.state[old.get_parameter(source)]["exp_avg"])


def test_permuted_and_cut_moments():
    source = {"fused": torch.zeros(6, 3), "t": torch.zeros(2, 5)}
    state = {
        "state": {i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(value.shape)} for i, value in enumerate(source.values())},
        "param_groups": [{"lr": 0.5, "params": [0, 1]}],
    }
    model = nn.ParameterDict({"b": torch.zeros(5, 2), "a1": torch.zeros(3, 3), "a2": torch.zeros(3, 3)})
    feeds = {"a1": ("fused", Slice(0, 0, 3)), "a2": ("fused", Slice(0, 3, 3)), "b": ("t", Permute((1, 0)))}
    optimizer = torch.optim.Adam(model.parameters())
    moved = remap_optimizer_state(state, mapping_of(model, source, feeds), optimizer, model)
    by_key = {key: moved["state"][i]["exp_avg"] for i, (key, _) in enumerate(model.named_parameters())}
    assert torch.equal(torch.cat([by_key["a1"], by_key["a2"]]), state["state"][0]["exp_avg"])
    assert torch.equal(by_key["b"], state["state"][1]["exp_avg"].T)
    assert moved["param_groups"][0]["lr"] == 0.5
    assert moved["param_groups"][0]["params"] == [0, 1, 2]


def test_new_parameters_begin_afresh_and_removed_ones_are_left_behind():
    old = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(old.parameters())
    old(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    new = nn.ModuleDict({"fresh": nn.Linear(3, 7), "body": nn.Linear(3, 3)})
    resumed = torch.optim.Adam(new.parameters())
    mapping = mapping_of(new, old.state_dict(), {"body.weight": "0.weight", "body.bias": "0.bias"})
    moved = remap_optimizer_state(optimizer.state_dict(), mapping, resumed, new)
    assert set(moved["state"]) == {2, 3}
    resumed.load_state_dict(moved)
    new["body"](torch.ones(1, 3)).sum().backward()
    new["fresh"](torch.ones(1, 3)).sum().backward()
    resumed.step()


def twins() -> tuple[nn.Module, nn.Module, dict, dict]:
    """Two parameters of one shape, of which the old optimizer held one only."""
    old = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    new = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
    state = {
        "state": {0: {"momentum_buffer": torch.ones(3, 3)}, 1: {"momentum_buffer": torch.zeros(3, 3)}},
        "param_groups": [{"params": [0, 1]}],
    }
    return old, new, state, {"a.weight": "1.weight"}


def test_positions_that_cannot_be_told_apart_are_refused_and_may_be_named():
    old, new, state, feeds = twins()
    optimizer = torch.optim.SGD(new.parameters(), momentum=0.9)
    mapping = mapping_of(new, old.state_dict(), feeds)
    with pytest.raises(MappingError, match=r"group 0 of the saved optimizer.*2 positions for '1.weight'.*names="):
        remap_optimizer_state(state, mapping, optimizer, new)
    moved = remap_optimizer_state(state, mapping, optimizer, new, names=["1.weight", "2.weight"])
    assert torch.equal(moved["state"][0]["momentum_buffer"], torch.ones(3, 3))
    with pytest.raises(MappingError, match="names has 1 keys, the saved optimizer holds 2 parameters"):
        remap_optimizer_state(state, mapping, optimizer, new, names=["1.weight"])


def test_states_that_disagree_are_refused():
    source = {"q": torch.zeros(2, 2), "k": torch.zeros(2, 2)}
    model = nn.ParameterDict({"qk": torch.zeros(4, 2)})
    mapping = mapping_of(model, source, {"qk": (("q", "k"), Concat(0))})
    optimizer = torch.optim.Adam(model.parameters())

    def saved(*entries: dict) -> dict:
        return {"state": dict(enumerate(entries)), "param_groups": [{"params": [0, 1]}]}

    moment = torch.ones(2, 2)
    first, second = ({"step": torch.tensor(step), "exp_avg": moment} for step in (3.0, 4.0))
    with pytest.raises(MappingError, match=r"'qk'.*state 'step' differs \(3.0, 4.0\)"):
        remap_optimizer_state(saved(first, second), mapping, optimizer, model)
    with pytest.raises(MappingError, match="other state for 'k' than for 'q'"):
        remap_optimizer_state(saved({"exp_avg": moment}, {}), mapping, optimizer, model)
    with pytest.raises(MappingError, match="packed"):
        remap_optimizer_state(saved(*[{"exp_avg": moment.to(torch.uint8)}] * 2), mapping, optimizer, model)
    with pytest.raises(MappingError, match="has 2 parameter groups, the new one has 1"):
        remap_optimizer_state({"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}, mapping, optimizer, model)
    with pytest.raises(MappingError, match="no parameter of Linear"):
        remap_optimizer_state(saved({}, {}), mapping, optimizer, nn.Linear(2, 2))


class Tied(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, 3, bias=False))
        getattr(self, names[1]).weight = getattr(self, names[0]).weight
        self.free = nn.Linear(3, 3, bias=False)


def test_moments_of_tied_parameters_follow_under_either_key(tmp_path):
    old, new = Tied(("embed", "head")), Tied(("b", "a"))
    optimizer = torch.optim.Adam(old.parameters())
    sum(p.square().sum() for p in old.parameters()).backward()
    optimizer.step()
    torch.save(old.state_dict(), tmp_path / "c.pt")  # ties are known from the file
    for feeds in ({"a.weight": "head.weight"}, {"b.weight": "embed.weight"}, {"b.weight": "head.weight"}):
        mapping = mapping_of(new, tmp_path / "c.pt", feeds | {"free.weight": "free.weight"})
        moved = remap_optimizer_state(optimizer.state_dict(), mapping, torch.optim.Adam(new.parameters()), new)
        assert torch.equal(moved["state"][0]["exp_avg"], optimizer.state[old.embed.weight]["exp_avg"])
        assert torch.equal(moved["state"][1]["exp_avg"], optimizer.state[old.free.weight]["exp_avg"])


def test_names_under_another_prefix_are_not_taken_for_nothing():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.Adam([(f"module.{key}", value) for key, value in old.named_parameters()])
    mapping = mapping_of(new, old.state_dict(), {"weight": "weight", "bias": "bias"})
    with pytest.raises(MappingError, match=r"names parameters like 'module.weight', none of which the mapping uses; pass names="):
        remap_optimizer_state(optimizer.state_dict(), mapping, torch.optim.Adam(new.parameters()), new)


def renamed_pair(width: int = 2) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    feeds = {"x.weight": "a.weight", "x.bias": "a.bias"}
    return nn.ModuleDict({"a": nn.Linear(2, width)}), nn.ModuleDict({"x": nn.Linear(2, width)}), feeds


def test_groups_in_another_order_are_refused():
    # hyperparameters are kept by the number of a group, so the weight decay of the weights would go to the biases
    old, new, feeds = renamed_pair()

    def grouped(layer: nn.Linear, name: str, order: tuple[str, str], named: bool) -> torch.optim.Optimizer:
        groups = [[(f"{name}.{leaf}", getattr(layer, leaf)) if named else getattr(layer, leaf)] for leaf in order]
        return torch.optim.SGD([{"params": group, "weight_decay": 0.1 * i} for i, group in enumerate(groups)], momentum=0.9)

    mapping = mapping_of(new, old.state_dict(), feeds)
    for named in (True, False):
        optimizer = grouped(old["a"], "a", ("weight", "bias"), named)
        resumed = grouped(new["x"], "x", ("bias", "weight"), named)
        with pytest.raises(MappingError, match=r"group 0 of the new optimizer holds what was in group 1.*'a.bias'.*the old order"):
            remap_optimizer_state(optimizer.state_dict(), mapping, resumed, new, names=None if named else ["a.weight", "a.bias"])


def test_names_that_do_not_fit_the_moments_are_refused():
    old, new, feeds = renamed_pair(width=3)
    optimizer = torch.optim.Adam(old.parameters())
    sum(p.square().sum() for p in old.parameters()).backward()
    optimizer.step()
    mapping = mapping_of(new, old.state_dict(), feeds)
    with pytest.raises(MappingError, match=r"state for 'a.bias' has shape \(3, 2\), the checkpoint's tensor \(3,\); are the names in"):
        remap_optimizer_state(optimizer.state_dict(), mapping, torch.optim.Adam(new.parameters()), new, names=["a.bias", "a.weight"])


def test_a_mapping_for_another_model_moves_nothing():
    old, new, feeds = renamed_pair()
    compiled = torch.compile(new, backend="eager")
    mapping = mapping_of(compiled, old.state_dict(), {f"_orig_mod.{key}": source for key, source in feeds.items()})
    optimizer, resumed = torch.optim.Adam(old.named_parameters()), torch.optim.Adam(new.parameters())
    sum(p.square().sum() for p in old.parameters()).backward()
    optimizer.step()
    with pytest.raises(MappingError, match=r"made for another model.*'_orig_mod.x.weight' is not there"):
        remap_optimizer_state(optimizer.state_dict(), mapping, resumed, new)
    assert set(remap_optimizer_state(optimizer.state_dict(), mapping, resumed, compiled)["state"]) == {0, 1}


def test_factored_moments_follow_renames_and_nothing_else():
    old = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer = torch.optim.Adafactor(old.parameters())
    sum(p.square().sum() for p in old.parameters()).backward()
    optimizer.step()
    renamed = nn.ModuleDict({"y": nn.Linear(3, 3), "x": nn.Linear(3, 3)})
    feeds = {f"{new}.{leaf}": f"{source}.{leaf}" for new, source in ("ya", "xb") for leaf in ("weight", "bias")}
    mapping = mapping_of(renamed, old.state_dict(), feeds)
    moved = remap_optimizer_state(optimizer.state_dict(), mapping, torch.optim.Adafactor(renamed.parameters()), renamed)
    assert torch.equal(moved["state"][2]["row_var"], optimizer.state[old["b"].weight]["row_var"])
    fused = nn.ModuleDict({"ab": nn.Linear(3, 6)})
    mapping = mapping_of(fused, old.state_dict(), {f"ab.{leaf}": ((f"a.{leaf}", f"b.{leaf}"), Concat(0)) for leaf in ("weight", "bias")})
    with pytest.raises(MappingError, match=r"state 'row_var' of 'ab.weight' has shape \(3, 1\), not the parameter's \(3, 3\).*'concat'"):
        remap_optimizer_state(optimizer.state_dict(), mapping, torch.optim.Adafactor(fused.parameters()), fused)


def test_square_factored_moments_of_transformers_do_not_pass_for_vectors():
    old, new, feeds = renamed_pair()
    entry = {"step": 3, "exp_avg_sq_row": torch.ones(2), "exp_avg_sq_col": torch.zeros(2)}
    state = {"state": {0: entry, 1: {"step": 3, "exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": [0, 1]}]}
    moved = remap_optimizer_state(state, mapping_of(new, old.state_dict(), feeds), torch.optim.SGD(new.parameters()), new)
    assert moved["state"] == {0: entry, 1: state["state"][1]}


def test_moments_of_adapted_parameters_begin_afresh():
    old, new = nn.ModuleDict({"a": nn.Linear(2, 2), "out": nn.Linear(2, 3)}), nn.ModuleDict({"out": nn.Linear(2, 5), "a": nn.Linear(2, 2)})
    optimizer = torch.optim.Adam(old.parameters())
    sum(p.square().sum() for p in old.parameters()).backward()
    optimizer.step()
    mapping = mapping_of(new, old.state_dict(), {"a.weight": "a.weight", "a.bias": "a.bias"})
    report = load(new, old.state_dict(), mapping=mapping, adapt={"out.*": "rows"})
    resumed = torch.optim.Adam(new.parameters())
    resumed.load_state_dict(remap_optimizer_state(optimizer.state_dict(), report.applied, resumed, new))
    assert set(resumed.state) == {new["a"].weight, new["a"].bias}
    assert torch.equal(resumed.state[new["a"].weight]["exp_avg"], optimizer.state[old["a"].weight]["exp_avg"])


def test_states_by_name_need_no_positions():
    old, new = nn.Linear(2, 2), nn.ModuleDict({"x": nn.Linear(2, 2)})
    state = {"state": {"weight": {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.1, "params": ["bias", "weight"]}]}
    mapping = mapping_of(new, old.state_dict(), {"x.weight": "weight", "x.bias": "bias"})
    moved = remap_optimizer_state(state, mapping, torch.optim.Adam(new.parameters()), new)
    assert set(moved["state"]) == {0}
